"""RegMean against the dense formula on whole weights, W = (sum w G~ W_i^T)^-1, in float64."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from method_cases import deltas, random_factors, relative, weighted

from ray_merge import Moments
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.sketch import FrequentDirections
from ray_merge.errors import MethodError, RunFailed
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import at_site, get, resolve_parameters
from ray_merge.spec import Factor

CLOSE = 1e-11

CASES = [
    ((24, 17), (3, 5, 2)),
    ((17, 24), (0, 4, 0)),
    ((6, 40), (4, 4, 4)),
    ((5, 4), (7, 1, 3)),
    ((8, 9), (0, 0, 0)),
    ((1, 1), (1,)),
    ((13, 11), (2,) * 8),
]


def moments_of(X: torch.Tensor) -> Moments:
    X = X.double()
    return Moments(X.T @ X, X.mean(0), len(X))


def random_moments(n_inputs: int, count: int, *, seed: int = 5, rows: int = 64) -> list[Moments]:
    """Of correlated inputs with a mean, of another scale and another number of rows in each task."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [
        moments_of((0.5 + task) * (normal(rows + task, n_inputs) @ normal(n_inputs, n_inputs) + 0.3))
        for task in range(count)
    ]


def tilde(moments: Moments, off_diagonal: float) -> torch.Tensor:
    G = moments.gram / moments.count
    return off_diagonal * G + (1 - off_diagonal) * torch.diag(G.diagonal())


def dense(taus, moments, weight, off_diagonal=0.9, ridge=1e-6):
    """The merged weight minus the base weight."""
    base = torch.randn(taus[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grams = [tilde(one, off_diagonal) for one in moments]
    mean = sum(w * G.diagonal().mean() for w, G in zip(weight, grams, strict=True)) / sum(weight)
    grams = [G + ridge * mean * torch.eye(len(G), dtype=torch.float64) for G in grams]
    left = sum(w * G for w, G in zip(weight, grams, strict=True))
    right = sum(w * G @ (base + tau).T for w, G, tau in zip(weight, grams, taus, strict=True))
    return torch.linalg.solve(left, right).T - base


@pytest.mark.parametrize(("shape", "ranks"), CASES)
@pytest.mark.parametrize(
    "given", [{}, {"off_diagonal": 1.0, "ridge": 1e-3}, {"off_diagonal": 0.0, "ridge": 0.0}]
)
def test_the_factors_multiply_to_the_solution_for_whole_weights(shape, ranks, given):
    factors, moments = random_factors(shape, ranks), random_moments(shape[1], len(ranks))
    weight = [0.5 + place for place in range(len(ranks))]
    merged = merge_factors("regmean", factors, moments=moments, weight=weight, lambda_=0.7, **given)
    want = 0.7 * dense(deltas(factors), moments, weight, **given)
    assert float((merged.dense() - want).norm()) < CLOSE * max(1.0, float(want.norm()))
    assert merged.factors().B.shape == (shape[0], sum(ranks))
    assert torch.equal(merged.rows(0, 1), merged.dense()[:1])


@pytest.mark.parametrize(("shape", "ranks"), CASES)
def test_a_weight_stored_in_out_gives_the_transposed_result(shape, ranks):
    factors, moments = random_factors(shape, ranks), random_moments(shape[1], len(ranks))
    turned = [Factor(f.A.T.contiguous(), f.B.T.contiguous(), f.scale) for f in factors]
    want = merge_factors("regmean", factors, moments=moments).dense().T
    merged = merge_factors("regmean", turned, moments=moments, input_side="rows")
    assert float((merged.dense() - want).norm()) < CLOSE * max(1.0, float(want.norm()))
    assert merged.factors().A.shape == (sum(ranks), shape[0])


def test_it_is_the_least_squares_solution_on_the_inputs_themselves():
    factors = random_factors((7, 9), (2, 3))
    generator = torch.Generator().manual_seed(3)
    X = [torch.randn(rows, 9, generator=generator, dtype=torch.float64) for rows in (40, 30)]
    merged = merge_factors(
        "regmean",
        factors,
        moments=[moments_of(x) for x in X],
        off_diagonal=1.0,
        ridge=0.0,
        weight=[40.0, 30.0],
    )
    # With weights of the numbers of rows each row counts once.
    outputs = torch.cat([x @ tau.T for x, tau in zip(X, deltas(factors), strict=True)])
    want = torch.linalg.lstsq(torch.cat(X), outputs).solution.T
    assert relative(merged.dense(), want) < CLOSE


@pytest.mark.parametrize("n_adapters", range(1, 9))
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 10.0])
def test_equal_grams_give_the_mean_whatever_the_ridge(n_adapters, ridge):
    factors = random_factors((6, 12), [2] * n_adapters)
    one = random_moments(12, 1)[0]
    more = Moments(3 * one.gram, one.mean, 3 * one.count)
    moments = [one if place % 2 else more for place in range(n_adapters)]
    merged = merge_factors("regmean", factors, moments=moments, ridge=ridge)
    assert relative(merged.dense(), deltas(factors).mean(0)) < CLOSE


def test_a_task_decides_where_it_alone_has_inputs_and_what_none_shows_is_averaged():
    factors = random_factors((5, 6), (2, 2))
    one, other, no_one = torch.eye(6, dtype=torch.float64).split([2, 2, 2])
    moments = [moments_of(one), moments_of(other)]
    first, second = deltas(factors)
    want = torch.cat([first[:, :2], second[:, 2:4], (first + second)[:, 4:] / 2], dim=1)
    assert no_one.any()
    merged = merge_factors("regmean", factors, moments=moments, ridge=1e-9)
    assert relative(merged.dense(), want) < 1e-7
    nothing = [Moments(torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6), 1)] * 2
    assert relative(merge_factors("regmean", factors, moments=nothing).dense(), (first + second) / 2) < CLOSE


def test_an_adapter_that_does_not_touch_the_site_still_counts_with_its_inputs():
    factors, moments = random_factors((5, 6), (2, 0)), random_moments(6, 2)
    merged = merge_factors("regmean", factors, moments=moments).dense()
    assert relative(merged, dense(deltas(factors), moments, [1.0, 1.0])) < CLOSE
    assert relative(merged, merge_factors("regmean", factors[:1], moments=moments[:1]).dense()) > 0.1
    # With a weight of 0 it does not.
    alone = merge_factors("regmean", factors, moments=moments, weight=[1.0, 0.0]).dense()
    assert relative(alone, deltas(factors)[0]) < CLOSE


def test_fewer_tokens_than_inputs_need_the_ridge_and_keep_their_digits_with_it():
    factors = random_factors((9, 30), (3, 2))
    scales = torch.logspace(0, -4, 30, dtype=torch.float64)  # a spectrum over 8 decades, below it nothing
    moments = [
        moments_of(
            torch.randn(7, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scales
        )
        for seed in (1, 2)
    ]
    for task in range(2):
        assert torch.linalg.matrix_rank(moments[task].gram, hermitian=True) <= 7
    with pytest.raises(
        RunFailed, match=r"off_diagonal 1 and ridge 0 the Gram matrix of its 30 inputs is singular"
    ):
        merge_factors("regmean", factors, moments=moments, off_diagonal=1.0, ridge=0.0)
    merged = merge_factors("regmean", factors, moments=moments, off_diagonal=1.0).dense()
    assert relative(merged, dense(deltas(factors), moments, [1.0, 1.0], off_diagonal=1.0)) < 1e-8
    single = [Factor(f.B.float(), f.A.float(), f.scale) for f in factors]
    rounded = merge_factors("regmean", single, moments=moments, off_diagonal=1.0).dense()
    assert rounded.dtype == torch.float32
    assert relative(rounded, merged) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_factors_are_solved_in_float64_and_rounded_once(dtype):
    factors = random_factors((24, 17), (3, 5, 2), dtype=dtype)
    moments = random_moments(17, 3)
    merged = merge_factors("regmean", factors, moments=moments)
    assert merged.dense().dtype == torch.float32
    assert relative(merged.dense(), dense(deltas(factors), moments, [1.0] * 3)) < 1e-6


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("of_columns", [False, True])
def test_a_dora_delta_is_solved_by_rows(by_rows, of_columns):
    shape = (560, 500)  # more than one chunk of rows
    plain, dora = random_factors(shape, (3, 2))
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(*shape, generator=generator, dtype=torch.float64)
    size = (1, shape[1]) if of_columns else (shape[0], 1)
    magnitude = 30 * (1 + torch.rand(*size, generator=generator, dtype=torch.float64))
    dora = dataclasses.replace(dora, magnitude=magnitude)
    V = base + dora.scale * dora.B @ dora.A
    tau = magnitude * V / V.norm(dim=0 if of_columns else 1, keepdim=True) - base
    taus = [deltas([plain])[0], tau]
    moments = random_moments(shape[0 if by_rows else 1], 2, rows=20)
    weight = [1.5, 0.5]
    want = dense([t.T for t in taus] if by_rows else taus, moments, weight)
    merged = merge_factors(
        "regmean",
        [plain, dora],
        base=base,
        moments=moments,
        weight=weight,
        input_side="rows" if by_rows else "columns",
    )
    assert relative(merged.dense(), want.T if by_rows else want) < 1e-9
    assert merged.factors() is None
    assert torch.equal(merged.rows(520, 530), merged.dense()[520:530])


def merge(site, inputs, **given):
    names = [str(place) for place in range(len(site))]
    parameters = at_site(get("regmean"), resolve_parameters(get("regmean"), given, names), names, "s")
    return merge_site("regmean", site, parameters, names=names, site="layers.0.q", seed=0, inputs=inputs)


def test_a_site_without_moments_is_refused_or_averaged_where_that_was_asked_for():
    factors = random_factors((5, 6), (2, 3))
    with pytest.raises(
        MethodError, match=r"no statistics of data at layers\.0\.q.*`without_moments: average`"
    ):
        merge(SiteFactors(factors), {})
    merged = merge(SiteFactors(factors), {}, without_moments="average", weight={"0": 3, "1": 1})
    assert relative(merged.dense(), weighted(deltas(factors), [0.75, 0.25]).sum(0)) < CLOSE


def test_gram_matrices_may_be_loaded_when_they_are_asked_for():
    moments = random_moments(6, 3)
    asked = []

    class Lazy:
        def __len__(self):
            return 3

        def __getitem__(self, place):
            asked.append(place)
            return moments[place]

    factors = random_factors((5, 6), (2, 3, 0))
    merged = merge(SiteFactors(factors), {"moments": Lazy()})
    assert asked == [0, 1, 2]
    assert torch.equal(merged.dense(), merge_factors("regmean", factors, moments=moments).dense())
    with pytest.raises(MethodError, match=r"2 moments for 3 adapters at layers\.0\.q"):
        merge(SiteFactors(factors), {"moments": moments[:2]})
    with pytest.raises(
        MethodError, match=r"Gram matrix for layers\.0\.q is \(7, 7\), but the weight takes 6 inputs"
    ):
        merge(SiteFactors(factors), {"moments": random_moments(7, 3)})


def test_sketched_moments_are_taken_as_well():
    factors, moments = random_factors((5, 6), (2, 3)), random_moments(6, 2)
    sketches = []
    for one in moments:
        sketch = FrequentDirections(6, 6)
        # Rows with that Gram matrix: with as many rows as inputs nothing is lost.
        sketch.add(torch.linalg.cholesky(one.gram).T)
        sketches.append(dataclasses.replace(sketch.finish(), count=one.count))
    want = merge_factors("regmean", factors, moments=moments).dense()
    assert relative(merge_factors("regmean", factors, moments=sketches).dense(), want) < 1e-9


def with_entry(row: int, column: int, value: float) -> list[Moments]:
    """Moments of two tasks of 6 inputs, with one entry of the second's Gram matrix set."""
    moments = random_moments(6, 2)
    moments[1].gram[row, column] = value
    return moments


def of_gram(gram: object) -> list[SimpleNamespace]:
    return [SimpleNamespace(gram=gram, count=3)] * 2


def test_low_precision_grams_and_no_moments_are_taken_where_that_was_asked_for():
    factors, moments = random_factors((5, 6), (2, 3)), random_moments(6, 2)
    want = merge_factors("regmean", factors, moments=moments).dense()
    single = [dataclasses.replace(one, gram=one.gram.float()) for one in moments]
    assert relative(merge_factors("regmean", factors, moments=single).dense(), want) < 1e-4
    half = [dataclasses.replace(one, gram=one.gram.bfloat16()) for one in moments]
    assert merge_factors("regmean", factors, moments=half).shape == (5, 6)
    mean = merge_factors("regmean", factors, without_moments="average", weight=[3, 1]).dense()
    assert relative(mean, weighted(deltas(factors), [0.75, 0.25]).sum(0)) < CLOSE


NAN = Moments(torch.full((6, 6), float("nan"), dtype=torch.float64), torch.zeros(6), 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "regmean needs `moments`"),
        ({"moments": random_moments(6, 3)}, "one for each of 2 factors; got 3 of them"),
        ({"moments": torch.ones(2, 6, 6)}, "one for each of 2 factors; got a Tensor"),
        ({"moments": [torch.eye(6)] * 2}, r"moments\[0\] is a Tensor, expected ray_merge.Moments"),
        ({"moments": random_moments(5, 2)}, r"moments\[0\] is of 5 inputs, but the weight takes 6"),
        ({"moments": random_moments(6, 2), "input_side": "rows"}, "6 inputs, but the weight takes 5"),
        ({"moments": random_moments(6, 2), "input_side": "left"}, "input_side is 'left'"),
        ({"moments": [NAN, NAN]}, r"moments\[0\] is of 3 tokens and its diagonal goes from nan"),
        (
            {"moments": with_entry(1, 4, float("nan"))},
            r"moments\[1\].gram differs from its transpose by up to nan",
        ),
        ({"moments": with_entry(1, 4, 1e9)}, r"moments\[1\].gram differs from its transpose by up to 1e\+09"),
        ({"moments": with_entry(2, 2, 1e300)}, r"moments\[1\] goes up to 1e\+300, expected 0 or 1e-150 to"),
        ({"moments": of_gram(torch.eye(6).double() * 1e-300)}, r"moments\[0\] goes up to 1e-300, expected"),
        (
            {"moments": of_gram(torch.eye(6).numpy())},
            r"moments\[0\].gram is ndarray, expected a floating tensor",
        ),
        ({"moments": of_gram(torch.eye(6).long())}, r"moments\[0\].gram is torch.int64 \(6, 6\), expected"),
        ({"moments": of_gram(torch.ones(6))}, r"moments\[0\].gram is torch.float32 \(6,\), expected"),
        ({"moments": of_gram(torch.ones(6, 5))}, r"moments\[0\].gram is torch.float32 \(6, 5\), expected"),
        ({"moments": random_moments(6, 2), "off_diagonal": 1.5}, "off_diagonal is 1.5, expected"),
        ({"moments": random_moments(6, 2), "ridge": -1}, "ridge is -1, expected"),
        ({"moments": random_moments(6, 2), "weight": [1, -1]}, "weight for 1 is -1.0|weight for 1 is -1"),
        ({"moments": random_moments(6, 2), "weight": 0}, "regmean: the weights are all 0"),
    ],
)
def test_what_cannot_be_merged_is_refused(given, message):
    with pytest.raises(MethodError, match=message):
        merge_factors("regmean", random_factors((5, 6), (2, 3)), **given)


# Printed by `benchmarks/parity/regmean.py`, fusion_bench 54c9e8c9d9621620c720452cd8533332a32d3689 in float64.
# off_diagonal, their norm, their entry [3, 5], and that entry where weights are stored (in, out)
PARITY = [
    (0.1, 2.53981892953, 0.0198471276661, 0.0534635737972),
    (0.9, 3.01988472994, 0.0696680588199, 0.0993487063357),
    (0.95, 3.15290618313, 0.0768597429078, 0.105463690076),
    (1.0, 3.34608587747, 0.0855107048926, 0.11254857992),
]


@pytest.mark.parametrize(("off_diagonal", "norm", "entry", "turned_entry"), PARITY)
def test_regmean_gives_fusion_benchs_numbers(off_diagonal, norm, entry, turned_entry):
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    factors = [Factor(normal(96, 8) / 48, normal(8, 48), 1.0) for _ in range(4)]
    generator = torch.Generator().manual_seed(4)
    mix = [normal(48, 48) / 48**0.5 for _ in range(4)]
    moments = [moments_of((1 + task) * (normal(300, 48) @ mix[task] + 0.3)) for task in range(4)]
    given = {"moments": moments, "off_diagonal": off_diagonal, "ridge": 0.0}
    merged = merge_factors("regmean", factors, **given)
    turned = [Factor(f.A.T.contiguous(), f.B.T.contiguous(), f.scale) for f in factors]
    other = merge_factors("regmean", turned, input_side="rows", **given)
    # The recorded numbers have 12 digits; theirs is a difference of weights of entries of about 1.
    assert merged.norm() == pytest.approx(norm, rel=1e-11)
    assert other.norm() == pytest.approx(norm, rel=1e-11)
    assert float(merged.rows(3, 4)[0, 5]) == pytest.approx(entry, rel=1e-10)
    assert float(other.rows(3, 4)[0, 5]) == pytest.approx(turned_entry, rel=1e-10)
