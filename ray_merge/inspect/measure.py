"""Numbers of adapters and of pairs of adapters, site by site, from the factors alone.

Each update is decomposed once, in float64, while its site is looked at; nothing dense is made. Where an adapter
is DoRA, its low-rank part `s B A` is measured: the magnitude's delta depends on the base weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ray_merge.algebra.diagnose import (
    ThinSvd,
    chance_overlap,
    effective_rank,
    frobenius_norm,
    inner_product,
    norm_on_inputs_of,
    overlap,
    spectral_norm,
    thin_svd,
)
from ray_merge.spec import Adapter, FactorEntry, Site
from ray_merge.storage.store import Stores
from ray_merge.work.factors import AdapterFiles

TURNED = ("conv1d", "embedding")
"""Layouts whose weight is stored (in, out): they are turned back, so that outputs are lora_B's side everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteNumbers:
    """One adapter at one site; a number is None where it cannot be told.

    Args:
        site: disk name with a base, runtime name of the module without.
        layout: kind of layer; "" where only the base could tell.
        rank: of the factors.
        scale: alpha / r, or alpha / sqrt(r).
        norm: Frobenius norm of the delta s B A.
        spectral_norm: its largest singular value.
        effective_rank: exp of the entropy of its singular values; between 1 and the rank.
    """

    site: str
    layout: str
    rank: int
    scale: float | None = None
    norm: float | None = None
    spectral_norm: float | None = None
    effective_rank: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairNumbers:
    """Two adapters at one site, or over all sites that they share; None where an update is zero.

    Args:
        outputs: overlap of the column spaces (lora_B): mean squared cosine of the principal angles; over sites
            the mean.
        inputs: the same of the row spaces (lora_A).
        outputs_by_chance, inputs_by_chance: the mean overlap with a random subspace.
        cosine: <delta1, delta2> / (|delta1| |delta2|); over sites of the deltas taken together.
        on_first: interference of the second with the first: |delta2 P1| / |delta1|, P1 the projection on the
            inputs that the first reads. It takes the row space of the first's A for the inputs of its task, in
            equal strength; no data is used.
        on_second: the same of the first with the second.
    """

    outputs: float | None
    inputs: float | None
    outputs_by_chance: float | None
    inputs_by_chance: float | None
    cosine: float | None
    on_first: float | None
    on_second: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured: adapter -> numbers by site, and pair of adapters -> numbers by site."""

    sites: Mapping[str, Mapping[str, SiteNumbers]]
    pairs: Mapping[tuple[str, str], Mapping[str, PairNumbers]]
    totals: Mapping[tuple[str, str], PairNumbers]


@dataclass(frozen=True, slots=True)
class _Terms:
    """What the numbers of a pair are made of, at one site."""

    outputs: float | None
    inputs: float | None
    outputs_by_chance: float | None
    inputs_by_chance: float | None
    inner: float
    norms: tuple[float, float]
    onto: tuple[float, float]


def measure(
    adapters: Mapping[str, Adapter], sites: Mapping[str, Mapping[str, Site]], cache: Path, stores: Stores
) -> Measured:
    """Measure adapters whose numbers are known to be finite.

    Args:
        adapters: by name, in order.
        sites: adapter -> its sites by name.
        cache: the node's cache.
        stores: to read from.
    """
    low_rank = {name: _low_rank(adapter, sites[name]) for name, adapter in adapters.items()}
    names = list(dict.fromkeys(site for adapter in low_rank.values() for site in adapter.factors))
    found: dict[str, dict[str, SiteNumbers]] = {name: {} for name in adapters}
    terms: dict[tuple[str, str], dict[str, _Terms]] = {pair: {} for pair in combinations(adapters, 2)}
    with AdapterFiles(cache, low_rank, stores, device="cpu", dtype=torch.float64) as files:
        for site_name in names:
            parts: dict[str, tuple[Site, ThinSvd]] = {}
            for name, adapter in low_rank.items():
                if site_name not in adapter.factors:
                    continue
                site = sites[name][site_name]
                svd = _decomposed(files, name, site)
                found[name][site_name] = _site_numbers(adapter, site, svd)
                if svd is not None:
                    parts[name] = (site, svd)
            for pair in combinations(parts, 2):
                (one_site, one), (other_site, other) = (parts[name] for name in pair)
                if (one_site.shape, one_site.layout) == (other_site.shape, other_site.layout):
                    terms[pair][site_name] = _terms(one, other)
    return Measured(
        found,
        {
            pair: {site: _pair_numbers([part]) for site, part in parts.items()}
            for pair, parts in terms.items()
        },
        {pair: _pair_numbers(list(parts.values())) for pair, parts in terms.items()},
    )


def _low_rank(adapter: Adapter, sites: Mapping[str, Site]) -> Adapter:
    """The adapter without magnitudes and without biases, whose deltas are no product of thin factors."""
    factors = {
        name: FactorEntry(update.products, update.initial)
        for name, update in adapter.factors.items()
        if isinstance(update, FactorEntry) and sites[name].layout != "raw"
    }
    return replace(adapter, factors=factors)


def _no_base() -> Tensor:
    raise AssertionError("factors alone do not ask for the base")


def _decomposed(files: AdapterFiles, name: str, site: Site) -> ThinSvd | None:
    B_OR, A_RI = files.site([name], site, _no_base).pairs[0]
    if site.tensor and site.layout in TURNED:
        B_OR, A_RI = A_RI.T, B_OR.T
    try:
        return thin_svd(B_OR, A_RI)
    except OverflowError:
        return None


def _site_numbers(adapter: Adapter, site: Site, svd: ThinSvd | None) -> SiteNumbers:
    update = adapter.factors[site.name]
    assert isinstance(update, FactorEntry)
    known = SiteNumbers(site=site.name, layout=site.layout, rank=update.rank, scale=update.products[0].scale)
    if svd is None:
        return known
    return replace(
        known,
        norm=_finite(frobenius_norm(svd.S_K)),
        spectral_norm=spectral_norm(svd.S_K),
        effective_rank=effective_rank(svd.S_K),
    )


def _terms(one: ThinSvd, other: ThinSvd) -> _Terms:
    return _Terms(
        overlap(one.U_OK, other.U_OK),
        overlap(one.V_IK, other.V_IK),
        chance_overlap(one.U_OK, other.U_OK),
        chance_overlap(one.V_IK, other.V_IK),
        inner_product(one, other),
        (frobenius_norm(one.S_K), frobenius_norm(other.S_K)),
        (norm_on_inputs_of(other, one), norm_on_inputs_of(one, other)),
    )


def _pair_numbers(parts: Sequence[_Terms]) -> PairNumbers:
    first, second = (math.hypot(*(part.norms[index] for part in parts)) for index in (0, 1))
    on_first, on_second = (math.hypot(*(part.onto[index] for part in parts)) for index in (0, 1))
    return PairNumbers(
        outputs=_mean([part.outputs for part in parts]),
        inputs=_mean([part.inputs for part in parts]),
        outputs_by_chance=_mean([part.outputs_by_chance for part in parts]),
        inputs_by_chance=_mean([part.inputs_by_chance for part in parts]),
        cosine=_ratio(sum(part.inner for part in parts), first * second),
        on_first=_ratio(on_first, first),
        on_second=_ratio(on_second, second),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _ratio(value: float, by: float) -> float | None:
    return _finite(value / by) if by and math.isfinite(by) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
