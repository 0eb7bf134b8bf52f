"""Fisher merging against the formula on dense deltas, in float64."""

import dataclasses

import pytest
import torch
from method_cases import deltas, random_factors, relative, weighted

from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import MethodError
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import at_site, get, resolve_parameters
from ray_merge.spec import Factor

CLOSE = 1e-12

CASES = [
    ((24, 17), (3, 5, 2)),
    ((17, 24), (0, 4, 0)),
    ((5, 4), (7, 1, 3)),
    ((8, 9), (0, 0, 0)),
    ((1, 1), (1,)),
    ((600, 900), (2,) * 3),  # more than one chunk of rows
    ((13, 11), (2,) * 8),
]

GIVEN = [
    {},
    {"epsilon": 0.5},
    {"normalize": False, "epsilon": 0.1},
    {"floor": "absolute", "epsilon": 1e-3},
    {"floor": "absolute", "normalize": False},
]


def random_fishers(shape, count: int, seed: int = 6) -> list[torch.Tensor]:
    """Squares over several decades, of another scale in each task."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(10.0**-task * normal() * normal().exp()).square() for task in range(count)]


def dense(taus, fishers, weight, *, normalize=True, epsilon=1e-6, floor="relative"):
    norms = [F.norm() if normalize else torch.tensor(1.0) for F in fishers]
    if floor == "absolute":
        shares = [
            w * (F + epsilon) / (n + epsilon * normalize)
            for w, F, n in zip(weight, fishers, norms, strict=True)
        ]
    else:
        units = [F / n for F, n in zip(fishers, norms, strict=True)]
        mean = torch.stack(units).mean()
        shares = [w * (F + epsilon * mean) for w, F in zip(weight, units, strict=True)]
    return sum(s * tau for s, tau in zip(shares, taus, strict=True)) / sum(shares)


@pytest.mark.parametrize(("shape", "ranks"), CASES)
@pytest.mark.parametrize("given", GIVEN)
def test_entries_are_averaged_by_their_fisher_information(shape, ranks, given):
    factors, fishers = random_factors(shape, ranks), random_fishers(shape, len(ranks))
    weight = [0.5 + place for place in range(len(ranks))]
    merged = merge_factors("fisher", factors, moments=fishers, weight=weight, lambda_=0.7, **given)
    want = 0.7 * dense(deltas(factors), fishers, weight, **given)
    assert relative(merged.dense(), want) < CLOSE
    assert torch.equal(merged.rows(0, 1), merged.dense()[:1])
    assert merged.factors() is None


@pytest.mark.parametrize("n_adapters", range(1, 9))
@pytest.mark.parametrize("given", GIVEN)
def test_equal_information_gives_the_mean(n_adapters, given):
    factors = random_factors((6, 12), [2] * n_adapters)
    fishers = random_fishers((6, 12), 1) * n_adapters
    merged = merge_factors("fisher", factors, moments=fishers, **given)
    assert relative(merged.dense(), deltas(factors).mean(0)) < CLOSE


def test_a_scale_of_its_own_matters_only_without_normalize():
    factors, fishers = random_factors((6, 12), (2, 3)), random_fishers((6, 12), 2)
    scaled = [fishers[0] * 1e-8, fishers[1] * 1e4]
    merged = merge_factors("fisher", factors, moments=fishers).dense()
    assert relative(merge_factors("fisher", factors, moments=scaled).dense(), merged) < CLOSE
    plain = merge_factors("fisher", factors, moments=scaled, normalize=False).dense()
    assert relative(plain, deltas(factors)[1]) < 0.01


def test_what_nothing_depends_on_is_averaged_by_weight_and_the_rest_decided_by_one():
    factors = random_factors((4, 6), (2, 2))
    fishers = [torch.zeros(4, 6, dtype=torch.float64) for _ in factors]
    fishers[0][:, :2] = 3.0
    fishers[1][:, 2:4] = 0.5
    first, second = deltas(factors)
    mean = 0.25 * first + 0.75 * second
    want = torch.cat([first[:, :2], second[:, 2:4], mean[:, 4:]], dim=1)
    merged = merge_factors("fisher", factors, moments=fishers, weight=[1, 3], epsilon=1e-10)
    assert relative(merged.dense(), want) < 1e-8
    nothing = [torch.zeros(4, 6)] * 2
    assert relative(merge_factors("fisher", factors, moments=nothing, weight=[1, 3]).dense(), mean) < CLOSE


def test_a_published_floor_hides_small_information_and_the_relative_one_does_not():
    factors = random_factors((6, 12), (2, 3))
    fishers = [1e-12 * F / F.norm() for F in random_fishers((6, 12), 2)]
    mean, want = deltas(factors).mean(0), dense(deltas(factors), fishers, [1.0, 1.0])
    merged = merge_factors("fisher", factors, moments=fishers)
    published = merge_factors("fisher", factors, moments=fishers, floor="absolute")
    assert relative(published.dense(), mean) < 1e-5
    assert relative(merged.dense(), want) < CLOSE
    assert relative(merged.dense(), mean) > 0.3


def test_an_adapter_that_does_not_touch_the_site_still_counts():
    factors, fishers = random_factors((5, 6), (2, 0)), random_fishers((5, 6), 2)
    merged = merge_factors("fisher", factors, moments=fishers).dense()
    assert relative(merged, dense(deltas(factors), fishers, [1.0, 1.0])) < CLOSE
    assert relative(merged, deltas(factors)[0]) > 0.1
    alone = merge_factors("fisher", factors, moments=fishers, weight=[1.0, 0.0]).dense()
    assert relative(alone, deltas(factors)[0]) < CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-40, 1e30])
def test_float32_holds_information_of_any_scale(dtype, scale):
    factors = random_factors((24, 17), (3, 5, 2), dtype=dtype)
    fishers = [(scale * F / F.max()).float() for F in random_fishers((24, 17), 3)]
    merged = merge_factors("fisher", factors, moments=fishers)
    assert merged.dense().dtype == torch.float32
    assert relative(merged.dense(), dense(deltas(factors), [F.double() for F in fishers], [1.0] * 3)) < 1e-6


def test_a_dora_delta_is_averaged_like_any_other():
    plain, dora = random_factors((7, 9), (3, 2))
    base = torch.randn(7, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    magnitude = torch.arange(1.0, 8, dtype=torch.float64)[:, None]
    dora = dataclasses.replace(dora, magnitude=magnitude)
    V = base + dora.scale * dora.B @ dora.A
    taus = [deltas([plain])[0], magnitude * V / V.norm(dim=1, keepdim=True) - base]
    fishers = random_fishers((7, 9), 2)
    merged = merge_factors("fisher", [plain, dora], base=base, moments=fishers)
    assert relative(merged.dense(), dense(taus, fishers, [1.0, 1.0])) < CLOSE


class Exact:
    """Rows, and the norm over all weights of the adapter."""

    def __init__(self, F, norm):
        self.F, self.norm = F, norm

    def rows(self, start, stop):
        return self.F[start:stop]


class Stored(Exact):
    """In float32, as files have them."""

    def rows(self, start, stop):
        return self.F[start:stop].float()


def merge(site, inputs, **given):
    names = [str(place) for place in range(len(site))]
    parameters = at_site(get("fisher"), resolve_parameters(get("fisher"), given, names), names, "s")
    return merge_site("fisher", site, parameters, names=names, site="layers.0.q", seed=0, inputs=inputs)


@pytest.mark.parametrize("floor", ["relative", "absolute"])
def test_the_norm_is_that_of_all_weights_and_not_of_the_site(floor):
    factors = random_factors((5, 6), (2, 3))
    fishers = [F.float().double() for F in random_fishers((5, 6), 2)]
    inputs = {"moments": [Stored(F, 2.0 + place) for place, F in enumerate(fishers)]}
    merged = merge(SiteFactors(factors), inputs, floor=floor)
    if floor == "absolute":
        shares = [(F + 1e-6) / (2.0 + place + 1e-6) for place, F in enumerate(fishers)]
    else:
        mean = (fishers[0].mean() / 2 + fishers[1].mean() / 3) / 2
        shares = [F / (2.0 + place) + 1e-6 * mean for place, F in enumerate(fishers)]
    want = sum(s * tau for s, tau in zip(shares, deltas(factors), strict=True)) / sum(shares)
    assert relative(merged.dense(), want) < CLOSE


def test_a_site_without_information_is_refused_or_averaged_where_that_was_asked_for():
    factors = random_factors((5, 6), (2, 3))
    with pytest.raises(
        MethodError, match=r"no statistics of data at layers\.0\.q.*`without_moments: average`"
    ):
        merge(SiteFactors(factors), {})
    merged = merge(SiteFactors(factors), {}, without_moments="average", weight={"0": 3, "1": 1})
    assert relative(merged.dense(), weighted(deltas(factors), [0.75, 0.25]).sum(0)) < CLOSE


def test_without_any_information_factors_are_averaged_where_that_was_asked_for():
    factors = random_factors((5, 6), (2, 3))
    mean = merge_factors("fisher", factors, without_moments="average", weight=[3, 1]).dense()
    assert relative(mean, weighted(deltas(factors), [0.75, 0.25]).sum(0)) < CLOSE


F = torch.ones(5, 6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "fisher needs `moments`"),
        ({"moments": [F]}, "one for each of 2 factors; got 1 of them"),
        (
            {"moments": [F, F.T]},
            r"moments\[1\] is torch.float32 \(6, 5\), expected a floating tensor \(5, 6\)",
        ),
        ({"moments": [F, F.long()]}, r"moments\[1\] is torch.int64"),
        ({"moments": [F, 3]}, r"moments\[1\] is a int"),
        ({"moments": [F, -F]}, r"moments\[1\] holds NaN, Inf or negative numbers"),
        ({"moments": [F, F / 0]}, r"moments\[1\] holds NaN, Inf or negative numbers"),
        (
            {"moments": [F, F.double() * 1e300]},
            r"moments\[1\] goes up to 1e\+300, expected 0 or 1e-150 to 1e\+32",
        ),
        ({"moments": [F, F.double() * 1e-300]}, r"moments\[1\] goes up to 1e-300, expected 0 or"),
        ({"moments": [F, F], "epsilon": 0}, "epsilon is 0, expected"),
        (
            {"moments": [F, F], "labels": "true"},
            "labels is 'true', expected one of expected, sampled, empirical",
        ),
        ({"moments": [F, F], "weight": [0, 0]}, "fisher: the weights are all 0"),
        ({"moments": [F, F], "weight": [1, -1]}, "weight for 1 is -1"),
    ],
)
def test_what_cannot_be_merged_is_refused(given, message):
    with pytest.raises(MethodError, match=message):
        merge_factors("fisher", random_factors((5, 6), (2, 3)), **given)


# Printed by `benchmarks/parity/fisher.py`, fusion_bench 54c9e8c9d9621620c720452cd8533332a32d3689 in float64.
# weights, normalize, their norm at the first of two sites, their entry [3, 5]
PARITY = [
    ([0.25] * 4, True, 3.7120998859, 0.023915225232),
    ([0.25] * 4, False, 3.83079275949, 0.0647992960992),
    ([0.4, 0.3, 0.2, 0.1], True, 3.49718016592, 0.0225604349151),
    ([0.4, 0.3, 0.2, 0.1], False, 3.85954142375, 0.0650272477389),
]


@pytest.mark.parametrize(("weight", "normalize", "norm", "entry"), PARITY)
def test_fisher_gives_fusion_benchs_numbers(weight, normalize, norm, entry):
    def generator(seed):
        drawn = torch.Generator().manual_seed(seed)
        return lambda *size: torch.randn(*size, generator=drawn, dtype=torch.float64)

    normal = generator(3)
    factors = [Factor(normal(96, 8) / 48, normal(8, 48), 1.0) for _ in range(4)]
    of_sites = []
    for seed in (4, 5):
        normal = generator(seed)
        scales = [0.1 ** (1 + task) for task in range(4)]
        of_sites.append([(scale * normal(96, 48) * normal(96, 48).exp()).square() for scale in scales])
    norms = [float(torch.stack(both).norm()) for both in zip(*of_sites, strict=True)]
    inputs = {"moments": [Exact(F, own) for F, own in zip(of_sites[0], norms, strict=True)]}
    named = {str(place): own for place, own in enumerate(weight)}
    merged = merge(SiteFactors(factors), inputs, weight=named, normalize=normalize, floor="absolute")
    # The recorded numbers have 12 digits; theirs is a difference of weights of entries of about 1.
    assert merged.norm() == pytest.approx(norm, rel=1e-11)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=1e-10)
