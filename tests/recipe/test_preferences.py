import itertools
import time

import pytest

from ray_merge.errors import RecipeError
from ray_merge.evaluate.document import pareto_tables
from ray_merge.recipe import expand, load_recipe

HEAD = "base_model: /b\noutput: /o\nadapters: {a: /a, b: /b, c: /c}\n"


def merges(text, head=HEAD):
    return expand(*load_recipe("r.yaml", f"{head}merges:\n  - {text}\n"))


def refusal(text, head=HEAD):
    with pytest.raises(RecipeError) as caught:
        merges(text, head)
    return str(caught.value)


def test_each_listed_preference_is_a_merge_named_by_it_in_the_order_of_the_adapters():
    found = merges(
        "{name: t, merge_method: tara_a, adapters: [b, a],"
        " preferences: [{a: 0.75, b: 0.25}, {b: 0.3333333333, a: 2}, {a: 1e-9, b: 1234567}]}"
    )
    assert [one.name for one in found] == ["t/b=0.25,a=0.75", "t/b=0.333333,a=2.0", "t/b=1234570.0,a=1e-09"]
    assert [one.parameters["preference"] for one in found] == [
        {"b": 0.25, "a": 0.75}, {"b": 0.3333333333, "a": 2.0}, {"b": 1234567.0, "a": 1e-9},
    ]  # fmt: skip
    assert all(list(one.parameters["preference"]) == ["b", "a"] for one in found)
    assert all(one.parameters["alpha"] == 0.05 for one in found)


@pytest.mark.parametrize("total", [3, 4, 6])
def test_a_simplex_is_every_split_into_whole_shares(total):
    found = merges(f"{{name: t, merge_method: tara_b, preferences: {{simplex: {total}}}}}")
    shares = [tuple(round(total * one.parameters["preference"][name]) for name in "abc") for one in found]
    every = itertools.product(range(1, total + 1), repeat=3)
    assert shares == [one for one in every if sum(one) == total]
    assert all(sum(one.parameters["preference"].values()) == pytest.approx(1, abs=1e-15) for one in found)


def test_preferences_multiply_with_a_sweep_and_stand_last():
    found = merges(
        "{name: t, merge_method: adamerging, adapters: [a, b], sweep: {alpha: [0.1, 1]},"
        " preferences: {simplex: 3}}"
    )
    assert [one.name for one in found] == [
        "t/alpha=0.1/a=0.333333,b=0.666667", "t/alpha=0.1/a=0.666667,b=0.333333",
        "t/alpha=1/a=0.333333,b=0.666667", "t/alpha=1/a=0.666667,b=0.333333",
    ]  # fmt: skip
    assert [(one.parameters["alpha"], one.parameters["preference"]["a"]) for one in found] == [
        (0.1, 1 / 3), (0.1, 2 / 3), (1.0, 1 / 3), (1.0, 2 / 3),
    ]  # fmt: skip


def test_a_combination_takes_its_part_of_a_preference_and_has_a_simplex_of_its_own():
    listed = merges(
        "{name: t, merge_method: tara_a, combinations: {choose: 2}, preferences: [{a: 1, b: 2, c: 3}]}"
    )
    assert [one.name for one in listed] == ["t/a__b/a=1.0,b=2.0", "t/a__c/a=1.0,c=3.0", "t/b__c/b=2.0,c=3.0"]
    assert [list(one.parameters["preference"].values()) for one in listed] == [[1, 2], [1, 3], [2, 3]]
    grid = merges(
        "{name: t, merge_method: tara_a, combinations: {choose: [1, 3]}, preferences: {simplex: 4}}"
    )
    assert [one.name for one in grid] == [
        "t/a/a=1.0", "t/b/b=1.0", "t/c/c=1.0",
        "t/a__b__c/a=0.25,b=0.25,c=0.5", "t/a__b__c/a=0.25,b=0.5,c=0.25", "t/a__b__c/a=0.5,b=0.25,c=0.25",
    ]  # fmt: skip


def test_the_pareto_table_compares_merges_that_differ_in_preference_alone():
    found = merges(
        "{name: t, merge_method: tara_a, adapters: [a, b], sweep: {alpha: [0.1, 1]},"
        " preferences: {simplex: 3}}"
    )
    scores = iter([(0.5, 0.9), (0.9, 0.5), (0.5, 0.5), (0.6, 0.6)])
    rows = {
        one.name: {
            task: {"metric": "accuracy", "value": value}
            for task, value in zip("ab", next(scores), strict=True)
        }
        for one in found
    }
    tables = pareto_tables(found, rows)
    assert {parent: [one["dominated"] for one in table["points"]] for parent, table in tables.items()} == {
        "t/alpha=0.1": [False, False], "t/alpha=1": [True, False],
    }  # fmt: skip
    assert tables["t/alpha=1"]["points"][1]["preference"] == {"a": 2 / 3, "b": 1 / 3}


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("merge_method: ties, preferences: {simplex: 3}", "ties takes no preferences; the methods that do are tara_a"),
        ("merge_method: nsc, preferences: {simplex: 3}", "nsc takes no preferences"),
        ("merge_method: tara, preferences: {simplex: 3}", "unknown merge method 'tara'; did you mean 'tara_"),
        (
            "merge_method: tara_a, parameters: {preference: {a: 1, b: 1, c: 1}}, preferences: {simplex: 3}",
            "has preferences, and preference in parameters",
        ),
        (
            "merge_method: tara_a, sweep: {preference: [1, 2]}, preferences: {simplex: 3}",
            "has preferences, and preference in sweep",
        ),
        ("merge_method: tara_a, preferences: {simplex: 2}", "simplex: 2 cannot give each of 3 adapters"),
        (
            "merge_method: tara_a, combinations: {choose: [2, 3]}, preferences: {simplex: 2}",
            "simplex: 2 cannot give each of 3 adapters",
        ),
        ("merge_method: tara_a, preferences: {simplx: 3}", "unknown key 'simplx'; did you mean 'simplex'?"),
        ("merge_method: tara_a, preferences: {simplex: 3, foo: 1}", "unknown key 'foo'"),
        ("merge_method: tara_a, preferences: {simplex: 0}", "preferences.simplex: input should be greater than"),
        ("merge_method: tara_a, preferences: {simplex: 3.0}", "preferences.simplex: input should be a valid integer"),
        ("merge_method: tara_a, preferences: {}", "preferences.simplex is missing"),
        ("merge_method: tara_a, preferences: []", "preferences: list should have at least 1 item"),
        ("merge_method: tara_a, preferences: 3", "preferences: input should be a valid list, got 3"),
        ("merge_method: tara_a, prefrences: []", "unknown key 'prefrences'; did you mean 'preferences'?"),
        ("merge_method: tara_a, preferences: [{a: 1, b: 0, c: 1}]", "preferences[0].b: input should be greater than 0"),
        ("merge_method: tara_a, preferences: [{a: 1, b: -1, c: 1}]", "preferences[0].b: input should be greater than"),
        ("merge_method: tara_a, preferences: [{a: 1, b: .inf, c: 1}]", "preferences[0].b: input should be a finite"),
        ("merge_method: tara_a, preferences: [{a: 1, b: '1', c: 1}]", "preferences[0].b: input should be a valid num"),
        ("merge_method: tara_a, preferences: [{a: 1, b: true, c: 1}]", "preferences[0].b: input should be a valid num"),
        ("merge_method: tara_a, preferences: [{a: 1, b: 1}]", "preference 1 has no value for c"),
        ("merge_method: tara_a, preferences: [{a: 1, b: 1, c: 1, cc: 1}]", "preference 1 names 'cc'"),
        (
            "merge_method: tara_a, adapters: [a, b], preferences: [{a: 1, b: 1}, {a: 1, b: 1, c: 2}]",
            "preference 2 names 'c'",
        ),
        (
            "merge_method: tara_a, preferences: [{a: 1, b: 1, c: 1}, {a: 1.0000000001, b: 1, c: 1}]",
            "two merges are named 't/a=1.0,b=1.0,c=1.0'",
        ),
    ],
)  # fmt: skip
def test_a_refusal_says_where_and_why(rest, words):
    message = refusal(f"{{name: t, {rest}}}")
    assert message.startswith("r.yaml:5")
    assert words in message


def test_preferences_count_before_any_is_made():
    head = f"base_model: /b\noutput: /o\nadapters: {{{', '.join(f'a{i}: /x' for i in range(30))}}}\n"
    began = time.monotonic()
    assert "over 10^12 merges" in refusal(
        "{name: t, merge_method: tara_a, preferences: {simplex: 300}}", head
    )
    assert time.monotonic() - began < 5
    three = "{name: t, merge_method: tara_a, combinations: {choose: [2, 3]}, preferences: {simplex: 5}}"
    # 3 pairs of 4 splits each, and 6 splits into three
    assert "expands to 18 merges, more than max_merges = 17" in refusal(three, f"max_merges: 17\n{HEAD}")
    assert len(merges(three, f"max_merges: 18\n{HEAD}")) == 18
