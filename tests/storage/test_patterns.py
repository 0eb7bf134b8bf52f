import random
import re
import signal
import time

import pytest
from peft.utils.other import get_pattern_key

from ray_merge.errors import AdapterError
from ray_merge.storage import patterns
from ray_merge.storage.patterns import MAX_PATTERN_CHARACTERS, Patterns, check_pattern, pattern_matches

REAL_KEYS = [
    "q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj", r".*self_attn\.q_proj", ".*q_proj",
    r"model\.layers\.(0|1|2)\.mlp\..*", r"^model\.decoder\.layers\.\d+\.fc1", r"layers\.(?:1[0-9]|2[0-3])\.",
    "q_proj|v_proj",
    r"(?:.*\.)?layers\.\d\d?\.mlp\.(up|down)_proj", r"[^.]+\.q_proj", "to_q", "attn-1", r"blocks.\d+.attn", "",
    r"q_proj$", r"\Aq_proj\Z", "l.yers.0.mlp.up_proj",
]  # fmt: skip
REAL_MODULES = [
    "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.2.mlp.up_proj",
    "model.layers.0.mlp.up_proj", "model.decoder.layers.11.fc1", "x.model.decoder.layers.11.fc1", "unet.blocks.3.attn",
    "attn-1", "layersX0.mlp.up_proj", "not_q_proj", "a.", "",
]  # fmt: skip


def peft_takes(keys, module):
    """The key that PEFT finds, None where it falls back to the default."""
    found = get_pattern_key(keys, module)
    return found if found in keys else None


@pytest.mark.parametrize("key", REAL_KEYS)
def test_one_key_matches_where_peft_says_so(key):
    check_pattern(key, "x")
    for module in REAL_MODULES:
        assert pattern_matches(key, module) == (peft_takes([key], module) is not None), module


def test_of_several_keys_the_first_in_file_order_counts():
    rng = random.Random(0)
    for _ in range(300):
        keys = rng.sample(REAL_KEYS, 5)
        found = Patterns(keys, "x")
        for module in REAL_MODULES:
            assert found.first(module) == peft_takes(keys, module)


def test_a_key_that_is_the_module_itself_counts_last():
    assert Patterns(["a[0]", "x"], "x").first("a[0]") == "a[0]"
    assert Patterns(["a[0]", r".*\]"], "x").first("a[0]") == r".*\]"
    assert get_pattern_key(["a[0]", r".*\]"], "a[0]") == r".*\]"


def test_keys_that_no_module_matches_are_named():
    keys = [
        "q_proj",
        r"layers\.9\..*",
        "nosuch",
        "layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
    ]
    assert Patterns(keys, "x").unmatched(REAL_MODULES) == [r"layers\.9\..*", "nosuch"]


ATOMS = [
    "a",
    "b",
    ".",
    r"\.",
    "[ab]",
    "[^a]",
    r"\d",
    r"\D",
    r"\w",
    r"[^\W\d]",
    r"\s",
    "(a|b.)",
    "(?:ab?)",
    "(a*b)",
    "^",
    "$",
    "(|a)",
    "-",
]
COUNTS = ["", "", "", "*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{2,}", "{0,2}?"]


def random_key(rng, depth=0):
    parts = []
    for _ in range(rng.randrange(1, 4)):
        nested = depth < 2 and rng.random() < 0.3
        parts.append(
            (f"({random_key(rng, depth + 1)})" if nested else rng.choice(ATOMS)) + rng.choice(COUNTS)
        )
        if rng.random() < 0.1:
            parts.append("|")
    return "".join(parts)


class TooSlow(Exception):
    pass


def too_slow(*_):
    raise TooSlow


def test_ten_thousand_random_keys_match_exactly_what_python_matches():
    # Some of them are so bad that Python itself does not come to an end.
    rng = random.Random(1)
    compared = 0
    before = signal.signal(signal.SIGALRM, too_slow)
    try:
        while compared < 10_000:
            key = random_key(rng)
            module = "".join(rng.choice("ab.0_ -") for _ in range(rng.randrange(10)))
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                wanted = re.match(rf"(.*\.)?({key})$", module) is not None
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert pattern_matches(key, module) == (wanted or key == module), (key, module)
                compared += 1
            except (TooSlow, re.error, AdapterError):
                continue
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "key",
    ["(a+)+$", "(.|.)*x", "(a|aa)+$", "(.*)*x", "((((a+)+)+)+)+$", ".*" * 40 + "x", "(x+x+)+y", "(a?){1000}a{1000}",
     r"(\w+\.?)+#", "(((a?b?){1,50}c?){1,50}d?){1,50}x", "(.*)*" * 100 + "x", "((a|b)+c?)+" * 50 + "x"],
)  # fmt: skip
def test_no_key_takes_long(key):
    began = time.monotonic()
    for module in ("a" * 300, "model.layers.0." * 20 + "aaaa", "ab" * 200):
        assert not pattern_matches(key, f"{module}!")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "key",
    [
        "(",
        "*",
        "[",
        "[z-a]",
        "a{99999999999}",
        "(?P<n>a)(?P<n>a)",
        r"\p{L}",
        "(?i)q",
        "(" * 1500 + ")" * 1500,
    ],
)
def test_what_python_does_not_parse_is_refused(key):
    with pytest.raises(
        AdapterError, match=r"^adapter a: rank_pattern: .* (is not a regular expression|characters long)"
    ):
        check_pattern(key, "adapter a: rank_pattern")


@pytest.mark.parametrize(
    ("key", "word"),
    [("(?=a)a", "look-around"), ("(?<!a)b", "look-around"), (r"(a)\1", "back-reference"),
     ("(?(1)a|b)", "back-reference"), ("(?i:q)", "flags"), (r"\bq", "word boundary"), ("(?>a)", "atomic"),
     ("a++", "possessive")],
)  # fmt: skip
def test_what_is_no_plain_pattern_is_refused_by_name(key, word):
    with pytest.raises(AdapterError, match=f"^x: .* uses .*{word}"):
        Patterns([key], "x")


def test_an_endless_key_is_refused_and_not_shown_whole():
    with pytest.raises(AdapterError, match=f"a pattern may have {MAX_PATTERN_CHARACTERS}") as caught:
        check_pattern("(a)" * 100_000, "x")
    assert len(str(caught.value)) < 300


def test_as_many_keys_as_modules_are_looked_up_at_once():
    modules = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(48) for j in range(128)]
    began = time.monotonic()
    found = Patterns(modules, "x")
    assert [found.first(module) for module in modules] == modules
    assert found.unmatched(modules) == []
    assert time.monotonic() - began < 5


def test_more_work_than_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_STEPS", 10_000)
    found = Patterns([rf".*layers\.{i}\..*" for i in range(100)], "adapter a: alpha_pattern")
    with pytest.raises(AdapterError, match="adapter a: alpha_pattern holds 100 patterns that take too long"):
        found.unmatched(f"model.layers.{i}.q_proj" for i in range(1000))
