import time

import pytest
import yaml

from ray_merge.errors import RecipeError
from ray_merge.recipe import source
from ray_merge.recipe.source import MAX_NAMES_SHOWN, MAX_RECIPE_BYTES, nearest, parse_yaml


def value(text):
    return parse_yaml(text, "r.yaml").value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001), ("1.0e-3", 0.001), ("1E5", 100000.0), ("12e03", 12000.0), ("+1.5", 1.5), (".5", 0.5),
        ("5.", 5.0), ("-0.25", -0.25), ("7", 7), ("-7", -7), ("0", 0),
        ("true", True), ("True", True), ("false", False),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("NO", "NO"), ("TRUE", "TRUE"),
        ("010", "010"), ("0x10", "0x10"), ("0b1", "0b1"), ("1_000", "1_000"), ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"), ("null", None), ("~", None), ("", None), ("1e", "1e"), ("e3", "e3"),
    ],
)  # fmt: skip
def test_plain_scalars_are_what_yaml_1_2_says(text, expected):
    found = value(f"a: {text}\n")["a"]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("key", ["no", "1", "1.50", "010", "true", "null", "2026-01-31", "1e3"])
def test_a_key_is_the_text_that_was_written(key):
    assert value(f"{key}: x\n") == {key: "x"}


def test_keys_that_python_would_take_for_one_stay_apart():
    assert value("1: a\n1.0: b\ntrue: c\n") == {"1": "a", "1.0": "b", "true": "c"}


def test_the_dialect_does_not_leak_into_other_users_of_yaml():
    parse_yaml("a: no", "r.yaml")
    assert yaml.safe_load("a: no\nb: 2026-01-31\nc: 010")["a"] is False


def test_lines_of_keys_and_items_are_remembered():
    source = parse_yaml("a: 1\nb:\n  - x\n  - y: 2\n    z: 3\n", "r.yaml")
    assert source.where(("a",)) == "r.yaml:1"
    assert source.where(("b",)) == "r.yaml:2"
    assert source.where(("b", 0)) == "r.yaml:3"
    assert source.where(("b", 1, "z")) == "r.yaml:5"


def test_what_is_not_in_the_file_is_placed_at_its_nearest_parent():
    source = parse_yaml("a: 1\nb:\n  c: 2\n", "r.yaml")
    assert source.where(("b", "missing", "deeper")) == "r.yaml:2"
    assert source.where(("missing",)) == "r.yaml:1"


@pytest.mark.parametrize(
    ("text", "line", "first"),
    [("a: 1\nb: 2\na: 3\n", 3, 1), ("x:\n  a: 1\n  a: 2\n", 3, 2), ("1: a\n'1': b\n", 2, 1)],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text, line, first):
    with pytest.raises(RecipeError, match=rf"r\.yaml:{line}: key .* stands twice \(first on line {first}\)"):
        value(text)


def test_anchors_aliases_and_merge_keys_work():
    assert value("a: &x {p: 1, q: 2}\nb: *x\nc:\n  <<: *x\n  q: 3\n") == {
        "a": {"p": 1, "q": 2},
        "b": {"p": 1, "q": 2},
        "c": {"p": 1, "q": 3},
    }


@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{n}: &{n} [{','.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "a: &a {k: 1}\n"
        + "".join(
            f"{n}: &{n} {{<<: [{','.join([f'*{p}'] * 9)}]}}\n"
            for p, n in zip("abcdefgh", "bcdefghi", strict=True)
        ),
    ],
    ids=["lists", "merge-keys"],
)
def test_a_few_lines_that_unfold_to_millions_of_values_are_refused_at_once(bomb):
    began = time.monotonic()
    with pytest.raises(RecipeError, match="unfolded"):
        value(bomb)
    # 9^9 values would take minutes; 200,000 take some tenths of a second.
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "text", ["&a [*a]\n", "&a {x: *a}\n", "[" * 3000, "a: " + "{b: " * 900 + "1" + "}" * 900]
)
def test_cycles_and_deep_nesting_are_refused(text):
    with pytest.raises(RecipeError, match=r"r\.yaml.*not valid YAML"):
        value(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: !!int abc\n", 2), ("a: 1\nb: !!float abc\n", 2), ("b: !!bool maybe\n", 1),
        ("a: 1\nb: " + "9" * 5000 + "\n", 2),
        ("a: !!python/object/apply:os.system [ls]\n", 1), ("a: !!binary aGk=\n", 1), ("a: !!set {x}\n", 1),
        ("a: !!timestamp x\n", 1), ("a: 1\nb: !mine 2\n", 2),
        ("a: 1\n? [1, 2]\n: 3\n", 2), ("? {a: 1}\n: 3\n", 1),
        ("a: 1\nb: [\n", 3), ("a:\n\t- 1\n", 2), ("a: 1\n---\nb: 2\n", 2), ("a: *nowhere\n", 1),
        ("a: 1\nb: \x00\n", 2), ("a: \x07\n", 1), ("a: \ud800\n", 1),
    ],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_refused_with_its_line(text, line):
    with pytest.raises(RecipeError, match=rf"^r\.yaml:{line}: "):
        value(text)


def test_a_text_far_too_long_for_a_recipe_is_not_parsed():
    with pytest.raises(RecipeError, match="not a recipe"):
        value("#" * (MAX_RECIPE_BYTES + 1))


@pytest.mark.parametrize("item", ["1,", "[],", "{a: 1},"])
def test_too_many_values_are_not_even_composed(item, monkeypatch):
    made = []
    compose = source._Loader.compose_scalar_node
    monkeypatch.setattr(source, "MAX_VALUES", 1000)
    monkeypatch.setattr(
        source._Loader, "compose_scalar_node", lambda *given: made.append(1) or compose(*given)
    )
    with pytest.raises(RecipeError, match=r"^r\.yaml:1: .*more than 1000 keys and values"):
        value(f"a: [{item * 3000}]")
    assert len(made) <= 1000


def test_as_many_values_as_the_limit_are_read(monkeypatch):
    monkeypatch.setattr(source, "MAX_VALUES", 1000)
    assert value(f"a: [{'1,' * 997}]") == {"a": [1] * 997}  # with the mapping, its key and the list


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_document_is_none(text):
    assert value(text) is None


def test_the_nearest_known_word_is_named():
    assert nearest("adaptors", ["adapters", "merges"]) == "; did you mean 'adapters'?"


def test_without_a_near_word_the_known_ones_are_listed_up_to_a_limit():
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    many = nearest("zzz", [f"name{i:03d}" for i in range(500)])
    assert many.count("name") == MAX_NAMES_SHOWN
    assert many.endswith(", ...")
