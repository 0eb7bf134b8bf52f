"""Arguments that typer checks on the command line are checked in Python too, before anything is read."""

import pytest

import ray_merge
from ray_merge.errors import Refusal
from ray_merge.recipe.arguments import check_count, check_list

RECIPE = {
    "base_model": "/nowhere", "output": "/nowhere/out", "adapters": {"a": "/nowhere/a"},
    "merges": [{"name": "m", "merge_method": "linear"}],
}  # fmt: skip


@pytest.mark.parametrize("value", [None, 1, 7])
def test_counts_are_whole_numbers_from_one_on(value):
    check_count("limit", value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "2"])
def test_another_count_is_refused_with_both(value):
    with pytest.raises(
        Refusal, match=rf"limit is {value!r}, expected a whole number from 1 on; leave it out"
    ):
        check_count("limit", value)


@pytest.mark.parametrize("values", [(), ["m"], ("m", "n*"), {"m"}])
def test_lists_hold_names(values):
    check_list("only", values)


@pytest.mark.parametrize(
    ("values", "advice"),
    [("m", r"only=\['m'\]"), ([1], 'only=."a", "b".'), (None, "expected a list of names"), (5, "only is 5,")],
)
def test_no_list_is_refused_with_what_to_write(values, advice):
    with pytest.raises(Refusal, match=advice):
        check_list("only", values)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("run", {"workers": 0}, "workers is 0"),
        ("run", {"only": "m"}, "only is 'm'"),
        ("plan", {"only": "m"}, "only is 'm'"),
        ("calibrate", {"workers": 0}, "workers is 0"),
        ("init_adapters", {"workers": -1}, "workers is -1"),
        ("evaluate", {"workers": 0}, "workers is 0"),
        ("evaluate", {"limit": 0}, "limit is 0"),
        ("evaluate", {"only": "m"}, "only is 'm'"),
        ("evaluate", {"held_out": "a"}, "held_out is 'a'"),
    ],
)
def test_every_function_refuses_them(name, arguments, words):
    with pytest.raises(Refusal, match=words):
        getattr(ray_merge, name)(RECIPE, **arguments)
