import gc
import json
import time

import pytest

from ray_merge.errors import CheckpointError
from ray_merge.storage.strict_json import MAX_DEPTH, check_depth, parse_object


def refusal(raw):
    with pytest.raises(CheckpointError) as caught:
        check_depth(parse_object(raw, "here"), "here")
    message = str(caught.value)
    assert message.startswith("here")
    assert len(message) < 400
    return message


def nested(levels):
    return b'{"a":' * levels + b"1" + b"}" * levels


def test_an_object_is_what_the_json_module_says():
    document = {"a": [1, 2.5, None, True, {"b": "\u00e9\U0001f600"}], "": {}}
    for ascii_only in (True, False):
        raw = json.dumps(document, ensure_ascii=ascii_only).encode()
        assert parse_object(raw, "x") == document
    assert parse_object(b'{"limit": [0.0, Infinity]}', "x")["limit"][1] == float("inf")  # as Mamba2 is saved


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"\\udfff": 1}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": 1, "a": 1}', "'a' stands twice"),
        (b'{"x": [{"b": 1, "c": 2, "b": 3}]}', "'b' stands twice"),
        (b'{"' + b"x" * 10**6 + b'": 1, "' + b"x" * 10**6 + b'": 2}', "stands twice"),
        (nested(MAX_DEPTH + 1), "nested more than 100 levels deep"),
        (b'{"a":' + b"[" * 500 + b"0" + b"]" * 500 + b"}", "nested more than 100 levels deep"),
    ],
)
def test_what_other_readers_read_otherwise_or_not_at_all_is_refused(raw, words):
    assert words in refusal(raw)


def test_the_deepest_object_that_is_taken_can_be_written_again():
    document = parse_object(nested(MAX_DEPTH - 1), "x")
    check_depth(document, "x")
    assert json.dumps(document)


def test_a_name_that_stands_twice_among_many_is_found_at_once():
    raw = b"{" + b",".join(b'"%d":0' % number for number in range(300_000)) + b',"299999":0}'
    began = time.monotonic()
    assert "'299999' stands twice" in refusal(raw)
    assert time.monotonic() - began < 5


def test_the_garbage_collector_is_left_as_it_was():
    for enabled in (True, False):
        gc.enable() if enabled else gc.disable()
        try:
            parse_object(b"{}", "x")
            with pytest.raises(CheckpointError):
                parse_object(b"{", "x")
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
