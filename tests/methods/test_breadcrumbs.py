"""Model Breadcrumbs. Numbers of the authors' code: github.com/rezazzr/breadcrumbs at
f89fc664a171df2b90567aa1313ec7be677f2669, made by `benchmarks/parity/breadcrumbs.py`; of mergekit 0.1.5, made by
`benchmarks/parity/mergekit_sparsify.py --size 64 --rank 4 --seed 3`.
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
from method_cases import deltas, elect_dense, random_factors, relative, weighted

from ray_merge.errors import MethodError
from ray_merge.methods.breadcrumbs import band
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import get, resolve_parameters
from ray_merge.spec import Factor

METHODS = ["breadcrumbs", "breadcrumbs_ties"]
PER_SITE = [{"filter": "mlp", "value": 0.1}, {"value": 0.2}]
DENSITY, GAMMA = [0.3, 0.6, 0.9], [0.2, 0.05, 0.3]  # the last leaves room for 0.1 only


def middle(values, density, gamma):
    """Of each of T tensors the entries after the int(gamma n) largest, int(density n) of them."""
    out = torch.zeros_like(values)
    for own, kept, share, outliers in zip(values, out, density, gamma, strict=True):
        flat, n = own.flatten(), own.numel()
        count = n if share >= 1 else max(1, int(share * n))
        above = min(int(outliers * n), n - count)
        places = flat.abs().argsort(descending=True)[above : above + count]
        kept.view(-1)[places] = flat[places]
    return out


def reference(method, density=(0.9,) * 3, gamma=(0.01,) * 3, weights=(1.0,) * 3, lambda_=1.0):
    def merged(values):
        n = len(values)
        kept = weighted(middle(values, density[:n], gamma[:n]), weights[:n])
        return lambda_ * (kept.sum(0) if method == "breadcrumbs" else elect_dense(kept))

    return merged


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_only_entries_of_middle_magnitude_are_left(method, space, shape, ranks):
    factors = random_factors(shape, ranks)
    merged = merge_factors(
        method, factors, weight=WEIGHTS, density=DENSITY, gamma=GAMMA, lambda_=0.6, space=space
    )
    want = in_space(space, factors, reference(method, DENSITY, GAMMA, WEIGHTS, 0.6))
    assert relative(merged.dense(), want) < CLOSE
    assert (merged.factors() is None) is (space == "dense")


@pytest.mark.parametrize(
    ("method", "plain"), [("breadcrumbs", "magnitude_prune"), ("breadcrumbs_ties", "ties")]
)
@pytest.mark.parametrize("space", SPACES)
def test_without_outliers_it_is_a_trim(space, method, plain):
    factors = random_factors((24, 17), (3, 5, 2))
    given = {"weight": WEIGHTS, "density": 0.4, "space": space}
    want = merge_factors(plain, factors, **given).dense()
    assert relative(merge_factors(method, factors, gamma=0.0, **given).dense(), want) < CLOSE


def test_density_one_drops_nothing_whatever_gamma_is():
    factors = random_factors((24, 17), (3, 5))
    want = merge_factors("task_arithmetic", factors, normalize=True).dense()
    merged = merge_factors("breadcrumbs", factors, density=1.0, gamma=0.3, normalize=True)
    assert relative(merged.dense(), want) < CLOSE


def test_entries_of_one_magnitude_are_no_outliers():
    flat = Factor(torch.ones(10, 1), torch.tensor([[1.0, -1.0]]))
    assert torch.equal(merge_factors("breadcrumbs", [flat], gamma=0.1).dense(), flat.B @ flat.A)
    values = torch.tensor([3.0, -3.0, 2.0, 1.0])
    assert band(values, 1.0, 2.0).tolist() == [0.0, 0.0, 2.0, 1.0]
    assert band(values, 2.0, 3.0).tolist() == [3.0, -3.0, 2.0, 0.0]
    assert band(values, 0.0, float("inf")).tolist() == values.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_from_the_whole_model_take_the_place_of_the_site(method):
    factors = random_factors((24, 17), (3, 5, 2))
    thresholds = [(0.5, 2.0), (0.0, float("inf")), (1.0, 1.5)]
    merged = merged_as(method, factors, thresholds=thresholds)
    kept = torch.stack(
        [v * (v.abs() >= t[0]) * (v.abs() <= t[1]) for v, t in zip(deltas(factors), thresholds, strict=True)]
    )
    want = kept.sum(0) if method == "breadcrumbs" else elect_dense(kept)
    assert relative(merged.dense(), want) < CLOSE


def test_the_counts_are_where_the_kept_entries_and_the_outliers_end():
    values = {"density": {"a": 0.5, "b": 0.9, "c": 1.0}, "gamma": {"a": 0.2, "b": 0.2, "c": 0.2}}
    assert [get("breadcrumbs").counts(values, name, 20) for name in "abc"] == [(14, 5), (20, 3), (20, 0)]
    # Entries 1 to 3 of 3: one is kept, and of the two above only one may go.
    assert get("breadcrumbs").counts({"density": {"a": 0.01}, "gamma": {"a": 1.0}}, "a", 3) == (2, 2)


def scaled_adapters(size, rank, count, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [Factor(normal(size, rank) / size, normal(rank, size), 1.0) for _ in range(count)]


def test_the_authors_code_takes_the_quantiles_of_each_row():
    factors = scaled_adapters(192, 8, 4, 3)
    given = {"density": 0.2, "gamma": 0.1, "lambda_": 0.4}
    merged = merge_factors("breadcrumbs", factors, compat="authors", **given)
    assert merged.norm() == pytest.approx(1.33295717433, rel=1e-10)
    assert float(merged.dense()[3, 5]) == pytest.approx(-0.0125083080701, rel=1e-9)
    assert float(merged.dense().abs().max()) == pytest.approx(0.036416366741, rel=1e-9)
    # Which entries go differs, how many hardly does.
    paper = merge_factors("breadcrumbs", factors, **given)
    assert 0.1 < relative(paper.dense(), merged.dense()) < 1.0


def test_a_row_too_short_for_a_single_entry_keeps_nothing_in_the_authors_code():
    factors = random_factors((6, 4), [2])
    assert not merge_factors("breadcrumbs", factors, density=0.2, compat="authors").dense().any()
    assert not merge_factors("breadcrumbs", factors, gamma=1.0, compat="authors").dense().any()


@pytest.mark.parametrize(
    ("method", "given", "norm"),
    [
        ("breadcrumbs", {"density": 0.3, "gamma": 0.05}, 39319256.2),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.3}, 38731741),
        ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.05, "compat": "mergekit"}, 50099781),
        (
            "breadcrumbs_ties",
            {"density": 0.3, "gamma": 0.05, "compat": "mergekit", "normalize": True},
            34514760.6,
        ),
    ],
)
def test_the_numbers_of_mergekit(method, given, norm):
    generator = torch.Generator().manual_seed(3)

    def whole(*shape):
        return torch.randint(-1024, 1025, shape, generator=generator).float()

    weights = [0.5, 1.0, 0.75, 0.25, 1.0, 0.5, 0.8, 0.6]
    factors = [Factor(whole(64, 4), whole(4, 64), 1.0) for _ in weights]
    merged = merge_factors(method, factors, weight=weights, lambda_=0.6, **given)
    # Theirs is computed in float32 and recorded with nine digits.
    assert merged.norm() == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_are_zero_are_harmless(method, space):
    check_zero_adapters(method, space)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_matter(method, space):
    assert order_moves(method, space, weight=WEIGHTS, density=DENSITY, gamma=GAMMA) < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_it_sees_deltas_and_in_core_space_also_the_gauge_of_their_factors(method):
    given = {"density": 0.4, "gamma": 0.1}
    assert gauge_moves(method, "dense", **given) < 1e-9
    assert gauge_moves(method, "knots", **given) < 1e-9
    assert gauge_moves(method, "core", **given) > 1e-2


@pytest.mark.parametrize("given", [{}, {"compat": "authors"}])
def test_rows_have_the_same_bits_in_any_block(given):
    check_rows_in_any_block("breadcrumbs", **given)


@pytest.mark.parametrize(
    ("method", "given"),
    [("breadcrumbs", {}), ("breadcrumbs_ties", {}), ("breadcrumbs", {"compat": "authors"})],
)
def test_the_grid_of_chunks_does_not_show(method, given, monkeypatch):
    assert chunks_move(method, monkeypatch, **given) < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_float32_factors_are_merged_in_float32(method):
    assert float32_error(method, reference(method)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_dora_delta_is_treated_like_any_other(method):
    assert dora_error(method, reference(method)) < CLOSE


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("breadcrumbs", {"gamma": -0.1}, r"gamma .*is -0.1, expected a number in \[0, 1\]"),
        ("breadcrumbs_ties", {"density": 0.0}, r"density .*is 0.0, expected a number in \(0, 1\]"),
        ("breadcrumbs", {"compat": "authors", "space": "core"}, "each row of a delta, but space is core"),
        ("breadcrumbs", {"compat": "authors", "scope": "model"}, "each row of a delta, but scope is model"),
        ("breadcrumbs", {"scope": "model", "density": PER_SITE}, "density differs between sites"),
        ("breadcrumbs_ties", {"scope": "model", "gamma": PER_SITE}, "gamma differs between sites"),
        ("breadcrumbs", {"weight": 0.0, "normalize": True}, "sum to 0"),
        ("breadcrumbs_ties", {"normalize": True}, "normalize belongs to compat mergekit"),
    ],
)
def test_bad_parameters_are_refused(method, given, message):
    with pytest.raises(MethodError, match=message):
        resolve_parameters(get(method), given, ["a", "b"])


@pytest.mark.parametrize("method", METHODS)
def test_the_scope_may_be_the_model(method):
    assert resolve_parameters(get(method), {"scope": "model"}, ["a"])["scope"] == "model"
    assert resolve_parameters(get(method), {}, ["a"])["scope"] == "tensor"
    assert resolve_parameters(get(method), {"gamma": PER_SITE}, ["a"])["scope"] == "tensor"
