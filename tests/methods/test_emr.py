"""EMR-Merging. Numbers of the authors' code: github.com/harveyhuang18/EMR_Merging at
cc225ecb5589aae273dc10889676d94366cd34fc, made by `benchmarks/parity/emr.py`.
"""

import math

import pytest
import torch
from entrywise_cases import (
    CLOSE,
    SHAPES_AND_RANKS,
    SPACES,
    WEIGHTS,
    check_rows_in_any_block,
    check_zero_adapters,
    chunks_move,
    dora_error,
    float32_error,
    gauge_moves,
    in_space,
    merged_as,
    order_moves,
)
from method_cases import deltas, random_factors, relative, weighted

from ray_merge.algebra.bits import pack_rows, unpack_rows
from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import MethodError
from ray_merge.methods import registry
from ray_merge.methods.catalogue.emr import rescaler
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import get, resolve_parameters
from ray_merge.spec import Factor


def unified(weights=(1.0,) * 3, tie=0.0):
    """tau_u of dense coordinates."""

    def merged(values):
        own = weighted(values, weights[: len(values)])
        gamma = own.sum(0).sign()
        gamma = torch.where(gamma == 0, tie, gamma)
        return gamma * ((own * gamma > 0) * own.abs()).amax(0)

    return merged


def part(index, weights=(1.0,) * 3, tie=0.0):
    """rescale_i mask_i tau_u of dense coordinates."""

    def merged(values):
        elected = unified(weights, tie)(values)
        kept = elected * (values[index] * elected.sign() > 0)
        mass = kept.abs().sum()
        return kept * (values[index].abs().sum() / mass if mass else 1.0)

    return merged


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("space", SPACES)
def test_the_unified_update_and_every_adapter_are_those_of_the_formula(space, shape, ranks):
    factors = random_factors(shape, ranks)
    merged = merge_factors("emr", factors, weight=WEIGHTS, lambda_=0.6, space=space)
    assert relative(merged.dense(), 0.6 * in_space(space, factors, unified(WEIGHTS))) < CLOSE
    assert (merged.factors() is None) is (space == "dense")
    assert len(merged.per_adapter) == len(factors)
    for index, own in enumerate(merged.per_adapter):
        want = in_space(space, factors, part(index, WEIGHTS))
        assert float((own.dense() - want).norm()) < CLOSE * (1 + float(want.norm()))
        assert (own.factors() is None) is (space == "dense")


@pytest.mark.parametrize("space", SPACES)
def test_one_adapter_is_itself_whatever_its_weight(space):
    (factor,) = random_factors((24, 17), [3])
    merged = merge_factors("emr", [factor], weight=2.5, lambda_=0.4, space=space)
    assert relative(merged.dense(), deltas([factor])[0]) < CLOSE
    assert relative(merged.per_adapter[0].dense(), deltas([factor])[0]) < CLOSE
    assert merged.rescalers[0] == pytest.approx(1 / 2.5)


def test_adapters_that_share_no_entry_are_given_back_exactly():
    first, second = random_factors((24, 17), (3, 2))
    first.B[10:], second.B[:10] = 0.0, 0.0
    merged = merge_factors("emr", [first, second])
    assert relative(merged.dense(), deltas([first, second]).sum(0)) < CLOSE
    for own, want in zip(merged.per_adapter, deltas([first, second]), strict=True):
        assert relative(own.dense(), want) < CLOSE


def test_copies_of_one_adapter_are_that_adapter():
    factors = random_factors((24, 17), [3]) * 4
    merged = merge_factors("emr", factors)
    for delta in (merged, *merged.per_adapter):
        assert relative(delta.dense(), deltas(factors[:1])[0]) < CLOSE


def test_a_rescaler_gives_an_adapter_its_own_mean_magnitude():
    factors = random_factors((24, 17), (3, 5, 2))
    merged = merge_factors("emr", factors, weight=[0.5, 1.0, 3.0])
    for own, tau in zip(merged.per_adapter, deltas(factors), strict=True):
        assert float(own.dense().abs().sum()) == pytest.approx(float(tau.abs().sum()), rel=1e-12)


def entry(*values):
    """A 1 x 1 site whose adapters have these deltas."""
    return [Factor(torch.tensor([[float(value)]]), torch.ones(1, 1)) for value in values]


@pytest.mark.parametrize(
    ("values", "weights", "compat", "want", "parts"),
    [
        ((4, 3, -1), (1, 1, 1), "paper", 4, (4, 3, 0)),
        ((4, -3, -2), (1, 1, 1), "paper", -3, (0, -3, -2)),
        ((4, -4, 0), (1, 1, 1), "paper", 0, (0, 0, 0)),
        ((4, -4, 0), (1, 1, 1), "authors", -4, (0, -4, 0)),
        ((0, 0, 0), (1, 1, 1), "authors", 0, (0, 0, 0)),
        ((4, 3, 0), (1, 2, 1), "paper", 6, (4, 3, 0)),
        ((4, 3, 0), (1, 0, 1), "paper", 4, (4, 3, 0)),  # no vote, but it has a mask
        ((4, -3, 0), (1, -1, 1), "paper", 4, (4, 0, 0)),  # votes for the other sign, and is not given back
        (
            (1e-30, 2e-30, -1e-30),
            (1, 1, 1),
            "paper",
            2e-30,
            (1e-30, 2e-30, 0),
        ),  # whose products are 0 in float32
    ],
)
def test_who_wins_an_entry_and_who_is_given_back(values, weights, compat, want, parts):
    merged = merge_factors("emr", entry(*values), weight=list(weights), compat=compat)
    assert merged.dense().item() == pytest.approx(want)
    assert [own.dense().item() for own in merged.per_adapter] == [pytest.approx(part) for part in parts]


def test_an_adapter_that_loses_every_entry_is_zero_and_not_nan():
    merged = merge_factors("emr", entry(4, -1, -1))
    assert merged.rescalers == (1.0, 1.0, 1.0)
    assert rescaler(3.0, 0.0) == rescaler(0.0, 0.0) == 1.0
    assert [own.norm() for own in merged.per_adapter] == [4.0, 0.0, 0.0]


def test_lambda_is_for_the_unified_update_alone():
    factors = random_factors((24, 17), (3, 5, 2))
    one, half = (merge_factors("emr", factors, lambda_=lambda_) for lambda_ in (1.0, 0.5))
    assert torch.equal(half.dense(), 0.5 * one.dense())
    for mine, other in zip(one.per_adapter, half.per_adapter, strict=True):
        assert torch.equal(mine.dense(), other.dense())


def authors_model():
    """Two weights, whose last two adapters cancel in the first row: benchmarks/parity/emr.py."""
    sites = []
    for place, (rows, columns) in enumerate([(192, 192), (48, 96)]):
        generator = torch.Generator().manual_seed(3 + place)

        def normal(*shape, generator=generator):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        factors = [Factor(normal(rows, 8) / columns, normal(8, columns), 1.0) for _ in range(4)]
        for factor, first in zip(factors, (0.0, 0.0, -1.0, 1.0), strict=True):
            factor.B[0] = first
        factors[3].A.copy_(factors[2].A)
        sites.append(factors)
    return sites


@pytest.mark.parametrize(
    ("weight_share", "norms"),
    [
        (math.prod, (3.68080904099, 3.51415743983, 43.0872506603, 41.7562749539)),
        (lambda shape: 1, (3.66684618824, 3.60168334176, 39.722687193, 37.8701095255)),
    ],
    ids=["by tensor", "flat"],
)
def test_the_authors_numbers(weight_share, norms):
    merged = [merge_factors("emr", factors, compat="authors") for factors in authors_model()]
    assert math.hypot(*(delta.norm() for delta in merged)) == pytest.approx(45.5653255318, rel=1e-11)
    for index, norm in enumerate(norms):
        sums = torch.zeros(2, dtype=torch.float64)
        for delta in merged:
            looks = [delta.elected.look(i).sums[index] for i in range(delta.elected.space.n_chunks)]
            sums += torch.tensor(looks).double().sum(0) / weight_share(delta.shape)
        whole = rescaler(*sums.tolist())
        parts = [delta.per_adapter[index].norm() / delta.rescalers[index] * whole for delta in merged]
        # Their rescalers are float32.
        assert math.hypot(*parts) == pytest.approx(norm, rel=3e-7)


@pytest.mark.parametrize("space", SPACES)
def test_adapters_that_are_zero_are_harmless(space):
    check_zero_adapters("emr", space)
    nothing = [Factor(torch.zeros(6, 0), torch.zeros(0, 5))] * 2
    assert not any(own.dense().any() for own in merge_factors("emr", nothing, space=space).per_adapter)


@pytest.mark.parametrize("space", SPACES)
def test_the_order_of_adapters_does_not_matter(space):
    assert order_moves("emr", space, weight=WEIGHTS) < CLOSE
    factors, order = random_factors((24, 17), (3, 5, 2)), [2, 0, 1]
    one = merged_as("emr", factors, space=space).per_adapter
    other = merged_as("emr", [factors[i] for i in order], space=space).per_adapter
    for place, i in enumerate(order):
        assert relative(other[place].dense(), one[i].dense()) < CLOSE


def test_it_sees_deltas_and_in_core_space_also_the_gauge_of_their_factors():
    assert gauge_moves("emr", "dense") < 1e-9
    assert gauge_moves("emr", "knots") < 1e-9
    assert gauge_moves("emr", "core") > 1e-2


def test_rows_have_the_same_bits_in_any_block():
    check_rows_in_any_block("emr")
    own = merge_factors("emr", random_factors((18, 65_536), (2, 2), dtype=torch.float32)).per_adapter[1]
    assert torch.equal(own.rows(3, 18), own.dense()[3:18])


def test_the_grid_of_chunks_does_not_show(monkeypatch):
    factors = random_factors((24, 17), (3, 5, 2))
    whole = merge_factors("emr", factors).per_adapter[1].dense()
    assert chunks_move("emr", monkeypatch) < CLOSE
    assert relative(merge_factors("emr", factors).per_adapter[1].dense(), whole) < CLOSE


def test_the_deltas_of_other_merges_of_the_site_are_left_alone():
    site = SiteFactors(random_factors((24, 17), (3, 5, 2)))
    space = site.space("dense")
    before = [space.chunk(i, 0).clone() for i in range(3)]
    names = list("abc")
    given = registry.at_site(get("emr"), resolve_parameters(get("emr"), {}, names), names, "s")
    merged = merge_site("emr", site, given, names=names, site="s", seed=0)
    assert merged.dense().any()
    assert all(own.dense().any() for own in merged.per_adapter)
    assert all(torch.equal(space.chunk(i, 0), before[i]) for i in range(3))


def test_float32_factors_are_merged_in_float32():
    assert float32_error("emr", unified()) < 1e-5
    factors = random_factors((48, 40), (3, 5, 2), dtype=torch.float32)
    own = merge_factors("emr", factors).per_adapter[2].dense()
    assert own.dtype == torch.float32
    assert relative(own, part(2)(deltas(factors))) < 1e-5


def test_a_dora_delta_is_treated_like_any_other():
    assert dora_error("emr", unified()) < CLOSE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scope": "site"}, "scope is 'site', expected one of model, tensor"),
        ({"compat": "mergekit"}, "compat is 'mergekit', expected one of paper, authors"),
        ({"density": 0.2}, "emr has no parameter 'density'"),
        ({"weight": {"a": 1.0}}, "weight has no value for b"),
        ({"lambda": {"a": 1.0}}, "lambda has one value for all adapters"),
    ],
)
def test_bad_parameters_are_refused(given, message):
    with pytest.raises(MethodError, match=message):
        resolve_parameters(get("emr"), given, ["a", "b"])


def test_no_magnitudes_are_counted_over_the_model_for_its_scope():
    parameters = resolve_parameters(get("emr"), {}, ["a"])
    assert parameters["scope"] == "model"
    assert not registry.selects_over_model(get("emr"), parameters)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64])
def test_masks_are_packed_with_the_first_entry_in_the_lowest_bit(columns):
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    bits = pack_rows(mask)
    assert bits.shape == (5, -(-columns // 8))
    assert torch.equal(unpack_rows(bits, columns), mask)
    for row, packed in zip(mask.tolist(), bits.tolist(), strict=True):
        assert packed == [
            sum(bit << place for place, bit in enumerate(row[first : first + 8]))
            for first in range(0, columns, 8)
        ]
