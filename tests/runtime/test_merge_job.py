"""`jobs/merge.py` through `ray job submit` on a real head: the exit status is the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ray_head import RayHead, run_head
from ray_merge.storage.commit import MANIFEST
from tiny import write_recipe_files

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]


def submit(head: RayHead, *words: str) -> tuple[int, str]:
    """`ray job submit` as a user types it, its exit code and what it prints; jobs/ travels as the working directory."""
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", head.jobs_url]
    done = subprocess.run(
        [*command, "--working-dir", str(REPOSITORY / "jobs"), "--", "python", "merge.py", *words],
        env={**os.environ, **head.environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def submit_two() -> dict[str, Any]:
    """A good recipe and one that is refused, one after the other on one head."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        document = write_recipe_files(folder)
        document["merges"][0].update(merge_method="ties", parameters={"scope": "tensor", "space": "core"})
        good, bad = folder / "recipe.yaml", folder / "broken.yaml"
        good.write_text(json.dumps(document))
        bad.write_text(json.dumps(document).replace('"ties"', '"tees"'))
        cache = ("--cache-dir", str(folder / "cache"))
        with run_head() as head:
            return {
                "good": submit(head, str(good), *cache, "--workers", "1"),
                "published": (folder / "out" / "m" / MANIFEST).is_file(),
                "bad": submit(head, str(bad), *cache),
            }


@pytest.mark.own_process(work=submit_two)
def test_a_submitted_recipe_is_merged_and_a_refused_one_fails(answer):
    code, printed = answer["good"]
    assert code == 0, printed
    assert answer["published"]
    assert "published" in printed
    code, printed = answer["bad"]
    assert code == 1  # `ray job submit` knows 0 and 1 alone; the job's own code is in its log
    assert "unknown merge method 'tees'" in printed
