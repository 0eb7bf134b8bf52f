import pytest
import torch
from method_cases import deltas, random_factors, relative

from ray_merge.errors import MethodError
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

ALL = [
    ("task_arithmetic", {}),
    ("linear", {}),
    ("cat", {}),
    ("svd", {"rank": 2}),
    ("ties", {}),
    ("ties", {"space": "core"}),
    ("dare_linear", {}),
    ("dare_ties", {}),
    ("knots_ties", {}),
    ("knots_dare_ties", {}),
]


@pytest.mark.parametrize(("method", "given"), ALL)
@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_results_are_float32_unless_factors_are_float64(method, given, dtype, want):
    delta = merge_factors(method, random_factors((12, 10), (2, 3), dtype=dtype), **given)
    assert delta.dense().dtype == want
    assert delta.rows(3, 5).dtype == want
    assert delta.shape == (12, 10)
    factors = delta.factors()
    if factors is not None:
        assert factors.B.dtype == factors.A.dtype == want
        assert torch.equal(factors.B @ factors.A, delta.dense())


@pytest.mark.parametrize(("method", "given"), ALL)
def test_inputs_are_left_as_they_were(method, given):
    factors = random_factors((12, 10), (2, 3))
    before = [(factor.B.clone(), factor.A.clone()) for factor in factors]
    merge_factors(method, factors, weight=0.5, lambda_=2.0, **given).dense()
    for factor, (B, A) in zip(factors, before, strict=True):
        assert torch.equal(factor.B, B)
        assert torch.equal(factor.A, A)


def test_lambda_may_be_written_as_in_a_recipe():
    factors = random_factors((12, 10), (2, 3))
    as_recipe = merge_factors("task_arithmetic", factors, **{"lambda": 0.3})
    assert torch.equal(as_recipe.dense(), merge_factors("task_arithmetic", factors, lambda_=0.3).dense())


@pytest.mark.parametrize("weight", [[1, 2], (1, 2), {"0": 1, "1": 2}, [{"value": {"0": 1, "1": 2}}]])
def test_weights_may_be_a_sequence_in_the_order_of_factors(weight):
    factors = random_factors((12, 10), (2, 3))
    merged = merge_factors("task_arithmetic", factors, weight=weight)
    assert relative(merged.dense(), deltas(factors)[0] + 2 * deltas(factors)[1]) < 1e-12


def test_one_weight_is_the_whole_model_so_both_scopes_are_the_same():
    factors = random_factors((12, 10), (2, 3))
    results = [
        merge_factors("ties", factors, **given).dense()
        for given in ({}, {"scope": "model"}, {"scope": "tensor"})
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_transposed_factor_is_merged_like_a_contiguous_one():
    (factor,) = random_factors((12, 10), [3], dtype=torch.float32)
    other = Factor(factor.B.T.contiguous().T, factor.A.T.contiguous().T, factor.scale)
    assert torch.equal(merge_factors("ties", [other]).dense(), merge_factors("ties", [factor]).dense())


def bad(B=None, A=None, scale=1.0):
    return Factor(torch.ones(4, 2) if B is None else B, torch.ones(2, 3) if A is None else A, scale)


NAN = torch.tensor([[1.0, float("nan")], [0, 0], [0, 0], [0, 0]])


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([bad(), bad(B=NAN)], r"factors\[1\].B holds NaN or Inf"),
        ([bad(A=torch.full((2, 3), float("inf")))], r"factors\[0\].A holds NaN or Inf"),
        ([bad(scale=float("inf"))], r"factors\[0\].scale is inf"),
        ([bad(B=torch.ones(4, 5))], r"B \(4, 5\) and A \(2, 3\)"),
        ([bad(B=torch.ones(4))], r"B \(4,\) and A \(2, 3\)"),
        (
            [bad(), bad(B=torch.ones(5, 2))],
            r"factors\[1\] is for a weight of \(5, 3\), but factors\[0\] is for \(4, 3\)",
        ),
        ([bad(B=torch.ones(4, 2, dtype=torch.int64))], r"factors\[0\].B has dtype torch.int64"),
        ([(torch.ones(4, 2), torch.ones(2, 3))], r"factors\[0\] is a tuple, expected"),
        ([], "needs at least one adapter"),
    ],
)
def test_factors_that_cannot_be_merged_are_refused(factors, message):
    with pytest.raises(MethodError, match=message):
        merge_factors("task_arithmetic", factors)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": [1, 2, 3]}, "weight has 3 values for 2 factors"),
        ({"weight": {"mnli": 1}}, "names 'mnli'"),
        ({"lambda_": 1, "lambda": 2}, "lambda or lambda_, not both"),
        ({"moments": []}, "task_arithmetic takes no `moments`"),
        ({"phi": torch.ones(2)}, "task_arithmetic takes no `phi`"),
        ({"base": torch.ones(4, 3)}, "task_arithmetic takes no `base`"),
        ({"scope": "tensor"}, "has no parameter 'scope'"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(given, message):
    with pytest.raises(MethodError, match=message):
        merge_factors("task_arithmetic", [bad(), bad()], **given)


def test_a_scope_that_does_not_exist_is_refused():
    with pytest.raises(MethodError, match="scope is 'layer'"):
        merge_factors("ties", [bad()], scope="layer")


def dora(shape=(4, 3), magnitude=None):
    return Factor(
        torch.ones(shape[0], 2), torch.ones(2, shape[1]), 0.5,
        torch.arange(1.0, shape[0] + 1)[:, None] if magnitude is None else magnitude,
    )  # fmt: skip


BASE = torch.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize("magnitude", [torch.arange(1.0, 5)[:, None], torch.arange(1.0, 4)[None]])
def test_a_dora_factor_is_merged_against_the_base_weight(magnitude):
    factor = dora(magnitude=magnitude)
    plain = bad(scale=2.0)
    merged = merge_factors("task_arithmetic", [factor, plain], base=BASE, weight=[0.5, 3.0])
    V = BASE.double() + 0.5 * (factor.B.double() @ factor.A.double())
    tau = magnitude.double() * V / V.norm(dim=int(magnitude.shape[1] == 1), keepdim=True) - BASE.double()
    want = 0.5 * tau + 3.0 * 2.0 * (plain.B.double() @ plain.A.double())
    assert relative(merged.dense(), want) < 1e-6
    assert merged.factors() is None


@pytest.mark.parametrize(
    ("method", "base", "magnitude", "given", "message"),
    [
        ("task_arithmetic", None, None, {}, r"needs `base` of shape \(4, 3\), got none"),
        ("task_arithmetic", torch.ones(3, 4), None, {}, r"needs `base` of shape \(4, 3\), got \(3, 4\)"),
        ("task_arithmetic", BASE, torch.ones(3, 1), {}, r"factors\[0\].magnitude is \(3, 1\)"),
        ("task_arithmetic", BASE, torch.ones(4), {}, r"factors\[0\].magnitude is \(4,\)"),
        ("cat", BASE, None, {}, "cat works on factors, but a DoRA delta is dense"),
        ("ties", BASE, None, {"space": "core"}, "ties works on factors"),
        (
            "task_arithmetic",
            BASE,
            torch.full((4, 1), float("nan")),
            {},
            r"factors\[0\].magnitude holds NaN or Inf",
        ),
        ("task_arithmetic", BASE.log(), None, {}, "base holds NaN or Inf"),
    ],
)
def test_a_dora_factor_that_cannot_be_merged_is_refused(method, base, magnitude, given, message):
    with pytest.raises(MethodError, match=message):
        merge_factors(method, [dora(magnitude=magnitude)], base=base, **given)
