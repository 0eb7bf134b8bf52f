import json
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ray_merge.errors import CheckpointError
from ray_merge.storage.headers import FIRST_READ_BYTES, MAX_DIMENSIONS, make_header, parse_header, read_header
from ray_merge.storage.store import open_store
from ray_merge.storage.strict_json import MAX_JSON_BYTES


def raw_file(document, data=b""):
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(start, end, shape=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def read(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    return read_header(open_store(str(tmp_path)), "x.safetensors")


def refusal(tmp_path, content):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/x.safetensors")
    return message


def test_a_header_of_the_safetensors_library_is_read(tmp_path):
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3),
        "a": torch.ones(4, dtype=torch.bfloat16),
        "e": torch.ones(0, 3),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(open_store(str(tmp_path)), "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert header.metadata == {"format": "pt"}
    assert {name: (e.dtype, e.shape) for name, e in header.tensors.items()} == {
        "a": ("BF16", (4,)), "b": ("F32", (2, 3)), "e": ("F32", (0, 3)),
    }  # fmt: skip
    entry = header.tensors["b"]
    assert content[entry.start : entry.end] == bytes(tensors["b"].numpy().tobytes())
    assert entry.file == "x.safetensors"


def test_a_header_longer_than_the_first_request_is_read_whole(tmp_path):
    save_file({f"layer.{i:05d}.weight": torch.zeros(1) for i in range(2000)}, tmp_path / "x.safetensors")
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") > FIRST_READ_BYTES
    assert len(read_header(open_store(str(tmp_path)), "x.safetensors").tensors) == 2000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist"):
        read_header(open_store(str(tmp_path)), "none.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is 0 bytes long: no safetensors file"),
        (b"1234567", "is 7 bytes long: no safetensors file"),
        ((2**63).to_bytes(8, "little") + b"{}", "claims a header of 9223372036854775808 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "claims a header of 100 bytes but is 10 bytes long"),
        ((0).to_bytes(8, "little"), "not valid JSON"),
        (raw_file(b"{"), "not valid JSON"),
        (raw_file(b"[]"), "not a JSON object"),
        (raw_file(b"3"), "not a JSON object"),
        (raw_file(b"\xff{}"), "not valid JSON"),
        (raw_file('{"a": 1}'.encode("utf-16")), "not valid JSON"),
        (raw_file(b'{"a":' * 5000), "not valid JSON"),
        (raw_file(b"[" * 50_000), "not valid JSON"),
        (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (raw_file(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' stands twice"),
        (raw_file(b'{"a": {}, "a": {}}'), "'a' stands twice"),
        (raw_file({"__metadata__": {"x": 1}}), "__metadata__ is not a mapping of strings"),
        (raw_file({"__metadata__": ["x"]}), "__metadata__ is not a mapping of strings"),
        (raw_file({"__metadata__": []}), "__metadata__ is not a mapping of strings"),
        (raw_file({"__metadata__": {"x": "\ud800"}}), "not valid JSON"),
        (raw_file({"a": 3}), "'a' lacks dtype, shape or data_offsets"),
        (raw_file({"a": []}), "'a' lacks dtype, shape or data_offsets"),
        (raw_file({"a": None}), "'a' lacks dtype, shape or data_offsets"),
        (raw_file({"a": {"dtype": "F32", "shape": [1]}}), "'a' lacks dtype, shape or data_offsets"),
        (raw_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}), "lacks dtype"),
        (raw_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}), "lacks dtype"),
        (
            raw_file({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"0000"),
            "no whole number >= 0",
        ),
        (raw_file({"a": tensor(0, 4, [-1])}, b"0000"), "no whole number >= 0"),
        (raw_file({"a": tensor(0, 4, [1.0])}, b"0000"), "no whole number >= 0"),
        (raw_file({"a": tensor(0, 4, [True])}, b"0000"), "no whole number >= 0"),
        (raw_file({"a": tensor(-4, 0, [1])}, b"0000"), "no whole number >= 0"),
        (raw_file({"a": tensor(0, 4, ["1"])}, b"0000"), "no whole number >= 0"),
        (raw_file({"a": tensor(0, 4, [2**64])}, b"0000"), "no whole number >= 0"),
        (raw_file({"a": tensor(0, 4, [1] * 65)}, b"0000"), "no whole number >= 0"),
        (raw_file({"a": tensor(0, 4, [1], "F33")}, b"0000"), "unknown dtype 'F33'"),
        (raw_file({"a": tensor(0, 4, [1], ["F32"])}, b"0000"), "unknown dtype ['F32']"),
        (raw_file({"a": tensor(0, 4, [2])}, b"0000"), "shape (2,) and dtype F32 cannot be 4 bytes"),
        (raw_file({"a": tensor(8, 4, [1])}, b"0" * 8), "cannot be -4 bytes"),
        (raw_file({"a": tensor(0, 4), "b": tensor(8, 12)}, b"0" * 12), "overlap or hole"),
        (raw_file({"a": tensor(0, 4), "b": tensor(0, 4)}, b"0000"), "overlap or hole"),
        (raw_file({"a": tensor(0, 8), "b": tensor(4, 12)}, b"0" * 12), "overlap or hole"),
        (raw_file({"a": tensor(4, 8)}, b"0" * 8), "overlap or hole"),
        (raw_file({"a": tensor(0, 8)}, b"0000"), "truncated or damaged"),
        (raw_file({"a": tensor(0, 4)}, b"0" * 8), "truncated or damaged"),
        (raw_file({"": tensor(0, 4), "a\nb": tensor(4, 8)}, b"0" * 8), "is not printable text"),
        (raw_file({"x" * 1001: tensor(0, 4)}, b"0" * 4), "is not printable text of up to 1000 characters"),
        (
            raw_file(b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
            "not valid JSON",
        ),
    ],
)
def test_a_hostile_or_damaged_header_is_refused(tmp_path, content, words):
    assert words in refusal(tmp_path, content)


def test_a_header_that_would_fill_memory_is_refused_by_its_length(tmp_path):
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write((MAX_JSON_BYTES + 1).to_bytes(8, "little") + b'{"a":[')
        file.truncate(MAX_JSON_BYTES + 100)
    with pytest.raises(CheckpointError, match=f"at most {MAX_JSON_BYTES} are read"):
        read_header(open_store(str(tmp_path)), "x.safetensors")


def test_a_message_does_not_repeat_a_megabyte_of_a_hostile_name(tmp_path):
    for content in (
        {"x" * 10**6: 3},
        {"a": {**tensor(0, 4), "dtype": "x" * 10**6}},
        {"a": tensor(0, 4, [2**60] * 60)},
    ):
        assert len(refusal(tmp_path, raw_file(content, b"0000"))) < 600


def test_a_shape_of_many_huge_numbers_costs_no_time(tmp_path):
    shape = [2**62] * 300_000
    began = time.monotonic()
    assert "no whole number" in refusal(tmp_path, raw_file({"a": tensor(0, 4, shape)}, b"0000"))
    # Their product alone would take minutes; parsing 6 MB of JSON takes tenths of a second.
    assert time.monotonic() - began < 10
    assert len(shape) > MAX_DIMENSIONS


def test_entries_may_stand_in_any_order_and_be_empty(tmp_path):
    content = raw_file(
        {"b": tensor(4, 8), "e": tensor(4, 4, [0, 7]), "a": tensor(0, 4), "s": tensor(8, 12, [])}, b"0" * 12
    )
    header = read(tmp_path, content)
    assert list(header.tensors) == ["b", "e", "a", "s"]
    assert header.tensors["s"].shape == ()


def test_a_made_header_is_read_by_this_package_and_by_the_library(tmp_path):
    layout = [("w", "F32", (2, 3)), ("b\u00e9", "BF16", (3,)), ("empty", "I64", (0,))]
    raw, entries = make_header(layout, {"z": "1", "format": "pt"})
    assert len(raw) % 8 == 0
    data = (
        torch.arange(6.0).numpy().tobytes()
        + torch.ones(3, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    )
    (tmp_path / "x.safetensors").write_bytes(raw + data)
    header = read_header(open_store(str(tmp_path)), "x.safetensors")
    assert {n: (e.start, e.end) for n, e in header.tensors.items()} == {
        n: (e.start, e.end) for n, e in entries.items()
    }
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), torch.arange(6.0).reshape(2, 3))
        assert file.metadata() == {"z": "1", "format": "pt"}


def test_the_same_layout_gives_the_same_header_whatever_the_order_of_the_metadata():
    layout = [("w", "F32", (2,))]
    assert make_header(layout, {"a": "1", "b": "2"})[0] == make_header(layout, {"b": "2", "a": "1"})[0]


def test_parse_header_takes_the_file_length_from_its_caller():
    text = json.dumps({"a": tensor(0, 4)}).encode()
    assert parse_header(text, file="f", file_bytes=8 + len(text) + 4, where="f").tensors[
        "a"
    ].start == 8 + len(text)
    with pytest.raises(CheckpointError, match="f is 9 bytes long"):
        parse_header(text, file="f", file_bytes=9, where="f")
