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
    ("task_arithmetic", {"weight": [0.7, "0.3"]}, "written as a mapping by adapter"),
    ("task_arithmetic", {"weight": [0.7, True]}, "numbers alone for a gradient"),
    ("task_arithmetic", {"weight": [0.7, math.nan]}, "weight, value 2 is nan, expected a finite number"),
    ("task_arithmetic", {"weight": {"mnli": [1, 2], "stsb": ["a"]}}, r"weight for stsb is \['a'\]"),
    ("ties", {"density": {"mnli": [0.5, 1.5], "stsb": 1}}, "density for mnli, value 2 is 1.5"),
    ("ties", {"scope": "tensor", "density": [0.5, 0]}, r"value 2 is 0, expected a number in \(0, 1\]"),
    ("task_arithmetic", {"weight": [{"depth": 0, "value": 1}, {"depth": 0.5, "value": 2}]}, "rise from 0"),
    ("task_arithmetic", {"weight": [{"depth": 1, "value": 1}, {"depth": 0, "value": 2}]}, "rise from 0"),
    ("task_arithmetic", {"weight": [{"depth": "0", "value": 1}, {"depth": 1, "value": 2}]}, "rise from 0"),
    ("task_arithmetic", {"weight": [{"depth": 0, "value": [1, 2]}, {"depth": 1, "value": 2}]}, "one value"),
    (
        "task_arithmetic",
        {
            "weight": [
                {"filter": "q", "depth": 0, "value": 1},
                {"value": 3},
                {"filter": "q", "depth": 1, "value": 2},
            ]
        },
        "stand together",
    ),
    ("task_arithmetic", {"weight": [{"value": [1, 2]}, {"filter": "q", "value": 2}]}, "put it last"),
    ("task_arithmetic", {"normalize": True, "weight": [1, 0]}, "the weights at depth 1 sum to 0"),
    ("task_arithmetic", {"normalize": True, "weight": [1, -1]}, "change sign with depth"),
    (
        "linear",
        {"weight": [{"filter": "q", "value": [1, 0, 1]}, {"value": 1}]},
        "the weights for filter 'q' at depth 0.5 sum to 0",
    ),
    (
        "knots_dare_ties",
        {"compat": "authors", "weight": {"mnli": [1, 2], "stsb": [1, 3]}},
        "the weights at depth 1 are",
    ),
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
    ("ties", {"density": [0.5, 0.2]}, "write `scope: tensor`"),
    ("ties", {"scope": "model", "density": {"mnli": [0.5, 0.2], "stsb": 0.1}}, "write `scope: tensor`"),
    ("knots_ties", {"density": [{"filter": "q", "value": 0.5}]}, "write `scope: tensor`"),
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


def levels(name, given, depths, site="layers.0.q"):
    method = get(name)
    return [at_site(method, resolve(name, given), ADAPTERS, site, depth) for depth in depths]


# Printed by mergekit 0.1.4's evaluate_setting (mergekit/config.py) for five blocks: t = 0, 1/4, 1/2, 3/4, 1.
MERGEKIT = [
    ([0, 0.5, 1], [0.0, 0.25, 0.5, 0.75, 1.0]),
    ([1, 0.2], [1.0, 0.8, 0.6, 0.4, 0.2]),
    ([0.3, 0.9, 0.1, 0.4], [0.3, 0.75, 0.5, 0.17500000000000002, 0.4]),
]


@pytest.mark.parametrize(("numbers", "want"), MERGEKIT)
def test_gradients_are_those_of_mergekit(numbers, want):
    depths = [block / 4 for block in range(5)]
    found = levels("task_arithmetic", {"weight": numbers, "lambda": numbers}, depths)
    assert [one.lambda_ for one in found] == pytest.approx(want, rel=1e-15)
    assert [one.weight for one in found] == [pytest.approx((value, value), rel=1e-15) for value in want]


GRADIENTS = [
    {"weight": [0, 1]},
    {"lambda": (0.2, 0.7, 0.2)},
    {"weight": {"mnli": [0, 1, 0.5], "stsb": 2}},
    {"weight": {"mnli": [0, 1, 0.5], "stsb": [1, 0.1]}},
    {"weight": [{"filter": "q", "value": [1, 2]}, {"filter": "k", "value": {"mnli": [0, 3], "stsb": 1}}]},
    {"weight": [{"filter": "q", "value": 3}, {"value": [1, 2, 3, 4]}]},
    {"lambda": [{"filter": "q", "value": [1, 2]}, {"filter": "k", "value": [2, 4]}, {"value": [3, 1]}]},
]


@pytest.mark.parametrize("given", GRADIENTS)
def test_resolved_gradients_are_json_and_resolve_to_themselves(given):
    once = resolve("task_arithmetic", given)
    assert json.loads(json.dumps(once)) == once
    assert resolve("task_arithmetic", once) == once
    assert resolve("task_arithmetic", json.loads(json.dumps(once))) == once


@pytest.mark.parametrize("same", [0.3, [0.3], [0.3, 0.3, 0.3], [{"value": [0.3, 0.3]}]])
def test_a_gradient_of_equal_numbers_is_one_number(same):
    assert resolve("task_arithmetic", {"lambda": same}) == resolve("task_arithmetic", {"lambda": 0.3})
    assert resolve("task_arithmetic", {"weight": same}) == resolve("task_arithmetic", {"weight": 0.3})


def test_adapters_have_gradients_of_their_own_with_other_numbers_of_values():
    given = {"weight": {"mnli": [0, 1, 0], "stsb": [1, 0, 0, 2]}}
    found = levels("task_arithmetic", given, [0, 1 / 3, 0.5, 2 / 3, 0.9, 1])
    assert [one.weight[0] for one in found] == pytest.approx([0, 2 / 3, 1, 2 / 3, 0.2, 0])
    assert [one.weight[1] for one in found] == pytest.approx([1, 0, 0, 0, 1.4, 2])


def test_a_gradient_behind_a_filter_holds_where_the_filter_is_found():
    given = {
        "lambda": [{"filter": "attn", "value": [1, 3]}, {"filter": "mlp", "value": 7}, {"value": [0, 1, 0]}]
    }
    sites = [("layers.0.attn", 2.0), ("layers.0.mlp", 7.0), ("layers.0.norm", 1.0)]
    assert [levels("task_arithmetic", given, [0.5], site)[0].lambda_ for site, _ in sites] == [
        want for _, want in sites
    ]


def test_a_gradient_stays_within_its_values():
    for depth in (place / 97 for place in range(98)):
        value = levels("dare_linear", {"density": [1.0, 1.0, 0.7]}, [depth])[0].density[0]
        assert 0.7 <= value <= 1.0


def test_a_gradient_needs_a_depth():
    resolved = resolve("task_arithmetic", {"lambda": [0, 1]})
    with pytest.raises(MethodError, match="lambda changes with depth"):
        at_site(get("task_arithmetic"), resolved, ADAPTERS, "layers.0.q")
    assert at_site(get("task_arithmetic"), resolve("task_arithmetic"), ADAPTERS, "q", None).lambda_ == 1.0


def test_weights_that_never_sum_to_zero_may_be_normalised_over_depth():
    assert resolve("task_arithmetic", {"normalize": True, "weight": {"mnli": [1, -1], "stsb": [1, 3]}})
