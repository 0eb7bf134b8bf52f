import math

import pytest
import torch
from method_cases import deltas, random_factors, relative

from ray_merge.errors import MethodError
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

CLOSE = 1e-12
SHAPES_AND_RANKS = [
    ((24, 17), (3, 5, 2)),
    ((17, 24), (0, 4, 1)),
    ((5, 4), (7, 1, 3)),
    ((1, 1), (1, 1, 1)),
    ((200, 150), (120, 3, 8)),  # more entries than the direct selection takes
]
WEIGHTS, DENSITY = [0.5, -1.0, 2.0], [0.8, 0.3, 1.0]


def pruned(values, density):
    """The max(1, floor(density n)) largest magnitudes."""
    flat = values.double().flatten()
    out = torch.zeros_like(flat)
    places = flat.abs().argsort(descending=True)[: max(1, int(density * flat.numel()))]
    out[places] = flat[places]
    return out.view(values.shape)


def merged_by_rank(factors, weights, density, lambda_):
    """Algorithm 1, one rank-one term after another."""
    kept = [(pruned(f.B, share), pruned(f.A, share)) for f, share in zip(factors, density, strict=True)]
    total = torch.zeros(factors[0].B.shape[0], factors[0].A.shape[1], dtype=torch.float64)
    for j in range(max(f.A.shape[0] for f in factors)):
        scales = []
        for factor, (_, A) in zip(factors, kept, strict=True):
            alive = j < factor.A.shape[0] and A[j].abs().sum() > 0
            scales.append(float(factor.A[j].double().abs().sum() / A[j].abs().sum()) if alive else 0.0)
        for factor, (B, A), own, scale in zip(factors, kept, weights, scales, strict=True):
            if scale:
                share = scale / sum(scales)
                total += lambda_ * own * factor.scale * share * torch.outer(B[:, j], A[j])
    return total


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_robustmerge_follows_the_algorithm(shape, ranks):
    factors = random_factors(shape, ranks)
    merged = merge_factors("robustmerge", factors, weight=WEIGHTS, density=DENSITY, lambda_=0.4)
    assert relative(merged.dense(), merged_by_rank(factors, WEIGHTS, DENSITY, 0.4)) < CLOSE
    assert merged.rank == sum(ranks)


def test_the_defaults_keep_four_fifths_and_fuse_with_two():
    factors = random_factors((24, 17), (3, 5, 2))
    want = merged_by_rank(factors, [1.0] * 3, [0.8] * 3, 2.0)
    assert relative(merge_factors("robustmerge", factors).dense(), want) < CLOSE


@pytest.mark.parametrize("compat", ["paper", "tara"])
def test_with_nothing_pruned_equal_ranks_are_averaged(compat):
    factors = random_factors((24, 17), (3, 3, 3))
    merged = merge_factors("robustmerge", factors, weight=WEIGHTS, density=1.0, lambda_=1.0, compat=compat)
    want = merge_factors("task_arithmetic", factors, weight=WEIGHTS, lambda_=1 / 3)
    assert relative(merged.dense(), want.dense()) < (CLOSE if compat == "paper" else 1e-5)


def test_one_adapter_with_nothing_pruned_is_itself():
    (factor,) = random_factors((9, 8), [3])
    merged = merge_factors("robustmerge", [factor], density=1.0, lambda_=1.0)
    assert relative(merged.dense(), deltas([factor])[0]) < CLOSE


def test_robustmerge_with_authors_and_nothing_pruned_has_cross_terms():
    factors = [Factor(f.B, f.A, 0.5) for f in random_factors((9, 8), (3, 3))]
    merged = merge_factors("robustmerge", factors, density=1.0, lambda_=4.0, compat="authors")
    want = 0.5 * (factors[0].B + factors[1].B) @ (2 * (factors[0].A + factors[1].A))
    assert relative(merged.dense(), want) < CLOSE
    assert merged.rank == 3


def merged_apart(factors, weights, density, lambda_):
    """The authors' script: scales of A below an adapter's 80th percentile raised, factors summed apart."""
    roots = [math.sqrt(abs(own * f.scale)) for own, f in zip(weights, factors, strict=True)]
    signs = [math.copysign(1.0, own * f.scale) for own, f in zip(weights, factors, strict=True)]
    # One entry more than the floor is kept where density * n is whole, as it is here.
    kept_B = [pruned(f.B, share + 1 / f.B.numel()) for f, share in zip(factors, density, strict=True)]
    kept_A = [pruned(f.A, share + 1 / f.A.numel()) for f, share in zip(factors, density, strict=True)]
    scales = torch.stack([f.A.abs().sum(1) / A.abs().sum(1) for f, A in zip(factors, kept_A, strict=True)])
    for row in scales:
        row.clamp_(min=float(row.sort().values[int(0.8 * len(row))]))
    B = sum(B * s * root for B, s, root in zip(kept_B, scales, roots, strict=True)) / scales.sum(0)
    A = sum(A * root * sign for A, root, sign in zip(kept_A, roots, signs, strict=True))
    return lambda_ * B @ A


@pytest.mark.parametrize("rank", [1, 5, 10])
def test_compat_authors_follows_their_script(rank):
    factors = random_factors((20, 30), (rank, rank, rank))
    density = [0.5, 0.3, 0.2]
    merged = merge_factors(
        "robustmerge", factors, weight=WEIGHTS, density=density, lambda_=0.4, compat="authors"
    )
    assert relative(merged.dense(), merged_apart(factors, WEIGHTS, density, 0.4)) < CLOSE


def test_the_order_of_adapters_does_not_matter():
    factors = random_factors((24, 17), (3, 5, 2))
    want = merge_factors("robustmerge", factors, weight=WEIGHTS, density=DENSITY).dense()
    back = merge_factors("robustmerge", factors[::-1], weight=WEIGHTS[::-1], density=DENSITY[::-1])
    assert relative(back.dense(), want) < CLOSE


def test_ranks_are_compared_by_place_so_the_gauge_matters():
    factors = random_factors((24, 17), (4, 4))
    want = merge_factors("robustmerge", factors).dense()
    order = [2, 0, 3, 1]
    alike = [Factor(-f.B[:, order], -f.A[order], f.scale) for f in factors]
    assert relative(merge_factors("robustmerge", alike).dense(), want) < CLOSE
    one_only = [alike[0], factors[1]]
    assert relative(merge_factors("robustmerge", one_only).dense(), want) > 1e-3
    G = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    rotated = [Factor(f.B @ G, G.T @ f.A, f.scale) for f in factors]
    assert relative(merge_factors("robustmerge", rotated).dense(), want) > 1e-2


def test_a_row_that_lost_everything_leaves_its_share_to_the_others():
    big, small = torch.full((1, 10), 5.0), torch.full((1, 10), 0.1)
    first = Factor(torch.eye(4, 2), torch.cat([big, small]), 1.0)
    second = Factor(torch.eye(4, 2), torch.ones(2, 10), 1.0)
    merged = merge_factors("robustmerge", [first, second], density=[0.5, 1.0], lambda_=1.0).dense()
    assert torch.allclose(merged[0], torch.full((10,), 0.5 * 5.0 + 0.5))
    assert torch.allclose(merged[1], torch.ones(10))
    # TARA's code divides by 1e-6 there: the lost row takes the whole share, and rank 1 is gone.
    published = merge_factors("robustmerge", [first, second], density=[0.45, 1.0], lambda_=1.0, compat="tara")
    assert torch.allclose(published.dense()[0], merged[0])
    assert float(published.dense()[1].abs().max()) < 1e-5


@pytest.mark.parametrize("compat", ["paper", "tara", "authors"])
def test_fresh_adapters_and_untouched_sites_give_zero(compat):
    fresh = [
        Factor(torch.zeros(9, 2), torch.randn(2, 8), 1.0),
        Factor(torch.zeros(9, 2), torch.zeros(2, 8), 1.0),
    ]
    assert torch.equal(merge_factors("robustmerge", fresh, compat=compat).dense(), torch.zeros(9, 8))
    assert merge_factors("robustmerge", random_factors((9, 8), [0, 0]), compat=compat).norm() == 0


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_float32_factors_give_float32_accuracy(shape, ranks):
    single = random_factors(shape, ranks, dtype=torch.float32)
    merged = merge_factors("robustmerge", single, density=DENSITY)
    assert merged.dense().dtype == torch.float32
    assert relative(merged.dense(), merged_by_rank(single, [1.0] * 3, DENSITY, 2.0)) < 1e-5


def test_authors_need_equal_ranks_where_an_adapter_touches_the_site():
    factors = random_factors((9, 8), (3, 0, 3))
    both = merge_factors("robustmerge", [factors[0], factors[2]], compat="authors")
    assert torch.equal(merge_factors("robustmerge", factors, compat="authors").dense(), both.dense())
    with pytest.raises(
        MethodError, match="needs equal ranks, but they are 0 3, 1 2; remove `compat: authors`"
    ):
        merge_factors("robustmerge", random_factors((9, 8), (3, 2)), compat="authors")


def test_bad_parameters_are_refused():
    factors = random_factors((4, 4), [2])
    for density in (0.0, 1.2):
        with pytest.raises(MethodError, match=r"robustmerge: density is .*, expected a number in \(0, 1\]"):
            merge_factors("robustmerge", factors, density=density)
    with pytest.raises(MethodError, match="expected one of paper, tara, authors"):
        merge_factors("robustmerge", factors, compat="peft")
    dora = Factor(factors[0].B, factors[0].A, 1.0, magnitude=torch.ones(4, 1, dtype=torch.float64))
    with pytest.raises(MethodError, match="robustmerge works on factors, but a DoRA delta is dense"):
        merge_factors("robustmerge", [dora], base=torch.eye(4, dtype=torch.float64))


# Printed by `benchmarks/parity/tara_baselines.py --rows O --columns I` (rank 8, 4 adapters, seed 5).
# tara: wooseong97/TARA-Merge efbae686f73d2d2c9487d38f8caff24cb43383fd, its defaults (mask_ratio 0.8, fuse_weight 2).
# authors: AuroraZengfh/RobustMerge 12128022190516cc93a549cc4931112ce4bdcda3, its script (mask_ratio 0.2, 2 on A and B).
PARITY = [
    ((200, 160), {"compat": "tara"}, 3.15332816762, 0.0107375222074),
    ((143, 81), {"compat": "tara"}, 3.62774350453, 0.0346230514949),
    ((200, 160), {"compat": "authors", "density": 0.2, "lambda_": 4.0}, 8.4207989495, 0.0921589316526),
    ((143, 81), {"compat": "authors", "density": 0.2, "lambda_": 4.0}, 9.75099160293, 0.0637283012444),
]


@pytest.mark.parametrize(("shape", "given", "norm", "entry"), PARITY)
def test_robustmerge_gives_the_published_codes_numbers(shape, given, norm, entry):
    generator = torch.Generator().manual_seed(5)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    factors = [Factor(normal(shape[0], 8) / shape[1], normal(8, shape[1]), 1.0) for _ in range(4)]
    merged = merge_factors("robustmerge", factors, **given)
    # The recorded numbers have 12 digits.
    assert merged.norm() == pytest.approx(norm, rel=1e-11)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=1e-10)
