"""OSRM on six real tasks: adapters fine-tuned from four starts, merged, and how well each merge keeps them.

    python benchmarks/osrm_suite.py --suite FOLDER [--output DIR] [--seeds 0 1 2] [--extras]
        [--samples 8 32 128] [--tasks 2 3 4 5 6] [--processes 2] [--dry]

OSRM (arXiv 2505.22934) starts LoRA's A in the directions that the other tasks' inputs use least. Its rows have norm 1
and PEFT's about 0.58, and with Adam a longer A means larger updates; so each of its two norms has a control (see INITS
in osrm_tasks.py): `osrm` against `random` and `osrm_peft` against `default` differ in directions alone. For one seed
and task the head, the order of rows and the test rows are the same for every start.

Every training and every merge is a unit of its own; its rows are appended to DIR/<settings>/rows.jsonl as it ends, and
the same call again goes on from there. Lambda is never chosen on other rows: "best" is the best of the grid on the test
rows, the same favour for every start. TIES trims each weight for itself (scope: tensor), density 0.2.
With --samples and --tasks the first seed is measured with so many calibration samples and so many of the tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from osrm_merging import ALWAYS, EXTRAS, merge
from osrm_tables import tables
from osrm_tasks import FROM_DATA, INITS, TASKS, Home, Merging, Settings, Start, Training, prepare
from osrm_training import train

from ray_merge.demo.crew import hands
from ray_merge.demo.suite import base_folder

Unit = Training | Merging


def main() -> None:
    """Run what is missing and print the tables."""
    options = arguments()
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    home = Home(options.output.expanduser() / settings.id, base_folder(), settings)
    prepare(home, options.suite)
    (home.folder / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
    units = plan(options, settings)
    rows = Rows(home.folder / "rows.jsonl")
    missing = [unit for unit in units if unit.key not in rows.keys]
    say(f"{home.folder}: {len(units)} units, {len(missing)} of them missing")
    if not options.dry:
        work(home, missing, rows, options.processes)
    keys = {unit.key for unit in units}
    for text in tables([row for row in rows.read() if row["key"] in keys], settings):
        print(text)


def arguments() -> argparse.Namespace:
    """Command line; every field of Settings is an option."""
    default = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", type=Path, required=True, help="folder with tasks/<task>/{train,test}.parquet")
    add("--output", type=Path, default=Path("~/.cache/ray-merge/osrm_suite"))
    add("--inits", nargs="+", choices=tuple(INITS), default=list(INITS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--extras", action="store_true", help=f"merge by {', '.join(EXTRAS)} too")
    add("--samples", nargs="+", type=int, default=[], dest="sample_counts", metavar="N")
    add("--tasks", nargs="+", type=int, default=[], dest="task_counts", metavar="N")
    add("--processes", type=int, default=hands(2), help="one thread each")
    add("--dry", action="store_true", help="run nothing; print the tables of what is there")
    add("--only", nargs="+", dest="tasks", choices=tuple(TASKS), default=default.tasks, metavar="TASK")
    add("--targets", nargs="+", default=default.targets)
    for name in ("rank", "alpha", "steps", "batch_size", "max_length", "test_rows"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    add("--calibration-samples", type=int, dest="samples", default=default.samples)
    add("--learning-rate", type=float, default=default.learning_rate)
    add("--mode", choices=("covariance", "means"), default=default.mode)
    options = parser.parse_args()
    options.tasks, options.targets = tuple(options.tasks), tuple(options.targets)
    if len(options.tasks) < 2 or any(not 2 <= count <= len(options.tasks) for count in options.task_counts):
        parser.error(f"merges take at least 2 and at most all of the tasks ({len(options.tasks)})")
    return options


def plan(options: argparse.Namespace, settings: Settings) -> list[Unit]:
    """All units in the order they should run, each once; a merge comes behind its adapters."""
    methods = ALWAYS + (EXTRAS if options.extras else ())
    full, first = len(settings.tasks), options.seeds[0]
    cases = [(init, seed, full, settings.samples) for seed in options.seeds for init in options.inits]
    cases += [("osrm", first, full, count) for count in options.sample_counts]
    cases += [
        (init, first, count, settings.samples) for count in options.task_counts for init in options.inits
    ]
    found: dict[str, Unit] = {}
    for init, seed, n_tasks, samples in cases:
        start = Start(init, seed, n_tasks, samples if init in FROM_DATA else 0)
        parts: list[Unit] = [Training(start, task) for task in settings.tasks[:n_tasks]]
        for unit in [*parts, *(Merging(start, method) for method in methods)]:
            found.setdefault(unit.key, unit)
    return list(found.values())


class Rows:
    """The JSON lines of finished units; every line says how many its unit has, and a unit cut short is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        found = list(self._lines())
        lines = Counter(row["key"] for row in found)
        self._rows = [row for row in found if lines[row["key"]] == row["lines"]]
        path.write_text("".join(json.dumps(row) + "\n" for row in self._rows))

    def _lines(self) -> Iterator[dict[str, Any]]:
        for line in self._path.read_text().splitlines() if self._path.is_file() else ():
            try:
                yield json.loads(line)
            except ValueError:
                say(f"{self._path}: a line was cut short; its unit runs again")

    def read(self) -> Sequence[dict[str, Any]]:
        """All rows, in the order they were appended."""
        return self._rows

    @property
    def keys(self) -> set[str]:
        """Of the units that are done."""
        return {row["key"] for row in self._rows}

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """All rows of one unit in one write."""
        with self._path.open("a") as sink:
            sink.write("".join(json.dumps(row) + "\n" for row in rows))
            sink.flush()
            os.fsync(sink.fileno())
        self._rows += rows


def work(home: Home, units: Sequence[Unit], rows: Rows, processes: int) -> None:
    """Run units in spawned processes of one thread; a merge starts as soon as its adapters are there."""
    waiting, running = list(units), dict[Future[tuple[list[dict[str, Any]], float]], Unit]()
    began, total = time.perf_counter(), len(units)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            while len(running) < processes and (unit := next_unit(home, waiting, rows.keys)):
                waiting.remove(unit)
                running[pool.submit(run, home, unit)] = unit
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                found, seconds = future.result()
                told = {"key": unit.key, "lines": len(found), "unit_cpu_seconds": round(seconds, 1)}
                rows.append([{**told, **row} for row in found])
                left = len(waiting) + len(running)
                minutes = (time.perf_counter() - began) / 60
                say(f"{minutes:6.1f} min  {total - left}/{total}  {unit.key}  {seconds:.1f} s of CPU")


def next_unit(home: Home, waiting: Sequence[Unit], done: set[str]) -> Unit | None:
    """A merge whose adapters are done, else the next training."""
    for unit in waiting:
        if isinstance(unit, Merging):
            names = home.settings.tasks[: unit.start.n_tasks]
            if all(Training(unit.start, name).key in done for name in names):
                return unit
    return next((unit for unit in waiting if isinstance(unit, Training)), None)


def run(home: Home, unit: Unit) -> tuple[list[dict[str, Any]], float]:
    """One unit in this process: its rows and its CPU seconds, which do not depend on what else runs."""
    began = time.process_time()
    if isinstance(unit, Training):
        rows = [{"kind": "training", **train(home, unit)}]
    else:
        rows = [{"kind": "merge", **row} for row in merge(home, unit)]
    return rows, time.process_time() - began


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
