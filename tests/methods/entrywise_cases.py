"""What every rule over entries has to satisfy, and the spaces to try it in; references come from the callers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from method_cases import core_dense, deltas, knots_dense, random_factors, relative
from torch import Tensor

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import at_site, get, resolve_parameters
from ray_merge.spec import Factor

CLOSE = 1e-10
SPACES = ["dense", "core", "knots"]
SHAPES_AND_RANKS = [
    ((24, 17), (3, 5, 2)),
    ((17, 24), (0, 4, 1)),
    ((6, 40), (4, 4, 4)),
    ((5, 4), (7, 1, 3)),
    ((1, 1), (1, 1, 1)),
]
NAMES = ("a", "b", "c")
WEIGHTS, DENSITY = [0.5, -1.0, 2.0], [0.2, 0.5, 1.0]

Reference = Callable[[Tensor], Tensor]
"""(T, P, Q) coordinates -> merged coordinates (P, Q)."""


def in_space(space: str, factors: Sequence[Factor], reference: Reference) -> Tensor:
    """The (O, I) update that `reference` gives on coordinates that were made from dense deltas."""
    if space == "dense":
        return reference(deltas(factors))
    if space == "knots":
        U, coordinates = knots_dense(deltas(factors))
        return U @ reference(coordinates)
    U, M, Vt = core_dense(factors)
    return U @ reference(M) @ Vt


def merged_as(
    method: str,
    factors: Sequence[Factor],
    names: Sequence[str] = NAMES,
    site: str = "layers.0",
    seed: int = 3,
    thresholds: Any = None,
    **given: Any,
) -> Delta:
    """What a worker does, with names, a site and thresholds from elsewhere."""
    declared = get(method)
    values = {
        key: by_name(names, value) if isinstance(value, list) else value for key, value in given.items()
    }
    parameters = at_site(declared, resolve_parameters(declared, values, names), names, site)
    return merge_site(
        method, SiteFactors(factors), parameters, names=names, site=site, seed=seed, thresholds=thresholds
    )


def by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return dict(zip(names, values, strict=True))


def other_gauge(factors: Sequence[Factor]) -> list[Factor]:
    """B G and G^-1 A: the same deltas by other factors."""
    generator = torch.Generator().manual_seed(9)
    turned = []
    for factor in factors:
        rank = factor.B.shape[1]
        G = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        turned.append(Factor(factor.B @ G, torch.linalg.solve(G, factor.A), factor.scale))
    return turned


def gauge_moves(method: str, space: str, **given: Any) -> float:
    """How far another gauge of the same deltas moves the result, relative."""
    factors = random_factors((24, 17), (3, 5, 2))
    got = merge_factors(method, other_gauge(factors), space=space, **given).dense()
    return relative(got, merge_factors(method, factors, space=space, **given).dense())


def order_moves(method: str, space: str, **given: Any) -> float:
    """How far another order of the adapters moves the result, relative."""
    factors, order = random_factors((24, 17), (3, 5, 2)), [2, 0, 1]
    shuffled = {
        key: [value[i] for i in order] if isinstance(value, list) else value for key, value in given.items()
    }
    names = [NAMES[i] for i in order]
    other = merged_as(method, [factors[i] for i in order], names, space=space, **shuffled)
    return relative(other.dense(), merged_as(method, factors, space=space, **given).dense())


def check_zero_adapters(method: str, space: str, **given: Any) -> None:
    """Fresh adapters, adapters that do not touch the site, and one beside a trained one."""
    fresh = [Factor(torch.zeros(6, 2), torch.randn(2, 5, generator=torch.Generator().manual_seed(1)))] * 2
    assert not merge_factors(method, fresh, space=space, **given).dense().any()
    nothing = [Factor(torch.zeros(6, 0), torch.zeros(0, 5))] * 2
    merged = merge_factors(method, nothing, space=space, **given)
    assert not merged.dense().any()
    assert merged.norm() == 0.0
    (trained,) = random_factors((6, 5), [2], dtype=torch.float32)
    beside = merge_factors(method, [fresh[0], trained, nothing[0]], space=space, **given).dense()
    assert torch.isfinite(beside).all()


def check_rows_in_any_block(method: str, **given: Any) -> None:
    """Two chunks of the grid: rows have the bits of the whole."""
    delta = merge_factors(method, random_factors((18, 65_536), (2, 2), dtype=torch.float32), **given)
    dense = delta.dense()
    assert dense.any()
    for start, stop in [(15, 17), (3, 18)]:
        assert torch.equal(delta.rows(start, stop), dense[start:stop])


def chunks_move(method: str, monkeypatch: Any, **given: Any) -> float:
    """How far a grid of two-row chunks moves the result of a site that is one chunk, relative."""
    factors = random_factors((24, 17), (3, 5, 2))
    whole = merge_factors(method, factors, **given).dense()
    for module in ("grid", "spaces", "delta", "site"):
        monkeypatch.setattr(f"ray_merge.algebra.{module}.chunk_rows", lambda columns: 2)
    return relative(merge_factors(method, factors, **given).dense(), whole)


def float32_error(method: str, reference: Reference, **given: Any) -> float:
    """Float32 factors against the reference on the same numbers in float64, relative."""
    factors = random_factors((48, 40), (3, 5, 2), dtype=torch.float32)
    merged = merge_factors(method, factors, **given).dense()
    assert merged.dtype == torch.float32
    return relative(merged, reference(deltas(factors)))


def dora_error(method: str, reference: Reference, **given: Any) -> float:
    """One DoRA adapter among two: its delta is m (W + BA) / |W + BA| - W, rows normalised; relative error."""
    plain, dora = random_factors((12, 10), (3, 2))
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(12, 10, generator=generator, dtype=torch.float64)
    magnitude = torch.rand(12, 1, generator=generator, dtype=torch.float64) + 0.5
    tuned = base + deltas([dora])[0]
    delta = magnitude * tuned / tuned.norm(dim=1, keepdim=True) - base
    factors = [plain, Factor(dora.B, dora.A, dora.scale, magnitude)]
    merged = merge_factors(method, factors, base=base, **given).dense()
    return relative(merged, reference(torch.stack([deltas([plain])[0], delta])))
