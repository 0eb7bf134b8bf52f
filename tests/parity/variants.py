"""How PEFT trains and saves one adapter: every variant of LoraConfig, with every trainable tensor moved.

`train` returns the live, unmerged PeftModel and leaves the folder exactly as `save_pretrained` writes it. Adapters
that today's PEFT no longer writes (older layouts, per-expert factors) are made from a saved one by `edit`, which
changes names and layout but not what the adapter means, or are written by `write`.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import TinyModel

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors, dict[str, Any]], Tensors]
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How one adapter is made.

    Args:
        options: keyword arguments of LoraConfig, over r = 4, lora_alpha = 6 and the row's `target_modules`.
        resize: vocabulary size to which the model is resized before PEFT wraps it.
        initial: keep the adapter as it was before training in `initial_folder`.
        convert: save with path_initial_model_for_weight_conversion (needs `initial`).
        pickle: save adapter_model.bin in place of safetensors.
        tables: save with save_embedding_layers=True.
        prepare: called with (model, config, inputs) before PEFT wraps the model.
        after: called with (peft model, inputs) right after PEFT wrapped it.
        edit: rewrites names and layout of the saved tensors and their config; the meaning stays.
        write: in place of training: the tensors and config of an adapter for the given model.
        out_of_reach: part of the names of parameters that no gradient reaches, which training leaves as they were.
        live_from_file: the live model is what PEFT loads from the folder, because `edit` rounds.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    resize: int | None = None
    initial: bool = False
    convert: bool = False
    pickle: bool = False
    tables: bool = False
    prepare: Callable[[nn.Module, Any, dict[str, Tensor]], None] | None = None
    after: Callable[[nn.Module, dict[str, Tensor]], None] | None = None
    edit: Edit | None = None
    write: Callable[[nn.Module, int], tuple[Tensors, dict[str, Any]]] | None = None
    out_of_reach: str | None = None
    live_from_file: bool = False


def initial_folder(folder: Path) -> Path:
    """Where an adapter's state before training lies."""
    return folder.parent / f"{folder.name}-initial"


@contextlib.contextmanager
def quiet():
    """PEFT warns about most variants on purpose; rows check numbers instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(tiny: TinyModel, base: Path, folder: Path, variant: Variant, seed: int) -> nn.Module:
    """Wraps the base in PEFT, moves every trainable tensor, saves to `folder`; returns the live model."""
    from peft import LoraConfig, PeftModel, get_peft_model

    with quiet():
        model = tiny.base(base)
        torch.manual_seed(seed)
        if variant.resize is not None:
            model.resize_token_embeddings(variant.resize, mean_resizing=False)
        if variant.write is not None:
            tensors, config = variant.write(model, seed)
            write_folder(folder, tensors, config)
            return PeftModel.from_pretrained(model, folder).eval()
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, **variant.options})
        if variant.prepare is not None:
            variant.prepare(model, config, tiny.inputs())
        live = get_peft_model(model, config)
        # Its README.md takes half of the time of saving.
        live.create_or_update_model_card = lambda _folder: None
        if variant.after is not None:
            variant.after(live, tiny.inputs())
        if variant.initial:
            config_then = live.peft_config["default"].init_lora_weights
            live.save_pretrained(initial_folder(folder))
            live.peft_config["default"].init_lora_weights = config_then
        move(live, seed, variant.out_of_reach)
        initial = str(initial_folder(folder)) if variant.convert else None
        live.save_pretrained(
            folder,
            safe_serialization=not variant.pickle,
            save_embedding_layers=variant.tables or "auto",
            path_initial_model_for_weight_conversion=initial,
        )
        if variant.edit is not None:
            tensors = load_file(folder / WEIGHTS)
            config = json.loads((folder / CONFIG).read_text())
            write_folder(folder, variant.edit(tensors, config), config)
        if variant.live_from_file:
            live = PeftModel.from_pretrained(tiny.base(base), folder)
        return live.eval()


def write_folder(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    """An adapter folder from tensors and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True))


def move(live: nn.Module, seed: int, out_of_reach: str | None) -> None:
    """Random factors, and noise on everything else that PEFT made trainable, in the order of names."""
    generator = torch.Generator().manual_seed(100 + seed)

    def noise(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in sorted(live.named_parameters()):
            if not parameter.requires_grad or (out_of_reach and out_of_reach in name):
                continue
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * noise(parameter))
            elif not parameter.any():  # B of a new adapter; A of a new adapter on an embedding
                parameter.copy_(0.2 * noise(parameter))
            elif ".lora_" in name:
                parameter.add_(0.5 * parameter.std() * noise(parameter))
            else:
                parameter.add_(0.1 * noise(parameter))


# What some initialisations need before or after PEFT wraps the model.


def corda_statistics(model: nn.Module, config: Any, inputs: dict[str, Tensor]) -> None:
    """CorDA decomposes the weights in the directions of these inputs."""
    from peft.tuners.lora.corda import preprocess_corda

    one = {"input_ids": torch.arange(3, 64)[None]}  # its hook takes a batch of one
    preprocess_corda(model, config, run_model=lambda: model(**one))


def lora_ga_gradients(model: nn.Module, config: Any, inputs: dict[str, Tensor]) -> None:
    """LoRA-GA starts from the gradient of these inputs' loss."""
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(
        model, config, train_step=lambda: model(**inputs, labels=inputs["input_ids"]).loss.backward()
    )


def eva_directions(live: nn.Module, inputs: dict[str, Tensor]) -> None:
    """EVA starts from the inputs' singular vectors and moves ranks between modules (rank_pattern)."""
    from peft import initialize_lora_eva_weights

    initialize_lora_eva_weights(live, dataloader=[inputs], show_progress_bar=False)


# Layouts that today's PEFT reads or read once, made from what it writes.


def in_bfloat16(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """An adapter that was saved in half precision."""
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def old_dora_names(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """PEFT 0.9 to 0.11: the magnitude's name ends in `.weight`."""
    suffix = ".lora_magnitude_vector"
    return {name + ".weight" if name.endswith(suffix) else name: tensor for name, tensor in tensors.items()}


def moe_of_peft_0_18(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """PEFT up to 0.18.1 took the parameter [E, d1, d2] as [E, in, out] in every model."""
    return _swap_experts(tensors, config, "0.18.1", transposed=False)


def moe_of_peft_0_19(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """PEFT 0.19.0 swapped in and out exactly where it should not have, so [E, out, in] was read as [E, in, out]."""
    return _swap_experts(tensors, config, "0.19.0", transposed=False)


def moe_of_peft_0_19_transposed(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """PEFT 0.19.0 on a model with `is_transposed` ([E, in, out]): read as [E, out, in]."""
    return _swap_experts(tensors, config, "0.19.0", transposed=True)


def _swap_experts(tensors: Tensors, config: dict[str, Any], version: str, *, transposed: bool) -> Tensors:
    # The delta of one expert is s B_e A_e on (out, in). Read the other way round it is s A_e^T B_e^T: the same matrix
    # when A and B change places, each in its own packing.
    config["peft_version"] = version
    swapped = dict(tensors)
    for name in tensors:
        if "experts" in name and name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            A, B, r = tensors[name], tensors[other], rank_of(config, name)
            E = A.shape[0] // r
            A_Era, B_brE = A.reshape(E, r, -1), B.reshape(B.shape[0], r, E)
            swapped[name] = B_brE.permute(2, 1, 0).reshape(E * r, -1)
            swapped[other] = A_Era.permute(2, 1, 0).reshape(-1, r * E)
    return swapped


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """The one rank of all expert factors (the rows that use this have no rank_pattern)."""
    assert not config["rank_pattern"], name
    return config["r"]


def grouped_by_expert(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Unsloth before September 2026, with the marker that newer versions write: B's columns are expert-slowest."""
    config["lora_B_layout"] = "grouped_by_expert"
    return _regroup(tensors, config)


def grouped_by_expert_unmarked(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The same without the marker: nothing in the adapter says so."""
    return _regroup(tensors, config)


def rank_major(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """PEFT's own packing, with Unsloth's marker for it."""
    config["lora_B_layout"] = "rank_major"
    return tensors


def _regroup(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    out = dict(tensors)
    for name, B in tensors.items():
        if "experts" in name and name.endswith("lora_B.weight"):
            out[name] = B.reshape(B.shape[0], config["r"], -1).permute(0, 2, 1).reshape(B.shape)
    return out


def adapter_name_in_keys(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """A state dict that was dumped from memory: the adapter's name is still in its keys."""
    return {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): tensor
        for name, tensor in tensors.items()
    }


def wrapped_by_compile_and_fsdp(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """torch.compile and FSDP put their own component into module paths."""
    out = {}
    for name, tensor in tensors.items():
        name = name.replace("base_model.model.", "base_model.model._orig_mod.")
        out[name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn.")] = tensor
    return out


def without_prefix(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Saved from the model inside the PeftModel."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def renamed(mapping: Mapping[str, str], *, targets: list[str] | None = None) -> Edit:
    """Plain replacements in names: an adapter of another model class or of another transformers."""

    def edit(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        out = {}
        for name, tensor in tensors.items():
            for old, new in mapping.items():
                name = name.replace(old, new)
            out[name] = tensor
        if targets is not None:
            config["target_modules"] = targets
        return out

    return edit


def per_expert(
    names: Mapping[str, str], **keys: Any
) -> Callable[[nn.Module, int], tuple[Tensors, dict[str, Any]]]:
    """Writes what transformers 4 had: one pair of factors per expert and projection.

    Args:
        names: projection -> path of one expert's layer, with `{layer}` and `{expert}`; the projections are gate, up,
            down and router.
        keys: of the config.
    """

    def write(model: nn.Module, seed: int) -> tuple[Tensors, dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        tensors, config = {}, {"r": 3, "lora_alpha": 6, **keys}
        for layer, block in enumerate(model.model.layers):
            E, I2, H = block.mlp.experts.gate_up_proj.shape
            shapes = {"gate": (I2 // 2, H), "up": (I2 // 2, H), "down": (H, I2 // 2), "router": (E, H)}
            for projection, path in names.items():
                n_out, n_in = shapes[projection]
                for expert in range(E if "{expert}" in path else 1):
                    stem = "base_model.model." + path.format(layer=layer, expert=expert)
                    A = torch.randn(config["r"], n_in, generator=generator) / n_in**0.5
                    B = 0.3 * torch.randn(n_out, config["r"], generator=generator)
                    tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = A, B
        targets = sorted({path.rpartition(".")[2] for path in names.values()})
        plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.17.1", "bias": "none"}
        return tensors, {**plain, "target_modules": targets, "inference_mode": True, **config}

    return write
