"""Declarations of the learned methods, and `merge_factors` with a phi."""

import pytest
import torch

import ray_merge
from ray_merge.errors import MethodError
from ray_merge.methods.registry import get
from ray_merge.methods.resolve import resolve_parameters
from ray_merge.spec import Factor

NAMES = ("tara_a", "tara_b", "adamerging", "nsc")
RANKS = (2, 3)


def factors():
    torch.manual_seed(0)
    return [Factor(torch.randn(8, r), torch.randn(r, 6), 0.5 + r) for r in RANKS]


def shape(name):
    return {"tara_a": (5,), "tara_b": (2, 5)}.get(name, (2,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_resolved_parameters_are_complete_and_resolve_to_themselves(name, preset):
    found = resolve_parameters(get(name), {"preset": preset}, ("a", "b"))
    assert all(value is not None for key, value in found.items() if key not in ("low", "high"))
    assert resolve_parameters(get(name), found, ("a", "b")) == found
    assert resolve_parameters(get(name), {"preset": preset, "steps": 7}, ("a", "b")) == {**found, "steps": 7}


@pytest.mark.parametrize(
    ("name", "scalarisation"),
    [("tara_a", "tchebycheff"), ("tara_b", "tchebycheff"), ("adamerging", "linear")],
)
def test_the_papers_settings_of_entropy_are_there_by_name(name, scalarisation):
    found = resolve_parameters(get(name), {"preset": "paper"}, ("a", "b"))
    wanted = {
        "objective": "entropy", "steps": 500, "learning_rate": 1e-3, "batch_size": 16, "weight_decay": 0.01,
        "init": 0.4,
        "scalarisation": scalarisation, "alpha": 1.0, "absolute": False, "normalize_entropy": False, "diversity": 0.0,
        "anchors": "single", "effective_rank": 0.0, "sharing": "site", "low": None, "high": None,
        "group_by_length": False,
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted


def test_the_papers_settings_of_nsc_are_there_by_name():
    nsc = resolve_parameters(get("nsc"), {"preset": "paper"}, ("a",))
    assert (nsc["steps"], nsc["learning_rate"], nsc["layers"], nsc["init"]) == (
        100,
        1e-3,
        "last_quarter",
        0.4,
    )


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("nsc", {"layers": "top"}, "layers is 'top', expected all, last, last_quarter"),
        ("nsc", {"layers": "5-3"}, "the first block before the last"),
        ("nsc", {"layers": [3, 5]}, "layers is one value"),
        ("nsc", {"modules": "("}, "a regular expression"),
        ("nsc", {"low": 0.0, "hold_sum": True}, "hold_sum: false"),
        ("nsc", {"preference": 1.0}, "no parameter 'preference'"),
        ("tara_a", {"low": 1.0, "high": 0.5}, "low is 1 and high is 0.5"),
        ("tara_a", {"preference": {"a": 0.0, "b": 1.0}}, r"expected a number in \(0, inf\)"),
        ("tara_b", {"preference": [{"filter": "x", "value": 2.0}, {"value": 1.0}]}, "one value for each adapter"),
        ("tara_b", {"steps": -1}, "steps"),
        ("tara_b", {"alpha": 0}, "alpha"),
        ("adamerging", {"objective": "labels"}, "expected one of agreement, entropy"),
    ],
)  # fmt: skip
def test_bad_parameters_are_refused(name, given, message):
    with pytest.raises(MethodError, match=message):
        resolve_parameters(get(name), given, ("a", "b"))


@pytest.mark.parametrize("name", NAMES)
def test_merge_factors_takes_phi(name):
    some = factors()
    merged = ray_merge.merge_factors(name, some, phi=torch.full(shape(name), 0.3))
    expected = ray_merge.merge_factors("task_arithmetic", some, lambda_=0.3)
    torch.testing.assert_close(merged.dense(), expected.dense(), rtol=0, atol=1e-5)
    assert merged.factors().B.shape[1] == 5


def test_plain_numbers_are_a_phi_of_adapters():
    some = factors()
    merged = ray_merge.merge_factors("nsc", some, phi=[2, -1]).dense()
    tau = [factor.scale * factor.B @ factor.A for factor in some]
    torch.testing.assert_close(merged, 2 * tau[0] - tau[1])


@pytest.mark.parametrize(
    ("name", "phi", "message"),
    [
        ("tara_a", torch.ones(2), r"phi is \(2,\), but tara_a takes \(5,\) for 2 factors of ranks \[2, 3\]"),
        ("tara_b", torch.ones(5, 2), r"takes \(2, 5\).*shared basis"),
        ("nsc", torch.ones(2, 1), r"takes \(2,\)"),
        ("adamerging", torch.tensor([1.0, torch.nan]), "NaN or Inf"),
        ("adamerging", torch.ones(2, dtype=torch.int64), r"phi is torch\.int64, allowed are .*float32"),
        ("adamerging", [True, False], r"phi is torch\.bool, allowed are"),
        ("adamerging", "ab", "phi is a str"),
        ("adamerging", None, "needs `phi`"),
    ],
)  # fmt: skip
def test_another_phi_is_refused(name, phi, message):
    with pytest.raises(MethodError, match=message):
        ray_merge.merge_factors(name, factors(), phi=phi)
