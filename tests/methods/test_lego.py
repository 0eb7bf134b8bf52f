import itertools
import math

import pytest
import torch
from method_cases import deltas, random_factors, relative

from ray_merge.errors import MethodError
from ray_merge.methods.catalogue.lego import LoraLego
from ray_merge.methods.context import Context
from ray_merge.methods.lego import Pool, assemble, k_means, seeds, tightest
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

CLOSE = 1e-10
WEIGHTS = [0.5, -1.0, 2.0]
SHAPES_AND_RANKS = [
    ((9, 7), (2, 3, 1)),
    ((7, 9), (0, 4, 1)),
    ((3, 2), (3, 1, 2)),
    ((1, 1), (1, 1, 1)),
]


def raw_pairs(factors, weights):
    """(b, a) of every rank with an update, weight and scale split evenly."""
    found = []
    for factor, own in zip(factors, weights, strict=True):
        c = own * factor.scale
        for j in range(factor.B.shape[1]):
            b, a = factor.B[:, j].double() * math.sqrt(abs(c)), factor.A[j].double()
            found.append((b, a * math.copysign(math.sqrt(abs(c)), c)))
    return found


def partitions(n, count):
    """Every way to put n points into at most `count` clusters, clusters named in order of appearance."""
    for labels in itertools.product(range(count), repeat=n):
        firsts = list(dict.fromkeys(labels))
        if firsts == list(range(len(firsts))):
            yield labels


def tightest_of_all(points, count, signed):
    """The clustering with the least sum of squared distances, by trying all of them."""
    best = (float("inf"), None)
    for labels in partitions(len(points), count):
        cost, signs = 0.0, [1.0] * len(points)
        for k in set(labels):
            members = [i for i, label in enumerate(labels) if label == k]
            options = (
                itertools.product([1.0, -1.0], repeat=len(members) - 1) if signed else [[1.0] * len(members)]
            )
            least = float("inf")
            for option in options:
                chosen = [1.0, *option][: len(members)]
                aligned = torch.stack([s * points[i] for s, i in zip(chosen, members, strict=True)])
                spread = float((aligned - aligned.mean(0)).square().sum())
                if spread < least - 1e-12:
                    least = spread
                    for s, i in zip(chosen, members, strict=True):
                        signs[i] = s
            cost += least
        if cost < best[0] - 1e-12:
            best = (cost, (labels, signs))
    return best[1]


def by_formula(factors, weights, count, *, signed=True):
    """The dense result of the tightest clustering."""
    pairs = raw_pairs(factors, weights)
    points = [torch.cat([b / b.norm(), a / a.norm()]) for b, a in pairs]
    labels, signs = tightest_of_all(points, count, signed)
    total = torch.zeros(len(pairs[0][0]), len(pairs[0][1]), dtype=torch.float64)
    for k in set(labels):
        members = [torch.cat(pairs[i]) * signs[i] for i in range(len(pairs)) if labels[i] == k]
        centroid = torch.stack(members).mean(0)
        centroid = centroid * sum(m.abs().max() for m in members) / len(members) / centroid.abs().max()
        total += torch.outer(centroid[: total.shape[0]], centroid[total.shape[0] :])
    largest = max(factor.B.shape[1] for factor in factors)
    return total * math.sqrt(largest / len(set(labels)))


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS[:2])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("compat", "signed"), [("paper", True), ("tara", False)])
def test_lora_lego_rebuilds_the_centroids_of_the_tightest_clusters(shape, ranks, count, compat, signed):
    factors = random_factors(shape, ranks)
    given = {"weight": WEIGHTS, "rank": count, "restarts": 40, "compat": compat}
    merged = merge_factors("lora_lego", factors, lambda_=0.4, **given)
    assert relative(merged.dense(), 0.4 * by_formula(factors, WEIGHTS, count, signed=signed)) < CLOSE
    assert merged.rank == count


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("compat", ["paper", "tara"])
def test_with_a_cluster_for_every_pair_lora_lego_is_the_sum(shape, ranks, compat):
    factors = random_factors(shape, ranks)
    given = {"weight": WEIGHTS, "rank": 20, "compat": compat}
    want = merge_factors("task_arithmetic", factors, weight=WEIGHTS).dense()
    plain = merge_factors("lora_lego", factors, output_reweighting=False, **given)
    assert relative(plain.dense(), want) < CLOSE
    reweighted = merge_factors("lora_lego", factors, **given).dense()
    assert relative(reweighted, want * math.sqrt(max(ranks) / sum(ranks))) < CLOSE


@pytest.mark.parametrize("copies", [1, 2, 4])
@pytest.mark.parametrize("rank", [0, 5, 9])
def test_equal_adapters_merge_to_themselves_whatever_the_order_and_sign_of_their_ranks(copies, rank):
    (factor,) = random_factors((12, 10), [5])
    generator = torch.Generator().manual_seed(8)
    shuffled = []
    for _ in range(copies):
        order = torch.randperm(5, generator=generator)
        signs = torch.randint(2, (5,), generator=generator) * 2.0 - 1
        shuffled.append(Factor(factor.B[:, order] * signs, factor.A[order] * signs[:, None], factor.scale))
    merged = merge_factors("lora_lego", shuffled, rank=rank)
    assert relative(merged.dense(), deltas([factor])[0]) < CLOSE
    assert merged.rank == 5


def test_noisy_copies_are_matched():
    (factor,) = random_factors((30, 20), [4])
    generator = torch.Generator().manual_seed(5)
    noisy, aligned = [], []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        B = factor.B + 0.05 * torch.randn(30, 4, generator=generator, dtype=torch.float64)
        A = factor.A + 0.05 * torch.randn(4, 20, generator=generator, dtype=torch.float64)
        aligned.append((B, A))
        noisy.append(Factor(-B[:, order], -A[order], 1.0))
    merged = merge_factors("lora_lego", noisy, parameter_reweighting=False)
    B, A = (sum(side) / 3 for side in zip(*aligned, strict=True))
    assert relative(merged.dense(), B @ A) < CLOSE


def test_only_compat_tara_tells_a_pair_from_its_negative():
    first, second = random_factors((12, 10), (3, 3))
    flipped = Factor(-second.B, -second.A, second.scale)
    paper = [merge_factors("lora_lego", [first, other]).dense() for other in (second, flipped)]
    assert relative(paper[1], paper[0]) < CLOSE
    tara = [merge_factors("lora_lego", [first, other], compat="tara").dense() for other in (second, flipped)]
    assert relative(tara[1], tara[0]) > 1e-3


def test_neither_the_order_of_adapters_nor_of_ranks_changes_a_bit():
    factors = random_factors((40, 30), (6, 8, 5))
    want = merge_factors("lora_lego", factors, weight=WEIGHTS).dense()
    for order in itertools.permutations(range(3)):
        given = [factors[place] for place in order]
        weights = [WEIGHTS[place] for place in order]
        assert torch.equal(merge_factors("lora_lego", given, weight=weights).dense(), want)
    permuted = [Factor(f.B.flip(1), f.A.flip(0), f.scale) for f in factors]
    assert relative(merge_factors("lora_lego", permuted, weight=WEIGHTS).dense(), want) < CLOSE


def test_pairs_are_units_so_a_rotation_of_the_ranks_matters():
    factors = random_factors((40, 30), (4, 4))
    want = merge_factors("lora_lego", factors).dense()
    G = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    rotated = [Factor(f.B @ G, G.T @ f.A, f.scale) for f in factors]
    assert relative(merge_factors("lora_lego", rotated).dense(), want) > 1e-2


def test_a_scale_is_split_between_both_sides():
    factors = random_factors((12, 10), (3, 3))
    inside = [Factor(f.B * math.sqrt(f.scale), f.A * math.sqrt(f.scale), 1.0) for f in factors]
    assert (
        relative(merge_factors("lora_lego", inside).dense(), merge_factors("lora_lego", factors).dense())
        < CLOSE
    )


def test_pairs_without_update_are_left_out():
    first, second, third = random_factors((12, 10), (3, 2, 3))
    want = merge_factors("lora_lego", [first, second], rank=3).dense()
    fresh = Factor(torch.zeros_like(third.B), third.A, 1.0)
    for extra, own in ((fresh, 1.0), (third, 0.0), (Factor(third.B, third.A, 0.0), 1.0)):
        merged = merge_factors("lora_lego", [first, extra, second], weight=[1.0, own, 1.0], rank=3)
        assert torch.equal(merged.dense(), want)
    padded = Factor(
        torch.cat([first.B, torch.ones(12, 1)], 1), torch.cat([first.A, torch.zeros(1, 10)]), first.scale
    )
    assert relative(merge_factors("lora_lego", [padded, second], rank=3).dense(), want) < CLOSE
    assert torch.equal(merge_factors("lora_lego", [fresh]).dense(), torch.zeros(12, 10, dtype=torch.float64))
    assert merge_factors("lora_lego", random_factors((9, 8), [0, 0])).norm() == 0


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
def test_float32_factors_give_float32_accuracy(shape, ranks):
    single = random_factors(shape, ranks, dtype=torch.float32)
    exact = [Factor(f.B.double(), f.A.double(), f.scale) for f in single]
    merged = merge_factors("lora_lego", single, rank=2).dense()
    assert merged.dtype == torch.float32
    assert relative(merged, merge_factors("lora_lego", exact, rank=2).dense()) < 1e-5


def spread(points, found):
    """Sum of squared distances to the mean of each cluster, points turned by their signs."""
    turned = points * found.signs[:, None]
    clusters = [turned[found.labels == k] for k in set(found.labels.tolist())]
    return sum(float((members - members.mean(0)).square().sum()) for members in clusters)


@pytest.mark.parametrize("compat", ["paper", "tara"])
def test_more_restarts_never_give_looser_clusters(compat):
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.nn.functional.normalize(torch.randn(40, 3, generator=generator, dtype=torch.float64))
        for _ in range(2)
    ]
    gram = Pool(*sides, 40).gram()
    context = Context(names=("a",), site="s", seed=0)
    spreads = [
        spread(torch.cat(sides, 1), tightest(gram, 6, settings(restarts=n, compat=compat), context))
        for n in (1, 3, 10, 40)
    ]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < spreads[0]


def test_seeds_are_different_points_and_stop_where_there_are_no_more():
    points = torch.eye(3, dtype=torch.float64).repeat(4, 1) * torch.tensor([1.0, -1.0]).repeat(6)[:, None]
    gram = 2 * points @ points.T
    for seed in range(5):
        chosen = seeds(gram, 7, torch.Generator().manual_seed(seed), signed=True)
        assert sorted((chosen % 3).tolist()) == [0, 1, 2]
        told_apart = seeds(gram, 7, torch.Generator().manual_seed(seed), signed=False)
        assert len({tuple(points[place].tolist()) for place in told_apart}) == len(told_apart) == 6


def test_a_cluster_that_loses_every_pair_keeps_its_centre_and_is_left_out_at_the_end():
    x_N = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    gram = 2 * torch.outer(x_N, x_N)
    found = k_means(gram, torch.tensor([0, 1]), 5, signed=True)
    assert found.labels.tolist() == [0, 0, 0, 0]
    pool = Pool(torch.ones(4, 3, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64), 1)
    assert assemble(pool, found, settings(), torch.float64).rank == 1


def test_a_centre_without_pairs_can_win_them_back():
    x_N = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    found = k_means(2 * torch.outer(x_N, x_N), torch.tensor([0, 1]), 5, signed=False)
    # All go to the first of two equal centres; its mean moves off, and the second is still where it was.
    assert found.labels.tolist() == [1, 1, 0]


def settings(**given):
    defaults = {
        "weight": (1.0,),
        "lambda_": 1.0,
        "rank": 0,
        "restarts": 1,
        "iterations": 10,
        "compat": "tara",
    }
    return LoraLego(**{**defaults, "parameter_reweighting": True, "output_reweighting": True, **given})


def test_bad_parameters_are_refused():
    factors = random_factors((4, 4), [2])
    for given in ({"rank": -1}, {"rank": 1.5}, {"restarts": 0}, {"iterations": 0}, {"compat": "authors"}):
        with pytest.raises(MethodError, match=f"lora_lego: {next(iter(given))} is .*expected"):
            merge_factors("lora_lego", factors, **given)
    dora = Factor(factors[0].B, factors[0].A, 1.0, magnitude=torch.ones(4, 1, dtype=torch.float64))
    with pytest.raises(MethodError, match="lora_lego works on factors, but a DoRA delta is dense"):
        merge_factors("lora_lego", [dora], base=torch.eye(4, dtype=torch.float64))


# Printed by `benchmarks/parity/tara_baselines.py --rows O --columns I` (rank 8, 4 adapters, seed 5):
# wooseong97/TARA-Merge efbae686f73d2d2c9487d38f8caff24cb43383fd with seed 7. Its k-means starts at
# randperm(32)[:K] of that seed's generator, in the order of adapters and ranks.
PARITY = [
    ((200, 160), 8, 3.42268025473, 0.00988691367748),
    ((200, 160), 16, 3.17525544562, 0.00272344256905),
    ((60, 61), 16, 2.7790050339, 0.10137631656),
]


@pytest.mark.parametrize(("shape", "count", "norm", "entry"), PARITY)
def test_from_the_same_start_lora_lego_gives_the_published_codes_numbers(shape, count, norm, entry):
    generator = torch.Generator().manual_seed(5)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    drawn = [(normal(shape[0], 8) / shape[1], normal(8, shape[1])) for _ in range(4)]
    pool = Pool(torch.cat([B.T for B, _ in drawn]), torch.cat([A for _, A in drawn]), 8)
    start = torch.randperm(32, generator=torch.Generator().manual_seed(7))[:count]
    found = k_means(pool.gram(), start, 10, signed=False)
    merged = assemble(pool, found, settings(), torch.float64)
    # Their epsilons of 1e-8 in norms move the 12th digit.
    assert merged.norm() == pytest.approx(norm, rel=1e-10)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=1e-9)
