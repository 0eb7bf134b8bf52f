"""Factors of one adapted module -> its update of a base weight, for every kind of layer but MoE experts.

Deltas in the layout of the stored base weight (PEFT 0.21 `tuners/lora/layer.py`, checked by tests/parity):

    Linear                       s B A
    MultiheadAttention           s B A on in_proj, 2 s B A on out_proj: PEFT adds the latter twice, in training too
    HF Conv1D, weight (in, out)  s (B A)^T = s A^T B^T
    Embedding, weight (V, H)     s (B A)^T = s A^T B^T, A (R, V), B (H, R)
    convolution, groups = 1      s B A with A as (R, in * kernel) and B as (O, R)
    lora_bias                    s b on the layer's bias
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray_merge.errors import AdapterError, AdapterShapeError
from ray_merge.fit.draft import Draft
from ray_merge.models.conversion import Slot
from ray_merge.spec import CONV1D_MODELS, FactorEntry, Layout, Product, TensorEntry, View
from ray_merge.storage.adapter import CONFIG_FILE, StoredAdapter
from ray_merge.storage.modules import StoredModule

TWICE = 2.0


def fit_module(draft: Draft, module: StoredModule, initial: StoredModule | None) -> None:
    """Add the update of one module that is no stack of experts."""
    if "embedding_A" in module.tensors:
        slot = draft.one_slot(f"{module.name}.weight", "LoRA on an embedding")
        layout: Layout = "embedding"
    else:
        slot, layout = _linear_slot(draft, module)
    shape = draft.shape(slot.tensor)
    _check_kind(draft, module, layout, shape)
    rows = shape[0]
    site = draft.site(slot, (rows, math.prod(shape[1:])), layout, module.name)
    products = [_product(draft, module, layout, shape, slot)]
    if initial is not None:
        products.append(_taken_away(draft, module, initial, layout, shape, slot))
        if products[1].rank != products[0].rank:
            raise AdapterError(
                f"{draft.where}: {module.name} has rank {products[0].rank}, but the initial adapter has rank "
                f"{products[1].rank} there; it is not the one that this training started from"
            )
        if products[1].scale != -products[0].scale:
            raise AdapterError(
                f"{draft.where}: {module.name} has scale {products[0].scale:g}, but the initial adapter has scale "
                f"{-products[1].scale:g} there; it is not the one that this training started from"
            )
    magnitude = _magnitude(draft, module, layout, site.shape)
    if in_attention(draft.adapter, module.name):
        # MultiheadAttention.merge, which its forward calls too, adds s B A by hand and then lets out_proj add it.
        products = [replace(product, scale=TWICE * product.scale) for product in products]
    draft.add(site, module.name, FactorEntry(tuple(products), len(products) - 1, magnitude))
    if "B.bias" in module.tensors:
        _add_bias(draft, module, layout)


def _check_kind(draft: Draft, module: StoredModule, layout: Layout, shape: tuple[int, ...]) -> None:
    """Refuse factors of an embedding on another layer, and the other way round."""
    may_be_table = layout == "embedding" or any(word in module.name for word in ("embed", "wte", "wpe"))
    kind = draft.names.kind(module.name) if may_be_table else ""
    is_table = kind == "embedding" if kind else layout == "embedding"
    if (layout == "embedding" and len(shape) != 2) or is_table != (layout == "embedding"):
        has = "of an embedding" if layout == "embedding" else "of a linear layer"
        raise AdapterError(
            f"{draft.where}: {module.name} has factors {has}, but it is {kind or 'no embedding'} of shape {shape} in "
            f"{draft.base_url}; the adapter was trained on another model"
        )


def is_idle(draft: Draft, module: StoredModule) -> bool:
    """Whether PEFT never applies these factors: out_proj of a MultiheadAttention that is not adapted itself.

    `all-linear` targets it, but the attention reads out_proj's weight and never calls it; in training B stays 0.
    """
    parent, _, leaf = module.name.rpartition(".")
    if leaf != "out_proj" or in_attention(draft.adapter, module.name):
        return False
    return bool(draft.names.slots(f"{parent}.in_proj_weight"))


def _linear_slot(draft: Draft, module: StoredModule) -> tuple[Slot, Layout]:
    slots = draft.names.slots(f"{module.name}.weight")
    if not slots and draft.names.slots(f"{module.name}.in_proj_weight"):
        return draft.one_slot(f"{module.name}.in_proj_weight", "LoRA"), "mha"
    slot = draft.one_slot(f"{module.name}.weight", "LoRA")
    shape = draft.shape(slot.tensor)
    if len(shape) > 2:
        return slot, "conv"
    if len(shape) != 2:
        raise AdapterError(
            f"{draft.where}: {module.name}: base weight {slot.tensor} has shape {shape}; LoRA needs a matrix or a "
            "convolution"
        )
    return slot, "conv1d" if _is_conv1d(draft, module, shape) else "linear"


def _is_conv1d(draft: Draft, module: StoredModule, shape: tuple[int, ...]) -> bool:
    """Whether the weight is stored (in, out): the module's type decides, then the shapes, then the flag."""
    A, B = module.tensors["A"].shape, module.tensors["B"].shape
    if not A or not B:
        return False  # scalars: check_dimensions refuses them
    blocks = max(1, draft.adapter.settings.blocks)
    straight = shape[0] in (B[0], B[0] * blocks) and shape[1] in (A[-1], A[-1] * blocks)
    turned = shape[1] in (B[0], B[0] * blocks) and shape[0] in (A[-1], A[-1] * blocks)
    if not turned:
        return False
    flag = draft.adapter.settings.transposed
    if straight and not flag and not _may_be_transposed(draft.names.base.config):
        return False
    kind = draft.names.kind(module.name)
    return kind == "conv1d" if kind else (flag or not straight)


def _may_be_transposed(config: Mapping[str, Any]) -> bool:
    """Whether the model, or one inside it (a GPT-2 that decodes for a vision encoder), has Conv1D layers."""
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    return str(config.get("model_type")) in CONV1D_MODELS or any(map(_may_be_transposed, inner))


def check_orientation(draft: Draft) -> None:
    """Refuse a fan_in_fan_out that no layer of the base answers to: PEFT sets it by the type of the layer."""
    transposed = any(site.layout == "conv1d" for site in draft.sites.values())
    if draft.adapter.settings.transposed and not transposed and draft.modules:
        raise AdapterError(
            f"{draft.where}: {CONFIG_FILE} says fan_in_fan_out: true, but no adapted layer of {draft.base_url} is an "
            "HF Conv1D; the adapter was trained on another model class, or the flag was edited: set it to false"
        )


def _product(
    draft: Draft, module: StoredModule, layout: Layout, shape: tuple[int, ...], slot: Slot
) -> Product:
    if layout == "embedding":
        product = _embedding_product(draft, module)
    elif layout == "conv":
        product = _conv_product(draft, module, shape)
    else:
        product = _matrix_product(draft, module, layout, shape)
    _check_fit(draft, module.name, product, (shape[0], math.prod(shape[1:])), slot, layout)
    return product


def scale_of(adapter: StoredAdapter, module: str, rank: int, other: int) -> float:
    """The scale of a module whose two factors have the rank that the config claims."""
    scaling = adapter.settings.scaling
    # PEFT adapts MultiheadAttention and its out_proj as one module: patterns name the former.
    name = adapter.in_training(module)
    name = name.removesuffix(".out_proj") if in_attention(adapter, module) else name
    check_rank(adapter, module, rank, scaling.rank_of(name), other)
    return scaling.scale_of(name, rank)


def in_attention(adapter: StoredAdapter, module: str) -> bool:
    """Whether `module` is the out_proj of an adapted MultiheadAttention."""
    parent, _, leaf = module.rpartition(".")
    return leaf == "out_proj" and any(
        other.name == parent and "A" in other.tensors for other in adapter.modules
    )


def _embedding_product(draft: Draft, module: StoredModule) -> Product:
    A, B = module.tensors["embedding_A"], module.tensors["embedding_B"]
    check_dimensions(draft, module.name, ("lora_embedding_A", A), ("lora_embedding_B", B), 2)
    scale = scale_of(draft.adapter, module.name, A.shape[0], B.shape[1])
    return Product(View(A, A.shape, transpose=True), View(B, B.shape, transpose=True), scale)


def _conv_product(draft: Draft, module: StoredModule, shape: tuple[int, ...]) -> Product:
    A, B = module.tensors["A"], module.tensors["B"]
    check_dimensions(draft, module.name, ("lora_A", A), ("lora_B", B), len(shape))
    rank = A.shape[0]
    fewer_inputs = A.shape[1] != shape[1] and A.shape[1] % shape[1] == 0 and A.shape[2:] == shape[2:]
    fewer_ranks = B.shape[1] != rank and rank % B.shape[1] == 0
    if fewer_inputs or fewer_ranks or draft.names.kind(module.name) == "grouped_conv":
        raise AdapterError(
            f"{draft.where}: {module.name} is a grouped convolution, whose LoRA has no exact delta (PEFT refuses "
            "to merge it too); train without it or serve the adapter"
        )
    scale = scale_of(draft.adapter, module.name, rank, B.shape[1])
    if A.shape[2:] != shape[2:] or any(size != 1 for size in B.shape[2:]):
        raise AdapterShapeError(
            module.name,
            "lora_A",
            A.shape,
            f"the kernel of the base is {shape[2:]}",
            draft.where,
            draft.base_url,
        )
    return Product(View(B, (B.shape[0], rank)), View(A, (rank, math.prod(A.shape[1:]))), scale)


def _matrix_product(draft: Draft, module: StoredModule, layout: Layout, shape: tuple[int, ...]) -> Product:
    A, B = module.tensors["A"], module.tensors["B"]
    check_dimensions(draft, module.name, ("lora_A", A), ("lora_B", B), 2)
    turned = layout == "conv1d"
    inputs, rank = shape[0] if turned else shape[1], A.shape[0]
    A_blocks, B_blocks = (_blocks(draft, A.shape[1], inputs), _blocks(draft, B.shape[1], rank))
    if A.shape[0] % A_blocks or B.shape[0] % B_blocks:
        raise AdapterError(
            f"{draft.where}: {module.name}: lora_A {A.shape} and lora_B {B.shape} cannot be cut into the "
            f"{draft.adapter.settings.blocks} blocks of use_bdlora"
        )
    scale = scale_of(draft.adapter, module.name, rank, B.shape[1] * B_blocks)
    left, right = View(B, B.shape, None, B_blocks, turned), View(A, A.shape, None, A_blocks, turned)
    return Product(right, left, scale) if turned else Product(left, right, scale)


def _blocks(draft: Draft, stored: int, whole: int) -> int:
    """BD-LoRA stores one side without its zeros: that side has `whole / blocks` columns."""
    blocks = draft.adapter.settings.blocks
    return blocks if blocks and stored != whole and stored * blocks == whole else 1


def check_dimensions(
    draft: Draft, module: str, A: tuple[str, TensorEntry], B: tuple[str, TensorEntry], expected: int
) -> None:
    """Refuse factors with another number of axes than their layer has."""
    for side, entry in (A, B):
        if len(entry.shape) != expected:
            raise AdapterError(
                f"{draft.where}: {module}.{side} has {len(entry.shape)} dimensions {entry.shape}, "
                f"expected {expected} for "
                f"the base's layer ({draft.base_url})"
            )


def check_rank(adapter: StoredAdapter, module: str, rank: int, claimed: int, other: int) -> None:
    """Refuse factors whose ranks differ, or that the config denies."""
    if other != rank:
        raise AdapterError(f"{adapter.where}: {module}: lora_A has rank {rank} but lora_B has rank {other}")
    if rank != claimed:
        raise AdapterError(
            f"{adapter.where}: {module}: the factors have rank {rank} but {CONFIG_FILE} says {claimed}; the scale "
            "alpha / r would be wrong"
        )


def _check_fit(
    draft: Draft, module: str, product: Product, matrix: tuple[int, int], slot: Slot, layout: Layout
) -> None:
    assert product.A is not None
    sides = (
        (product.B, product.B.matrix[0], matrix[0], "outputs" if layout != "conv1d" else "inputs"),
        (product.A, product.A.matrix[1], matrix[1], "inputs" if layout != "conv1d" else "outputs"),
    )
    for view, got, want, word in sides:
        if got != want:
            side = view.entry.name.rpartition(".lora_")[2].split(".")[0]
            raise AdapterShapeError(
                module,
                f"lora_{side}",
                view.entry.shape,
                f"{slot.tensor} has {want} {word}",
                draft.where,
                draft.base_url,
            )


def _taken_away(
    draft: Draft,
    module: StoredModule,
    initial: StoredModule,
    layout: Layout,
    shape: tuple[int, ...],
    slot: Slot,
) -> Product:
    """The factors that training began with, negated: dW = s B A - s0 B0 A0."""
    started = draft.adapter.initial
    assert started is not None
    before = Draft(started, draft.names, draft.untied)
    before.replaced = draft.replaced
    product = _product(before, initial, layout, shape, slot)
    return Product(product.B, product.A, -product.scale)


def _magnitude(draft: Draft, module: StoredModule, layout: Layout, shape: tuple[int, int]) -> View | None:
    """DoRA's magnitude: of rows, or of columns where the weight is stored transposed (embeddings: per column too)."""
    entry = module.tensors.get("magnitude")
    if entry is None:
        return None
    of_columns = layout in ("conv1d", "embedding")
    wanted = (1, shape[1]) if of_columns else (shape[0], 1)
    if math.prod(entry.shape) != max(wanted):
        raise AdapterError(
            f"{draft.where}: {module.name}: lora_magnitude_vector has shape {entry.shape}, expected "
            f"{max(wanted)} values"
        )
    return View(entry, wanted)


def _add_bias(draft: Draft, module: StoredModule, layout: Layout) -> None:
    entry = module.tensors["B.bias"]
    if layout == "mha":
        draft.ignored[entry.name] = "PEFT never adds the bias on B of a MultiheadAttention's in_proj"
        return
    scale = scale_of(draft.adapter, module.name, module.tensors["A"].shape[0], module.tensors["A"].shape[0])
    slots = draft.names.slots(f"{module.name}.bias")
    if not slots:
        raise AdapterError(
            f"{draft.where}: {module.name} has a bias on B (lora_bias), but the base's layer has no bias to add it to; "
            "train without lora_bias, or serve the adapter"
        )
    shape = draft.shape(slots[0].tensor)
    if entry.shape != shape:
        raise AdapterShapeError(
            module.name, "lora_B.bias", entry.shape, f"the bias is {shape}", draft.where, draft.base_url
        )
    site = draft.site(slots[0], (shape[0], 1), "raw", module.name)
    draft.add(site, f"{module.name}.bias", FactorEntry((Product(View(entry, (shape[0], 1)), None, scale),)))
