"""What tara.py and nsc.py learn from: a tiny CLIP vision model, LoRA adapters with text heads, unlabelled images.

Written tensor by tensor from seeds, in the layouts that both sides read: the authors' code by file names and
`torch.load`, ours by a recipe. tests/parity/test_learned_parity.py makes the same school.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ray_merge.calibration import load_batches
from ray_merge.learn.order import Order
from ray_merge.recipe import Calibration, DataSource
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import Stores, open_store

CLASSES = {"stanford_cars": 7, "dtd": 5, "eurosat": 3, "gtsrb": 10}
"""Their code knows tasks by the names of data sets, in this order."""

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
SCALE, EMBEDDING, IMAGE, PATCH = 10.0, 24, 8, 4
INIT, BATCH, RATE, SEED = 0.4, 16, 1e-3, 0
"""Coefficients from 0.4; batch and step size of AdamW; the papers' and their scripts'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class School:
    """Where it lies, and its size.

    Args:
        folder: holds base, adapters, heads and rows.
        tasks: names out of `CLASSES`, in order.
        blocks: of the vision model.
        width: of its hidden states.
        rank: of every adapter.
        multiple: alpha / rank of every adapter.
        n_rows: images of each task.
    """

    folder: Path
    tasks: tuple[str, ...] = tuple(CLASSES)
    blocks: int = 4
    width: int = 32
    rank: int = 4
    multiple: float = 1.0
    n_rows: int = 64

    @classmethod
    def small(cls, folder: Path) -> School:
        """The one of the tests, with `SMALL` for its learning."""
        return cls(folder=folder, tasks=tuple(CLASSES)[:3], blocks=2, n_rows=8)

    @property
    def base(self) -> Path:
        """The vision model; their code asks for `clip` in its name."""
        return self.folder / "clip"

    def adapter(self, task: str) -> Path:
        """The folder of a task's adapter."""
        return self.folder / task

    def data(self, task: str) -> Path:
        """The images of a task, as ours reads them."""
        return self.folder / f"{task}.jsonl"

    def images(self, task: str) -> Tensor:
        """(N, 3, 8, 8) float32, in the order that ours numbers rows."""
        base = read_checkpoint(open_store(str(self.base)))
        calibration = Calibration(samples=10**6, batch_size=1)
        source = DataSource(path=str(self.data(task)))
        rows = load_batches(source, calibration, task, base, Path("unused"), Stores()).batches
        return torch.cat([row.pixel_values for row in rows])

    def batches(self, task: str, steps: int, size: int) -> list[Tensor]:
        """The images of each step."""
        images = self.images(task)
        order = Order(SEED, task, len(images), size)
        return [images[list(order.batch(step))] for step in range(steps)]


SMALL: Mapping[str, Any] = {"steps": 5, "batch_size": 4, "learning_rate": 2e-2}


def make_school(school: School) -> School:
    """Write it."""
    draw = torch.Generator().manual_seed(SEED)
    school.base.mkdir(parents=True)
    (school.base / "config.json").write_text(json.dumps(_config(school)))
    save_file(_weights(school, draw), school.base / "model.safetensors", {"format": "pt"})
    for task in school.tasks:
        _write_adapter(school, task, draw)
        _write_head(school, task, draw)
        shift, spread = torch.randn(3, IMAGE, IMAGE, generator=draw), 1 + torch.rand(1, generator=draw)
        images = shift + spread * torch.randn(school.n_rows, 3, IMAGE, IMAGE, generator=draw)
        rows = ({"pixel_values": [round(value, 3) for value in one.flatten().tolist()]} for one in images)
        school.data(task).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return school


def _config(school: School) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "dtype": "float32",
        "hidden_size": school.width,
        "intermediate_size": 2 * school.width,
        "num_hidden_layers": school.blocks,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "projection_dim": EMBEDDING,
    }


def _weights(school: School, draw: torch.Generator) -> dict[str, Tensor]:
    width, found = school.width, {}

    def normal(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        found[f"vision_model.{name}"] = mean + scale * torch.randn(*shape, generator=draw)

    def norm(name: str) -> None:
        normal(f"{name}.weight", width, scale=0.1, mean=1.0)
        normal(f"{name}.bias", width, scale=0.1)

    def linear(name: str, rows: int, columns: int) -> None:
        normal(f"{name}.weight", rows, columns, scale=columns**-0.5)
        normal(f"{name}.bias", rows, scale=0.1)

    normal("embeddings.class_embedding", width, scale=1.0)
    normal("embeddings.patch_embedding.weight", width, 3, PATCH, PATCH, scale=(3 * PATCH**2) ** -0.5)
    normal("embeddings.position_embedding.weight", (IMAGE // PATCH) ** 2 + 1, width, scale=0.5)
    norm("pre_layrnorm")
    for block in range(school.blocks):
        at = f"encoder.layers.{block}"
        for name in TARGETS:
            linear(f"{at}.self_attn.{name}", width, width)
        linear(f"{at}.mlp.fc1", 2 * width, width)
        linear(f"{at}.mlp.fc2", width, 2 * width)
        norm(f"{at}.layer_norm1")
        norm(f"{at}.layer_norm2")
    norm("post_layernorm")
    found["visual_projection.weight"] = torch.randn(EMBEDDING, width, generator=draw) * width**-0.5
    return found


def _write_adapter(school: School, task: str, draw: torch.Generator) -> None:
    folder, tensors = school.adapter(task), {}
    folder.mkdir()
    for block in range(school.blocks):
        for name in TARGETS:
            at = f"base_model.model.vision_model.encoder.layers.{block}.self_attn.{name}"
            A = torch.randn(school.rank, school.width, generator=draw) * school.width**-0.5
            B = torch.randn(school.width, school.rank, generator=draw) * (2 * school.rank) ** -0.5
            tensors |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B / school.multiple}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": school.rank,
        "lora_alpha": school.multiple * school.rank,
        "target_modules": list(TARGETS),
        "lora_dropout": 0.0,
        "bias": "none",
        "base_model_name_or_path": str(school.base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _write_head(school: School, task: str, draw: torch.Generator) -> None:
    """Texts' embeddings: unit rows for ours, which has a scale beside them; times the scale for theirs."""
    rows = functional.normalize(torch.randn(CLASSES[task], EMBEDDING, generator=draw), dim=-1)
    save_file({"head": rows}, school.folder / f"{task}_head.safetensors")
    torch.save(SCALE * rows, school.folder / f"{task}_head.pt")


def learn(
    school: School, methods: Mapping[str, Mapping[str, Any]], output: str = "ours"
) -> dict[str, dict[str, Tensor]]:
    """Method -> site -> phi, by `ray_merge.run` on this machine, with the settings of the paper.

    Args:
        school: to learn from.
        methods: method -> parameters besides `preset: paper`.
        output: folder in the school's.
    """
    import ray_merge

    where = school.folder / output
    adapters = {
        task: {
            "path": str(school.adapter(task)),
            "data": str(school.data(task)),
            "head": {"path": str(school.folder / f"{task}_head.safetensors"), "logit_scale": SCALE},
        }
        for task in school.tasks
    }
    recipe = {
        "base_model": str(school.base),
        "output": str(where),
        "dtype": "float32",
        "calibration": {"seed": 0},
        "adapters": adapters,
        "merges": [
            {
                "name": method,
                "merge_method": method,
                "adapters": list(school.tasks),
                "parameters": {"preset": "paper", **given},
            }
            for method, given in methods.items()
        ],
    }
    ray_merge.run(recipe, engine="local", cache_dir=school.folder / "cache")
    found = {}
    for method in methods:
        tensors = load_file(where / method / "ray_merge" / "phi.safetensors")
        found[method] = {k.removeprefix("phi."): v for k, v in tensors.items() if k.startswith("phi.")}
    return found


def anchors(school: School) -> dict[str, float]:
    """Task -> the entropy of its adapter alone, as `learn` found it."""
    folder = school.folder / "ours" / ".ray_merge" / "anchors"
    found = {one["task"]: one["value"] for one in (json.loads(path.read_text()) for path in folder.iterdir())}
    return {task: found[task] for task in school.tasks}


def probes(phi: Mapping[str, Tensor]) -> list[float]:
    """Three numbers that any entry moves: |phi - init| of the first site and of all, and a sum that sees the order."""
    moved = [(phi[site].double() - INIT).flatten() for site in sorted(phi)]
    total = torch.cat(moved)
    weights = torch.cos(torch.arange(len(total), dtype=torch.float64))
    return [float(one) for one in (moved[0].norm(), total.norm(), (weights * total).sum())]
