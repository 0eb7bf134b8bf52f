"""Files of a public repository, for the parity scripts beside this one: at a commit, into a temporary folder.

Nothing of a peer's code is kept in this repository; it is read from a clone given on the command line.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_merge.spec import Factor


@contextlib.contextmanager
def checked_out(
    repo: Path, commit: str, files: Sequence[str], stubs: Mapping[str, ModuleType] = {}
) -> Iterator[Path]:
    """A temporary folder on `sys.path` with `files` of `repo` at `commit`, and stand-ins for heavy imports."""
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            shown = subprocess.run(
                ["git", "-C", str(repo), "show", f"{commit}:{name}"], check=True, capture_output=True
            )
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(shown.stdout)
        sys.path.insert(0, folder)
        sys.modules.update(stubs)
        try:
            yield Path(folder)
        finally:
            sys.path.remove(folder)
            for name in [*stubs, *(Path(file).stem for file in files)]:
                sys.modules.pop(name, None)


def functions_module(name: str, **functions: Any) -> ModuleType:
    """A module that holds `functions`."""
    module = ModuleType(name)
    for key, function in functions.items():
        setattr(module, key, function)
    return module


def import_peer(name: str) -> Any:
    """A module from the folder that `checked_out` put on the path."""
    return importlib.import_module(name)


def adapters(rows: int, columns: int, rank: int, count: int, seed: int, dtype: torch.dtype) -> list[Factor]:
    """Seeded factors whose deltas have entries of about 1/columns; drawn in float64, alpha / r = 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        Factor((normal(rows, rank) / columns).to(dtype), normal(rank, columns).to(dtype), 1.0)
        for _ in range(count)
    ]


class Seconds(NamedTuple):
    """How long a call took, by the clock and by this process's CPU time (one thread: what a free core would need)."""

    wall: float
    cpu: float

    def times_slower_than(self, other: Seconds) -> str:
        """Both ratios as text."""
        return f"{self.wall / other.wall:.1f} x by the clock, {self.cpu / other.cpu:.1f} x in CPU time"

    def __str__(self) -> str:
        return f"{self.wall:.4f} s (CPU {self.cpu:.4f} s)"


def timed(function: Callable[[], Any]) -> tuple[Any, Seconds]:
    """What `function` returns, and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def best_of(function: Callable[[], Any], repeats: int) -> tuple[Any, Seconds]:
    """The result and the least times of several calls."""
    runs = [timed(function) for _ in range(repeats)]
    return runs[-1][0], Seconds(min(s.wall for _, s in runs), min(s.cpu for _, s in runs))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Frobenius norm of the difference over the peer's norm, in float64."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
