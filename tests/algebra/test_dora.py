"""DoRA against its formula, m * V / |V| - W with V = W + s B A, in float64."""

import pytest
import torch
from algebra_cases import random_factors

from ray_merge.algebra.dora import dora_gain, dora_rows
from ray_merge.algebra.grid import chunk_rows, chunk_spans
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.registry import at_site, get, resolve_parameters
from ray_merge.spec import Factor

SHAPES = [(24, 17), (17, 24), (1, 9), (9, 1), (1, 1), (40, 70_001)]
"""The last one is computed in three chunks of rows."""


def case(shape, axis, rank=3, seed=0, dtype=torch.float64):
    """W, a DoRA factor whose magnitude is of rows (axis 1) or columns (axis 0), and the delta it means."""
    generator = torch.Generator().manual_seed(seed)
    (plain,) = random_factors(shape, [rank], seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    size = (shape[0], 1) if axis == 1 else (1, shape[1])
    magnitude = (1 + torch.rand(size, generator=generator, dtype=torch.float64)).to(dtype)
    factor = Factor(plain.B.to(dtype), plain.A.to(dtype), plain.scale, magnitude)
    return base, factor, formula(base, factor)


def formula(base, factor):
    W, B, A = (tensor.double() for tensor in (base, factor.B, factor.A))
    V = W + factor.scale * (B @ A)
    axis = 1 if factor.magnitude.shape == (W.shape[0], 1) else 0
    norm = torch.sqrt((V * V).sum(dim=axis, keepdim=True))
    return factor.magnitude.double() * V / norm - W


def all_rows(delta):
    return torch.cat([delta.rows(start, stop) for start, stop in chunk_spans(delta.shape)])


@pytest.mark.parametrize("axis", [1, 0], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_adapter_is_the_formula(shape, axis):
    base, factor, want = case(shape, axis)
    site = SiteFactors([factor], base)
    got = all_rows(site.sum([1.0]))
    assert got.dtype == torch.float64
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("axis", [1, 0], ids=["rows", "columns"])
def test_gain_and_rows_are_the_parts_of_the_formula(axis):
    base, factor, want = case((40, 70_001), axis)
    right = factor.A * factor.scale
    gain = dora_gain(base, factor.B, right, factor.magnitude)
    assert gain.shape == factor.magnitude.shape
    V = base + factor.B @ right
    assert torch.allclose(gain * V.norm(dim=axis, keepdim=True), factor.magnitude, rtol=1e-12)
    step = chunk_rows(base.shape[1])
    assert step < 40
    for index in range(-(-40 // step)):
        rows = dora_rows(base, factor.B, right, gain, index)
        assert torch.allclose(rows, want[index * step : (index + 1) * step], rtol=1e-11, atol=1e-11)


def test_float32_and_a_rounded_base_are_taken_as_they_are():
    base, factor, _ = case((24, 17), 1, dtype=torch.float32)
    base = base.bfloat16()
    got = all_rows(SiteFactors([factor], base).sum([1.0]))
    assert got.dtype == torch.float32
    want = formula(base, factor)
    assert float((got.double() - want).norm() / want.norm()) < 1e-6


def test_a_small_change_of_a_large_weight_keeps_its_digits():
    # gain * V - W would lose what (gain - 1) W + gain B A keeps: here gain is 1 and the delta is s B A alone.
    (plain,) = random_factors((8, 6), [2], dtype=torch.float32)
    base = torch.full((8, 6), 1e4)
    small = plain.B * 1e-6
    V = base.double() + plain.scale * (small.double() @ plain.A.double())
    factor = Factor(small, plain.A, plain.scale, V.norm(dim=1, keepdim=True).float())
    got = all_rows(SiteFactors([factor], base).sum([1.0])).double()
    want = formula(base, factor)
    off = float((got - want).abs().max())
    naive = (factor.magnitude * (V.float() / V.float().norm(dim=1, keepdim=True)) - base).double()
    assert off < 0.05 * float((naive - want).abs().max())


def test_a_row_of_zeros_gives_no_number_as_in_peft():
    base = torch.zeros(3, 4)
    factor = Factor(torch.zeros(3, 1), torch.zeros(1, 4), 1.0, torch.ones(3, 1))
    assert not torch.isfinite(SiteFactors([factor], base).sum([1.0]).rows(0, 3)).any()


def merged(name, site, names, **parameters):
    method = get(name)
    return merge_site(
        name,
        site,
        at_site(method, resolve_parameters(method, parameters, names), names, "s"),
        names=names,
        site="s",
        seed=0,
    )


@pytest.mark.parametrize("axis", [1, 0], ids=["rows", "columns"])
def test_each_of_several_is_taken_against_the_original_base(axis):
    shape, weights = (24, 17), (0.7, -0.4, 0.3)
    base, one, tau_one = case(shape, axis, seed=1)
    _, other, _ = case(shape, axis, rank=5, seed=2)
    (plain,) = random_factors(shape, [4], seed=3)
    untouched = Factor(torch.empty(shape[0], 0).double(), torch.empty(0, shape[1]).double())
    tau_other, tau_plain = formula(base, other), plain.scale * (plain.B @ plain.A)
    site = SiteFactors([one, other, plain, untouched], base)
    names = ("one", "other", "plain", "untouched")
    given = dict(zip(names, (*weights, 5.0), strict=True))
    got = all_rows(merged("task_arithmetic", site, names, weight=given, **{"lambda": 0.5}))
    want = 0.5 * (weights[0] * tau_one + weights[1] * tau_other + weights[2] * tau_plain)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    one_after_another = formula(base + tau_one, other)
    assert float((tau_other - one_after_another).norm() / tau_other.norm()) > 0.01


@pytest.mark.parametrize("axis", [1, 0], ids=["rows", "columns"])
def test_ties_in_dense_space_sees_the_entries_of_the_formula(axis):
    shape = (24, 17)
    base, one, tau_one = case(shape, axis, seed=1)
    _, other, _ = case(shape, axis, seed=2)
    taus = torch.stack([tau_one, formula(base, other)])
    got = all_rows(
        merged("ties", SiteFactors([one, other], base), ("one", "other"), scope="tensor", density=0.5)
    )
    kept = torch.zeros_like(taus)
    for index, tau in enumerate(taus):
        order = tau.flatten().abs().argsort(descending=True)[: int(0.5 * tau.numel())]
        kept[index].view(-1)[order] = tau.flatten()[order]
    agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    want = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    assert torch.allclose(got, want, rtol=1e-11, atol=1e-11)


def test_dare_that_drops_nothing_is_the_sum():
    base, one, tau_one = case((24, 17), 1, seed=1)
    _, other, _ = case((24, 17), 1, seed=2)
    site = SiteFactors([one, other], base)
    got = all_rows(merged("dare_linear", site, ("one", "other"), density=1.0))
    assert torch.allclose(got, tau_one + formula(base, other), rtol=1e-12, atol=1e-12)


def test_a_dense_delta_has_no_factors_and_no_other_space():
    base, factor, _ = case((9, 8), 1)
    site = SiteFactors([factor], base)
    assert site.is_dense
    assert site.sum([1.0]).factors() is None
    for space in ("core", "knots"):
        with pytest.raises(ValueError, match="use space: dense"):
            site.space(space)


@pytest.mark.parametrize("base", [None, torch.zeros(8, 9)])
def test_a_magnitude_needs_its_base_weight(base):
    _, factor, _ = case((9, 8), 1)
    with pytest.raises(ValueError, match="needs its base weight"):
        SiteFactors([factor], base)


def test_plain_factors_need_no_base_and_stay_factors():
    site = SiteFactors(random_factors((9, 8), [2, 3]))
    assert not site.is_dense
    assert site.sum([1.0, 2.0]).factors() is not None
