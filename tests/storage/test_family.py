"""Headers read as members of a family must say what the parser says of them, or be left to the parser."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ray_merge.errors import RayMergeError
from ray_merge.storage import family
from ray_merge.storage.adapter import read_adapter
from ray_merge.storage.family import Families, MemberModules
from ray_merge.storage.store import open_store
from tiny import factors, write_adapter

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "model.layers.2.mlp.down_proj")


def tensors(rank=2, modules=MODULES, rows=8, columns=6, dtype=torch.float32):
    found = {}
    for module in modules:
        found |= {name: tensor.to(dtype) for name, tensor in factors(module, rank, rows, columns).items()}
    return found


def read(folder, families=None):
    return read_adapter("a", open_store(str(folder)), families=families)


def outcome(folder, families=None):
    """What was read, or the refusal, in a form that compares."""
    try:
        found = read(folder, families)
    except RayMergeError as error:
        return type(error).__name__, str(error)
    return (
        [(module.name, module.depth, dict(module.tensors)) for module in found.modules],
        found.saved, found.tokens, found.same, dict(found.ignored), found.file_bytes, found.file_version,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_members_at_every_rank_are_what_the_parser_says(tmp_path, rank, dtype):
    families = Families()
    first = read(write_adapter(tmp_path / "first", tensors(3), r=3), families)
    folder = write_adapter(tmp_path / "a", tensors(rank, dtype=dtype), r=rank)
    found = read(folder, families)
    assert found.member is not None
    assert outcome(folder, families) == outcome(folder)
    assert (found.member.family is first.member.family) == (dtype == torch.float32)
    assert len(found.modules) == 3
    assert found.modules[1] == list(found.modules)[1]
    assert found.modules[:2] == list(found.modules)[:2]


def test_equal_headers_are_one_member(tmp_path):
    families = Families()
    one, other = (read(write_adapter(tmp_path / name, tensors(), r=2), families) for name in "ab")
    assert one.member is other.member


OTHERS = {
    "another base": (tensors(rows=16, columns=12), 2),
    "other rows alone": (tensors(rows=10), 2),
    "another rank": (tensors(5), 5),
    "a rank that the config denies": (tensors(5), 2),
    "an equal header": (tensors(), 2),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("first", ["early", "late"])
def test_a_header_parsed_meanwhile_is_proven_against_the_family_that_another_thread_made(
    tmp_path, monkeypatch, other, first
):
    given = [(tensors(), 2), OTHERS[other]]
    early, late = given if first == "early" else reversed(given)
    folders = {
        name: write_adapter(tmp_path / name, found, r=rank)
        for name, (found, rank) in (("early", early), ("late", late))
    }
    both_missed, early_is_read = threading.Barrier(2), threading.Event()
    make = family._family

    def made_late(*arguments):
        found = make(*arguments)
        both_missed.wait(30)
        if threading.current_thread().name.startswith("late"):
            assert early_is_read.wait(30)
        return found

    monkeypatch.setattr(family, "_family", made_late)
    families = Families()
    with ThreadPoolExecutor(1, "early") as one, ThreadPoolExecutor(1, "late") as two:
        reads = {
            name: pool.submit(read, folders[name], families)
            for name, pool in zip(folders, (one, two), strict=True)
        }
        reads["early"].result(60)
        early_is_read.set()
    found = {name: one.result() for name, one in reads.items()}
    for name, folder in folders.items():
        assert list(found[name].modules) == list(read(folder).modules)
    assert (found["early"].member is found["late"].member) == (other == "an equal header")


def header_of(folder):
    raw = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length].decode(), raw[8 + length :]


def with_header(folder, text, data=None):
    path = folder / "adapter_model.safetensors"
    _, old_data = header_of(folder)
    raw = text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + (old_data if data is None else data))
    return folder


CHANGES = {
    "offsets that leave a hole": lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[4,', 1),
    "a leading zero": lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[00,', 1),
    "a number in a name": lambda text: text.replace("layers.10.", "layers.11."),
    "a rank that the config denies": lambda text: text.replace("[2,6]", "[3,4]"),
    "one number more": lambda text: text.replace("[2,6]", "[2,6,1]", 1),
    "numbers moved between lists": lambda text: text.replace("[2,6]", "[2]", 1),
    "an exponent": lambda text: text.replace("[2,6]", "[2e0,6]", 1),
    "a fraction": lambda text: text.replace("[2,6]", "[2.0,6]", 1),
    "a negative number": lambda text: text.replace("[2,6]", "[-2,-6]", 1),
    "another dtype": lambda text: text.replace('"F32"', '"I32"', 1),
    "a tensor twice": lambda text: text.replace("up_proj.lora_A", "down_proj.lora_A").replace(
        "layers.10.", "layers.2."
    ),
    "another role": lambda text: text.replace("lora_A", "lora_C", 1),
    "trailing text": lambda text: text.rstrip() + "x",
    "a huge number": lambda text: text.replace("[2,6]", f"[2,{10**30}]", 1),
    "a vertical tab before metadata": lambda text: '{\v"__metadata__":{"a":"b"},' + text[1:],
    "a form feed behind metadata": lambda text: '{"__metadata__":{"a":"b"}\f,' + text[1:],
    "a vertical tab inside metadata": lambda text: '{"__metadata__":{"a":\v"b"},' + text[1:],
    "metadata with a name twice": lambda text: '{"__metadata__":{"a":"b","a":"c"},' + text[1:],
    "a space in a number": lambda text: text.replace("[2,6]", "[2,6 6]", 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("known", [True, False])
def test_what_the_parser_refuses_is_refused_with_the_same_words(tmp_path, change, known):
    families = Families()
    if known:
        read(write_adapter(tmp_path / "first", tensors(), r=2), families)
    folder = write_adapter(tmp_path / "a", tensors(), r=2)
    text, _ = header_of(folder)
    changed = CHANGES[change](text)
    assert changed != text
    with_header(folder, changed)
    assert outcome(folder, families) == outcome(folder)


SAME = {
    "metadata of its own": lambda text: '{"__metadata__":{"sha":"0123abc","steps":"[1,2]"},' + text[1:],
    "metadata with braces": lambda text: '{"__metadata__":{"sha":"{1}"},' + text[1:],
    "metadata and white space": lambda text: '{ \t\r\n"__metadata__"\n:\t{"a":"b"}\r,  ' + text[1:],
    "metadata at the end": lambda text: text.rstrip()[:-1] + ',"__metadata__":{"a":"b"}}',
    "metadata twice": lambda text: '{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"},' + text[1:],
    "metadata that is no text": lambda text: '{"__metadata__":{"a":1},' + text[1:],
    "spaces": lambda text: json.dumps(json.loads(text)),
    "more spaces": lambda text: json.dumps(json.loads(text), indent=1),
    "padding": lambda text: text.rstrip() + " " * 13,
    "another order of keys": lambda text: json.dumps(
        {name: dict(reversed(entry.items())) for name, entry in json.loads(text).items()}
    ),
    "another order of tensors": lambda text: json.dumps(dict(reversed(json.loads(text).items()))),
    "escapes": lambda text: text.replace("model.layers.10", "model\\u002elayers.10"),
}


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("rank", [2, 4])
def test_other_spellings_of_a_header_mean_the_same(tmp_path, change, rank):
    families = Families()
    read(write_adapter(tmp_path / "first", tensors(), r=2), families)
    folder = write_adapter(tmp_path / "a", tensors(rank), r=rank)
    with_header(folder, SAME[change](header_of(folder)[0]))
    assert outcome(folder, families) == outcome(folder)


def test_a_file_of_another_length_is_refused_as_truncated(tmp_path):
    families = Families()
    read(write_adapter(tmp_path / "first", tensors(), r=2), families)
    folder = write_adapter(tmp_path / "a", tensors(), r=2)
    with_header(folder, header_of(folder)[0], header_of(folder)[1] + b"more")
    assert outcome(folder, families) == outcome(folder)
    assert outcome(folder)[0] == "CheckpointError"


@pytest.mark.parametrize(
    ("extra", "config"),
    [
        ({}, {"rank_pattern": {"q_proj": 2}}),
        ({}, {"alpha_pattern": {"q_proj": 2}}),
        ({"base_model.model.score.weight": torch.ones(2, 8)}, {"modules_to_save": ["score"]}),
        ({"base_model.model.x.lora_embedding_A": torch.ones(2, 8),
          "base_model.model.x.lora_embedding_B": torch.ones(8, 2)}, {}),
        ({"base_model.model.x.lora_A.weight": torch.ones(2, 8, 1, 1),
          "base_model.model.x.lora_B.weight": torch.ones(8, 2, 1, 1)}, {}),
    ],
)  # fmt: skip
def test_anything_beyond_plain_factors_is_left_to_the_parser(tmp_path, extra, config):
    families = Families()
    folder = write_adapter(tmp_path / "a", tensors() | extra, r=2, **config)
    assert read(folder, families).member is None
    assert outcome(folder, families) == outcome(folder)
    assert not isinstance(read(folder, families).modules, MemberModules)


def test_settings_that_change_a_place_keep_families_apart(tmp_path):
    families = Families()
    one = read(write_adapter(tmp_path / "a", tensors(), r=2), families)
    other = read(write_adapter(tmp_path / "b", tensors(), r=2, fan_in_fan_out=True), families)
    third = read(write_adapter(tmp_path / "c", tensors(), r=2, task_type="SEQ_CLS"), families)
    fourth = read(write_adapter(tmp_path / "d", tensors(), r=2, lora_alpha=99, lora_dropout=0.5), families)
    assert len({id(found.member.family) for found in (one, other, third)}) == 3
    assert fourth.member is one.member
