"""What a transformers model class says about a checkpoint, without its weights, as plain data.

Owns: kinds of modules, shapes and order of parameters, the disk tensors they are made of, what is tied, and the
older names of modules. Which class: model_class.py. How disk names become runtime names: conversion.py.
Never does: read weights, run remote code, ask the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_merge.errors import CheckpointError
from ray_merge.models.conversion import Conversion, Shapes, Slot, convert, saved_names
from ray_merge.models.model_class import WAY_OUT, class_candidates, meta_model, quiet_and_offline

if TYPE_CHECKING:
    from torch import nn

TRANSPOSED_CLASSES = frozenset({"GptOssExperts"})
"""Expert modules of layout (E, in, out) in transformers 4, whose modules do not say so themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model class and one checkpoint.

    Args:
        name: class name.
        kinds: runtime path of every module that owns parameters -> `linear`, `conv1d` (transformers' Conv1D,
            weight (I, O)), `embedding`, `conv` (1d, 2d, 3d with groups = 1), `grouped_conv`, `mha`
            (nn.MultiheadAttention), `norm` or `other`.
        parameters: runtime name -> shape, in module order; tied names too. Heads have the size that the base's
            config gives them.
        slots: runtime name of a parameter or persistent buffer -> its disk tensors. A parameter that has none,
            is not tied and not unsupported is absent from the checkpoint (a new head).
        unsupported: runtime name -> why its disk tensors cannot be named.
        unused: disk tensors that this class does not have (the heads of another one); they are copied as they are.
        tied: runtime name -> the one that stands for it. One that has slots of its own has a copy on disk, and
            transformers ties the two only if they are equal.
        aliases: names that modules have under other versions or classes of transformers -> runtime path.
        transposed_experts: modules whose 3-D parameters are (E, in, out), as PEFT from 0.19.1 on sees them.
    """

    name: str
    kinds: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]]
    slots: Mapping[str, tuple[Slot, ...]]
    unsupported: Mapping[str, str]
    unused: tuple[str, ...]
    tied: Mapping[str, str]
    aliases: Mapping[str, str]
    transposed_experts: frozenset[str]


def build_architecture(
    config: Mapping[str, Any],
    tensors: Shapes,
    *,
    class_name: str | None = None,
    task_type: str | None = None,
) -> Architecture:
    """What transformers knows about the base: builds the class on the meta device, seconds for any size.

    Args:
        config: the parsed config.json of the base.
        tensors: disk name -> shape.
        class_name: the class that the adapter's `auto_mapping.base_model_class` names, if any.
        task_type: the adapter's `task_type`, if any.

    Raises:
        AdapterError: the adapter's class is for another model type.
        CheckpointError: no class of transformers reads this base, or it cannot be built.
    """
    names = class_candidates(config, class_name=class_name, task_type=task_type)
    if not names:
        import transformers

        asked = [f"adapter's class {class_name}"] if class_name else []
        asked += [f"saved by {saved}" for saved in (config.get("architectures") or [])[:1]]
        raise CheckpointError(
            f"transformers {transformers.__version__} has no class for the base's model_type "
            f"{config.get('model_type')!r}{' (' + ', '.join(asked) + ')' if asked else ''}, and remote code is never "
            f"run; {WAY_OUT}"
        )
    model = meta_model(config, names[0], len(tensors))
    with quiet_and_offline():
        conversion = convert(model, tensors)
        older = dict(_older_names(model, conversion))
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = {path: _kind(one) for path, one in modules.items() if _owns_parameters(one)}
    return Architecture(
        name=names[0],
        kinds=kinds,
        parameters={
            name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)
        },
        slots=conversion.slots,
        unsupported=conversion.unsupported,
        unused=tuple(sorted(conversion.unused)),
        tied=_tied(model, conversion),
        aliases={old: new for old, new in older.items() if old not in modules and new in kinds},
        transposed_experts=frozenset(path for path, one in modules.items() if _is_transposed(one)),
    )


def runtime_module(architecture: Architecture, name: str) -> str | None:
    """This class's path of a module that an adapter names; None if there is none or more than one."""
    return name if name in architecture.kinds else architecture.aliases.get(name)


def _kind(module: nn.Module) -> str:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.MultiheadAttention):
        return "mha"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv" if module.groups == 1 else "grouped_conv"
    return "norm" if "norm" in type(module).__name__.lower() else "other"


def _owns_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.named_parameters(recurse=False))


def _is_transposed(module: nn.Module) -> bool:
    said = getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED_CLASSES)
    return said is True and _owns_parameters(module)


def _tied(model: nn.Module, conversion: Conversion) -> dict[str, str]:
    """Names that share one parameter -> the name that has it on disk, or the first one."""
    groups: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(name)
    tied: dict[str, str] = {}
    for names in groups.values():
        head = next((name for name in names if name in conversion.slots), names[0])
        tied |= {name: head for name in names if name != head}
    return tied


def _older_names(model: nn.Module, conversion: Conversion) -> Iterator[tuple[str, str]]:
    """Module names that lead to exactly one module: the checkpoint's and those transformers writes, any prefix."""
    renamed = {
        name: slots[0].tensor for name, slots in conversion.slots.items() if slots == (Slot(slots[0].tensor),)
    }
    pairs = [(disk, runtime) for runtime, disk in renamed.items()]
    pairs += saved_names(model, renamed)
    pairs += [(runtime, runtime) for runtime in renamed]
    prefix = f"{model.base_model_prefix}."
    found: dict[str, set[str]] = {}
    for old, new in pairs:
        (module, _, leaf), (target, _, new_leaf) = old.rpartition("."), new.rpartition(".")
        if leaf != new_leaf or not module:
            continue
        spellings = {module, module.removeprefix(prefix), prefix + module} if prefix != "." else {module}
        for spelling in spellings:
            found.setdefault(spelling, set()).add(target)
    return ((old, new) for old, (new, *more) in found.items() if not more)
