import json
import math

import pytest

from ray_merge.errors import MethodError
from ray_merge.methods import METHODS, at_site, get, resolve_parameters

ADAPTERS = ("mnli", "stsb")


def resolve(name, given=None, adapters=ADAPTERS):
    return resolve_parameters(get(name), given or {}, adapters)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_resolved_parameters_are_complete_json_and_resolve_to_themselves(method):
    given = {"rank": 4} if method.name == "svd" else {}
    given |= {"scope": "tensor"} if "scope" in method.declared() else {}
    once = resolve_parameters(method, given, ADAPTERS)
    assert list(once) == list(method.declared())
    assert json.loads(json.dumps(once)) == once
    assert resolve_parameters(method, once, ADAPTERS) == once
    at_site(method, once, ADAPTERS, "layers.0.q")


@pytest.mark.parametrize(
    "weight",
    [
        1,
        1.0,
        {"mnli": 1, "stsb": 1.0},
        {"stsb": 1, "mnli": 1},
        [{"value": 1}],
    ],
)
def test_values_that_mean_the_same_resolve_to_the_same(weight):
    resolved = resolve("task_arithmetic", {"weight": weight})
    assert json.dumps(resolved) == json.dumps(resolve("task_arithmetic"))


def test_defaults_follow_the_papers():
    assert resolve("task_arithmetic") == {
        "weight": {"mnli": 1.0, "stsb": 1.0},
        "lambda": 1.0,
        "normalize": False,
    }
    assert resolve("linear")["normalize"] is True
    assert resolve("linear", {"compat": "peft"})["normalize"] is False
    assert resolve("ties", {"scope": "tensor"})["density"] == {"mnli": 0.2, "stsb": 0.2}
    assert resolve("dare_linear")["density"] == {"mnli": 0.1, "stsb": 0.1}
    assert resolve("knots_dare_ties")["density"] == {"mnli": 0.9, "stsb": 0.9}
    assert resolve("ties", {"scope": "tensor", "compat": "mergekit"})["normalize"] is True
    assert resolve("dare_ties", {"compat": "mergekit"})["normalize"] is False


FILTERED = [
    {"filter": r"\.0\.", "value": {"mnli": 1, "stsb": 2}},
    {"filter": "attn", "value": 3},
    {"value": 4},
]


@pytest.mark.parametrize(
    ("site", "want"),
    [("layers.0.attn.q", (1.0, 2.0)), ("layers.1.attn.q", (3.0, 3.0)), ("layers.1.mlp.up", (4.0, 4.0))],
)
def test_the_first_filter_that_is_found_in_the_site_name_wins(site, want):
    resolved = resolve("task_arithmetic", {"weight": FILTERED})
    assert at_site(get("task_arithmetic"), resolved, ADAPTERS, site).weight == want


def test_a_site_that_no_filter_matches_gets_the_default():
    given = {"weight": FILTERED[:2], "lambda": [{"filter": "attn", "value": 0.5}]}
    chosen = at_site(get("task_arithmetic"), resolve("task_arithmetic", given), ADAPTERS, "layers.1.mlp")
    assert chosen.weight == (1.0, 1.0)
    assert chosen.lambda_ == 1.0


def test_tuples_follow_the_order_of_adapters():
    resolved = resolve("task_arithmetic", {"weight": {"stsb": 2, "mnli": 1}})
    assert at_site(get("task_arithmetic"), resolved, ADAPTERS, "s").weight == (1.0, 2.0)


REFUSED = [
    ("ties", {"densty": 1}, "has no parameter 'densty'; did you mean 'density'"),
    ("ties", {"zzz": 1}, r"has no parameter 'zzz'\. Known: weight, density"),
    ("ties", {"lambda_": 1}, "did you mean 'lambda'"),
    ("svd", {}, "svd: rank is required"),
    ("svd", {"rank": 0}, r"rank is 0, expected a number in \[1, inf\)"),
    ("svd", {"rank": 2.5}, "rank is 2.5, expected a whole number"),
    ("svd", {"rank": True}, "rank is True, expected a finite number"),
    ("svd", {"rank": [4]}, "is one value for the whole merge"),
    ("ties", {"density": 0}, r"density is 0, expected a number in \(0, 1\]"),
    ("ties", {"density": 1.5}, "density is 1.5"),
    ("ties", {"density": "0.5"}, "density is '0.5', expected a finite number"),
    ("ties", {"density": {"mnli": 0.5, "stsb": -1}}, "density for stsb is -1"),
    ("task_arithmetic", {"weight": math.nan}, "weight is nan, expected a finite number"),
    ("task_arithmetic", {"weight": math.inf}, "weight is inf"),
    ("task_arithmetic", {"weight": True}, "weight is True"),
    ("task_arithmetic", {"weight": 10**400}, "expected a finite number"),
    ("task_arithmetic", {"weight": {"mnli": 1, "stbs": 1}}, r"names 'stbs' \(nearest: 'stsb'\)"),
    ("task_arithmetic", {"weight": {"mnli": 1}}, "has no value for stsb"),
    ("task_arithmetic", {"weight": [0.7, 0.3]}, "written as a mapping by adapter"),
    ("task_arithmetic", {"weight": [{"filter": "(", "value": 1}]}, "is not a regular expression"),
    (
        "task_arithmetic",
        {"weight": [{"filter": 3, "value": 1}]},
        "filter is 3, expected a regular expression",
    ),
    ("task_arithmetic", {"weight": [{"value": 1}, {"filter": "q", "value": 2}]}, "put it last"),
    ("task_arithmetic", {"weight": [{"filter": "q"}]}, "a list holds"),
    ("task_arithmetic", {"weight": [{"filter": "q", "value": 1, "x": 2}]}, "a list holds"),
    ("task_arithmetic", {"lambda": {"mnli": 1, "stsb": 1}}, "one value for all adapters"),
    ("task_arithmetic", {"normalize": 1}, "normalize is 1, expected true or false"),
    ("task_arithmetic", {"normalize": True, "weight": {"mnli": 1, "stsb": -1}}, "the weights sum to 0"),
    ("linear", {"weight": [{"filter": "q", "value": 0}]}, "the weights for filter 'q' sum to 0"),
    (
        "linear",
        {"weight": [{"filter": "q", "value": 1}, {"value": 0}]},
        "the weights for the remaining sites sum to 0",
    ),
    ("dare_linear", {"compat": "mergekit", "normalize": True, "weight": 0}, "the weights sum to 0"),
    ("ties", {}, "write `scope: tensor`"),
    ("ties", {"scope": "model"}, "write `scope: tensor`"),
    ("knots_ties", {}, "write `scope: tensor`"),
    ("ties", {"scope": "layer"}, "scope is 'layer', expected one of model, tensor"),
    (
        "ties",
        {"scope": "tensor", "space": "fourier"},
        "space is 'fourier', expected one of dense, core, knots",
    ),
    ("ties", {"scope": "tensor", "compat": ["paper"]}, "is one value for the whole merge"),
    ("ties", {"scope": "tensor", "normalize": True}, "normalize belongs to compat mergekit"),
    ("dare_ties", {"compat": "peft", "normalize": True}, "normalize belongs to compat mergekit"),
    ("knots_ties", {"scope": "tensor", "compat": "peft"}, "expected one of paper, authors"),
    ("dare_linear", {"compat": "peft"}, "expected one of paper, mergekit"),
    (
        "knots_dare_ties",
        {"compat": "authors", "weight": {"mnli": 1, "stsb": 2}},
        "one weight for all adapters",
    ),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_parameters_that_cannot_be_meant_are_refused(name, given, message):
    with pytest.raises(MethodError, match=message):
        resolve(name, given)


def test_a_merge_of_nothing_is_refused():
    with pytest.raises(MethodError, match="needs at least one adapter"):
        resolve("cat", adapters=())


def test_null_means_not_given():
    assert resolve("ties", {"scope": "tensor", "density": None, "normalize": None}) == resolve(
        "ties", {"scope": "tensor"}
    )
