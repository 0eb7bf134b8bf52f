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
    """Bytes that each block brings to the stage that holds it, and of a model without blocks, as stored.

    The first block brings what the model registers before its blocks (embeddings, a vision tower), the last one what it
    registers behind them (norm, head). A table that is tied to the head comes with both.

    Args:
        slots: runtime name -> disk tensors, in module order (`Skeleton.slots`).
        n_bytes: disk name -> bytes.
        blocks: of the model; None: everything is the rest.

    Returns:
        Bytes of each block, and of the rest: 0 where there are blocks.
    """
    if blocks is None:
        tensors = dict.fromkeys(slot.tensor for parts in slots.values() for slot in parts)
        return [], sum(n_bytes[tensor] for tensor in tensors)
    brought: list[dict[str, int]] = [{} for _ in range(blocks.count)]
    behind = False
    for name, parts in slots.items():
        block = blocks.block_of(name)
        behind = behind or block is not None
        place = block if block is not None else blocks.count - 1 if behind else 0
        brought[place] |= {slot.tensor: n_bytes[slot.tensor] for slot in parts}
    return [sum(tensors.values()) for tensors in brought], 0


def cut_stages(block_bytes: Sequence[int], rest_bytes: int, n_stages: int) -> list[range]:
    """Consecutive blocks of each stage: the largest stage is as small as it can be, the others as equal as they can be.

    Args:
        block_bytes: bytes that each block brings; equal numbers cut by work rather than by memory. Empty: one stage
            without blocks, which runs the whole model.
        rest_bytes: that belong to no block; they count for the first stage and for the last one.
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
        low, high = (low, middle) if _n_filled(sizes, middle) <= n_stages else (middle + 1, high)
    return _even_runs(sizes, n_stages, low)


def fewest_stages(block_bytes: Sequence[int], rest_bytes: int, max_bytes: int) -> int:
    """The smallest number of stages that each hold at most `max_bytes`; one per block where that is not enough."""
    if sum(block_bytes) + rest_bytes <= max_bytes or not block_bytes:
        return 1
    return _n_filled(_with_rest(block_bytes, rest_bytes), max_bytes)


def _with_rest(block_bytes: Sequence[int], rest_bytes: int) -> list[int]:
    sizes = list(block_bytes)
    sizes[0] += rest_bytes
    sizes[-1] += rest_bytes
    return sizes


def _n_filled(sizes: Sequence[int], ceiling: int) -> int:
    """How many stages it takes to fill each up to the ceiling; a block that exceeds it stands alone."""
    count, taken = 1, 0
    for index, size in enumerate(sizes):
        if index and taken + size > ceiling:
            count, taken = count + 1, 0
        taken += size
    return count


def _even_runs(sizes: Sequence[int], count: int, ceiling: int) -> list[range]:
    """The runs under the ceiling, of which there are some, whose squares have the smallest sum; dynamic programming."""
    ends: dict[int, tuple[int, list[range]]] = {0: (0, [])}  # blocks so far -> (sum of squares, runs)
    for left in range(count, 0, -1):
        longer: dict[int, tuple[int, list[range]]] = {}
        for start, (cost, runs) in ends.items():
            taken = 0
            for stop in range(start + 1, len(sizes) - left + 2):
                taken += sizes[stop - 1]
                if taken > ceiling:
                    break
                if stop not in longer or cost + taken**2 < longer[stop][0]:
                    longer[stop] = (cost + taken**2, [*runs, range(start, stop)])
        ends = longer
    return ends[len(sizes)][1]


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
