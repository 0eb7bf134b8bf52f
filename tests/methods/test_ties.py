import pytest
import torch
from method_cases import (
    core_dense,
    deltas,
    elect_dense,
    knots_dense,
    random_factors,
    relative,
    trim_dense,
    weighted,
)

from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.catalogue.ties import kept_entries
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

CLOSE = 1e-10
SHAPES_AND_RANKS = [
    ((24, 17), (3, 5, 2)),
    ((17, 24), (0, 4, 1)),
    ((6, 40), (4, 4, 4)),
    ((40, 6), (4, 4, 4)),
    ((5, 4), (7, 1, 3)),
    ((1, 1), (1, 1, 1)),
]
WEIGHTS, DENSITY = [0.5, -1.0, 2.0], [0.2, 0.5, 1.0]


def reference(values, density, weights, lambda_):
    return lambda_ * elect_dense(weighted(trim_dense(values, density), weights))


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_ties_on_deltas_is_trim_elect_average(shape, ranks):
    factors = random_factors(shape, ranks)
    merged = merge_factors("ties", factors, weight=WEIGHTS, density=DENSITY, lambda_=0.6)
    assert relative(merged.dense(), reference(deltas(factors), DENSITY, WEIGHTS, 0.6)) < CLOSE
    assert merged.factors() is None


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_ties_in_the_knots_basis_is_ties_on_the_coordinates(shape, ranks):
    factors = random_factors(shape, ranks)
    U, coordinates = knots_dense(deltas(factors))
    merged = merge_factors("knots_ties", factors, weight=WEIGHTS, density=DENSITY, lambda_=0.6)
    assert relative(merged.dense(), U @ reference(coordinates, DENSITY, WEIGHTS, 0.6)) < CLOSE
    assert merged.rank == U.shape[1]
    same = merge_factors("ties", factors, weight=WEIGHTS, density=DENSITY, lambda_=0.6, space="knots")
    assert torch.equal(same.dense(), merged.dense())


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_ties_in_core_space_is_ties_on_the_core_matrices(shape, ranks):
    factors = random_factors(shape, ranks)
    U, M, Vt = core_dense(factors)
    merged = merge_factors("ties", factors, weight=WEIGHTS, density=DENSITY, lambda_=0.6, space="core")
    assert relative(merged.dense(), U @ reference(M, DENSITY, WEIGHTS, 0.6) @ Vt) < CLOSE
    assert merged.rank == min(U.shape[1], Vt.shape[0])


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("space", ["dense", "core", "knots"])
def test_a_plain_sum_is_the_same_in_every_space(space, shape, ranks):
    factors = random_factors(shape, ranks)
    coordinates = SiteFactors(factors).space(space)
    merged = coordinates.lift(lambda index: sum(coordinates.chunk(adapter, index) for adapter in range(3)))
    assert relative(merged.dense(), deltas(factors).sum(0)) < CLOSE


@pytest.mark.parametrize("space", ["dense", "core", "knots"])
def test_the_order_of_adapters_does_not_matter(space):
    factors = random_factors((24, 17), (3, 5, 2))
    order = [2, 0, 1]
    merged = merge_factors("ties", factors, weight=WEIGHTS, density=DENSITY, space=space).dense()
    other = merge_factors(
        "ties",
        [factors[i] for i in order],
        weight=[WEIGHTS[i] for i in order],
        density=[DENSITY[i] for i in order],
        space=space,
    ).dense()
    assert relative(other, merged) < CLOSE


@pytest.mark.parametrize("space", ["dense", "knots"])
def test_ties_sees_deltas_and_not_the_gauge_of_their_factors(space):
    # Core Space takes its bases from B and A themselves, so there the gauge does enter.
    factors = random_factors((24, 17), (3, 5, 2))
    generator = torch.Generator().manual_seed(9)
    turned = []
    for factor in factors:
        G = torch.randn(factor.B.shape[1], factor.B.shape[1], generator=generator, dtype=torch.float64)
        turned.append(Factor(factor.B @ G, torch.linalg.solve(G, factor.A), factor.scale))
    got = merge_factors("ties", turned, space=space).dense()
    assert relative(got, merge_factors("ties", factors, space=space).dense()) < 1e-9


@pytest.mark.parametrize("space", ["dense", "core", "knots"])
def test_one_adapter_at_density_one_is_itself(space):
    (factor,) = random_factors((12, 10), [3])
    merged = merge_factors("ties", [factor], density=1.0, space=space)
    assert relative(merged.dense(), deltas([factor])[0]) < CLOSE


@pytest.mark.parametrize("space", ["core", "knots"])
def test_adapters_without_a_common_direction_do_not_dilute_each_other(space):
    Q = torch.linalg.qr(random_factors((20, 20), [20])[0].B).Q
    sizes = torch.arange(1.0, 7.0, dtype=torch.float64)
    first = Factor(Q[:, :3] * sizes[:3], Q[3:6])
    second = Factor(Q[:, 3:6] * sizes[3:], Q[8:11])
    merged = merge_factors("ties", [first, second], density=1.0, space=space)
    assert relative(merged.dense(), deltas([first, second]).sum(0)) < CLOSE


@pytest.mark.parametrize("space", ["dense", "core", "knots"])
def test_adapters_that_are_still_zero_merge_to_zero(space):
    factors = [Factor(torch.zeros(6, 2), torch.randn(2, 5)) for _ in range(2)]
    assert not merge_factors("ties", factors, space=space).dense().any()
    nothing = [Factor(torch.zeros(6, 0), torch.zeros(0, 5)) for _ in range(2)]
    merged = merge_factors("ties", nothing, space=space)
    assert not merged.dense().any()
    assert merged.norm() == 0.0


def test_dense_rows_have_the_same_bits_in_any_block():
    factors = random_factors((20, 65_536), (4, 4), dtype=torch.float32)
    delta = merge_factors("ties", factors)
    dense = delta.dense()
    for start, stop in [(0, 1), (15, 17), (3, 19), (16, 20)]:
        assert torch.equal(delta.rows(start, stop), dense[start:stop])


def test_the_threshold_of_a_large_site_is_that_of_all_its_entries():
    factors = random_factors((20, 65_536), (4, 4), dtype=torch.float32)
    delta = merge_factors("ties", factors, density=0.1)
    values = torch.stack([factor.scale * factor.B @ factor.A for factor in factors])
    # float32 products differ in their last bit from ours, so an entry at the threshold may change sides.
    want = elect_dense(trim_dense(values, [0.1, 0.1]))
    assert (delta.dense() - want).abs().gt(1e-4).sum() <= 4


@pytest.mark.parametrize(
    ("compat", "kept"),
    [("paper", (1, 4, 20)), ("peft", (0, 4, 20)), ("mergekit", (1, 4, 20)), ("authors", (1, 5, 20))],
)
def test_how_many_entries_each_tool_keeps_of_twenty(compat, kept):
    assert tuple(kept_entries(20, density, compat) for density in (0.01, 0.2, 1.0)) == kept


def entry(*values):
    """A 1 x 1 site whose adapters have these deltas."""
    return [Factor(torch.tensor([[float(value)]]), torch.ones(1, 1)) for value in values]


@pytest.mark.parametrize(
    ("compat", "more", "want"),
    [
        # Weights 2, 1, 1 on 1, -1.5, 3: weighted 2, -1.5, 3, all but -1.5 agree.
        ("paper", {}, 2.5),
        ("peft", {}, 2.5),
        ("mergekit", {}, 5 / 3),
        ("mergekit", {"normalize": False}, 5.0),
    ],
)
def test_what_the_agreeing_entries_are_divided_by(compat, more, want):
    merged = merge_factors("ties", entry(1, -1.5, 3), weight=[2, 1, 1], density=1.0, compat=compat, **more)
    assert merged.dense().item() == pytest.approx(want)


@pytest.mark.parametrize(("compat", "want"), [("paper", -2.0), ("peft", 0.2), ("mergekit", -1.0)])
def test_whether_weights_take_part_in_the_vote(compat, want):
    # Deltas 2 and -1 elect +; weighted 0.2 and -2 they elect -. mergekit then divides -2 by its weight 2.
    merged = merge_factors("ties", entry(2, -1), weight=[0.1, 2.0], density=1.0, compat=compat)
    assert merged.dense().item() == pytest.approx(want)


@pytest.mark.parametrize(("compat", "want"), [("paper", 0.0), ("peft", 1.0), ("mergekit", 1.0)])
def test_who_wins_an_exact_tie(compat, want):
    assert merge_factors("ties", entry(1, -1), density=1.0, compat=compat).dense().item() == want


@pytest.mark.parametrize("sign", [1, -1])
def test_an_exact_tie_goes_to_the_majority_of_the_site_in_the_authors_code(sign):
    first = Factor(torch.tensor([[1.0, 2.0, 3.0]]).T * sign, torch.ones(1, 1))
    second = Factor(torch.tensor([[-1.0, 1.0, 1.0]]).T * sign, torch.ones(1, 1))
    merged = merge_factors("ties", [first, second], density=1.0, compat="authors")
    assert merged.dense().flatten().tolist() == pytest.approx([1.0 * sign, 1.5 * sign, 2.0 * sign])


def test_the_authors_weight_multiplies_the_result():
    factors = random_factors((12, 10), (3, 3))
    doubled = merge_factors("knots_ties", factors, weight=2.0, compat="authors", lambda_=0.5)
    assert relative(doubled.dense(), merge_factors("knots_ties", factors, compat="authors").dense()) < CLOSE
