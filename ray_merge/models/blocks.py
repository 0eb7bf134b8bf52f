"""The blocks of a checkpoint, read off its tensor names: what may be cut where, whatever the architecture.

A block is one element of an outermost list of modules (`model.layers.7.`, `encoder.block.7.` and
`decoder.block.7.`, `vision_tower...layers.7.`); experts are lists inside blocks. Output shards are cut between
blocks, so a shard always holds whole consecutive layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

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
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    )


def block_prefixes(names: Sequence[str]) -> list[str]:
    """What stands in front of the block number in each list of blocks (`model.layers.`), in order of names.

    A list counts from 0 without gaps: the 0 and 2 of a `Sequential` with an activation in between are no list.
    """
    indices: dict[str, set[int]] = {}
    for name in names:
        match = re.match(r"(.*?\.)?([0-9]+)\.", name)  # the first number only: the outermost list
        if match:
            indices.setdefault(match[1] or "", set()).add(int(match[2]))
    return sorted(prefix for prefix, found in indices.items() if found == set(range(len(found))))


def split_blocks(tensors: Sequence[TensorEntry]) -> tuple[list[Part], list[Part], list[Part]]:
    """Tensors as (before the blocks, the blocks, after the blocks).

    What belongs to no block and holds an embedding by name goes in front, everything else behind, so that
    file order follows the forward pass of usual models.
    """
    ordered = sorted(tensors, key=lambda entry: natural_key(entry.name))
    prefixes = set(block_prefixes([entry.name for entry in ordered]))
    blocks: dict[str, list[TensorEntry]] = {}
    front: list[TensorEntry] = []
    back: list[TensorEntry] = []
    for entry in ordered:
        match = re.match(r"(.*?\.)?[0-9]+(?=\.)", entry.name)
        if match and (match[1] or "") in prefixes:
            blocks.setdefault(match[0], []).append(entry)
        else:
            (front if "embed" in entry.name or "wte" in entry.name.split(".") else back).append(entry)
    return (
        [Part("front", tuple(front))] if front else [],
        [Part(name, tuple(blocks[name])) for name in sorted(blocks, key=natural_key)],
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
    sizes = [_size(shard) for shard in shards]
    for entry in reversed([entry for part in front for entry in part.tensors]):
        if shards and sizes[0] + entry.n_bytes <= max_bytes:
            shards[0].insert(0, entry)
            sizes[0] += entry.n_bytes
        else:
            shards.insert(0, [entry])
            sizes.insert(0, entry.n_bytes)
    for entry in [entry for part in back for entry in part.tensors]:
        if shards and sizes[-1] + entry.n_bytes <= max_bytes:
            shards[-1].append(entry)
            sizes[-1] += entry.n_bytes
        else:
            shards.append([entry])
            sizes.append(entry.n_bytes)
    return [tuple(shard) for shard in shards]


def _even_runs(blocks: list[Part], count: int, max_bytes: int) -> list[list[Part]]:
    while count < len(blocks):
        runs = _runs(blocks, count)
        if all(sum(part.n_bytes for part in run) <= max_bytes for run in runs):
            return runs
        count += 1
    return [[block] for block in blocks]


def _runs(blocks: list[Part], count: int) -> list[list[Part]]:
    """Exactly `count` runs of about equal bytes: the blocks of a vision tower are smaller than those of its model."""
    runs: list[list[Part]] = []
    left_bytes = sum(part.n_bytes for part in blocks)
    position = 0
    for runs_left in range(count, 0, -1):
        start, taken = position, 0
        last = len(blocks) - runs_left  # one block at least stays for each of the others
        while position <= last:
            n_bytes = blocks[position].n_bytes
            if position > start and runs_left > 1 and (taken + n_bytes / 2) * runs_left > left_bytes:
                break
            taken += n_bytes
            position += 1
        runs.append(blocks[start:position])
        left_bytes -= taken
    return runs


def _size(entries: Sequence[TensorEntry]) -> int:
    return sum(entry.n_bytes for entry in entries)
