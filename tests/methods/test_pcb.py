"""PCB-Merging. Numbers of the authors' code: github.com/duguodong7/pcb-merging at
5897888b5d24adfcd33e124793d113746e00f3ff, made by `benchmarks/parity/pcb.py`.
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
    order_moves,
)
from method_cases import deltas, random_factors, relative

from ray_merge.errors import MethodError
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.pcb import kth_largest
from ray_merge.methods.registry import get, resolve_parameters
from ray_merge.spec import Factor

DENSITY = [0.2, 0.5, 1.0]
COMPATS = ["paper", "authors"]


def unit(rows):
    """Each row to [0, 1]; a row of equal entries to 1."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return torch.where(high == low, torch.ones_like(rows), (rows - low) / (high - low))


def paper_scores(rows, density):
    n_tasks, n = rows.shape
    size = (n_tasks * unit(rows**2)).softmax(1)
    agreement = torch.stack([unit(own * rows).softmax(1).sum(0) for own in rows])
    scores = size * agreement
    for own, share in zip(scores, density, strict=True):
        count = n if share >= 1 else max(1, int(share * n))
        own[own.argsort(descending=True)[count:]] = 0
    return rows, scores


def authors_scores(rows, density):
    n_tasks, n = rows.shape
    ordered = rows.abs().sort(1).values
    low, high = ordered[:, int(n * 0.0001), None], ordered[:, int(n * (1 - 0.0001) - 1), None]
    clamped = torch.maximum(torch.minimum(rows.abs(), high), low)
    scores = (n_tasks * unit(clamped) ** 2).exp() * torch.tanh(rows * rows.sum(0))
    lowest = torch.stack(
        [own.sort().values[int(n * (1 - d))] for own, d in zip(scores, density, strict=True)]
    )
    return rows.sign() * clamped, unit(torch.maximum(scores, lowest[:, None]))


def reference(weights=(1.0,) * 3, density=(0.1,) * 3, compat="paper"):
    def merged(values):
        present = [i for i, own in enumerate(values) if own.any()]
        rows = values[present].flatten(1)
        shares = [density[i] for i in present]
        entries, scores = (paper_scores if compat == "paper" else authors_scores)(rows, shares)
        own_weights = torch.tensor([weights[i] for i in present], dtype=rows.dtype)[:, None]
        total = scores.sum(0)
        average = (own_weights * scores * entries).sum(0) / torch.where(total == 0, 1.0, total)
        return average.reshape(values.shape[1:])

    return merged


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("compat", COMPATS)
def test_entries_are_averaged_by_their_scores(compat, space, shape, ranks):
    factors = random_factors(shape, ranks)
    merged = merge_factors(
        "pcb", factors, weight=WEIGHTS, density=DENSITY, lambda_=0.6, space=space, compat=compat
    )
    want = 0.6 * in_space(space, factors, reference(WEIGHTS, DENSITY, compat))
    assert relative(merged.dense(), want) < CLOSE
    assert (merged.factors() is None) is (space == "dense")


@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
def test_one_adapter_keeps_its_largest_entries(density):
    (factor,) = random_factors((24, 17), [3])
    want = merge_factors("magnitude_prune", [factor], density=density, weight=2.0).dense()
    merged = merge_factors("pcb", [factor], density=density, weight=2.0)
    assert relative(merged.dense(), want) < CLOSE


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_one_adapter_are_that_adapter(copies):
    factors = random_factors((24, 17), [3]) * copies
    merged = merge_factors("pcb", factors, density=1.0, lambda_=0.5)
    assert relative(merged.dense(), 0.5 * deltas(factors[:1])[0]) < CLOSE


def test_many_adapters_do_not_overflow():
    # exp(T) of the paper's softmax and of the authors' code is beyond float32 for more than 88 adapters.
    factors = random_factors((8, 6), [1] * 100, dtype=torch.float32)
    for compat in COMPATS:
        merged = merge_factors("pcb", factors, density=0.5, compat=compat).dense()
        assert torch.isfinite(merged).all()
        assert merged.any()


def test_the_scale_of_the_deltas_matters_in_the_authors_tanh_only():
    factors = random_factors((24, 17), (3, 5, 2))
    smaller = [Factor(factor.B, factor.A, factor.scale / 100) for factor in factors]

    def moved(compat):
        merged = merge_factors("pcb", factors, compat=compat).dense()
        return relative(100 * merge_factors("pcb", smaller, compat=compat).dense(), merged)

    assert moved("paper") < 1e-9
    assert moved("authors") > 1e-2


def test_the_authors_numbers():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = [Factor(normal(192, 8) / 192, normal(8, 192), 32.0) for _ in range(4)]
    merged = merge_factors("pcb", factors, density=0.1, compat="authors")
    assert merged.norm() == pytest.approx(111.13801466, rel=1e-10)
    assert float(merged.dense()[3, 5]) == pytest.approx(-1.00066464561, rel=1e-9)


@pytest.mark.parametrize("values", [[3.0, -1.0, 2.0, -5.0], [-1.0, -2.0, -3.0], [0.0, 0.0, -1.0, 1.0], [7.0]])
def test_the_kth_largest_has_a_sign(values):
    chunks = [torch.tensor(values[:2]), torch.tensor(values[2:])]
    got = [kth_largest(lambda: chunks, len(values), k + 1) for k in range(len(values))]
    assert got == sorted(values, reverse=True)


@pytest.mark.parametrize("compat", COMPATS)
def test_an_adapter_that_is_zero_here_takes_no_part(compat):
    factors = random_factors((24, 17), (3, 0, 5))
    zero = Factor(torch.zeros(24, 4), factors[0].A[:1].repeat(4, 1))
    want = merge_factors("pcb", [factors[0], factors[2]], compat=compat).dense()
    assert torch.equal(merge_factors("pcb", factors, compat=compat).dense(), want)
    assert torch.equal(merge_factors("pcb", [factors[0], zero, factors[2]], compat=compat).dense(), want)


@pytest.mark.parametrize("compat", COMPATS)
def test_a_delta_of_equal_entries_is_merged(compat):
    flat = Factor(torch.ones(6, 1), torch.full((1, 5), 2.0))
    merged = merge_factors("pcb", [flat, flat], compat=compat).dense()
    assert torch.equal(merged, torch.full((6, 5), 2.0))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("compat", COMPATS)
def test_adapters_that_are_zero_are_harmless(compat, space):
    check_zero_adapters("pcb", space, compat=compat)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("compat", COMPATS)
def test_the_order_of_adapters_does_not_matter(compat, space):
    assert order_moves("pcb", space, weight=WEIGHTS, density=DENSITY, compat=compat) < CLOSE


@pytest.mark.parametrize("compat", COMPATS)
def test_it_sees_deltas_and_in_core_space_also_the_gauge_of_their_factors(compat):
    assert gauge_moves("pcb", "dense", compat=compat) < 1e-9
    assert gauge_moves("pcb", "knots", compat=compat) < 1e-9
    assert gauge_moves("pcb", "core", compat=compat) > 1e-2


def test_rows_have_the_same_bits_in_any_block():
    check_rows_in_any_block("pcb")


@pytest.mark.parametrize("compat", COMPATS)
def test_the_grid_of_chunks_does_not_show(compat, monkeypatch):
    # Minima, maxima, means and the least score kept are those of the site.
    assert chunks_move("pcb", monkeypatch, compat=compat) < CLOSE


@pytest.mark.parametrize("compat", COMPATS)
def test_float32_factors_are_merged_in_float32(compat):
    assert float32_error("pcb", reference(compat=compat), compat=compat) < 1e-5


@pytest.mark.parametrize("compat", COMPATS)
def test_a_dora_delta_is_treated_like_any_other(compat):
    assert dora_error("pcb", reference(compat=compat), compat=compat) < CLOSE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"density": 0.0}, r"density .*is 0.0, expected a number in \(0, 1\]"),
        ({"scope": "model"}, "scope is 'model', expected one of tensor"),
        ({"compat": "peft"}, "compat is 'peft', expected one of paper, authors"),
    ],
)
def test_bad_parameters_are_refused(given, message):
    with pytest.raises(MethodError, match=message):
        resolve_parameters(get("pcb"), given, ["a", "b"])
