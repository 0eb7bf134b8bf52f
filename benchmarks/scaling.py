"""How a run grows with workers, merges and adapters, on a simulated cluster with a slow store.

    python benchmarks/scaling.py FOLDER [--workers 1,2,4,8] [--merges 1,4,16,64] [--adapters 1,8,64,256]
        [--tables workers,store,merges,adapters] [--rate 1e6] [--latency 0.02] [--store-workers 4] [--json FILE]

It measures SCHEDULING AND OVERLAP, not arithmetic: all workers are Ray actors on this one machine, and each has a line
of its own to the store, so slow that it must use less than 10 % of a core (the measured share is printed, and a row in
which it is more, or in which the machine itself was busy, says so and proves nothing).

The store is a real S3 server (SeaweedFS) behind throttle.py: every worker has its own port with `--rate` bytes per
second each way and `--latency` seconds per request. The model has 64 blocks and at least 64 output shards of
about 0.35 MB. Ray and the workers' processes are started before the clock: on 2 cores 8 of them start one after
another, which no cluster does. The workers share one cache of adapters, as on one node; `--workers-per-node 1`
gives each its own. The driver's line has the latency, but no limit.

t is the time from the first unit to the last merge's manifest; "whole" adds reading headers, hashes, probes and the
pass over the adapters. efficiency = t(1) / (W t(W)); the bar is 0.85. bound = the efficiency that the store's total
bandwidth S allows, t(1) S / (W bytes), bytes being those of the direction that has more; where it is below 1 the bar
is 0.85 of it. Table `store` runs against a store that can feed `--store-workers` workers at their full rate. floor
= bytes of that direction at full rate: perfect overlap, no latency. Bytes are what went through the workers' lines
during the pass over the adapters and the units: base, adapters, outputs, and every HTTP header.

At the default sizes all tables take about 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import slow_cluster
import synthetic
from slow_cluster import Case

from ray_merge.runtime.session import Session, open_session

VOCABULARY = 512
BAR = 0.85
BUSY_WORKER = 0.10  # of a core: above it arithmetic is measured, and not scheduling
BUSY_MACHINE = 0.85  # of all cores
STORE_BYTES = 1.6e9  # tests/s3_server.py allows 8 volumes of 256 MB

Row = Mapping[str, Any]

COLUMNS = (
    ("workers", "workers", "8d"),
    ("merges", "merges", "7d"),
    ("adapters", "adapters", "9d"),
    ("units", "units", "6d"),
    ("seconds", "t s", "8.1f"),
    ("whole_seconds", "whole s", "8.1f"),
    ("down_mb", "down MB", "8.1f"),
    ("up_mb", "up MB", "8.1f"),
    ("requests", "requests", "9d"),
    ("floor_seconds", "floor s", "8.1f"),
    ("worker_cpu_share", "CPU/worker", "11.3f"),
    ("machine_busy_share", "machine", "8.2f"),
)
"""Of every table. floor: the longer of both directions at the line's rate, i.e. perfect overlap and no latency."""


class Tables:
    """Runs cases, each once, and prints what the tables are made of."""

    def __init__(self, base: Path, adapters: Mapping[str, Path], session: Session) -> None:
        self._base, self._adapters, self._session = base, dict(adapters), session
        self._done: dict[Case, dict[str, Any]] = {}

    def row(self, case: Case) -> dict[str, Any]:
        """The figures of a case."""
        if case not in self._done:
            needed = (case.merges + 1) * sum(file.stat().st_size for file in self._base.iterdir())
            if needed > STORE_BYTES:
                raise SystemExit(
                    f"{case.merges} merges need {needed / 1e9:.1f} GB in the store, which holds "
                    f"{STORE_BYTES / 1e9:.1f}; use fewer merges or a smaller --hidden"
                )
            found = slow_cluster.measure(case, self._base, self._adapters, self._session)
            found["down_mb"], found["up_mb"] = found["down"] / 1e6, found["up"] / 1e6
            rate = min(case.workers * case.rate, case.total or float("inf"))
            found["floor_seconds"] = max(found["down"], found["up"]) / rate
            self._done[case] = found
        return dict(self._done[case])

    def workers(self, cases: Sequence[Case], least: int) -> list[dict[str, Any]]:
        """Efficiency against `least` workers of a store without a limit."""
        header("efficiency", "bound", "verdict")
        rows = []
        for case in cases:
            row = self.row(case)
            first = self.row(replace(case, workers=least, total=0.0))
            row["bound"] = store_bound(first, row)
            row["efficiency"] = efficiency(first, row, "seconds")
            row["whole_efficiency"] = efficiency(first, row, "whole_seconds")
            row["verdict"] = verdict(row)
            rows.append(row)
            show(row, f"{row['efficiency']:12.2f}{row['bound']:7.2f}  {row['verdict']}")
        return rows

    def growth(self, cases: Sequence[Case], what: str) -> list[dict[str, Any]]:
        """Seconds and bytes per merge or adapter, against the first case."""
        header("t/first", f"s per {what}")
        rows = []
        for case in cases:
            row, first = self.row(case), self.row(cases[0])
            row["times_first"] = row["seconds"] / first["seconds"]
            row["each_seconds"] = row["seconds"] / vars(case)[what]
            rows.append(row)
            show(row, f"{row['times_first']:12.2f}{row['each_seconds']:7.2f}{warning(row)}")
        return rows


def efficiency(first: Row, row: Row, key: str) -> float:
    """w1 t(w1) / (W t(W)); 1 is perfect."""
    return float(first["workers"] * first[key] / (row["workers"] * row[key]))


def store_bound(first: Row, row: Row) -> float:
    """The efficiency that the store's total bandwidth allows: at best it moves the row's bytes at that rate."""
    if not row["total"]:
        return 1.0
    least = max(row["down"], row["up"]) / row["total"]
    return min(1.0, float(first["workers"] * first["seconds"] / (row["workers"] * least)))


def verdict(row: Row) -> str:
    """Against the bar, or against as much of the store's bound where that is lower."""
    limit = BAR * row["bound"]
    bound = f" (the store is the bound: {row['bound']:.2f})" if row["bound"] < 1 else ""
    return ("PASS" if row["efficiency"] >= limit else "MISS") + bound + warning(row)


def warning(row: Row) -> str:
    """Why a row proves nothing, if so."""
    if row["worker_cpu_share"] > BUSY_WORKER:
        return f"  (proves nothing: a worker used {row['worker_cpu_share']:.0%} of a core; lower --rate)"
    if row["machine_busy_share"] > BUSY_MACHINE:
        return f"  (proves nothing: this machine was {row['machine_busy_share']:.0%} busy)"
    return ""


def header(*more: str) -> None:
    """The first line of a table."""
    words = [f"{word:>{width.split('.')[0].rstrip('df')}}" for _, word, width in COLUMNS]
    print("".join(words) + f"{more[0]:>12}" + "  ".join(["", *more[1:]]), flush=True)


def show(row: Row, more: str) -> None:
    """One line of a table."""
    print("".join(f"{row[key]:{width}}" for key, _, width in COLUMNS) + more, flush=True)


def numbers(text: str) -> list[int]:
    """1,2,4 as a list."""
    return [int(word) for word in text.split(",")]


def run_tables(given: argparse.Namespace, tables: Tables) -> dict[str, Any]:
    """The tables that were asked for, by name."""
    case = Case(1, 1, 8, given.rate, given.latency, per_node=given.workers_per_node)
    workers, most = numbers(given.workers), max(numbers(given.workers))
    wanted, made = given.tables.split(","), {}
    if "workers" in wanted:
        print("\nworkers, a store without a limit of its own")
        made["workers"] = tables.workers([replace(case, workers=count) for count in workers], min(workers))
    if "store" in wanted:
        total = given.store_workers * given.rate
        print(f"\nworkers, a store of {total / 1e6:g} MB/s each way in all")
        limited = [count for count in workers if count >= given.store_workers]
        cases = [replace(case, workers=count, total=total) for count in limited]
        made["store"] = tables.workers(cases, min(workers))
    if "merges" in wanted:
        print(f"\nmerges of one recipe, {most} workers")
        cases = [replace(case, workers=most, merges=count) for count in numbers(given.merges)]
        made["merges"] = tables.growth(cases, "merges")
    if "adapters" in wanted:
        print(f"\nadapters of one merge, {most} workers; the pass over adapters is in `whole`")
        cases = [replace(case, workers=most, adapters=count) for count in numbers(given.adapters)]
        made["adapters"] = tables.growth(cases, "adapters")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tables", default="workers,store,merges,adapters")
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--merges", default="1,4,16,64")
    parser.add_argument("--adapters", default="1,8,64,256")
    parser.add_argument("--rate", type=float, default=5e5, help="bytes per second of a worker, each way")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds per request")
    parser.add_argument("--store-workers", type=float, default=4, help="how many the limited store can feed")
    parser.add_argument("--workers-per-node", type=int, default=64, help="that share one cache of adapters")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    home = given.folder / f"llama-{given.layers}x{given.hidden}-v{VOCABULARY}"
    base = synthetic.make_base(
        home / "base", layers=given.layers, hidden=given.hidden, vocab=VOCABULARY, shards=given.layers
    )
    count = max(8, *numbers(given.adapters))
    adapters = {
        f"a{i}": synthetic.make_adapter(
            home / f"r{given.rank}" / f"a{i}",
            i + 1,
            layers=given.layers,
            hidden=given.hidden,
            rank=given.rank,
        )
        for i in range(count)
    }
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    print(
        "This measures scheduling and overlap, not arithmetic: every worker waits for a slow line to the store."
    )
    print(f"line of a worker: {given.rate / 1e6:g} MB/s each way, {given.latency * 1e3:g} ms per request")
    with open_session("local", num_cpus=max(numbers(given.workers))) as session:
        made = run_tables(given, Tables(base, adapters, session))
    if given.json:
        settings = {key: str(value) for key, value in vars(given).items()}
        given.json.write_text(json.dumps({"settings": settings, "tables": made}, indent=1))


if __name__ == "__main__":
    main()
