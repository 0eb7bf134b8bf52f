import math

import pytest

from ray_merge.identity import canonical_json, difference, digest, flatten


def test_the_order_of_keys_does_not_change_an_id():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})


def test_the_order_of_a_list_changes_an_id():
    assert digest(["a", "b"]) != digest(["b", "a"])


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (True, 1), (None, "null"), ("1", 1), ({}, [])])
def test_values_that_python_or_a_reader_may_confuse_have_ids_of_their_own(one, other):
    assert digest({"x": one}) != digest({"x": other})


def test_the_id_of_a_known_document_never_changes():
    # sha256 of the 19 bytes {"a":[1,0.1,"\u00e9"]}, computed with sha256sum.
    assert canonical_json({"a": [1, 0.1, "\u00e9"]}) == '{"a":[1,0.1,"\\u00e9"]}'
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"x": value})


def test_leaves_carry_dotted_paths_and_empty_containers_are_leaves():
    leaves = dict(flatten({"b": {"c": [1, {"d": 2}]}, "a": {}, "e": []}))
    assert leaves == {"a": {}, "b.c[0]": 1, "b.c[1].d": 2, "e": []}


def test_equal_documents_have_no_difference():
    assert difference({"a": {"b": [1]}}, {"a": {"b": [1]}}) == ""


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"seed": 0}, {"seed": 1}, "seed: 0 there, 1 here"),
        ({"p": {"lambda": 0.5}}, {"p": {"lambda": 1.0}}, "p.lambda: 0.5 there, 1.0 here"),
        ({"a": [1]}, {"a": [1, 2]}, "a[1]: absent there, 2 here"),
        ({"a": 1, "b": 2}, {"a": 1}, "b: 2 there, absent here"),
        ({"a": None}, {}, "a: null there, absent here"),
        ({"a": {}}, {}, "a: {} there, absent here"),
        ({"a": True}, {"a": 1}, "a: true there, 1 here"),
        ({"a": 1}, {"a": 1.0}, "a: 1 there, 1.0 here"),
    ],
)
def test_the_difference_names_the_input_and_both_values(before, after, words):
    assert difference(before, after) == words


@pytest.mark.parametrize("other", [{"a": None}, {"a": True}, {"a": 1.0}, {"a": []}, {"a": {"b": 1}}, {}])
def test_documents_with_other_ids_always_have_a_difference(other):
    one = {"a": 1}
    assert digest(one) != digest(other)
    assert difference(one, other)
