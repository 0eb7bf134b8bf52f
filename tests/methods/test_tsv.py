import dataclasses
import math

import pytest
import torch
from method_cases import core_dense, deltas, random_factors, relative, weighted

from ray_merge.errors import MethodError
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


def orthogonalised(M):
    """M (M^T M)^(-1/2) on the space that M spans."""
    values, vectors = torch.linalg.eigh(M.T @ M)
    roots = torch.where(values > 1e-9, values.clamp_min(1e-9).rsqrt(), 0.0)
    return M @ vectors @ torch.diag(roots) @ vectors.T


def tsv_dense(values, rank=None):
    """The formula on dense deltas: the triplets that each has, orthogonalised side by side."""
    triplets = []
    for value in values:
        U, s, Vt = torch.linalg.svd(value, full_matrices=False)
        keep = int(torch.linalg.matrix_rank(value, rtol=1e-9))
        keep = keep if rank is None else min(keep, rank)
        triplets.append((U[:, :keep], s[:keep], Vt[:keep].T))
    U, s, V = (torch.cat(parts, dim=-1) for parts in zip(*triplets, strict=True))
    return orthogonalised(U) @ torch.diag(s) @ orthogonalised(V).T


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("space", ["dense", "core"])
def test_it_is_the_formula_on_dense_deltas(shape, ranks, rank, space):
    factors, weights = random_factors(shape, ranks), WEIGHTS[: len(ranks)]
    want = 0.4 * tsv_dense(weighted(deltas(factors), weights), rank)
    merged = merge_factors("tsv_m", factors, weight=weights, lambda_=0.4, rank=rank, space=space)
    assert relative(merged.dense(), want) < CLOSE
    assert merged.rank <= min(*shape, sum(ranks))
    assert relative(merged.factors().B @ merged.factors().A, merged.dense()) < CLOSE


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("rank", [None, 2])
def test_the_formula_gives_the_same_on_core_matrices_and_on_deltas(shape, ranks, rank):
    factors = random_factors(shape, ranks)
    U, core, Vt = core_dense(factors)
    lifted = U @ tsv_dense(core, rank) @ Vt
    assert relative(merge_factors("tsv_m", factors, rank=rank, space="dense").dense(), lifted) < CLOSE


def orthogonal_adapters(shape, rank, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(n, rank * count, generator=generator, dtype=torch.float64) for n in shape]
    left, right = (torch.linalg.qr(draw).Q for draw in draws)
    sizes = 1.0 + torch.rand(rank * count, generator=generator, dtype=torch.float64)
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(count)]
    return [Factor(left[:, b] * sizes[b], right[:, b].T, 1.5) for b in blocks]


def test_adapters_that_do_not_meet_are_added():
    factors = orthogonal_adapters((30, 20), 4, 3)
    merged = merge_factors("tsv_m", factors, weight=WEIGHTS, lambda_=0.7).dense()
    want = merge_factors("task_arithmetic", factors, weight=WEIGHTS, lambda_=0.7).dense()
    assert relative(merged, want) < CLOSE


def in_another_gauge(factors, seed=9):
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for factor in factors:
        G = torch.randn(factor.B.shape[1], factor.B.shape[1], generator=generator, dtype=torch.float64)
        turned.append(Factor(factor.B @ G, torch.linalg.solve(G, factor.A), factor.scale))
    return turned


@pytest.mark.parametrize("smallest", [1.0, 1e-5])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_copies_of_one_adapter_merge_to_it_whatever_their_factors(count, smallest):
    # The smaller a singular value, the less exactly its vectors are known: copies in other factors differ there.
    (factor,) = random_factors((20, 16), [4])
    spread = torch.logspace(0, math.log10(smallest) / 2, 4, dtype=torch.float64)
    factor = Factor(factor.B * spread, spread[:, None] * factor.A, factor.scale)
    copies = [in_another_gauge([factor], seed)[0] for seed in range(count)]
    merged = merge_factors("tsv_m", copies)
    assert relative(merged.dense(), deltas([factor])[0]) < CLOSE
    assert int(torch.linalg.matrix_rank(merged.dense(), rtol=1e-9)) == 4


def test_neither_gauge_nor_order_nor_a_rank_that_is_padded_matters():
    factors = random_factors((20, 15), (3, 4, 2))
    want = merge_factors("tsv_m", factors, weight=WEIGHTS).dense()
    assert relative(merge_factors("tsv_m", in_another_gauge(factors), weight=WEIGHTS).dense(), want) < CLOSE
    assert relative(merge_factors("tsv_m", factors[::-1], weight=WEIGHTS[::-1]).dense(), want) < CLOSE
    padded = [*factors[:2], dataclasses.replace(factors[2], B=torch.nn.functional.pad(factors[2].B, (0, 3)))]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 15, generator=generator, dtype=torch.float64)
    padded[2] = dataclasses.replace(padded[2], A=torch.cat([factors[2].A, rows]))
    assert relative(merge_factors("tsv_m", padded, weight=WEIGHTS).dense(), want) < CLOSE


def without_a_delta(shape):
    B = torch.ones(shape[0], 1, dtype=torch.float64) / 3
    A = torch.ones(1, shape[1], dtype=torch.float64) / 7
    return {
        "rank 0": Factor(B[:, :0], A[:0], 1.0),
        "B = 0": Factor(B * 0, A, 1.0),
        "scale 0": Factor(B, A, 0.0),
        "cancels": Factor(torch.cat([B, B], 1), torch.cat([A, -A]), 1.0),
        "cancels but for rounding": Factor(torch.cat([B / 3, B / 7], 1), torch.cat([A / 7, -A / 3]), 1.0),
    }


@pytest.mark.parametrize("name", without_a_delta((1, 1)))
def test_an_adapter_without_a_delta_has_no_part(name):
    factors, nothing = random_factors((20, 15), (3, 4)), without_a_delta((20, 15))[name]
    want = merge_factors("tsv_m", factors).dense()
    assert relative(merge_factors("tsv_m", [*factors, nothing]).dense(), want) < CLOSE
    assert not merge_factors("tsv_m", [nothing, nothing]).dense().any()


def test_weight_zero_leaves_an_adapter_out_and_a_negative_weight_turns_it_round():
    factors = random_factors((20, 15), (3, 4, 2))
    without = merge_factors("tsv_m", factors[:2]).dense()
    assert relative(merge_factors("tsv_m", factors, weight=[1, 1, 0]).dense(), without) < CLOSE
    assert relative(merge_factors("tsv_m", factors[:2], weight=-1.0).dense(), -without) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_factors_are_merged_to_float32(dtype):
    factors = random_factors((60, 48), (8, 4, 6), dtype=dtype)
    merged = merge_factors("tsv_m", factors, weight=WEIGHTS).dense()
    assert merged.dtype == torch.float32
    assert relative(merged, tsv_dense(weighted(deltas(factors), WEIGHTS))) < 1e-6


def test_what_is_rounding_of_float32_factors_does_not_bend_directions():
    factors = random_factors((60, 48), (6, 5))
    # Resized to rank 12 in float32, as tools do: the last 6 of 12 singular values are rounding.
    U, s, Vt = torch.linalg.svd((factors[0].B @ factors[0].A).float(), full_matrices=False)
    resized = Factor(U[:, :12] * s[:12].sqrt(), s[:12].sqrt()[:, None] * Vt[:12], factors[0].scale)
    assert 0 < float(s[6] / s[0]) < 1e-6
    second = Factor(factors[1].B.float(), factors[1].A.float(), factors[1].scale)
    want = merge_factors("tsv_m", factors).dense()
    assert relative(merge_factors("tsv_m", [resized, second]).dense(), want) < 1e-5


def test_the_same_bits_every_time():
    factors = random_factors((60, 48), (8, 4, 6), dtype=torch.float32)
    first = merge_factors("tsv_m", factors).dense()
    merge_factors("tsv_m", factors, rank=1)
    assert torch.equal(merge_factors("tsv_m", factors).dense(), first)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, r"rank is 0, expected a number in \[1, inf\)"),
        ({"rank": 1.5}, "rank is 1.5, expected a whole number"),
        ({"space": "knots"}, "space is 'knots', expected one of dense, core"),
        ({"density": 0.2}, "tsv_m has no parameter 'density'"),
    ],
)
def test_what_it_cannot_do_is_refused(given, message):
    with pytest.raises(MethodError, match=message):
        merge_factors("tsv_m", random_factors((6, 5), (2, 2)), **given)


def test_dora_is_refused():
    (factor,) = random_factors((6, 5), (2,))
    dora = dataclasses.replace(factor, magnitude=torch.ones(6, 1))
    with pytest.raises(MethodError, match="tsv_m works on factors, but a DoRA delta is dense"):
        merge_factors("tsv_m", [dora], base=torch.ones(6, 5))


def seeded(rows, columns, rank, count, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [Factor(normal(rows, rank) / columns, normal(rank, columns), 1.0) for _ in range(count)]


# Made by `benchmarks/parity/tsv.py`: dense rows by github.com/tanganke/fusion_bench at
# 54c9e8c9d9621620c720452cd8533332a32d3689, the core row by github.com/apanariello4/core-space-merging at
# 85176fab749578b0b54a027ea89495846e79757d; float64, 4 adapters of rank 8, seed 3, lambda 0.6.
@pytest.mark.parametrize(
    ("shape", "given", "norm", "entry"),
    [
        ((40, 32), {}, 3.91249508368, -0.201567301811),
        ((24, 20), {"rank": 5}, 3.56802686566, -0.0612696725421),
        ((192, 192), {"space": "core"}, 3.42265979851, -0.0190076273786),
    ],
)
def test_it_gives_the_numbers_of_others_code(shape, given, norm, entry):
    merged = merge_factors("tsv_m", seeded(*shape, 8, 4, 3), lambda_=0.6, **given)
    assert merged.norm() == pytest.approx(norm, rel=1e-10)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=1e-9)
