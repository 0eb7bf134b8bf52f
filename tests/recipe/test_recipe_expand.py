import time

import pytest

from ray_merge.errors import RecipeError
from ray_merge.recipe import expand, load_recipe, select

HEAD = "base_model: /b\noutput: /o\nadapters: {a: /a, b: /b, c: /c}\n"


def merges(text, head=HEAD):
    return expand(*load_recipe("r.yaml", f"{head}merges:\n{text}"))


def names(text, head=HEAD):
    return [merge.name for merge in merges(text, head)]


def refusal(text, head=HEAD):
    with pytest.raises(RecipeError) as caught:
        merges(text, head)
    return str(caught.value)


def test_a_plain_entry_takes_all_adapters_in_recipe_order_and_every_default():
    (merge,) = merges("  - {name: m, merge_method: task_arithmetic}\n")
    assert merge.adapters == ("a", "b", "c")
    assert merge.parameters == {"weight": {"a": 1.0, "b": 1.0, "c": 1.0}, "lambda": 1.0, "normalize": False}


def test_adapters_keep_the_order_of_the_entry():
    (merge,) = merges("  - {name: m, merge_method: cat, adapters: [c, a]}\n")
    assert merge.adapters == ("c", "a")
    assert list(merge.parameters["weight"]) == ["c", "a"]


def test_a_parameter_that_is_null_takes_its_default():
    (merge,) = merges("  - {name: m, merge_method: cat, parameters: {lambda: null, weight: null}}\n")
    assert merge.parameters == {"weight": {"a": 1.0, "b": 1.0, "c": 1.0}, "lambda": 1.0}


def test_a_sweep_is_named_by_keys_as_written_and_values_by_repr():
    text = (
        "  - {name: scale, merge_method: ties, parameters: {scope: tensor},"
        " sweep: {lambda: [0.2, 1, 1e-3], density: [0.5]}}\n"
    )
    assert names(text) == [
        "scale/lambda=0.2,density=0.5",
        "scale/lambda=1,density=0.5",
        "scale/lambda=0.001,density=0.5",
    ]
    assert [m.parameters["lambda"] for m in merges(text)] == [0.2, 1.0, 0.001]
    assert merges(text)[0].sweep == (("lambda", 0.2), ("density", 0.5))


def test_combinations_are_named_by_their_adapters():
    text = "  - {name: pairs, merge_method: cat, combinations: {choose: 2}}\n"
    assert names(text) == ["pairs/a__b", "pairs/a__c", "pairs/b__c"]
    assert [m.adapters for m in merges(text)] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(m.combined for m in merges(text))


def test_several_sizes_and_a_sweep_multiply():
    text = "  - {name: p, merge_method: cat, combinations: {choose: [1, 3]}, sweep: {lambda: [1, 2]}}\n"
    assert names(text) == [
        "p/a/lambda=1", "p/a/lambda=2", "p/b/lambda=1", "p/b/lambda=2", "p/c/lambda=1", "p/c/lambda=2",
        "p/a__b__c/lambda=1", "p/a__b__c/lambda=2",
    ]  # fmt: skip


def test_a_combination_takes_its_part_of_the_weights():
    text = "  - {name: p, merge_method: cat, combinations: {choose: 2}, parameters: {weight: {a: 1, b: 2, c: 3}}}\n"
    assert [m.parameters["weight"] for m in merges(text)] == [
        {"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 3.0}, {"b": 2.0, "c": 3.0},
    ]  # fmt: skip


def test_a_combination_takes_its_part_of_weights_by_filter_and_of_swept_ones():
    filtered = "[{filter: q_proj, value: {a: 1, b: 2, c: 3}}]"
    text = f"  - {{name: p, merge_method: cat, combinations: {{choose: 1}}, parameters: {{weight: {filtered}}}}}\n"
    assert merges(text)[1].parameters["weight"][0] == {"filter": "q_proj", "value": {"b": 2.0}}
    text = (
        "  - {name: p, merge_method: cat, combinations: {choose: 1}, sweep: {weight: [{a: 1, b: 2, c: 3}]}}\n"
    )
    assert [m.parameters["weight"] for m in merges(text)] == [{"a": 1.0}, {"b": 2.0}, {"c": 3.0}]


def test_weights_of_an_unknown_adapter_are_refused_in_combinations_too():
    weights = "{a: 1, b: 2, c: 3, cc: 4}"
    text = f"  - {{name: p, merge_method: cat, combinations: {{choose: 2}}, parameters: {{weight: {weights}}}}}\n"
    assert "weight names 'cc'" in refusal(text)


def test_a_weight_of_an_adapter_that_the_merge_leaves_out_is_refused():
    text = "  - {name: m, merge_method: cat, adapters: [a, b], parameters: {weight: {a: 1, b: 2, c: 3}}}\n"
    assert "weight names 'c'" in refusal(text)


def test_a_weight_that_is_missing_is_refused_by_the_merge_that_needs_it():
    text = "  - {name: p, merge_method: cat, combinations: {choose: 2}, parameters: {weight: {a: 1, b: 2}}}\n"
    message = refusal(text)
    assert "merge 'p/a__c'" in message
    assert "no value for c" in message


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: m, merge_method: tees}", "unknown merge method 'tees'; did you mean 'ties'"),
        (
            "{name: m, merge_method: cat, parameters: {lamda: 1}}",
            "no parameter 'lamda'; did you mean 'lambda'?",
        ),
        ("{name: m, merge_method: cat, parameters: {lambda: .inf}}", "lambda is inf"),
        (
            "{name: m, merge_method: cat, parameters: {lambda: '1'}}",
            "lambda is '1', expected a finite number",
        ),
        ("{name: m, merge_method: cat, adapters: [a, d]}", "unknown adapter 'd'"),
        ("{name: m, merge_method: cat, adapters: [a, a]}", "adapter 'a' stands twice"),
        ("{name: m, merge_method: cat, adapters: []}", "has no adapters"),
        ("{name: m, merge_method: cat, combinations: {choose: 0}}", "choose 0 of 3 adapters"),
        ("{name: m, merge_method: cat, combinations: {choose: [2, 4]}}", "choose 4 of 3 adapters"),
        ("{name: m, merge_method: cat, combinations: {choose: [2, 2]}}", "two merges are named 'm/a__b'"),
        ("{name: m, merge_method: cat, sweep: {lambda: []}}", "sweep over lambda has no values"),
        ("{name: m, merge_method: cat, sweep: {lambda: [1, 1]}}", "two merges are named 'm/lambda=1'"),
        (
            "{name: m, merge_method: cat, sweep: {lambda: [1]}, parameters: {lambda: 1}}",
            "in parameters and in sweep",
        ),
        (
            "{name: m, merge_method: cat, sweep: {weight: [[{filter: a/b, value: 1}]]}}",
            "cannot name an output folder",
        ),
        ("{name: m, merge_method: svd}", "rank is required"),
    ],
)
def test_a_refusal_names_the_line_of_the_entry(entry, words):
    message = refusal(f"  - {{name: first, merge_method: cat}}\n  - {entry}\n")
    assert message.startswith("r.yaml:6: ")
    assert words in message


def test_a_merge_inside_the_folder_of_another_is_refused():
    text = "  - {name: s, merge_method: cat}\n  - {name: s, merge_method: cat, sweep: {lambda: [1]}}\n"
    assert "merge 's/lambda=1' would lie inside merge 's'" in refusal(text)


def test_too_many_merges_are_counted_before_they_are_made():
    head = f"base_model: /b\noutput: /o\nadapters: {{{', '.join(f'a{i}: /x' for i in range(400))}}}\n"
    began = time.monotonic()
    message = refusal("  - {name: p, merge_method: cat, combinations: {choose: 200}}\n", head)
    assert "over 10^12 merges, more than max_merges = 1000" in message
    assert time.monotonic() - began < 5


def test_max_merges_is_a_limit_that_can_be_raised():
    text = "  - {name: p, merge_method: cat, sweep: {lambda: [1, 2, 3]}}\n"
    assert "expands to 3 merges" in refusal(text, f"max_merges: 2\n{HEAD}")
    assert len(names(text, f"max_merges: 3\n{HEAD}")) == 3


def test_a_name_too_long_for_a_folder_is_refused():
    long = {f"{'x' * 60}{i}": "/x" for i in range(4)}
    head = f"base_model: /b\noutput: /o\nadapters: {{{', '.join(f'{k}: {v}' for k, v in long.items())}}}\n"
    assert "too long for a folder" in refusal(
        "  - {name: p, merge_method: cat, combinations: {choose: 4}}\n", head
    )


def test_only_selects_by_name_or_glob_and_keeps_the_order():
    some = merges(
        "  - {name: s, merge_method: cat, sweep: {lambda: [1, 2]}}\n  - {name: t, merge_method: cat}\n"
    )
    assert select(some, []) == some
    assert [m.name for m in select(some, ["t", "s/*"])] == ["s/lambda=1", "s/lambda=2", "t"]
    assert [m.name for m in select(some, ["s/lambda=2"])] == ["s/lambda=2"]


def test_only_refuses_a_pattern_that_matches_nothing():
    some = merges("  - {name: scale, merge_method: cat}\n")
    with pytest.raises(RecipeError, match="--only scal: no such merge; did you mean 'scale'"):
        select(some, ["scale", "scal"])


def test_every_merge_of_an_entry_is_exported_as_the_entry_says():
    found = merges(
        "  - {name: m, merge_method: cat, export: both, export_rank: 3, sweep: {lambda: [1, 2]}}\n"
    )
    assert [(merge.export, merge.export_rank, merge.export_tolerance) for merge in found] == [
        ("both", 3, None)
    ] * 2
    (one,) = merges("  - {name: m, merge_method: cat, export: adapter, export_tolerance: 0.25}\n")
    assert (one.export_rank, one.export_tolerance) == (None, 0.25)
