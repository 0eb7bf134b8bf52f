"""Consensus merging. Numbers of the authors' code: github.com/nik-dim/tall_masks at
d10af8b21383322367fb35474bd9cd0f9ebe9ecf, made by `benchmarks/parity/tall.py`.
"""

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
from method_cases import deltas, random_factors, relative, trim_dense, weighted

from ray_merge.errors import MethodError
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import get, resolve_parameters
from ray_merge.spec import Factor

METHODS = ["consensus", "consensus_ties"]
FACTORS, DENSITY = [0.2, 0.5, 1.5], [0.3, 0.6, 0.2]


def elected_sum(kept):
    """The sum of the entries whose sign is that of the sum."""
    return (kept * (kept.sign() == kept.sum(0).sign())).sum(0)


def reference(method, weights=(1.0,) * 3, factors=(0.4,) * 3, votes=2, density=(0.2,) * 3):
    def merged(values):
        n = len(values)
        own = weighted(values, weights[:n])
        kept = weighted(trim_dense(values, density[:n]), weights[:n])
        total = own.sum(0) if method == "consensus" else elected_sum(kept)
        claims = own.abs() >= weighted((total - own).abs(), factors[:n])
        return total * (claims.sum(0) >= votes)

    return merged


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("votes", [1, 2, 3])
def test_entries_that_enough_adapters_claim_are_kept(method, space, shape, ranks, votes):
    factors = random_factors(shape, ranks)
    given = {"density": DENSITY} if method == "consensus_ties" else {}
    merged = merge_factors(
        method, factors, weight=WEIGHTS, mask_lambda=FACTORS, votes=votes, lambda_=0.6, space=space, **given
    )
    rule = reference(method, WEIGHTS, FACTORS, votes, DENSITY)
    assert relative(merged.dense(), 0.6 * in_space(space, factors, rule)) < CLOSE
    assert (merged.factors() is None) is (space == "dense")


@pytest.mark.parametrize("space", SPACES)
def test_entries_that_need_no_votes_are_all_kept(space):
    factors = random_factors((24, 17), (3, 5, 2))
    given = {"weight": WEIGHTS, "lambda_": 0.6}
    want = merge_factors("task_arithmetic", factors, **given).dense()
    assert relative(merge_factors("consensus", factors, votes=0, space=space, **given).dense(), want) < CLOSE
    ties = merge_factors("ties", factors, space=space, compat="mergekit", normalize=False, **given).dense()
    merged = merge_factors("consensus_ties", factors, votes=0, space=space, **given)
    assert relative(merged.dense(), ties) < CLOSE


def test_everyone_claims_everything_at_a_factor_of_zero():
    factors = random_factors((24, 17), (3, 5, 2))
    want = merge_factors("task_arithmetic", factors).dense()
    assert relative(merge_factors("consensus", factors, mask_lambda=0.0, votes=3).dense(), want) < CLOSE


def entry(*values):
    """A 1 x 1 site whose adapters have these deltas."""
    return [Factor(torch.tensor([[float(value)]]), torch.ones(1, 1)) for value in values]


@pytest.mark.parametrize(
    ("values", "votes", "want"),
    [
        ((4, 1), 1, 5),  # 4 against 1: claimed once, because 1 < 0.5 * 4
        ((4, 1), 2, 0),
        ((4, 2), 2, 6),  # 2 >= 0.5 * 4: an exact tie is a claim
        ((4, -3, 1), 2, 2),  # |4| >= 0.5 * |2 - 4|, |-3| >= 0.5 * |2 + 3|, |1| >= 0.5 * |2 - 1|
        ((4, -3, 0), 3, 0),  # an adapter without a part claims nothing where the others leave something
    ],
)
def test_who_claims_an_entry(values, votes, want):
    merged = merge_factors("consensus", entry(*values), mask_lambda=0.5, votes=votes)
    assert merged.dense().item() == want


def test_claims_are_made_with_whole_deltas_and_not_with_trimmed_ones():
    # Entry 1 of the second adapter is trimmed, but it is as large as what the election leaves there.
    first, second = (
        Factor(torch.tensor([[1.0], [2.0]]), torch.ones(1, 1)),
        Factor(torch.tensor([[5.0], [2.0]]), torch.ones(1, 1)),
    )
    merged = merge_factors("consensus_ties", [first, second], density=0.5, votes=2, mask_lambda=0.9)
    assert merged.dense().flatten().tolist() == [0.0, 2.0]


def test_thresholds_from_the_whole_model_take_the_place_of_the_site():
    factors = random_factors((24, 17), (3, 5, 2))
    values, thresholds = deltas(factors), [1.0, 0.0, 2.0]
    merged = merged_as("consensus_ties", factors, thresholds=[(t,) for t in thresholds], scope="tensor")
    total = elected_sum(torch.stack([v * (v.abs() >= t) for v, t in zip(values, thresholds, strict=True)]))
    claims = (values.abs() >= 0.4 * (total - values).abs()).sum(0)
    assert relative(merged.dense(), total * (claims >= 2)) < CLOSE


@pytest.mark.parametrize(("compat", "count"), [("paper", 5), ("authors", 6)])
def test_how_many_entries_take_part_in_the_election(compat, count):
    values = {"density": {"a": 0.25}, "compat": compat}
    assert get("consensus_ties").counts(values, "a", 20) == (count,)
    assert get("consensus").counts is None


@pytest.mark.parametrize(
    ("method", "given", "norm", "kept"),
    [
        ("consensus", {"votes": 2}, 1.5187236053, 0.8721),
        ("consensus_ties", {"votes": 1, "density": 0.2, "compat": "authors"}, 1.54744662759, 0.5899),
    ],
)
def test_the_authors_numbers(method, given, norm, kept):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = [Factor(normal(192, 8) / 192, normal(8, 192), 1.0) for _ in range(4)]
    merged = merge_factors(method, factors, mask_lambda=[0.2, 0.3, 0.4, 0.5], lambda_=0.3, **given)
    assert merged.norm() == pytest.approx(norm, rel=1e-10)
    assert float((merged.dense() != 0).double().mean()) == pytest.approx(kept, abs=5e-5)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_are_zero_are_harmless(method, space):
    check_zero_adapters(method, space)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_matter(method, space):
    assert order_moves(method, space, weight=WEIGHTS, mask_lambda=FACTORS, scope="tensor") < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_it_sees_deltas_and_in_core_space_also_the_gauge_of_their_factors(method):
    assert gauge_moves(method, "dense") < 1e-9
    assert gauge_moves(method, "knots") < 1e-9
    assert gauge_moves(method, "core") > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_rows_have_the_same_bits_in_any_block(method):
    check_rows_in_any_block(method)


@pytest.mark.parametrize("method", METHODS)
def test_the_grid_of_chunks_does_not_show(method, monkeypatch):
    assert chunks_move(method, monkeypatch) < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_float32_factors_are_merged_in_float32(method):
    assert float32_error(method, reference(method)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_dora_delta_is_treated_like_any_other(method):
    assert dora_error(method, reference(method)) < CLOSE


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("consensus", {"votes": 3}, "votes is 3, but the merge has 2 adapters.* write `votes: 2` or less"),
        (
            "consensus_ties",
            {"votes": 3, "weight": [{"filter": "mlp", "value": 1}, {"value": 2}]},
            "votes is 3, but the merge has 2",
        ),
        ("consensus", {"votes": 1.5}, "votes is 1.5, expected a whole number"),
        ("consensus", {"votes": -1}, "votes is -1, expected a number in"),
        ("consensus", {"mask_lambda": -0.1}, r"mask_lambda .*is -0.1, expected a number in \[0, inf\)"),
        (
            "consensus_ties",
            {"compat": "authors", "weight": {"a": 1, "b": 2}},
            "has one weight for all adapters",
        ),
    ],
)
def test_bad_parameters_are_refused(method, given, message):
    with pytest.raises(MethodError, match=message):
        resolve_parameters(get(method), given, ["a", "b"])


def test_one_adapter_has_one_vote():
    with pytest.raises(MethodError, match="the merge has 1 adapter, so that"):
        resolve_parameters(get("consensus"), {}, ["a"])
    (factor,) = random_factors((12, 10), [3])
    merged = merge_factors("consensus", [factor], votes=1)
    assert relative(merged.dense(), deltas([factor])[0]) < CLOSE
