"""How much faster two Ray workers are than one on merges that are bound by arithmetic, on this machine's cores.

    python benchmarks/two_workers.py FOLDER [--methods tsv_m knots_ties] [--rounds 3] [--layers 12] [--hidden 1024]

One embedded Ray of two CPUs is kept. In every round a merge is run with one worker, with two, in one process without
Ray, and in each of two such processes at once; every second round in the opposite order. Seconds go from the first
unit's begin to the last one's end, so neither the start of Ray and its processes nor planning counts. Receipts tell
the time of units that merge; where thresholds are selected over the whole model first (`knots_ties`), the driver tells
when that begins. `speed-up` is the median over rounds of t(one worker) / t(two workers); the bar is 1.7. `ceiling` is
what the machine allows for this very work: the median of 2 t(one process) / t(two processes, which do it twice).
Cores that are two threads of one, share a cache or serve others too cannot give 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import synthetic

import ray_merge
from ray_merge.drive.events import Event
from ray_merge.runtime.session import open_session

BAR = 1.7


def main() -> None:
    """Print one row for each method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=["tsv_m", "knots_ties"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    base, adapters = synthetic.make(
        options.folder, layers=options.layers, hidden=options.hidden, adapters=8, rank=16
    )
    print(f"load {os.getloadavg()[0]:.1f}\n")
    print("| method | one worker s | two workers s | speed-up (rounds) | ceiling (rounds) | |")
    print("|---|---|---|---|---|---|", flush=True)
    with open_session("local", num_cpus=2):
        for method in options.methods:
            merge = Merge(options.folder, base, adapters, method)
            rounds = [one_round(merge, backwards=turn % 2 == 1) for turn in range(options.rounds)]
            print(row(method, rounds), flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f}")


@dataclass(frozen=True)
class Merge:
    """One merge; a copy of it goes to a process.

    Args:
        folder: for outputs and the cache.
        base: the model's folder.
        adapters: their folders by name.
        method: its merge method.
    """

    folder: Path
    base: Path
    adapters: dict[str, Path]
    method: str

    def run(self, output: Path, engine: Literal["ray", "local"], workers: int) -> None:
        """Merge into `output`."""

        def note(event: Event) -> None:
            if event.kind == "select" and not any(event.units):
                selecting_note(output).write_text(str(time.time()))

        recipe = {
            "base_model": str(self.base),
            "output": str(output),
            "adapters": {name: {"path": str(path)} for name, path in self.adapters.items()},
            "merges": [{"name": "m", "merge_method": self.method}],
            "max_shard_size": "8MB",
        }
        cache = self.folder / "cache"
        ray_merge.run(recipe, engine=engine, workers=workers, cache_dir=cache, progress=note)

    def by_workers(self, n: int) -> float:
        """Seconds of the merge on n workers of Ray."""
        (output,) = self._outputs(1)
        self.run(output, "ray", n)
        return span([output])

    def by_processes(self, n: int) -> float:
        """Seconds of the merge in each of n processes at once, which know nothing of each other."""
        outputs = self._outputs(n)
        context = get_context("spawn")
        processes = [context.Process(target=self.run, args=(output, "local", 1)) for output in outputs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{self.method}: a process that merged without Ray failed; its error is above")
        return span(outputs)

    def _outputs(self, n: int) -> list[Path]:
        outputs = [self.folder / f"merged-{index}" for index in range(n)]
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)
            selecting_note(output).unlink(missing_ok=True)
        return outputs


@dataclass(frozen=True)
class Round:
    """Seconds of one round."""

    one_worker: float
    two_workers: float
    one_process: float
    two_processes: float

    @property
    def speed_up(self) -> float:
        """Of two workers over one."""
        return self.one_worker / self.two_workers

    @property
    def ceiling(self) -> float:
        """Work per second of two processes over that of one."""
        return 2 * self.one_process / self.two_processes


def one_round(merge: Merge, *, backwards: bool) -> Round:
    """All four ways once."""
    ways: dict[str, Callable[[], float]] = {
        "one_worker": lambda: merge.by_workers(1),
        "two_workers": lambda: merge.by_workers(2),
        "one_process": lambda: merge.by_processes(1),
        "two_processes": lambda: merge.by_processes(2),
    }
    order = [*ways][:: -1 if backwards else 1]
    return Round(**{name: ways[name]() for name in order})


def selecting_note(output: Path) -> Path:
    """Where it stands when the selection over the whole model began, seconds since 1970."""
    return output.with_suffix(".selecting")


def span(outputs: Sequence[Path]) -> float:
    """From the first unit's begin to the last unit's end."""
    paths = [path for output in outputs for path in output.glob("**/receipts/*.json")]
    receipts = [json.loads(path.read_text()) for path in paths]
    units = [(one["began"], one["began"] + sum(one["seconds"].values())) for one in receipts if one["began"]]
    selecting = [float(note.read_text()) for note in map(selecting_note, outputs) if note.exists()]
    return max(end for _, end in units) - min([*selecting, *(begin for begin, _ in units)])


def row(method: str, rounds: Sequence[Round]) -> str:
    """One line of the table."""
    seconds = [
        statistics.median(getattr(one, name) for one in rounds) for name in ("one_worker", "two_workers")
    ]
    speed_ups, ceilings = [one.speed_up for one in rounds], [one.ceiling for one in rounds]
    verdict = "held" if statistics.median(speed_ups) >= BAR else "MISSED"
    cells = [method, *(f"{value:.2f}" for value in seconds), spread(speed_ups), spread(ceilings), verdict]
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """The median, and every value in the order of the rounds."""
    return f"{statistics.median(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"


if __name__ == "__main__":
    main()
