"""How many stages, and where they are cut: bytes of blocks, of sums, and of what goes by.

Pure arithmetic on shapes and headers; nothing is read and no weight is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ray_merge.errors import RecipeError, Refusal
from ray_merge.recipe import Calibration
from ray_merge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ray_merge.models.skeleton import Skeleton

HANDED_COPIES = 3
"""Of one task's hidden states in a stage: what came in, what goes out, and Ray's copy of that."""

WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
"""What config.json calls the width of the hidden state."""

STAGE_RUNTIME_BYTES = 470 * 10**6
"""A Ray worker with torch, transformers and this package loaded (measured: 410 MB, and 55 MB of Ray's)."""

PASSING_COPIES = 4
"""Of the widest module's outputs for one batch in float32: what goes by inside one block."""


class Sums(Protocol):
    """A part of the base, as far as its sums matter (`plan.moments.Part`)."""

    @property
    def block(self) -> int | None:
        """Its number, or None outside of the blocks."""
        ...

    @property
    def modules(self) -> Mapping[str, str]:
        """Site -> module."""
        ...


def handed_bytes(config: Mapping[str, Any], calibration: Calibration) -> int:
    """float32 hidden states of all tokens of one task."""
    text = config.get("text_config") or config
    width = next((text[key] for key in WIDTH_KEYS if isinstance(text.get(key), int)), 0)
    return 4 * int(width) * calibration.samples * calibration.max_length


def passing_bytes(skeleton: Skeleton, layers: Mapping[str, bool], calibration: Calibration) -> int:
    """What one block takes while a batch goes by: its widest outputs, and its largest weight in float32."""
    inside = [
        path for path in layers if skeleton.blocks is None or skeleton.blocks.block_of(path) is not None
    ]
    shapes = [skeleton.model.get_submodule(path).get_parameter("weight").shape for path in inside]
    widest = max((max(shape) for shape in shapes), default=0)
    tokens = calibration.batch_size * calibration.max_length
    return 4 * (PASSING_COPIES * tokens * widest + max((shape.numel() for shape in shapes), default=0))


def block_bytes(
    skeleton: Skeleton,
    base: Checkpoint,
    parts: Sequence[Sums],
    calibration: Calibration,
    site_bytes: Mapping[str, int] | None = None,
) -> list[int]:
    """Of each block: its weights as stored, with what stands before or behind the blocks, and its sums.

    Sites that share their input are counted as if each had sums of its own; `site_bytes` counts in place of sums.
    """
    from ray_merge.models.block_list import part_bytes

    n_bytes = {name: entry.n_bytes for name, entry in base.tensors.items()}
    sizes, rest = part_bytes(skeleton.slots, n_bytes, skeleton.blocks)
    sizes = sizes or [rest]
    for part in parts:
        if site_bytes is None:
            sums = sum(_sum_bytes(skeleton, path, calibration) for path in part.modules.values())
        else:
            sums = sum(site_bytes[site] for site in part.modules)
        # Outside of the blocks a site runs in the first stage or in the last one.
        for index in {0, len(sizes) - 1} if part.block is None else {part.block}:
            sizes[index] += sums
    return sizes


def _sum_bytes(skeleton: Skeleton, path: str, calibration: Calibration) -> int:
    """The Gram matrix of one module's inputs, or its sketch with what is added to it at once, in float64."""
    from torch import nn

    module = skeleton.model.get_submodule(path)
    shape = module.get_parameter("weight").shape
    inputs: int = shape[1] if isinstance(module, nn.Linear) else shape[0]
    if calibration.precision == "sketch" and inputs > 2 * calibration.sketch_rows:
        return 8 * 2 * calibration.sketch_rows * inputs
    return 8 * inputs * inputs


def cut(
    skeleton: Skeleton,
    base: Checkpoint,
    sizes: Sequence[int],
    asked: int | None,
    room: int | None,
    workers: int,
) -> tuple[tuple[tuple[int, int], ...], int]:
    """The stages, and the bytes of the largest one's weights and sums."""
    from ray_merge.models.block_list import cut_stages, fewest_stages

    if asked is not None and asked > len(sizes):
        has = f"has {len(sizes)} blocks" if skeleton.blocks else "has no single list of blocks to cut"
        raise RecipeError(f"stages: {asked}, but {skeleton.name} {has}; use at most {len(sizes)}")
    count = asked or max(min(workers, len(sizes)), 1 if room is None else fewest_stages(sizes, 0, room))
    # Equal work, as long as memory does not ask for equal bytes: an embedding table costs no time.
    ranges = cut_stages([1] * len(sizes), 0, count)
    if room is not None and _largest(sizes, ranges) > room:
        ranges = cut_stages(sizes, 0, count)
    largest = _largest(sizes, ranges)
    if room is not None and asked is None and largest > room:
        raise Refusal(
            f"--memory: one block of {base.url} with what belongs to it takes {largest / 1e6:.0f} MB, but only "
            f"{room / 1e6:.0f} MB of the ceiling are left beside the process itself, one batch and the hidden states "
            "of one task; raise it, or set fewer calibration samples or a smaller batch_size"
        )
    if skeleton.blocks is None:
        return ((0, 0),), largest
    return tuple((blocks.start, blocks.stop) for blocks in ranges), largest


def _largest(sizes: Sequence[int], ranges: Sequence[range]) -> int:
    return max(sum(sizes[index] for index in blocks) for blocks in ranges)
