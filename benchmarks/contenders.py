"""What merge_speed.py runs in turn: ray-merge, `cp`, PEFT and mergekit on the same base and adapters.

Owns: the commands and their inputs, deleting outputs, and what can be read off an output. Never judges a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import synthetic
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from watch import Cost, watch

HERE = Path(__file__).parent
LAMBDA = 0.4
TENSOR = {"density": 0.2, "lambda": LAMBDA, "scope": "tensor"}
COPIES = 16

ENTRIES: Mapping[str, Sequence[dict[str, Any]]] = {
    "task_arithmetic": [{"name": "m", "merge_method": "task_arithmetic", "parameters": {"lambda": LAMBDA}}],
    "ties_tensor": [{"name": "m", "merge_method": "ties", "parameters": TENSOR}],
    "ties_model": [{"name": "m", "merge_method": "ties", "parameters": {**TENSOR, "scope": "model"}}],
    "ties_core": [{"name": "m", "merge_method": "ties", "parameters": {**TENSOR, "space": "core"}}],
    "knots_ties": [{"name": "m", "merge_method": "knots_ties", "parameters": TENSOR}],
    "merges_16": [
        {
            "name": "m",
            "merge_method": "task_arithmetic",
            "sweep": {"lambda": [round(0.1 + 0.05 * i, 2) for i in range(COPIES)]},
        }
    ],
    "merges_16_mixed": [
        {"name": "sum", "merge_method": "task_arithmetic", "sweep": {"lambda": [0.2, 0.4, 0.6, 0.8]}},
        {
            "name": "ties",
            "merge_method": "ties",
            "parameters": {"scope": "tensor"},
            "sweep": {"density": [0.1, 0.2, 0.3]},
        },
        {
            "name": "core",
            "merge_method": "ties",
            "parameters": {"scope": "tensor", "space": "core"},
            "sweep": {"density": [0.1, 0.2, 0.3]},
        },
        {
            "name": "knots",
            "merge_method": "knots_ties",
            "parameters": {"scope": "tensor"},
            "sweep": {"lambda": [0.4, 0.6, 0.8]},
        },
        {"name": "dare", "merge_method": "dare_ties", "sweep": {"density": [0.5, 0.8]}},
        {"name": "mean", "merge_method": "linear"},
    ],
}
"""Recipes by name: the `merges` of each."""

PHASES = ("read", "merge", "write", "upload")
"""What our receipts tell seconds of."""

WHAT_OURS_IMPORTS = "import torch, ray_merge.api, ray_merge.work.worker"
"""What one process has loaded when it merges with --engine local."""


@dataclass(frozen=True)
class Run:
    """One timed run of one contender.

    Attributes:
        cost: of the command alone.
        sync_seconds: that `sync` took right after it.
        facts: what could be read off its output.
    """

    cost: Cost
    sync_seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def synced_seconds(self) -> float:
        """Wall until the bytes are on the disk."""
        return self.cost.seconds + self.sync_seconds


@dataclass
class Bench:
    """Base, adapters and outputs below one folder.

    Attributes:
        folder: everything lies here.
        base: the synthetic base.
        adapters: name -> folder, on all linears.
        peers: python of each peer's environment.
        cold: every run of ours gets an empty cache, and so hashes base and adapters.
    """

    folder: Path
    base: Path
    adapters: Mapping[str, Path]
    peers: Mapping[str, str]
    cold: bool

    @property
    def out(self) -> Path:
        """Where every contender writes; emptied before each run."""
        return self.folder / "out"

    @property
    def base_bytes(self) -> int:
        """Of the base's weight files."""
        return sum(file.stat().st_size for file in self.base.glob("*.safetensors"))

    def clean(self) -> None:
        """Remove the outputs and let the disk come to rest."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.cold:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        os.sync()

    def time(self, command: Sequence[str]) -> Run:
        """One run into an empty output, and the sync after it."""
        self.clean()
        cost = watch(command)
        started = time.monotonic()
        os.sync()
        return Run(cost, time.monotonic() - started, self.facts())

    def facts(self) -> dict[str, Any]:
        """Bytes of the output, what its receipts count, and a sample of its weights."""
        written = sum(file.stat().st_size for file in self.out.rglob("*") if file.is_file())
        counted = {
            "decoded_bytes": receipts_count(self.out, "unit_bytes", "decoded"),
            "base_bytes": receipts_count(self.out, "unit_bytes", "read"),
        }
        phases = {key: receipts_count(self.out, "seconds", key) for key in PHASES}
        return {"out_bytes": written, **counted, "phases": phases, "sample": self.sample()}

    def recipe(self, name: str, adapters: Mapping[str, Path], file: str) -> Path:
        """A recipe file of the entries called `name`."""
        path = self.folder / f"{file}.json"
        document = {
            "base_model": str(self.base),
            "base_model_names": ["synthetic/llama"],
            "output": str(self.out),
            "adapters": {key: str(folder) for key, folder in adapters.items()},
            "merges": list(ENTRIES[name]),
        }
        path.write_text(json.dumps(document))
        return path

    def ours(
        self, name: str, engine: str, adapters: Mapping[str, Path] | None = None, path: str = ""
    ) -> list[str]:
        """`ray-merge run` of one of ENTRIES, its recipe in the file `path`."""
        recipe = self.recipe(name, self.adapters if adapters is None else adapters, path or name)
        command = [sys.executable, "-m", "ray_merge", "run", str(recipe), "--engine", engine]
        return [*command, "--cache-dir", str(self.folder / "cache")]

    def planned(self, command: Sequence[str]) -> tuple[str | None, int]:
        """Why `ray-merge plan` refuses the recipe of one of our commands, or the bytes that it states per worker."""
        plan = [*command[:3], "plan", command[4], "--json"]
        done = subprocess.run(plan, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip().rpartition("\n")[2], 0
        return None, int(json.loads(done.stdout)["peak_bytes_per_worker"])

    def cp(self) -> list[str]:
        """`cp -r` of the base."""
        return ["cp", "-r", str(self.base), str(self.out)]

    def cp_many(self) -> list[str]:
        """The base copied COPIES times, one after another."""
        script = 'mkdir "$2"; for i in $(seq "$3"); do cp -r "$1" "$2/$i" || exit 1; done'
        return ["sh", "-c", script, "sh", str(self.base), str(self.out), str(COPIES)]

    def peft(self) -> list[str]:
        """PEFT's cat + merge_and_unload + save_pretrained."""
        script = str(HERE / "peers" / "peft_merge.py")
        adapters = [str(folder) for folder in self.adapters.values()]
        return [self.peers["peft"], script, str(self.base), str(self.out), str(LAMBDA), *adapters]

    def mergekit(self, method: str) -> list[str]:
        """`mergekit-yaml` of base+adapter models; what it makes of them stays in its cache for the next method."""
        parameters: dict[str, Any] = {"weight": 1.0}
        if method == "ties":
            parameters["density"] = TENSOR["density"]
        models = [
            {"model": f"{self.base}+{folder}", "parameters": parameters} for folder in self.adapters.values()
        ]
        config = {
            "merge_method": method,
            "base_model": str(self.base),
            "models": models,
            "parameters": {"lambda": LAMBDA},
            "dtype": "bfloat16",
        }
        path = self.folder / f"mergekit-{method}.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [self.peers["mergekit"], "-m", "mergekit.scripts.run_yaml", str(path), str(self.out)]
        return [*command, "--no-copy-tokenizer", "--lora-merge-cache", str(self.folder / "mergekit-cache")]

    def sample(self) -> dict[str, Tensor]:
        """Two weights of the first checkpoint below the output, to see that contenders do the same work."""
        index = next(iter(sorted(self.out.rglob("*.safetensors"))), None)
        if index is None:
            return {}
        found = {}
        names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")
        for file in sorted(index.parent.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in names if name in tensors.keys()}  # noqa: SIM118
        return found

    def difference(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float | None:
        """Relative difference of two samples' updates of the base, worst tensor; None where nothing is common."""
        base: dict[str, Tensor] = {}
        for file in sorted(self.base.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                base |= {name: tensors.get_tensor(name).double() for name in one if name in tensors.keys()}  # noqa: SIM118
        worst = [
            float(
                (one[name].double() - other[name].double()).norm() / (one[name].double() - base[name]).norm()
            )
            for name in one
            if name in other
        ]
        return max(worst, default=None)


def receipts_count(out: Path, where: str, key: str) -> float | None:
    """The sum over units of what receipts hold under `where` and `key`; None where none does.

    The merges of a group share a unit, and each of their receipts tells what the unit had come to when it was
    written: the largest counts.
    """
    units: dict[str, float] = {}
    for path in out.rglob("ray_merge/receipts/*.json"):
        receipt = json.loads(path.read_text())
        if key in receipt[where]:
            units[receipt["unit"]] = max(units.get(receipt["unit"], 0), receipt[where][key])
    return sum(units.values()) if units else None


def only(adapters: Mapping[str, Path], folder: Path, linears: Sequence[str]) -> dict[str, Path]:
    """The same adapters, on some of their linears alone."""
    made = {}
    for name, source in adapters.items():
        made[name] = folder / name
        if (made[name] / "adapter_config.json").is_file():
            continue
        made[name].mkdir(parents=True, exist_ok=True)
        with safe_open(source / "adapter_model.safetensors", "pt") as tensors:
            kept = [key for key in tensors.keys() if any(linear in key for linear in linears)]  # noqa: SIM118
            save_file(
                {key: tensors.get_tensor(key) for key in kept},
                made[name] / "adapter_model.safetensors",
                metadata={"format": "pt"},
            )
        config = json.loads((source / "adapter_config.json").read_text())
        (made[name] / "adapter_config.json").write_text(
            json.dumps({**config, "target_modules": list(linears)})
        )
    return made


def tensor_bytes(base: Path, chosen: Callable[[str], bool]) -> int:
    """Bytes of the base's tensors whose name is `chosen`."""
    total = 0
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in filter(chosen, tensors.keys()):
                part = tensors.get_slice(name)
                total += torch.Size(part.get_shape()).numel() * 2  # bfloat16
    return total


def import_seconds(python: str) -> float:
    """Wall of a process that imports what ours imports, and does nothing."""
    return watch([python, "-c", WHAT_OURS_IMPORTS]).seconds


def version(python: str, package: str) -> str:
    """Of a package in a peer's environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} has no {package}: {done.stderr.strip().rpartition(chr(10))[2]}")
    return done.stdout.strip()


def make(folder: Path, sizes: argparse.Namespace, peers: Mapping[str, str], *, cold: bool) -> Bench:
    """The synthetic base and its adapters, made once per folder."""
    base, adapters = synthetic.make(
        folder, layers=sizes.layers, hidden=sizes.hidden, adapters=sizes.adapters, rank=sizes.rank
    )
    return Bench(folder, base, adapters, peers, cold)
