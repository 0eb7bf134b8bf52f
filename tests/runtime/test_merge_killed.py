"""A merge on real Ray whose workers are killed in mid-file gives the bytes of an undisturbed run."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import ray_merge
from zoo import digests, llama_adapters, tiny_llama

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base", hidden=384)
    adapters = llama_adapters(folder / "base", folder / "adapters", 3)
    merges = [
        {"name": "scale", "merge_method": "task_arithmetic", "sweep": {"lambda": [0.2, 0.4, 0.6, 0.8]}},
        {
            "name": "dare",
            "merge_method": "dare_ties",
            "parameters": {"density": 0.5, "space": "knots"},
            "export": "both",
        },
    ]
    return {"base_model": str(folder / "base"), "adapters": adapters, "merges": merges}


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> dict[str, str]:
    """The local engine's bytes: the same for every engine and any number of workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ray_merge.run({**recipe, "output": str(folder / "out")}, engine="local", cache_dir=folder / "cache")
    return digests(folder / "out")


def writer_of(path: Path) -> int | None:
    """The process that has an unfinished file open."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if any(os.readlink(link) == str(path) for link in (entry / "fd").iterdir()):
                    return int(entry.name)
            except OSError:
                continue
    return None


class Killer(threading.Thread):
    """Kills the writers of the first `count` unfinished files that have some bytes."""

    def __init__(self, output: Path, count: int) -> None:
        super().__init__(daemon=True)
        self.output, self.count = output, count
        self.killed: list[int] = []
        self.finished = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.count and not self.finished.is_set():
            for path in (self.output / ".ray_merge").rglob("*safetensors-*"):
                pid = writer_of(path) if len(self.killed) < self.count and size(path) > 100_000 else None
                if pid is not None and pid not in self.killed:
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append(pid)
            time.sleep(0.001)


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def attempts_of(output: Path) -> dict[str, int]:
    """By unit, as the tables of all merges tell."""
    tables = [pq.read_table(path).to_pylist() for path in output.rglob("timeline.parquet")]
    return {row["unit"]: row["attempts"] for rows in tables for row in rows}


def test_ray_gives_the_bytes_of_the_local_engine(ray_session, recipe, undisturbed, tmp_path):
    result = ray_merge.run(
        {**recipe, "output": str(tmp_path / "out")}, workers=3, cache_dir=tmp_path / "cache"
    )
    assert result.units_run == 5
    assert digests(tmp_path / "out") == undisturbed


def test_workers_killed_in_mid_file_change_no_byte(ray_session, recipe, undisturbed, tmp_path):
    killer = Killer(tmp_path / "out", 2)
    killer.start()
    ray_merge.run({**recipe, "output": str(tmp_path / "out")}, workers=2, cache_dir=tmp_path / "cache")
    killer.finished.set()
    killer.join()
    assert len(killer.killed) == 2
    assert digests(tmp_path / "out") == undisturbed
    assert sum(attempts - 1 for attempts in attempts_of(tmp_path / "out").values()) >= 2
    assert not [path for path in (tmp_path / "out" / ".ray_merge").rglob("*") if path.is_file()]


def test_nan_is_refused_through_ray_before_anything_is_written(ray_session, recipe, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "bad"
    shutil.copytree(recipe["adapters"]["a1"], adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    tensors[first][0, 0] = torch.inf
    save_file(tensors, adapter / "adapter_model.safetensors")
    bad = {**recipe, "adapters": {**recipe["adapters"], "a1": str(adapter)}, "output": str(tmp_path / "out")}
    with pytest.raises(ray_merge.Refusal, match=r"a1.*NaN or Inf"):
        ray_merge.run(bad, workers=2, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "out").exists()
