"""The list of blocks of a model object, found without knowing its architecture, and where to cut it into stages.

Owns: which list of modules is the model's depth, which block a module belongs to, bytes of blocks, equal cuts.
Never runs a model, reads no weights. Blocks as they show in tensor names alone: blocks.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class BlockList:
    """The blocks that a model's forward runs one after another.

    Args:
        path: of the list, such as `model.layers`.
        count: of blocks, at least 2.
    """

    path: str
    count: int

    def block_of(self, name: str) -> int | None:
        """The block that a module or parameter of this runtime name lies in; None: before or behind the blocks."""
        inside = name.startswith(f"{self.path}.")
        head = name[len(self.path) + 1 :].partition(".")[0]
        return int(head) if inside and head.isdecimal() else None


def find_blocks(model: nn.Module) -> BlockList | None:
    """The outermost list of like modules with most parameters; None: the model runs as one stage.

    In a vision-language model that is the language model's list; its vision tower counts as what stands before.

    Args:
        model: a transformers model, its parameters on any device.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    best, best_size = None, 0
    for path, one in _outermost_lists(model, ""):
        children = list(one.children())
        size = sum(value.numel() for value in one.parameters())
        if len(children) > 1 and size > best_size and _are_alike(children):
            best, best_size = BlockList(path, len(children)), size
    return best


def hidden_name(block: nn.Module) -> str | None:
    """The name of the first argument of a block's forward, which is the hidden state; None: it has none."""
    parameters = list(inspect.signature(block.forward).parameters.values())
    named = [one for one in parameters[:1] if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return named[0].name if named else None


def part_bytes(
    slots: Mapping[str, Sequence[Any]], n_bytes: Mapping[str, int], blocks: BlockList | None
) -> tuple[list[int], int]:
    """Bytes of each block and of everything else, as stored; a tensor that is tied counts once.

    Args:
        slots: runtime name -> disk tensors (`Skeleton.slots` or `Architecture.slots`).
        n_bytes: disk name -> bytes.
        blocks: of the model; None: everything is the rest.
    """
    sizes = [0] * (blocks.count if blocks else 0)
    rest = 0
    counted: set[str] = set()
    for name, parts in slots.items():
        fresh = {slot.tensor: n_bytes[slot.tensor] for slot in parts if slot.tensor not in counted}
        counted.update(fresh)
        block = blocks.block_of(name) if blocks else None
        if block is None:
            rest += sum(fresh.values())
        else:
            sizes[block] += sum(fresh.values())
    return sizes, rest


def cut_stages(block_bytes: Sequence[int], rest_bytes: int, n_stages: int) -> list[range]:
    """Consecutive blocks of each stage so that the largest stage is as small as it can be; whole blocks, in order.

    Args:
        block_bytes: bytes of each block; empty: one stage without blocks, which runs the whole model.
        rest_bytes: of what stands before and behind the blocks; counts for the first stage and for the last one,
            which share an embedding table that is tied to the head. 0 cuts by work rather than by memory.
        n_stages: how many; no more than there are blocks come out.
    """
    if not block_bytes:
        return [range(0)]
    n_stages = max(1, min(n_stages, len(block_bytes)))
    if n_stages == 1:
        return [range(len(block_bytes))]
    sizes = _with_rest(block_bytes, rest_bytes)
    low, high = max(sizes), sum(sizes)
    while low < high:  # the smallest ceiling under which so many stages suffice
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(sizes, middle)) <= n_stages else (middle + 1, high)
    cuts = _filled(sizes, low)
    while len(cuts) < n_stages:  # fewer suffice: cut the largest one that can be cut
        index = max(
            (index for index, cut in enumerate(cuts) if len(cut) > 1),
            key=lambda index: sum(sizes[block] for block in cuts[index]),
        )
        cut = cuts[index]
        middle = _halfway(sizes, cut)
        cuts[index : index + 1] = [range(cut.start, middle), range(middle, cut.stop)]
    return cuts


def fewest_stages(block_bytes: Sequence[int], rest_bytes: int, max_bytes: int) -> int:
    """The smallest number of stages that each hold at most `max_bytes`; one per block where that is not enough."""
    if sum(block_bytes) + rest_bytes <= max_bytes or not block_bytes:
        return 1
    sizes = _with_rest(block_bytes, rest_bytes)
    return len(_filled(sizes, max_bytes))


def _with_rest(block_bytes: Sequence[int], rest_bytes: int) -> list[int]:
    sizes = list(block_bytes)
    sizes[0] += rest_bytes
    sizes[-1] += rest_bytes
    return sizes


def _filled(sizes: Sequence[int], ceiling: int) -> list[range]:
    """Runs of blocks that are filled from the front up to the ceiling; a block that exceeds it stands alone."""
    cuts, start, taken = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and taken + size > ceiling:
            cuts.append(range(start, index))
            start, taken = index, 0
        taken += size
    return [*cuts, range(start, len(sizes))]


def _halfway(sizes: Sequence[int], cut: range) -> int:
    total, taken = sum(sizes[index] for index in cut), 0
    for index in cut[:-1]:
        taken += sizes[index]
        if 2 * taken >= total:
            return index + 1
    return cut.stop - 1


def _outermost_lists(module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
    from torch import nn

    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield below, child
        else:
            yield from _outermost_lists(child, below)


def _are_alike(children: Sequence[nn.Module]) -> bool:
    """Whether all can be called with the same first argument: layers of a hybrid model are of several classes."""
    from torch import nn

    if any(isinstance(child, (nn.ModuleList, nn.ModuleDict)) for child in children):
        return False
    names = {hidden_name(child) for child in children}
    return len(names) == 1 and None not in names
