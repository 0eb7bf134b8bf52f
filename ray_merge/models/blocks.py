"""The blocks of a checkpoint, read off its tensor names: what may be cut where, whatever the architecture.

A block is one element of the model's longest repeated list (`model.layers.7.`, `encoder.layer.7.`). Output
shards are cut between blocks, so a shard always holds whole consecutive layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ray_merge.spec import TensorEntry


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive tensors that stay together: one block, or what stands before or after the blocks."""

    name: str
    tensors: tuple[TensorEntry, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors, as stored in the base."""
        return sum(entry.n_bytes for entry in self.tensors)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    return tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    )


def block_prefix(names: Sequence[str]) -> str | None:
    """The name in front of the block number (`model.layers.`) of the longest list; None without a list.

    Among the lists of equal length the outermost (shortest prefix) wins: experts are lists inside blocks.
    """
    indices: dict[str, set[int]] = {}
    weight: Counter[str] = Counter()
    for name in names:
        match = re.match(r"(.*?\.)?(\d+)\.", name)  # the first number only: the outermost list
        if match:
            prefix = match[1] or ""
            indices.setdefault(prefix, set()).add(int(match[2]))
            weight[prefix] += 1
    lists = {prefix: found for prefix, found in indices.items() if found == set(range(len(found)))}
    if not lists:
        return None
    return max(sorted(lists), key=lambda prefix: (len(lists[prefix]), weight[prefix], -len(prefix)))


def split_blocks(tensors: Sequence[TensorEntry]) -> tuple[list[Part], list[Part], list[Part]]:
    """Tensors as (before the blocks, the blocks, after the blocks).

    What belongs to no block and holds an embedding by name goes in front, everything else behind, so that
    file order follows the forward pass of usual models.
    """
    ordered = sorted(tensors, key=lambda entry: natural_key(entry.name))
    prefix = block_prefix([entry.name for entry in ordered])
    blocks: dict[int, list[TensorEntry]] = {}
    front: list[TensorEntry] = []
    back: list[TensorEntry] = []
    for entry in ordered:
        rest = entry.name.removeprefix(prefix) if prefix is not None else entry.name
        number = rest.split(".")[0]
        if prefix is not None and entry.name.startswith(prefix) and number.isdigit():
            blocks.setdefault(int(number), []).append(entry)
        else:
            (front if "embed" in entry.name or ".wte" in entry.name else back).append(entry)
    return (
        [Part("front", tuple(front))] if front else [],
        [Part(f"{prefix}{number}", tuple(blocks[number])) for number in sorted(blocks)],
        [Part("back", tuple(back))] if back else [],
    )


def cut_shards(
    tensors: Sequence[TensorEntry], max_bytes: int, min_shards: int = 16
) -> list[tuple[TensorEntry, ...]]:
    """Consecutive tensors of each output shard; depends on names and sizes alone.

    A model with blocks gets at least `min_shards` shards where it has that many blocks, else one per block.
    No block and no tensor is split: one that is larger than `max_bytes` is a shard of its own.
    """
    front, blocks, back = split_blocks(tensors)
    runs = _even_runs(blocks, min(min_shards, len(blocks)), max_bytes)
    shards = [[entry for part in run for entry in part.tensors] for run in runs]
    for entry in reversed([entry for part in front for entry in part.tensors]):
        if shards and _size([entry, *shards[0]]) <= max_bytes:
            shards[0].insert(0, entry)
        else:
            shards.insert(0, [entry])
    for entry in [entry for part in back for entry in part.tensors]:
        if shards and _size([*shards[-1], entry]) <= max_bytes:
            shards[-1].append(entry)
        else:
            shards.append([entry])
    return [tuple(shard) for shard in shards]


def _even_runs(blocks: list[Part], count: int, max_bytes: int) -> list[list[Part]]:
    while count < len(blocks):
        edges = [len(blocks) * index // count for index in range(count + 1)]
        runs = [blocks[start:end] for start, end in pairwise(edges)]
        if all(sum(part.n_bytes for part in run) <= max_bytes for run in runs):
            return runs
        count += 1
    return [[block] for block in blocks]


def _size(entries: Sequence[TensorEntry]) -> int:
    return sum(entry.n_bytes for entry in entries)
