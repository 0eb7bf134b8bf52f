"""ray-merge, `cp`, PEFT and mergekit on one model, in turn and in one call: wall, CPU, memory, bytes, and the bars.

    python benchmarks/merge_speed.py FOLDER [--peer peft=PYTHON] [--peer mergekit=PYTHON] [--pairs 5] [--rows GLOB]
        [--cache cold|warm] [--json FILE]

The model is the synthetic Llama of 1.1 B parameters with 8 adapters of rank 16 on all linears (synthetic.py; needs
2.3 GB, 36 GB free for the rows of 16 merges, 17 GB for mergekit's cache). PEFT runs in this python unless another is
named; mergekit only if one is named, once per method, with its cache kept from one method to the next.

Each row of issue 4's table is one contender of ours and those that it is compared with. All of them take turns: every
round runs each contender once, every second round in the opposite order; a ratio is made within a round and the median
over rounds is printed. Before each run outputs are deleted and the disk is synced; the page cache is warm. With
`--cache cold` (default) each run of ours also finds its own cache empty, and so hashes the base and all adapters.

Ours and `cp` are timed until a `sync` after them has ended; PEFT and mergekit until their process has ended, which
favours them. Whole processes: Python's and Ray's start are in the figures. Bytes read and written are rchar and wchar
of /proc/PID/io of all processes, Ray's daemons left out: the page cache counts, memory maps do not. The base's bytes
and the decoded ones are taken from our receipts where those count them. Memory is the sum of VmRSS without Ray's
daemons (watch.py).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import contenders
import synthetic
from contenders import COPIES, Bench, Run
from speed_rows import QV, ROWS, Row, Runs, wall


def commands(bench: Bench) -> dict[str, list[str]]:
    """Contender -> its command."""
    made = next(iter(bench.adapters.values())).parent
    qv = contenders.only(bench.adapters, made.with_name(f"{made.name}-qv"), QV)
    found = {
        "cp": bench.cp(),
        "cp_16": bench.cp_many(),
        "import": [sys.executable, "-c", contenders.WHAT_OURS_IMPORTS],
        "local": bench.ours("task_arithmetic", "local"),
        "qv": bench.ours("task_arithmetic", "ray", qv, path="qv"),
        **{name: bench.ours(name, "ray") for name in contenders.ENTRIES},
    }
    if "peft" in bench.peers:
        found["peft"] = bench.peft()
    if "mergekit" in bench.peers:
        found |= {f"mergekit_{method}": bench.mergekit(method) for method in ("task_arithmetic", "ties")}
    return found


def measure(bench: Bench, rows: Mapping[str, Row], pairs: int) -> dict[str, list[Run]]:
    """Run every contender that the rows need, in rounds."""
    known = commands(bench)
    for row in rows.values():
        why, peak_bytes = bench.planned(known[row.ours])
        if why is None:
            print(f"{row.ours}: the plan states {peak_bytes / 2**20:.0f} MB per worker", flush=True)
        else:
            print(f"{row.ours} does not run: {why}", flush=True)
            del known[row.ours]
    wanted: dict[str, int] = {}
    for row in rows.values():
        for name in (row.ours, *row.against):
            rounds = 1 if name.startswith("mergekit") else min(pairs, row.rounds or pairs)
            if name in known and row.ours in known:
                wanted[name] = max(wanted.get(name, 0), rounds)
    runs: dict[str, list[Run]] = {name: [] for name in wanted}
    for number in range(max(wanted.values(), default=0)):
        turn = [name for name in known if wanted.get(name, 0) > number]
        for name in turn if number % 2 == 0 else reversed(turn):
            runs[name].append(run_once(bench, name, known[name], number))
    return runs


def run_once(bench: Bench, name: str, command: Sequence[str], number: int) -> Run:
    """One run, said on one line."""
    copies = COPIES if "16" in name else 1
    needed = (copies + 1) * bench.base_bytes
    bench.clean()
    free = shutil.disk_usage(bench.folder).free
    if free < needed:
        raise SystemExit(
            f"{name} writes {needed / 1e9:.1f} GB, but {bench.folder} has {free / 1e9:.1f} GB free"
        )
    run = bench.time(command)
    print(f"  round {number + 1}  {name:26}{wall(name, run):8.1f} s", flush=True)
    return run


def report(bench: Bench, rows: Mapping[str, Row], runs: Runs) -> dict[str, Any]:
    """Print costs and bars; the same as data."""
    print(
        f"\n{'contender':26}{'runs':>5}{'wall s':>9}{'of it sync':>11}{'CPU s':>8}{'daemons':>9}{'peak MB':>9}"
        f"{'read GB':>9}{'written GB':>11}{'output GB':>10}"
    )
    costs = {name: summary(name, found) for name, found in runs.items() if found}
    for name, cost in costs.items():
        print(
            f"{name:26}{cost['runs']:5}{cost['wall_s']:9.2f}{cost['sync_s']:11.2f}{cost['cpu_s']:8.1f}"
            f"{cost['daemon_cpu_s']:9.1f}{cost['peak_bytes'] / 2**20:9.0f}{cost['read_bytes'] / 1e9:9.2f}"
            f"{cost['written_bytes'] / 1e9:11.2f}{cost['out_bytes'] / 1e9:10.2f}"
        )
    for name, cost in costs.items():
        told = [
            f"{phase} {value:.1f}" for phase, value in cost.get("phases", {}).items() if value is not None
        ]
        if told:
            print(f"{name}: seconds of all workers by phase, as receipts tell: {', '.join(told)}")
    for one, other, expected in SAME_WORK:
        if runs.get(one) and runs.get(other):
            off = bench.difference(runs[one][0].facts["sample"], runs[other][0].facts["sample"])
            print(f"{one} and {other}: updates differ by {off:.1e}, {expected} are expected")
    print(f"\n{'row':24}{'bar':44}{'limit':>8}{'measured':>10}")
    judged = []
    for name, row in rows.items():
        for bar in row.bars:
            value = bar.value(bench, {key: found for key, found in runs.items() if found})
            verdict = "not measured" if value is None else "PASS" if value <= bar.limit else "MISS"
            shown = "-" if value is None else f"{value:.3f}"
            print(f"{name:24}{bar.text:44}{bar.limit:8.3f}{shown:>10}  {verdict}")
            judged.append(
                {"row": name, "bar": bar.text, "limit": bar.limit, "value": value, "verdict": verdict}
            )
    return {"costs": costs, "bars": judged}


SAME_WORK = (
    ("task_arithmetic", "local", "0"),
    ("local", "peft", "0.01 to 0.03 (one is rounded to bfloat16 before it is added)"),
    ("task_arithmetic", "mergekit_task_arithmetic", "0.02 to 0.03 (deltas of checkpoints in bfloat16)"),
    ("ties_tensor", "mergekit_ties", "0.1 to 0.2 (the same, which moves what is trimmed)"),
)
"""Contenders whose weights must agree, or the comparison is none; and how far apart rounding puts them."""


def summary(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Medians over the runs, the highest peak, and the single walls."""

    def median(of: Callable[[Run], float]) -> float:
        return statistics.median(map(of, runs))

    return {
        "runs": len(runs),
        "wall_s": median(lambda run: wall(name, run)),
        "walls_s": [wall(name, run) for run in runs],
        "sync_s": median(lambda run: run.sync_seconds),
        "cpu_s": median(lambda run: run.cost.cpu_seconds),
        "daemon_cpu_s": median(lambda run: run.cost.daemon_cpu_seconds),
        "peak_bytes": max(run.cost.peak_bytes["total"] for run in runs),
        "read_bytes": median(lambda run: run.cost.moved.read),
        "written_bytes": median(lambda run: run.cost.moved.written),
        **{key: value for key, value in runs[0].facts.items() if key != "sample"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", default="*", metavar="GLOB", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold")
    parser.add_argument("--json", type=Path, metavar="FILE")
    synthetic.add_options(parser)
    given = parser.parse_args()
    rows = {name: row for name, row in ROWS.items() if fnmatch.fnmatchcase(name, given.rows)}
    if not rows:
        parser.error(f"no row matches {given.rows!r}; there are {', '.join(ROWS)}")
    peers = {"peft": sys.executable} | dict(peer.split("=", 1) for peer in given.peer)
    versions = {name: contenders.version(python, name) for name, python in peers.items()}
    bench = contenders.make(given.folder, given, peers, cold=given.cache == "cold")
    print(f"base {bench.base_bytes / 1e9:.2f} GB, {given.adapters} adapters of rank {given.rank}, {versions}")
    started = time.monotonic()
    shutil.rmtree(bench.folder / "mergekit-cache", ignore_errors=True)
    try:
        runs = measure(bench, rows, given.pairs)
        document = report(bench, rows, runs)
    finally:
        bench.clean()
        shutil.rmtree(bench.folder / "mergekit-cache", ignore_errors=True)
    if given.json:
        settings = {key: str(value) for key, value in vars(given).items()}
        head = {"settings": settings, "versions": versions, "seconds": time.monotonic() - started}
        given.json.write_text(json.dumps({**head, **document}, indent=1))


if __name__ == "__main__":
    main()
