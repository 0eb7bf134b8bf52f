"""Where unfinished files lie: beside a local output (so that publishing is one hard link), else on the node."""

from __future__ import annotations

from pathlib import Path

from ray_merge.storage.commit import STATE_FOLDER
from ray_merge.storage.store import open_store
from ray_merge.work.job import Job


def scratch_folder(job: Job, merge: str) -> Path:
    """The folder for this run's unfinished files of one merge; made when missing."""
    root = open_store(job.roots[merge]).local_root
    folder = Path(job.scratch) if root is None else root / STATE_FOLDER
    folder = folder / "attempts" / job.attempt
    folder.mkdir(parents=True, exist_ok=True)
    return folder
