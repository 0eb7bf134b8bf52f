"""LoRA on the fused parameters of MoE experts (PEFT's `target_parameters`) -> one update per expert.

The factors of all E experts are two matrices: A (E R, a) with the expert slowest, B (b, R E) with the expert
fastest; `delta_e = s B_e A_e` is (b, a) and is the expert's weight (d1, d2) or its transpose. Which one has
changed between PEFT's versions (peers-and-formats §3d):

    up to 0.18.1   always the transpose (a = d1, b = d2)
    0.19.0         the transpose exactly where the model is not (E, in, out)
    from 0.19.1    the transpose where the model is (E, in, out), as gpt-oss is

So shapes decide where d1 != d2, else the version that wrote the adapter. Unsloth before September 2026 packed B
with the expert slowest, which no shape shows. What cannot be proven is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ray_merge.errors import AdapterError, AdapterShapeError
from ray_merge.fit.draft import Draft
from ray_merge.fit.modules import check_dimensions
from ray_merge.models.architecture import runtime_module
from ray_merge.models.conversion import Slot
from ray_merge.spec import FLOAT_DTYPES, FactorEntry, Product, Site, TensorEntry, View
from ray_merge.storage.adapter import CONFIG_FILE
from ray_merge.storage.modules import StoredModule

LAST_ALWAYS_TURNED = (0, 18, 1)
TURNED_WRONG = (0, 19, 0)


@dataclass(frozen=True, slots=True)
class _Fused:
    """One fused parameter and its factors."""

    module: str
    parameter: str
    experts: int
    shape: tuple[int, int]
    rank: int
    A: TensorEntry
    B: TensorEntry
    turned: bool
    grouped: bool
    scale: float


def is_expert_module(draft: Draft, module: StoredModule) -> bool:
    """Whether these factors adapt a raw parameter and not the module's `weight`."""
    parameters = draft.adapter.settings.parameters
    if not parameters or "A" not in module.tensors:
        return False
    attention = f"{draft.adapter.in_training(module.name)}.in_proj_weight"
    if not module.depth and draft.names.slots(f"{module.name}.in_proj_weight"):
        return _is_target(attention, parameters)
    if module.depth > 0 or not draft.names.slots(f"{module.name}.weight"):
        return True
    weight = f"{draft.adapter.in_training(module.name)}.weight"
    return _is_target(weight, parameters)


def _is_target(parameter: str, targets: Sequence[str]) -> bool:
    """PEFT's rule for target_parameters: whole components at the end."""
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def fit_experts(draft: Draft, module: StoredModule, layout: str) -> None:
    """Add the updates of every expert of one fused parameter.

    Args:
        draft: of the adapter.
        module: its factors; `depth` says which of the module's parameters they belong to.
        layout: the recipe's word on how B is packed, "" where it says nothing.
    """
    fused = _read(draft, module, layout)
    slots = draft.names.slots(f"{fused.module}.{fused.parameter}")
    if not slots:
        raise draft.unmatched(f"{fused.module}.{fused.parameter}")
    for site, expert, cut in _places(draft, fused, slots):
        draft.add(site, f"{fused.module}.{fused.parameter}[{expert}]", _update(fused, expert, cut))


def _read(draft: Draft, module: StoredModule, layout: str) -> _Fused:
    others = sorted(module.tensors.keys() - {"A", "B"})
    if others:
        raise AdapterError(
            f"{draft.where}: {module.name} has {', '.join(others)} beside factors of raw parameters "
            "(target_parameters), which PEFT cannot make; save the adapter again"
        )
    parameter, shape = _parameter(draft, module)
    if len(shape) not in (2, 3):
        raise AdapterError(
            f"{draft.where}: {module.name}.{parameter} has shape {shape}; target_parameters takes 2 or 3 dimensions"
        )
    A, B = module.tensors["A"], module.tensors["B"]
    check_dimensions(draft, module.name, ("lora_A", A), ("lora_B", B), 2)
    experts, d1, d2 = shape if len(shape) == 3 else (1, *shape)
    path = f"{module.name}.{parameter}"
    scaling, trained = draft.adapter.settings.scaling, f"{draft.adapter.in_training(module.name)}.{parameter}"
    rank = scaling.rank_of(trained)
    if A.shape[0] != experts * rank or B.shape[1] != experts * rank:
        raise AdapterError(
            f"{draft.where}: {path}: lora_A {A.shape} and lora_B {B.shape} are no factors of rank {rank} "
            f"({CONFIG_FILE}) for {experts} experts"
        )
    turned = _is_turned(
        draft, module, path, (d1, d2), (B.shape[0], A.shape[1]), three_dimensional=len(shape) == 3
    )
    grouped = _is_grouped(draft, path, layout) if experts > 1 and rank > 1 else False
    scale = scaling.scale_of(trained, rank)
    return _Fused(module.name, parameter, experts, (d1, d2), rank, A, B, turned, grouped, scale)


def _parameter(draft: Draft, module: StoredModule) -> tuple[str, tuple[int, ...]]:
    """Which parameter of the module: PEFT wraps them in module order, the first one innermost."""
    own, in_order = _own_parameters(draft, module)
    targets = draft.adapter.settings.parameters
    trained = draft.adapter.in_training(module.name)
    adapted = [name for name in own if _is_target(f"{trained}.{name.rpartition('.')[2]}", targets)]
    there = [other for other in draft.adapter.modules if other.name == module.name]
    if len(adapted) != len(there):
        raise AdapterError(
            f"{draft.where}: {module.name} has {len(there)} pair(s) of factors, but target_parameters {list(targets)} "
            f"names {len(adapted)} of its parameters ({', '.join(own)}); the adapter does not say which is which"
        )
    if module.depth >= len(adapted):
        raise AdapterError(
            f"{draft.where}: {module.name} is wrapped {module.depth + 1} times, but only {len(adapted)} of its "
            "parameters are adapted; save the adapter again"
        )
    if in_order:
        name = adapted[len(adapted) - 1 - module.depth]
        return name.rpartition(".")[2], own[name]
    fitting = [name for name in adapted if _can_adapt(module, own[name])]
    if len(fitting) != 1:
        raise AdapterError(
            f"{draft.where}: {module.name} adapts raw parameters (target_parameters), transformers does not know this "
            f"model class, and {len(fitting)} of {', '.join(adapted)} have fitting shapes, so it cannot be proven "
            "which; merge this adapter with PEFT"
        )
    return fitting[0].rpartition(".")[2], own[fitting[0]]


def _own_parameters(draft: Draft, module: StoredModule) -> tuple[dict[str, tuple[int, ...]], bool]:
    """The module's parameters and their shapes, and whether their order is the module's own."""
    known = draft.names.architecture()
    path = None if known is None else runtime_module(known, module.name)
    if known is not None and path is not None:
        return {
            name: shape for name, shape in known.parameters.items() if name.rpartition(".")[0] == path
        }, True
    tensors = draft.names.base.tensors
    own = {f"{module.name}.{name.rpartition('.')[2]}" for name in tensors}
    slots = {name: slots[0].tensor for name in sorted(own) if len(slots := draft.names.slots(name)) == 1}
    return {name: tensors[disk].shape for name, disk in slots.items()}, False


def _can_adapt(module: StoredModule, shape: tuple[int, ...]) -> bool:
    A, B = module.tensors["A"].shape, module.tensors["B"].shape
    experts, sizes = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
    if len(sizes) != 2 or A[0] % experts:
        return False
    return (B[0], A[-1]) == sizes or (len(shape) == 3 and (A[-1], B[0]) == sizes)


def _is_turned(
    draft: Draft,
    module: StoredModule,
    path: str,
    stored: tuple[int, int],
    made: tuple[int, int],
    *,
    three_dimensional: bool,
) -> bool:
    """Whether `B_e A_e` is the transpose of the expert's weight."""
    d1, d2 = stored
    if made not in (stored, (d2, d1)):
        raise AdapterShapeError(
            path, "lora_B lora_A", made, f"one expert's weight is {stored}", draft.where, draft.base_url
        )
    if d1 != d2:
        return made != stored
    if not three_dimensional:
        return False
    version = draft.adapter.settings.version
    if not version:
        raise AdapterError(
            f"{draft.where}: {path}: one expert's weight is square ({d1} x {d2}) and {CONFIG_FILE} "
            "has no peft_version, so "
            "it cannot be proven whether the delta is transposed; add the peft_version that trained it to the config"
        )
    if version <= LAST_ALWAYS_TURNED:
        return True
    known = draft.names.architecture()
    place = None if known is None else runtime_module(known, module.name)
    is_in_out = known is not None and place in known.transposed_experts
    return is_in_out != (version == TURNED_WRONG)


def _is_grouped(draft: Draft, path: str, layout: str) -> bool:
    """Whether B has the expert slowest: what the recipe says, else the config, else PEFT's own order."""
    said = layout or draft.adapter.settings.expert_layout
    if not said and draft.adapter.unsloth:
        raise AdapterError(
            f"{draft.where}: {path}: the adapter mentions Unsloth, which before September 2026 packed lora_B with the "
            "experts in another order, and shapes do not show it; write moe_lora_b_layout: grouped_by_expert (older "
            "Unsloth) or rank_major (PEFT, newer Unsloth) behind its path"
        )
    return said == "grouped_by_expert"


def _places(
    draft: Draft, fused: _Fused, slots: tuple[Slot, ...]
) -> Iterator[tuple[Site, int, tuple[int, int, int] | None]]:
    """(site, expert, part of the expert's weight) for every piece of the fused parameter on disk."""
    base = draft.names.base.tensors
    d1, d2 = fused.shape
    for slot in slots:
        entry = base[slot.tensor]
        if entry.dtype not in FLOAT_DTYPES.values():
            raise AdapterError(f"{draft.where}: {slot.tensor} is stored as {entry.dtype}, not as floats")
        name = slot.tensor.removesuffix(".weight")
        if slot.expert is None:
            _expect(draft, entry, (fused.experts, d1, d2) if len(entry.shape) == 3 else (d1, d2))
            for expert in range(fused.experts):
                numbered = f"{name}[{expert}]" if len(entry.shape) == 3 else name
                yield Site(numbered, slot.tensor, (d1, d2), expert * d1, "expert"), expert, None
            continue
        cut = None if slot.rows is None else (slot.axis, *slot.rows)
        shape = [d1, d2]
        if cut is not None:
            shape[cut[0]] = cut[2] - cut[1]
        _expect(draft, entry, tuple(shape))
        yield Site(name, slot.tensor, (shape[0], shape[1]), 0, "expert"), slot.expert, cut


def _expect(draft: Draft, entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise AdapterShapeError(
            entry.name, "the expert's weight", shape, f"it is {entry.shape}", draft.where, draft.base_url
        )


def _update(fused: _Fused, expert: int, cut: tuple[int, int, int] | None) -> FactorEntry:
    """Factors of one expert, or of a part of it, in the layout of its weight."""
    A_shape = (fused.experts, fused.rank, fused.A.shape[1])
    outputs = fused.B.shape[0]
    B_shape = (outputs, fused.experts, fused.rank) if fused.grouped else (outputs, fused.rank, fused.experts)
    left = View(fused.B, B_shape, (1 if fused.grouped else 2, expert))
    right = View(fused.A, A_shape, (0, expert))
    if fused.turned:
        left, right = _turn(right), _turn(left)
    if cut is not None:
        left, right = (replace(left, cut=cut), right) if cut[0] == 0 else (left, replace(right, cut=cut))
    return FactorEntry((Product(left, right, fused.scale),))


def _turn(view: View) -> View:
    return replace(view, transpose=not view.transpose)
