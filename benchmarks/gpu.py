"""Merges and moments of an 8B-shaped model on a GPU, beside what the card can copy and multiply.

    python benchmarks/gpu.py FOLDER [--layers 4] [--hidden 4096] [--device cuda] [--methods task_arithmetic ties ...]

The base is --layers random blocks of Llama 3 8B's shape in bfloat16 with eight adapters of rank 16 on all linears.
Everything runs in one process (engine: local, one worker); seconds are the wall's, of the units alone (between the
first and the last event of their kind), so imports, planning and the first kernel's start are left out.

limits: a copy on the card counts bytes read and written; products are 8192^3. merge: GB of base a second. moments:
tokens a second through the blocks, and the share of the card's float32 product limit that forward and Grams come to.
Learning has its own script: learning.py --device cuda --models llama-8b.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import synthetic
import torch
from stage_cases import write_tokens

import ray_merge
from ray_merge.drive.events import Event

METHODS = ("task_arithmetic", "ties", "knots_ties", "tsv_m")
ROWS, TOKENS, TASKS = 64, 512, 2


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    limits = card_limits(options.device)
    print("\n| limit | |\n|---|---|")
    for name, value in limits.items():
        print(f"| {name} | {value:.1f} |", flush=True)
    base, adapters = synthetic.make(
        options.folder, layers=options.layers, hidden=options.hidden, adapters=8, rank=16
    )
    print("\n| method | units s | base GB/s |\n|---|---|---|")
    n_bytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    for method in options.methods:
        seconds = merge(options, base, adapters, method)
        print(f"| {method} | {seconds:.2f} | {n_bytes / seconds / 1e9:.2f} |", flush=True)
    moments(options, base, limits["float32 product TFLOP/s"])


def card_limits(device: str) -> dict[str, float]:
    """What the card does at best."""
    size = 8192 if device != "cpu" else 1024
    source = torch.randn(size * size, device=device)
    target = torch.empty_like(source)
    host = torch.randn(size * size)
    found = {
        "copy on the card GB/s": 2 * source.nbytes / _seconds(device, lambda: target.copy_(source)) / 1e9,
        "copy to the card GB/s": source.nbytes / _seconds(device, lambda: target.copy_(host)) / 1e9,
    }
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        taken = _seconds(device, lambda a=a, b=b: a @ b)
        found[f"{str(dtype).removeprefix('torch.')} product TFLOP/s"] = 2 * size**3 / taken / 1e12
    return found


def _seconds(device: str, call: Callable[[], Any], rounds: int = 10) -> float:
    """Mean of ten calls after three."""
    synchronise = torch.cuda.synchronize if device != "cpu" else lambda: None
    for _ in range(3):
        call()
    synchronise()
    began = time.perf_counter()
    for _ in range(rounds):
        call()
    synchronise()
    return (time.perf_counter() - began) / rounds


class Marks:
    """When events came, by kind."""

    def __init__(self) -> None:
        self.at: dict[str, list[float]] = {}
        self.began = time.perf_counter()

    def __call__(self, event: Event) -> None:
        """Note one."""
        self.at.setdefault(event.kind, []).append(time.perf_counter())

    def of_units(self) -> float:
        """Seconds from the event before the first unit's end, or the beginning of selection, to the last unit's end."""
        units = self.at["unit"]
        before = [one for marks in self.at.values() for one in marks if one < units[0]]
        return units[-1] - min([*self.at.get("select", [])[:1], max(before, default=self.began)])


def merge(options: argparse.Namespace, base: Path, adapters: dict[str, Path], method: str) -> float:
    """Seconds of the units of one merge, the second of two: the first one warms the files' cache."""
    marks = Marks()
    for _ in range(2):
        output = options.folder / "merged"
        shutil.rmtree(output, ignore_errors=True)
        recipe = {
            "base_model": str(base),
            "output": str(output),
            "adapters": {name: {"path": str(path)} for name, path in adapters.items()},
            "merges": [{"name": "m", "merge_method": method}],
        }
        marks = Marks()
        ray_merge.run(
            recipe,
            engine="local",
            workers=1,
            device=options.device,
            cache_dir=options.folder / "cache",
            progress=marks,
        )
    return marks.of_units()


def moments(options: argparse.Namespace, base: Path, limit: float) -> None:
    """Print the throughput of full Grams at q_proj and v_proj of every block."""
    data = {
        f"t{index}": write_tokens(
            options.folder / "tokens" / f"t{index}.jsonl", index, rows=ROWS, length=TOKENS
        )
        for index in range(TASKS)
    }
    output = options.folder / "moments"
    shutil.rmtree(output, ignore_errors=True)
    recipe = {
        "base_model": str(base),
        "output": str(output),
        "stages": 1,
        "calibration": {"samples": ROWS, "max_length": TOKENS, "batch_size": 16},
        "adapters": {name: {"data": str(path)} for name, path in data.items()},
        "init": {"method": "osrm", "target_modules": ["q_proj", "v_proj"], "output": str(output / "init")},
    }
    marks = Marks()
    ray_merge.calibrate(
        recipe,
        engine="local",
        workers=1,
        device=options.device,
        cache_dir=options.folder / "cache",
        progress=marks,
    )
    seconds, n_tokens = marks.of_units(), TASKS * ROWS * TOKENS
    weights = options.layers * sum(
        rows * columns for rows, columns in synthetic.shapes(options.hidden).values()
    )
    grams = (
        2 * options.layers * options.hidden**2
    )  # q_proj and v_proj read the same inputs, and each has its own
    flops = 2 * (weights + grams) * n_tokens
    print("\n| moments | units s | tokens/s | TFLOP/s | of the float32 limit |\n|---|---|---|---|---|")
    print(
        f"| {options.layers} blocks, {n_tokens} tokens | {seconds:.2f} | {n_tokens / seconds:.0f} | "
        f"{flops / seconds / 1e12:.1f} | {flops / seconds / 1e12 / limit:.2f} |"
    )


if __name__ == "__main__":
    main()
