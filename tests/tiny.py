"""Tiny checkpoints and adapters made of bytes alone, and the plan of a recipe over them: no model, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ray_merge.plan import Plan, make_plan, read_inputs
from ray_merge.recipe import expand, load_recipe
from ray_merge.spec import TensorEntry

HIDDEN = 8


def llama_tensors(layers: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Names of a Llama with two square projections per layer; values follow from the order of names."""
    shapes = {"model.embed_tokens.weight": (16, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        for module in ("self_attn.q_proj", "self_attn.v_proj"):
            shapes[f"model.layers.{layer}.{module}.weight"] = (HIDDEN, HIDDEN)
    shapes["lm_head.weight"] = (16, HIDDEN)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_base(
    folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint in one file, with a tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors or llama_tensors()), folder / "model.safetensors", metadata={"format": "pt"})
    plain = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 16}
    given = plain if config is None else dict(config)
    (folder / "config.json").write_text(json.dumps(given))
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder


def factors(module: str, rank: int = 2, rows: int = HIDDEN, columns: int = HIDDEN) -> dict[str, torch.Tensor]:
    """The two saved tensors of one adapted module."""
    prefix = f"base_model.model.{module}.lora_"
    return {f"{prefix}A.weight": torch.ones(rank, columns), f"{prefix}B.weight": torch.ones(rows, rank)}


Q0 = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """An adapter folder; `config` is laid over r = 2, lora_alpha = 4."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(factors(Q0) if tensors is None else tensors), folder / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def tables(rows: int) -> dict[str, torch.Tensor]:
    """What PEFT saves beside an adapter whose vocabulary has that many rows: both embeddings whole."""
    return {
        f"base_model.model.{name}.weight": torch.ones(rows, HIDDEN)
        for name in ("model.embed_tokens", "lm_head")
    }


def write_recipe_files(folder: Path, names: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
    """A base and some adapters in `folder`, and the recipe of one task_arithmetic merge over them."""
    write_base(folder / "base")
    for index, name in enumerate(names):
        write_adapter(folder / name, factors((Q0, V1)[index % 2]))
    return {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "adapters": {name: str(folder / name) for name in names},
        "merges": [{"name": "m", "merge_method": "task_arithmetic"}],
    }


def plan_of(recipe: dict[str, Any]) -> Plan:
    """The plan of a recipe given as a mapping."""
    parsed, source = load_recipe(recipe)
    merges = expand(parsed, source)
    return make_plan(parsed, merges, *read_inputs(parsed, merges))


def entry(name: str, n_bytes: int = 4, dtype: str = "F32") -> TensorEntry:
    """A flat float32 tensor of `n_bytes`, for code that looks at names and sizes only."""
    return TensorEntry(name, dtype, (n_bytes // 4,), "model.safetensors", 0, n_bytes)
