"""Moments through stages: throughput against plain hooks, memory of one stage, and equality for many model classes.

    python benchmarks/stages.py FOLDER [--tables speed,memory,parity] [--rounds 3] [--smollm2 DIR] [--json FILE]

speed: `ray-merge calibrate` on a synthetic Llama (12 x 1024 by default) with `--tasks` tasks, one stage per core on
Ray, against one process that runs transformers' own forward with plain hooks on the same modules, the same batches in
the same order, torch threads = all cores. Both sum X^T X, the sum and the count of the unmasked rows in float64 (the
peer by one plain product); a second row of the peer sums in float32. Seconds are from the end of the checks (data read,
model built, weights loaded, one input rehearsed) to the last unit, and of the peer's loop alone: starts, imports and
loading are left out on both sides. S stages and T tasks leave T / (T + S - 1) of perfect overlap. Bar: 0.8.

memory: the same on a synthetic bfloat16 Llama of about 3 GB, cut by `--memory`; the highest resident memory of any one
worker, sampled 20 times a second over the whole command. Bar: 1.2 GB.

parity: tiny random models of 9 classes, MiniLM and SmolLM2-135M (--smollm2: the folder that get_smollm2.py printed)
in 3 stages on Ray: relative error of Gram and mean against single-process hooks in float64. Bar: 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import synthetic
import yaml
from stage_cases import FAMILIES, make_family, write_tokens
from watch import watch

TARGETS = ("q_proj", "v_proj")


def recipe_of(
    base: Path, output: Path, data: Mapping[str, Path], targets: Sequence[str], **more: Any
) -> dict[str, Any]:
    """A recipe that needs moments at `targets`, without adapters."""
    return {
        "base_model": str(base),
        "output": str(output),
        "adapters": {name: {"data": str(path)} for name, path in data.items()},
        "init": {"method": "osrm", "target_modules": list(targets), "output": str(output / "init")},
        **more,
    }


def speed(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of ours and the peer's, alternating."""
    base = synthetic.make_base(
        folder / f"llama-{given.layers}x{given.hidden}", layers=given.layers, hidden=given.hidden
    )
    data = {
        f"t{index}": write_tokens(
            folder / "tokens" / f"t{index}.jsonl", index, rows=given.samples, length=128
        )
        for index in range(given.tasks)
    }
    cores = len(os.sched_getaffinity(0))
    found = {"ours": [], "peer": [], "peer32": []}
    for index in range(given.rounds):
        output = folder / f"speed-{index}"
        shutil.rmtree(output, ignore_errors=True)
        calibration = {"samples": given.samples, "max_length": 128, "batch_size": 16}
        document = recipe_of(
            base, output, data, TARGETS, calibration=calibration, stages=given.stages or cores
        )
        (folder / "speed.yaml").write_text(yaml.safe_dump(document))
        found["ours"].append(_units_seconds(folder / "speed.yaml"))
        for name, dtype in (("peer", "float64"), ("peer32", "float32")):
            command = [
                sys.executable,
                str(Path(__file__).with_name("stage_peer.py")),
                str(folder / "speed.yaml"),
                dtype,
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
            made = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment, timeout=3000
            )
            found[name].append(float(made.stdout.split()[-1]))
        print({name: [round(value, 1) for value in values] for name, values in found.items()}, flush=True)
        shutil.rmtree(output, ignore_errors=True)
    ours = median(found["ours"])
    return [
        {
            "table": "speed",
            "peer": name,
            "ours_s": ours,
            "peer_s": median(found[name]),
            "ratio": median(found[name]) / ours,
        }
        for name in ("peer", "peer32")
    ]


def _units_seconds(recipe: Path) -> float:
    """Seconds of the units of one `calibrate` on Ray; in a process of its own, as a user has it."""
    code = (
        "import sys, time, json\n"
        "from ray_merge.moments import calibrate\n"
        "marks = []\n"
        "calibrate(sys.argv[1], engine='ray', progress=lambda event: marks.append((event.kind, time.monotonic())))\n"
        "begun = [at for kind, at in marks if kind == 'check']\n"
        "units = [at for kind, at in marks if kind == 'unit']\n"
        "print(units[-1] - begun[-1])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    made = subprocess.run(
        [sys.executable, "-c", code, str(recipe)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=3000,
    )
    return float(made.stdout.split()[-1])


def memory(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One run over a 3 GB base, from a cold command to its end."""
    base = synthetic.make_base(folder / "llama-31x2048", layers=31, hidden=2048)
    n_bytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    data = {
        f"t{index}": write_tokens(folder / "tokens" / f"m{index}.jsonl", index, rows=32, length=128)
        for index in range(2)
    }
    output = folder / "memory"
    shutil.rmtree(output, ignore_errors=True)
    calibration = {"samples": 32, "max_length": 128, "batch_size": 8}
    (folder / "memory.yaml").write_text(
        yaml.safe_dump(recipe_of(base, output, data, TARGETS, calibration=calibration))
    )
    command = [str(Path(sys.executable).with_name("ray-merge")), "calibrate", str(folder / "memory.yaml")]
    cost = watch([*command, "--memory", given.memory])
    shutil.rmtree(output, ignore_errors=True)
    return [
        {
            "table": "memory",
            "base_gb": n_bytes / 1e9,
            "largest_stage_mb": cost.largest_worker_bytes / 1e6,
            "driver_mb": cost.peak_bytes["driver"] / 1e6,
            "seconds": cost.seconds,
        }
    ]


def parity(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model class."""
    from stage_reference import compare

    from ray_merge.runtime.session import open_session

    rows = []
    with open_session("local"):
        for name in [*FAMILIES, "minilm", *(["smollm2"] if given.smollm2 else [])]:
            base, data, targets = make_family(name, folder / "families", given.smollm2)
            output = folder / "parity" / name
            shutil.rmtree(output, ignore_errors=True)
            calibration = {"samples": 24, "max_length": 64, "batch_size": 8}
            document = recipe_of(base, output, {"one": data}, targets, calibration=calibration, stages=3)
            started = time.monotonic()
            gram, mean, sites, stages = compare(document)
            rows.append(
                {"table": "parity", "model": name, "stages": stages, "sites": sites, "gram": gram, "mean": mean,
                 "seconds": time.monotonic() - started}
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tables", default="speed,memory,parity")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--stages", type=int, default=0, help="of the speed table; default: one per core")
    parser.add_argument("--memory", default="1150MB", help="ceiling of one stage in the memory table")
    parser.add_argument("--smollm2", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    tables = {"speed": speed, "memory": memory, "parity": parity}
    rows = []
    for name in given.tables.split(","):
        rows += tables[name](given.folder.resolve(), given)
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
