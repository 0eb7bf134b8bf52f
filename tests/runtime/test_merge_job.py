"""`jobs/merge.py` through `ray job submit` on a real head: the exit status is the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ray_merge.storage.commit import MANIFEST
from zoo import llama_adapters, tiny_llama

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    tiny_llama(folder / "base")
    document = {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "adapters": llama_adapters(folder / "base", folder / "adapters", 2),
        "merges": [{"name": "m", "merge_method": "ties", "parameters": {"scope": "tensor", "space": "core"}}],
    }
    (folder / "recipe.yaml").write_text(json.dumps(document))
    return folder / "recipe.yaml"


def submit(head, working_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as a user types it; jobs/ travels as the working directory."""
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", head.jobs_url]
    return subprocess.run(
        [*command, "--working-dir", str(working_dir), "--", "python", "merge.py", *words],
        env={**os.environ, **head.environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_submitted_recipe_is_merged_and_a_refused_one_fails(ray_head, recipe, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(recipe.read_text().replace('"ties"', '"tees"'))
    jobs = [(str(recipe), "good", "--workers", "1"), (str(broken), "bad")]
    with ThreadPoolExecutor(len(jobs)) as threads:  # each takes seconds, most of them Ray's
        done, refused = threads.map(
            lambda job: submit(
                ray_head, REPOSITORY / "jobs", job[0], "--cache-dir", str(tmp_path / job[1]), *job[2:]
            ),
            jobs,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (recipe.parent / "out" / "m" / MANIFEST).is_file()
    assert "published" in done.stdout
    assert refused.returncode == 1  # `ray job submit` knows 0 and 1 alone; the job's own code is in its log
    assert "unknown merge method 'tees'" in refused.stdout + refused.stderr
