"""Which entries of a delta are kept: by magnitude or at random.

Owns: thresholds and masks. Drawing a mask is kept apart from applying it, so that a test can apply a peer's.
Masks depend on (seed, site, adapter, chunk of the fixed grid) and nothing else: not on the order of adapters,
on row blocks, or on the worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from ray_merge.algebra.select import kth_largest_magnitude

SEED_BITS = 63


def trim(values: Tensor, threshold: float) -> Tensor:
    """Entries of magnitude below `threshold` set to zero; equal magnitudes share one fate."""
    bound = values.new_tensor(threshold)
    # hardshrink keeps |x| > bound, in one pass; the next smaller float makes that |x| >= threshold.
    return torch.nn.functional.hardshrink(values, float(torch.nextafter(bound, torch.zeros_like(bound))))


def magnitude_threshold(chunks: Callable[[], Iterable[Tensor]], n_entries: int, n_kept: int) -> float:
    """The least magnitude that is kept when `n_kept` of `n_entries` are: 0 for all, inf for none."""
    if n_kept >= n_entries:
        return 0.0
    if n_kept == 0:
        return float("inf")
    return kth_largest_magnitude(chunks, n_entries, n_kept)


def random_mask(
    shape: tuple[int, int], density: float, *, seed: int, site: str, adapter: str, chunk: int
) -> Tensor:
    """True where an entry is kept, with probability `density`; drawn on the CPU for any device.

    Args:
        shape: of the chunk.
        density: in (0, 1].
        seed: of the merge.
        site: runtime site name.
        adapter: its name.
        chunk: index in the fixed row grid.
    """
    # torch.rand from a CPU generator is a serial Mersenne twister: the same bits with any thread count,
    # which bernoulli_ (split over threads by MKL) does not promise between builds.
    generator = torch.Generator().manual_seed(mask_seed(seed, site, adapter, chunk))
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32)
    return torch.from_numpy(drawn.numpy() < np.float32(density))  # numpy compares five times as fast


def mask_seed(seed: int, site: str, adapter: str, chunk: int) -> int:
    """63 bits of sha256 of who draws what; a separator keeps ("a", "bc") and ("ab", "c") apart."""
    text = "\0".join((str(seed), site, adapter, str(chunk)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - SEED_BITS)


def drop(values: Tensor, kept: Tensor, rescale: float) -> Tensor:
    """Entries that are not `kept` set to zero, the rest multiplied by `rescale`."""
    return kept.to(values.device, values.dtype).mul_(rescale).mul_(values)
