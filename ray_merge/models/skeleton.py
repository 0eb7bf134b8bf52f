"""A transformers model that can run although it holds no weights: parameters on the meta device, buffers real.

Owns: building it and saying which disk tensors every parameter and persistent buffer is read from. Rotary tables
and position ids are buffers and are computed by the class itself, so they are there. Running parts of it: stage.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ray_merge.errors import CheckpointError
from ray_merge.models.block_list import BlockList, find_blocks
from ray_merge.models.conversion import Shapes, Slot, convert
from ray_merge.models.model_class import build_model, class_candidates, quiet_and_offline


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """One model without weights. It belongs to one stage, which changes its modules.

    Args:
        name: class name.
        model: in eval mode, parameters on the meta device.
        blocks: the list of blocks; None: it runs as one stage.
        slots: runtime name of a parameter or persistent buffer -> its disk tensors; tied names have those of the
            parameter that stands for them. One without slots is not in the checkpoint.
        unsupported: runtime name -> why its disk tensors cannot be named.
    """

    name: str
    model: nn.Module
    blocks: BlockList | None
    slots: Mapping[str, tuple[Slot, ...]]
    unsupported: Mapping[str, str]


def build_skeleton(config: Mapping[str, Any], tensors: Shapes, *, name: str | None = None) -> Skeleton:
    """The skeleton of a base; seconds and some MB for any size.

    Args:
        config: the parsed config.json of the base.
        tensors: disk name -> shape.
        name: of the class (`Architecture.name`); default: the one that the base was saved from.

    Raises:
        CheckpointError: no class of transformers reads this base, or it cannot be built.
    """
    name = name or next(iter(class_candidates(config)), None)
    if name is None:
        raise CheckpointError(
            f"transformers has no class for the base's model_type {config.get('model_type')!r}, so its activations "
            "cannot be computed; use a merge method that needs no data"
        )
    model = build_model(config, name, len(tensors), place=_parameters_on_meta, adjust=_for_running)
    model.eval().requires_grad_(False)
    with quiet_and_offline():
        conversion = convert(model, tensors)
    return Skeleton(
        name=name,
        model=model,
        blocks=find_blocks(model),
        slots=_with_tied(model, conversion.slots),
        unsupported=conversion.unsupported,
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that this thread registers moves to the meta device; its memory was never touched."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    register: Any = (
        register_module_parameter_registration_hook  # its stub forgets that hooks may replace the value
    )

    builder = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, value: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != builder or value.is_meta:  # a tied parameter stays the same object
            return None
        moved: Any = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
        # transformers 5 asks for this before it draws values: 1.3 ms a parameter on the meta device (measured).
        moved._is_hf_initialized = True
        return cast("nn.Parameter", moved)

    hook = register(to_meta)
    try:
        yield
    finally:
        hook.remove()


def _for_running(config: Any) -> None:
    """No cache, named outputs, float32, whatever config.json says; attention is what transformers chooses."""
    import torch

    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for one in (config, *(part for part in parts if part is not None)):
        one.use_cache = False
        one.return_dict = True
        one.dtype = torch.float32
        if getattr(one, "output_router_logits", False):
            one.output_router_logits = False


def _with_tied(model: nn.Module, slots: Mapping[str, tuple[Slot, ...]]) -> dict[str, tuple[Slot, ...]]:
    """Slots, in module order, with those of tied parameters that have none of their own."""
    stored: dict[int, tuple[Slot, ...]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        if name in slots:
            stored.setdefault(id(value), slots[name])
    found = dict(slots)
    for name, value in model.named_parameters(remove_duplicate=False):
        if id(value) in stored:
            found.setdefault(name, stored[id(value)])
    order = {name: position for position, name in enumerate(model.state_dict())}
    return {name: found[name] for name in sorted(found, key=order.__getitem__)}
