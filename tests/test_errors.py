import inspect
import pickle
from typing import get_type_hints

import pytest

from ray_merge import errors

SAMPLES = {
    str: "a text",
    int: 3,
    float: 0.5,
    tuple[int, ...]: (16, 8),
    tuple[str, ...]: ("a", "b"),
    list[str]: ["a", "b"],
}


def sample(name: str) -> Exception:
    """One instance of the class, from the annotations of its constructor."""
    cls = getattr(errors, name)
    if cls.__init__ is Exception.__init__:
        return cls("what happened, and the next step")
    hints = get_type_hints(cls.__init__)
    names = [parameter for parameter in inspect.signature(cls).parameters]
    return cls(*(SAMPLES[hints[parameter]] for parameter in names))


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_keeps_type_arguments_and_text_through_pickle(name):
    error = sample(name)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.args == error.args
    assert str(again) == str(error)
    assert str(error)


@pytest.mark.parametrize("name", errors.__all__)
def test_exit_code_2_belongs_to_refusals_3_and_4_to_jobs_elsewhere_and_1_to_the_rest(name):
    cls = getattr(errors, name)
    elsewhere = {errors.ContactLost: 3, errors.Unwatched: 3, errors.JobOver: 4}
    assert cls.exit_code == elsewhere.get(cls, 2 if issubclass(cls, errors.Refusal) else 1)


def test_every_error_class_is_listed_in_order():
    classes = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert sorted(classes) == errors.__all__


def test_a_message_names_all_of_its_arguments():
    text = str(errors.UnitFailed("shard-00003", 4, "its worker died"))
    assert all(part in text for part in ("shard-00003", "4", "its worker died"))


@pytest.mark.parametrize(
    "error",
    [
        errors.RecipeError("a\nb \x1b[31m" + "x" * 10**6),
        errors.StoreError("/a\x1b[2J", "reading", 1, "y" * 10**6),
        errors.AdapterShapeError("s" * 10**6, "A", (1,), "x", "y\0", "z"),
    ],
)
def test_a_message_is_one_printable_line_of_bounded_length(error):
    assert str(error).isprintable()
    assert len(str(error)) < 2100


def test_values_of_hostile_files_are_shown_in_part():
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value in ("x" * 10**6, [1] * 10**6, deep, {"a" * 10**6: "b" * 10**6}, 10**4000, ("x",) * 10**5):
        assert len(errors.shown(value)) < 400
    assert errors.shown("q_proj") == "'q_proj'"
    assert errors.shown((2, 8)) == "(2, 8)"
