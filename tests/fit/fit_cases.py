"""Tiny bases and adapters for the tests of fitting, fitted from headers, and the dense delta of every update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ray_merge.fit import Fitted, fit_adapters
from ray_merge.plan import read_inputs
from ray_merge.recipe import expand, load_recipe
from ray_merge.spec import Adapter, FactorEntry
from ray_merge.storage.adapter import StoredAdapter
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.work.tensors import TensorFile
from tiny import write_adapter, write_base

P = "base_model.model."

DECODER = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 16, "tie_word_embeddings": False, "head_dim": 4,
}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **DECODER}
TIED_LLAMA = {**LLAMA, "tie_word_embeddings": True}
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_layer": 1, "n_head": 2,
    "vocab_size": 16, "n_positions": 8,
}  # fmt: skip
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 8, "d_kv": 4, "d_ff": 12,
    "num_layers": 1, "num_heads": 2, "vocab_size": 16, "relative_attention_num_buckets": 4, "is_encoder_decoder": True,
    "tie_word_embeddings": True,
}  # fmt: skip
UNKNOWN = {"model_type": "of_no_library"}
"""A model class that transformers does not know: only names, prefixes and shapes can prove anything."""

Shapes = Mapping[str, tuple[int, ...]]


def random(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A tensor of normal random numbers for every name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def pair(module: str, rank: int, outputs: int, inputs: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random A and B of one module under PEFT's names."""
    shapes = {f"{P}{module}.lora_A.weight": (rank, inputs), f"{P}{module}.lora_B.weight": (outputs, rank)}
    return random(shapes, seed)


def inputs(
    folder: Path,
    base: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    adapters: Mapping[str, tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]],
    **recipe: Any,
) -> tuple[Any, Checkpoint, dict[str, StoredAdapter]]:
    """Write everything, and read back what fitting takes: the recipe, the base, the stored adapters."""
    write_base(folder / "base", base, config)
    sources = recipe.pop("sources", {})
    for name, (tensors, settings) in adapters.items():
        write_adapter(folder / name, tensors, **settings)
    document = {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "adapters": {name: {"path": str(folder / name), **sources.get(name, {})} for name in adapters},
        "merges": [{"name": "m", "merge_method": "task_arithmetic"}],
        **recipe,
    }
    parsed, source = load_recipe(document)
    return (parsed, *read_inputs(parsed, expand(parsed, source)))


def fit(
    folder: Path,
    base: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any] | None = None,
    *,
    source: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> tuple[Fitted, Adapter]:
    """One adapter called `a`, fitted; `source` are keys behind its path in the recipe."""
    fitted = fit_adapters(
        *inputs(folder, base, config, {"a": (tensors, settings or {})}, sources={"a": source or {}}, **recipe)
    )
    return fitted, fitted.adapters["a"]


def dense(adapter: Adapter, folder: Path) -> dict[str, torch.Tensor]:
    """Site name -> sum of scale * B A in float64, in the layout of the stored weight; no magnitude, no base."""
    files = {False: TensorFile(folder / adapter.file)}
    if adapter.initial is not None:
        files[True] = TensorFile(Path(adapter.initial.url) / adapter.initial.file)
    found = {}
    for name, update in adapter.factors.items():
        assert isinstance(update, FactorEntry), name
        total = None
        for index, product in enumerate(update.products):
            file = files[index >= len(update.products) - update.initial]
            B = file.matrix(product.B).double()
            A = torch.eye(product.rank).double() if product.A is None else file.matrix(product.A).double()
            delta = product.scale * (B @ A)
            total = delta if total is None else total + delta
        found[name] = total
    for file in files.values():
        file.close()
    return found


def refusal(kind: type[Exception], call: Any, *arguments: Any, **keys: Any) -> str:
    """The message of the error that the call must raise."""
    try:
        call(*arguments, **keys)
    except kind as error:
        return str(error)
    raise AssertionError(f"{call.__name__} did not raise {kind.__name__}")
