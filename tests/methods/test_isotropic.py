import dataclasses

import pytest
import torch
from method_cases import core_dense, deltas, random_factors, relative, weighted

from ray_merge.errors import MethodError
from ray_merge.methods.catalogue.isotropic import task_directions
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

CLOSE = 1e-10
SHAPES_AND_RANKS = [
    ((24, 17), (3, 5, 2)),
    ((17, 24), (0, 4, 1)),
    ((9, 30), (8, 6, 3)),
    ((1, 1), (1, 1, 1)),
    ((30, 20), (4,)),
]
WEIGHTS = [0.5, -1.0, 2.0]
METHODS = [("iso_c", {}), ("iso_cts", {}), ("iso_cts", {"common": 0.4})]


def rank_of(M):
    return int(torch.linalg.matrix_rank(M, rtol=1e-9))


def top(M, count):
    U, s, Vt = torch.linalg.svd(M, full_matrices=False)
    return U[:, :count], s[:count], Vt[:count].T


def orthogonalised(M):
    """The nearest matrix to M with singular values of 1, on the space that M spans."""
    U, _, V = top(M, rank_of(M))
    return U @ V.T


def iso_c_dense(values, spectrum):
    """The mean of the singular values of the sum, on its own directions."""
    total = values.sum(0)
    U, s, V = top(total, rank_of(total))
    return s.sum() / (len(s) if spectrum == "rank" else min(total.shape)) * U @ V.T


def iso_cts_dense(values, spectrum, fraction):
    """The paper's steps on dense deltas, over directions that exist."""
    total = values.sum(0)
    tasks = [value for value in values if rank_of(value)]
    n_all = min(total.shape)
    if spectrum == "rank":
        n_all = min(rank_of(torch.cat(tasks, 1)), rank_of(torch.cat(tasks, 0)))
    n_task = task_directions(n_all, fraction, len(tasks))
    n_common = n_all - n_task * len(tasks)
    parts = [top(total, min(n_common, rank_of(total)))]
    for task in tasks:
        rest = task - parts[0][0] @ parts[0][0].T @ task
        there = int((torch.linalg.svdvals(rest) > 1e-9 * task.norm()).sum())
        parts.append(top(rest, min(n_task, there)))
    U, s, V = (torch.cat(pieces, dim=-1) for pieces in zip(*parts, strict=True))
    level = s.sum() / (len(s) if spectrum == "rank" else n_all)
    return level * orthogonalised(U) @ orthogonalised(V).T


def reference(method, values, spectrum, common=0.8):
    return iso_c_dense(values, spectrum) if method == "iso_c" else iso_cts_dense(values, spectrum, common)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize(("method", "given"), METHODS)
@pytest.mark.parametrize("spectrum", ["rank", "full"])
def test_it_is_the_formula_on_dense_deltas(shape, ranks, method, given, spectrum):
    factors, weights = random_factors(shape, ranks), WEIGHTS[: len(ranks)]
    want = 0.4 * reference(method, weighted(deltas(factors), weights), spectrum, **given)
    merged = merge_factors(method, factors, weight=weights, lambda_=0.4, spectrum=spectrum, **given)
    assert relative(merged.dense(), want) < CLOSE
    assert merged.rank <= min(*shape, sum(ranks))


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize(("method", "given"), METHODS)
@pytest.mark.parametrize("spectrum", ["rank", "full"])
def test_in_core_space_it_is_the_formula_on_core_matrices(shape, ranks, method, given, spectrum):
    factors = random_factors(shape, ranks)
    U, core, Vt = core_dense(factors)
    want = U @ reference(method, core, spectrum, **given) @ Vt
    merged = merge_factors(method, factors, space="core", spectrum=spectrum, **given)
    assert relative(merged.dense(), want) < CLOSE


@pytest.mark.parametrize(("method", "given"), METHODS)
def test_the_directions_that_exist_are_the_same_in_every_space(method, given):
    factors = random_factors((40, 30), (3, 5, 2))
    dense = merge_factors(method, factors, space="dense", **given).dense()
    assert torch.equal(merge_factors(method, factors, space="core", **given).dense(), dense)
    # With all singular values counted they differ: 30 of a dense delta, 10 of a core matrix.
    full = [merge_factors("iso_c", factors, space=s, spectrum="full").dense() for s in ("dense", "core")]
    assert relative(full[0] * 3, full[1]) < CLOSE


@pytest.mark.parametrize(("method", "given"), METHODS)
def test_the_spectrum_is_flat_and_has_the_rank_of_the_deltas(method, given):
    merged = merge_factors(method, random_factors((24, 17), (3, 5, 2)), **given).dense()
    s = torch.linalg.svdvals(merged)
    assert float(s[0]) == pytest.approx(float(s[9]), rel=1e-10)
    assert float(s[10]) < 1e-12 * float(s[0])


def test_iso_c_keeps_the_nuclear_norm_of_the_sum():
    factors = random_factors((24, 17), (3, 5, 2))
    want = float(torch.linalg.svdvals(deltas(factors).sum(0)).sum())
    assert float(torch.linalg.svdvals(merge_factors("iso_c", factors).dense()).sum()) == pytest.approx(want)


def test_iso_c_leaves_a_flat_sum_as_it_is():
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (24, 17)]
    left, right = (torch.linalg.qr(draw).Q for draw in draws)
    factors = [Factor(left[:, :3], right[:, :3].T, 2.0), Factor(left[:, 3:], right[:, 3:].T, 2.0)]
    total = merge_factors("task_arithmetic", factors).dense()
    assert relative(merge_factors("iso_c", factors).dense(), total) < CLOSE


@pytest.mark.parametrize("spectrum", ["rank", "full"])
def test_of_one_adapter_iso_cts_is_iso_c(spectrum):
    factors = random_factors((24, 17), (6,))
    want = merge_factors("iso_c", factors, spectrum=spectrum).dense()
    assert relative(merge_factors("iso_cts", factors, spectrum=spectrum, common=0.5).dense(), want) < CLOSE


def test_iso_cts_with_common_directions_only_is_iso_c():
    factors = random_factors((24, 17), (3, 5, 2))
    for spectrum in ("rank", "full"):
        want = merge_factors("iso_c", factors, spectrum=spectrum).dense()
        merged = merge_factors("iso_cts", factors, spectrum=spectrum, common=1.0).dense()
        assert relative(merged, want) < CLOSE
        assert relative(merge_factors("iso_cts", factors, spectrum=spectrum, common=0.4).dense(), want) > 1e-3


def test_as_published_iso_cts_has_no_directions_left_for_adapters_where_deltas_are_low_rank():
    # 0.8 of min(O, I) = 13 common directions hold all 10 that the sum has.
    factors = random_factors((24, 17), (3, 5, 2))
    want = merge_factors("iso_c", factors, spectrum="full").dense()
    assert relative(merge_factors("iso_cts", factors, spectrum="full").dense(), want) < CLOSE


@pytest.mark.parametrize(
    ("n_all", "common", "n_tasks", "each"),
    [
        (20, 0.8, 4, 1),
        (32, 0.8, 4, 2),
        (8, 0.8, 4, 0),
        (10, 0.0, 4, 2),
        (11, 0.0, 4, 2),
        (9, 1.0, 3, 0),
        (9, 0.5, 0, 0),
    ],
)
def test_directions_are_split_evenly_and_never_more_than_there_are(n_all, common, n_tasks, each):
    assert task_directions(n_all, common, n_tasks) == each


def in_another_gauge(factors, seed=9):
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for factor in factors:
        G = torch.randn(factor.B.shape[1], factor.B.shape[1], generator=generator, dtype=torch.float64)
        turned.append(Factor(factor.B @ G, torch.linalg.solve(G, factor.A), factor.scale))
    return turned


@pytest.mark.parametrize(("method", "given"), METHODS)
@pytest.mark.parametrize("space", ["dense", "core"])
@pytest.mark.parametrize("spectrum", ["rank", "full"])
def test_neither_gauge_nor_order_matters(method, given, space, spectrum):
    factors = random_factors((20, 15), (3, 4, 2))
    given = {**given, "space": space, "spectrum": spectrum}
    want = merge_factors(method, factors, weight=WEIGHTS, **given).dense()
    turned = merge_factors(method, in_another_gauge(factors), weight=WEIGHTS, **given).dense()
    assert relative(turned, want) < CLOSE
    reverse = merge_factors(method, factors[::-1], weight=WEIGHTS[::-1], **given).dense()
    assert relative(reverse, want) < CLOSE


def padded(factor, rows=3):
    """The same delta with a larger nominal rank."""
    A = torch.cat(
        [factor.A, torch.randn(rows, factor.A.shape[1], generator=torch.Generator().manual_seed(1)).double()]
    )
    return Factor(torch.nn.functional.pad(factor.B, (0, rows)), A, factor.scale)


def test_the_nominal_rank_matters_only_where_a_core_matrix_is_counted():
    factors = random_factors((20, 15), (3, 4, 2))
    longer = [padded(factors[0]), *factors[1:]]
    for method, given in METHODS:
        want = merge_factors(method, factors, **given).dense()
        assert relative(merge_factors(method, longer, **given).dense(), want) < CLOSE
    counted = {"spectrum": "full", "space": "core"}
    ratio = (
        merge_factors("iso_c", longer, **counted).norm() / merge_factors("iso_c", factors, **counted).norm()
    )
    assert ratio == pytest.approx(9 / 12)


def with_two_that_cancel(shape=(20, 15)):
    first, third = random_factors(shape, (3, 2))
    return [first, *in_another_gauge([first]), third], [1.0, -1.0, 1.0]


def test_what_cancels_in_the_sum_gets_no_direction_in_iso_c():
    factors, weights = with_two_that_cancel()
    assert not merge_factors("iso_c", factors[:2], weight=weights[:2]).dense().any()
    want = merge_factors("iso_c", factors[2:]).dense()
    assert relative(merge_factors("iso_c", factors, weight=weights).dense(), want) < CLOSE


@pytest.mark.parametrize(("method", "given"), METHODS)
def test_what_cancels_but_for_the_rounding_of_float32_factors_gets_none_either(method, given):
    factors, weights = with_two_that_cancel()
    large = [dataclasses.replace(factor, scale=200 * factor.scale) for factor in factors[:2]]
    single = [Factor(f.B.float(), f.A.float(), f.scale) for f in (*large, factors[2])]
    left = deltas(single)
    assert float((left[0] - left[1]).norm()) > 1e-6 * float(left[2].norm())
    want = reference(method, weighted(deltas([*large, factors[2]]), weights), "rank", **given)
    assert relative(merge_factors(method, single, weight=weights, **given).dense(), want) < 1e-4


@pytest.mark.parametrize("common", [0.8, 0.4])
def test_what_cancels_in_the_sum_gets_no_direction_in_iso_cts_either(common):
    factors, weights = with_two_that_cancel()
    merged = merge_factors("iso_cts", factors, weight=weights, common=common).dense()
    want = iso_cts_dense(weighted(deltas(factors), weights), "rank", common)
    assert relative(merged, want) < CLOSE
    assert rank_of(merged) == 2
    nothing = merge_factors("iso_cts", factors[:2], weight=weights[:2], common=common)
    assert nothing.norm() < CLOSE * float(deltas(factors)[0].norm())


@pytest.mark.parametrize(("method", "given"), METHODS)
def test_adapters_without_a_delta_have_no_part(method, given):
    factors = random_factors((20, 15), (3, 4))
    B, A = torch.ones(20, 1, dtype=torch.float64) / 3, torch.ones(1, 15, dtype=torch.float64) / 7
    nothing = [
        Factor(B[:, :0], A[:0], 1.0),
        Factor(B * 0, A, 1.0),
        Factor(torch.cat([B / 3, B / 7], 1), torch.cat([A / 7, -A / 3]), 1.0),
    ]
    want = merge_factors(method, factors, **given).dense()
    for factor in nothing:
        assert relative(merge_factors(method, [*factors, factor], **given).dense(), want) < CLOSE
        assert (
            relative(merge_factors(method, [factor, *factors], weight=[0, 1, 1], **given).dense(), want)
            < CLOSE
        )
    for spectrum in ("rank", "full"):
        assert not merge_factors(method, nothing[:2], spectrum=spectrum, **given).dense().any()


@pytest.mark.parametrize(("method", "given"), METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_factors_are_merged_to_float32(method, given, dtype):
    factors = random_factors((60, 48), (8, 4, 6), dtype=dtype)
    merged = merge_factors(method, factors, weight=WEIGHTS, **given).dense()
    assert merged.dtype == torch.float32
    want = reference(method, weighted(deltas(factors), WEIGHTS), "rank", **given)
    assert relative(merged, want) < 1e-6


def test_what_is_rounding_of_float32_factors_gets_no_part_of_the_spectrum():
    (factor,) = random_factors((60, 48), (6,))
    U, s, Vt = torch.linalg.svd((factor.B @ factor.A).float(), full_matrices=False)
    resized = Factor(U[:, :12] * s[:12].sqrt(), s[:12].sqrt()[:, None] * Vt[:12], factor.scale)
    assert 0 < float(s[6] / s[0]) < 1e-6
    want = merge_factors("iso_c", [factor]).dense()
    assert relative(merge_factors("iso_c", [resized]).dense(), want) < 1e-5


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("iso_cts", {"common": 1.1}, r"common is 1.1, expected a number in \[0, 1\]"),
        ("iso_cts", {"common": -0.1}, "common is -0.1, expected a number"),
        ("iso_c", {"common": 0.8}, "iso_c has no parameter 'common'"),
        ("iso_c", {"spectrum": "half"}, "spectrum is 'half', expected one of rank, full"),
        ("iso_c", {"space": "knots"}, "space is 'knots', expected one of dense, core"),
    ],
)
def test_what_they_cannot_do_is_refused(method, given, message):
    with pytest.raises(MethodError, match=message):
        merge_factors(method, random_factors((6, 5), (2, 2)), **given)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_dora_is_refused(method):
    (factor,) = random_factors((6, 5), (2,))
    dora = dataclasses.replace(factor, magnitude=torch.ones(6, 1))
    with pytest.raises(MethodError, match=f"{method} works on factors, but a DoRA delta is dense"):
        merge_factors(method, [dora], base=torch.ones(6, 5))


def seeded(rows, columns, rank, count, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [Factor(normal(rows, rank) / columns, normal(rank, columns), 1.0) for _ in range(count)]


# Made by `benchmarks/parity/isotropic.py` with github.com/tanganke/fusion_bench at
# 54c9e8c9d9621620c720452cd8533332a32d3689: float64, 4 adapters of rank 8, seed 3, lambda 0.6, common 0.8.
# In the last row what theirs puts into the null space (norm 1.22) was projected off.
@pytest.mark.parametrize(
    ("method", "shape", "given", "norm", "entry"),
    [
        ("iso_c", (192, 192), {"space": "core"}, 3.2747776705, -0.0166972733301),
        ("iso_cts", (192, 192), {"space": "core"}, 3.23209397502, -0.0176338846249),
        ("iso_c", (40, 32), {}, 3.00146904795, -0.083547868207),
        ("iso_cts", (40, 32), {}, 3.26768564669, -0.0125294592917),
        ("iso_c", (24, 20), {"spectrum": "full"}, 2.93804037403, -0.0136590547071),
        ("iso_cts", (24, 20), {"spectrum": "full"}, 3.17635709423, -0.12828900481),
        ("iso_c", (192, 192), {"spectrum": "full"}, 0.545796278416, -0.00278287888835),
    ],
)
def test_they_give_the_numbers_of_others_code(method, shape, given, norm, entry):
    merged = merge_factors(method, seeded(*shape, 8, 4, 3), lambda_=0.6, **given)
    assert merged.norm() == pytest.approx(norm, rel=1e-10)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=1e-9)
