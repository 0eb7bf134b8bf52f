"""A night whose recipes, models, results and summary all lie in a bucket."""

from __future__ import annotations

import json
import uuid

import pytest

from ray_merge.cli import _exit_code
from ray_merge.nightly import Night, run_night
from ray_merge.storage.store import open_store
from tiny import write_recipe_files

pytestmark = pytest.mark.s3


def test_recipes_results_and_summary_in_a_bucket(s3, tmp_path):
    document = write_recipe_files(tmp_path / "files")
    url = f"{s3.url}/night-{uuid.uuid4().hex[:8]}"
    store = open_store(url)
    for path in (tmp_path / "files").rglob("*"):
        if path.is_file():
            store.put_if_absent(str(path.relative_to(tmp_path / "files")), path.read_bytes(), {})
    text = json.dumps(document).replace(str(tmp_path / "files"), url).replace("/out", "/recipes/out/{date}")
    store.put_if_absent("recipes/a.yaml", text.encode(), {})

    def night(date):
        return Night(recipes=f"{url}/recipes", date=date, engine="local", workers=1, cache=tmp_path / "cache")

    first = run_night(night("2026-01-30"))
    assert [entry.state for entry in first.entries] == ["complete"]
    again = run_night(night("2026-01-31"))
    assert [entry.state for entry in again.entries] == ["skipped"]
    assert again.entries[0].merges[0].url == f"{url}/recipes/out/2026-01-30/m"
    summaries = [info.path for info in store.list("recipes/summaries")]
    assert [path.rpartition("/")[2] for path in summaries] == [
        f"nightly-2026-01-{day}-1.{kind}" for day in (30, 31) for kind in ("html", "json")
    ]
    assert json.loads(store.read(summaries[1])) == first.document()
    assert _exit_code(["status", f"{url}/recipes/out/2026-01-30"]) == 0
