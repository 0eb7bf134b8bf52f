"""Real adapters merged by every method: test scores at defaults, and at the best of four settings on validation rows.

    python benchmarks/real_suite.py --suite FOLDER [--tasks ...] [--methods ...] [--without sst2] [--seeds 0 1 2]
        [--output DIR] [--processes 1] [--device cpu] [--budget-minutes N] [--dry]

FOLDER/adapters/<task> are PEFT adapters of one base with their heads, FOLDER/tasks/<task>/{train,val,test}.parquet
their rows: `text`, optional `text_b`, `label` (a float is a regression, scored by Pearson, else a class). Merges are
made by `ray_merge.run`; scores are plain transformers' on the merged checkpoint with each task's own head.

Learned methods see the texts of train.parquet, never a label. Where the suite has a regression, methods by entropy or
agreement run with `without_entropy: include`: its adapter is merged, and its phi learns from the other tasks' losses.
Settings are chosen on the first --val-rows of val.parquet of all tasks, by the mean over them and by that over the
classifications; test rows decide nothing, and a subset of the tasks (--without) takes the same settings.

Every unit appends its row to DIR/rows.jsonl when it ends, and the same call again goes on from there. Units run in the
order of their worth (real_suite_units.py), so a run that is stopped has a table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from real_suite_merging import Home, run_unit
from real_suite_tables import tables
from real_suite_units import Unit, next_units

import ray_merge
from ray_merge.demo.suite import base_folder
from ray_merge.identity import digest


def main() -> None:
    """Run what is missing, as long as the budget lasts, and print the tables."""
    options = arguments()
    output = options.output.expanduser()
    output.mkdir(parents=True, exist_ok=True)
    home = Home(
        suite=str(options.suite),
        base=str(options.base or base_folder()),
        scratch=str(output / "scratch"),
        val_rows=options.val_rows,
        test_rows=options.test_rows,
        max_length=options.max_length,
        device=options.device,
    )
    same_settings(output, home, options)
    rows = Rows(output / "rows.jsonl")
    if not options.dry:
        work(home, options, rows)
    for text in tables(rows.read(), options):
        print(text)


def same_settings(output: Path, home: Home, options: argparse.Namespace) -> None:
    """Refuse to go on in a folder whose rows are of other data, other numbers of rows or other defaults."""
    names = ("suite", "base", "val_rows", "test_rows", "max_length")
    now = {name: getattr(home, name) for name in names} | {"methods": digest(ray_merge.methods())}
    path = output / "settings.json"
    if path.is_file() and (before := json.loads(path.read_text())) != now:
        sys.exit(f"{output} holds rows of {before}, this call has {now}; give another --output")
    if not options.dry:
        path.write_text(json.dumps(now, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", type=Path, required=True)
    add("--base", type=Path, help="default: all-MiniLM-L6-v2 from its package")
    add("--output", type=Path, default=Path("~/.cache/ray-merge/real_suite"))
    add("--tasks", nargs="+", help="default: all of the suite")
    add("--without", nargs="*", default=["sst2"], help="a second table without each of these")
    add("--methods", nargs="+", help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--trial-steps", type=int, default=60, help="of learned methods in a trial, at most 100")
    add("--steps", type=int, help="of learned methods in place of their defaults")
    add("--val-rows", type=int, default=250)
    add("--test-rows", type=int, default=1000, help="of each task, the first ones; 0 for all")
    add("--max-length", type=int, default=128)
    add("--processes", type=int, default=1, help="one thread each")
    add(
        "--device",
        default="cpu",
        help="of learning, merging and scoring; seconds are of the CPU all the same",
    )
    add("--budget-minutes", type=float, default=240.0, help="no unit begins later")
    add("--no-papers", action="store_true", help="leave out `preset: paper`")
    add("--dry", action="store_true", help="run nothing; print the tables of what is there")
    options = parser.parse_args()
    found = sorted(path.name for path in (options.suite / "adapters").iterdir())
    options.tasks = options.tasks or found
    unknown = [name for name in options.tasks if name not in found]
    if unknown or len(options.tasks) < 2:
        parser.error(f"--tasks: {unknown or options.tasks} of {found}; at least two of the suite")
    options.without = [name for name in options.without if name in options.tasks]
    return options


class Rows:
    """One JSON line for each finished unit; a line that was cut short is dropped, and its unit runs again."""

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, list[dict[str, Any]]()
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                self._rows.append(json.loads(line))
            except ValueError:
                say(f"{path}: a line was cut short; its unit runs again")
        path.write_text("".join(json.dumps(row) + "\n" for row in self._rows))

    def read(self) -> list[dict[str, Any]]:
        """All rows, in the order they were appended."""
        return self._rows

    def append(self, row: dict[str, Any]) -> None:
        """One more."""
        with self._path.open("a") as sink:
            sink.write(json.dumps(row) + "\n")
            sink.flush()
            os.fsync(sink.fileno())
        self._rows.append(row)


def work(home: Home, options: argparse.Namespace, rows: Rows) -> None:
    """Run units in spawned processes of one thread, the worthiest first."""
    running: dict[Future[dict[str, Any]], Unit] = {}
    began = time.monotonic()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        while True:
            minutes = (time.monotonic() - began) / 60
            waiting = [one for one in next_units(options, rows.read()) if one not in running.values()]
            while waiting and len(running) < options.processes and minutes < options.budget_minutes:
                unit = waiting.pop(0)
                running[pool.submit(run_unit, home, unit)] = unit
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                rows.append({**future.result(), "key": unit.key})
                row = rows.read()[-1]
                minutes = (time.monotonic() - began) / 60
                failed = f"  FAILED: {row['error']}" if "error" in row else ""
                say(
                    f"{minutes:6.1f} min  {unit.key}  {row['cpu_seconds']:.0f} s of CPU  "
                    f"{len(waiting)}+ to come{failed}"
                )
    left = next_units(options, rows.read())
    if left:
        roles = Counter(f"{unit.method} {unit.role} on {len(unit.tasks)} tasks" for unit in left)
        missing = ", ".join(f"{name} ({count})" for name, count in roles.items())
        say(f"{len(left)} unit(s) are missing; the same call goes on: {missing}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
