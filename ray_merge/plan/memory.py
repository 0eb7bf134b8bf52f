"""How many merges share one pass over the base, and the bytes that one worker then needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ray_merge.methods.memory import SiteBytes
from ray_merge.methods.registry import get, selects_over_model, working_bytes
from ray_merge.plan.kinds import Kind, SiteKinds
from ray_merge.spec import Adapter, Merge, Site, TensorEntry

DEFAULT_MEMORY_BYTES = 640 * 10**6
"""Ceiling per worker; two workers and the driver then stay under 1.5 GB."""

RUNTIME_BYTES = 300 * 10**6
"""A Ray worker with torch and this package loaded (measured: 283 MB with torch 2.13 and Ray 2.60 on Linux)."""

STREAM_BYTES = 52 * 10**6
"""13 chunks of 2 MiB read ahead or in use (storage/stream.py), and the float32 copies of the one being merged."""

QUESTION_BYTES = 8 * 2**16
"""A histogram of 16 bits, or the candidates that take its place, when thresholds are selected over a model."""

QUESTIONS_AT_ONCE = 128
"""Asked of one worker together: 64 MiB."""

MAX_GROUP = 16
"""Merges that share one pass over the base. Each has one unfinished shard on the worker's disk meanwhile."""


def fit_group(
    merges: Sequence[Merge],
    adapters: Mapping[str, Adapter],
    sites: Mapping[str, Site],
    tensors: Mapping[str, TensorEntry],
    memory_bytes: int,
    looking_bytes: int = 0,
) -> tuple[int, int]:
    """The largest number of merges that can share a pass, and the bytes that one worker then needs.

    Counted at the most expensive site of each kind: factors and bases once for each set of adapters, what each
    merge keeps, and the temporaries of one merge; `looking_bytes` are what diagnostics take beside them.
    """
    held, passing = 0, 0
    shared: dict[tuple[str, ...], int] = {}
    all_kinds = SiteKinds(adapters, sites, tensors)
    kinds = {names: all_kinds.of(names) for names in {merge.adapters for merge in merges}}
    files = max(map(all_kinds.file_bytes, kinds), default=0)
    for merge in merges:
        worst = _worst_site(merge, kinds[merge.adapters], all_kinds)
        held, passing = max(held, worst.held), max(passing, worst.passing)
        shared[merge.adapters] = max(shared.get(merge.adapters, 0), worst.shared)
    # A set of adapters is kept as long as one of its merges is in the group; at most one set per merge.
    sets = sorted(shared.values(), reverse=True)
    selecting = any(selects_over_model(get(merge.method), merge.parameters) for merge in merges)
    questions = QUESTIONS_AT_ONCE * QUESTION_BYTES if selecting else 0
    counting = RUNTIME_BYTES + STREAM_BYTES + files + passing + max(sets, default=0) + questions
    for size in range(min(MAX_GROUP, max(1, len(merges))), 0, -1):
        merging = files + passing + size * held + sum(sets[:size])
        peak = RUNTIME_BYTES + STREAM_BYTES + looking_bytes + merging
        if peak <= memory_bytes or size == 1:
            return size, max(peak, counting)
    raise AssertionError("unreachable: a group of one is always returned")


def _worst_site(merge: Merge, kinds: Iterable[Kind], all_kinds: SiteKinds) -> SiteBytes:
    method, space = get(merge.method), merge.parameters.get("space")
    sizes = []
    for shape, ranks, base_bytes in kinds:
        size = working_bytes(method, space, all_kinds.seen_by(method, shape), ranks)
        sizes.append(SiteBytes(size.shared + base_bytes, size.held, size.passing))
    return max(sizes, key=lambda size: size.total, default=SiteBytes(0, 0, 0))
