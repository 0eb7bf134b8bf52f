import errno
import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ray_merge.errors import AdapterError
from ray_merge.storage import pickled
from ray_merge.storage.headers import read_header
from ray_merge.storage.pickled import DTYPES, convert_pickle
from ray_merge.storage.store import open_store
from ray_merge.storage.writer import ScratchFile


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "base_model.model.q.lora_B.weight": torch.randn(8, 2, generator=generator),
        "base_model.model.q.lora_A.weight": torch.randn(2, 8, generator=generator).to(torch.bfloat16),
        "base_model.model.classifier.bias": torch.zeros(3, dtype=torch.float16),
        "base_model.model.empty": torch.zeros(0, 4),
        "base_model.model.scalar": torch.tensor(2.5, dtype=torch.float64),
    }


def saved(folder, values, **options):
    torch.save(values, folder / "adapter_model.bin", **options)
    return folder / "adapter_model.bin"


def converted(source):
    target = source.with_name("out.safetensors")
    convert_pickle(source, target)
    return load_file(target)


def refusal(source):
    target = source.with_name("out.safetensors")
    with pytest.raises(AdapterError) as caught:
        convert_pickle(source, target)
    assert not target.exists()
    message = str(caught.value)
    assert message.startswith(str(source))
    assert "weights_only" not in message
    assert len(message) < 1000
    return message


def equal(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value.detach())


@pytest.mark.parametrize("zipped", [True, False])
def test_every_tensor_comes_out_as_it_was(tmp_path, zipped):
    equal(converted(saved(tmp_path, tensors(), _use_new_zipfile_serialization=zipped)), tensors())


def test_a_state_dict_with_its_metadata_and_parameters_is_a_mapping_of_tensors(tmp_path):
    values = OrderedDict((name, torch.nn.Parameter(value)) for name, value in tensors().items())
    values._metadata = {"": {"version": 1}}
    equal(converted(saved(tmp_path, values)), tensors())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_that_both_formats_have(tmp_path, dtype):
    value = torch.arange(6).reshape(2, 3).to(torch.float32).to(getattr(torch, dtype))
    saved(tmp_path, {"x": value})
    convert_pickle(tmp_path / "adapter_model.bin", tmp_path / "out")
    entry = read_header(open_store(str(tmp_path)), "out").tensors["x"]
    assert (entry.dtype, entry.shape) == (DTYPES[dtype], (2, 3))
    content = (tmp_path / "out").read_bytes()[entry.start : entry.end]
    assert content == value.view(torch.uint8).numpy().tobytes()


def test_the_bytes_do_not_depend_on_the_order_of_the_names_or_on_the_pickle(tmp_path):
    results = []
    for index, zipped in enumerate((True, True, False)):
        folder = tmp_path / str(index)
        folder.mkdir()
        values = tensors() if index else dict(reversed(tensors().items()))
        source = saved(folder, values, _use_new_zipfile_serialization=zipped)
        convert_pickle(source, folder / "out")
        results.append((folder / "out").read_bytes())
    assert results[0] == results[1] == results[2]


def test_views_and_tensors_that_share_their_numbers_are_written_in_full(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    values = {"whole": whole, "again": whole, "columns": whole.T, "part": whole[1:3, 2:4], "row": whole[2]}
    equal(converted(saved(tmp_path, values)), values)


def test_large_tensors_go_by_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled, "CHUNK_BYTES", 64)
    monkeypatch.setattr(pickled, "MAPPED_BYTES", 256)
    values = {
        "a": torch.arange(1000.0),
        "b": torch.arange(60.0).reshape(6, 10).T,
        "c": torch.ones(7, dtype=torch.bfloat16),
    }
    equal(converted(saved(tmp_path, values)), values)


def test_an_existing_target_is_kept(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError):
        convert_pickle(saved(tmp_path, tensors()), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


class Code:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_code_in_a_pickle_is_named_and_never_run(tmp_path, form):
    values = {"x": torch.zeros(1), "evil": Code(os.system, f"touch {tmp_path}/pwned")}
    source = tmp_path / "adapter_model.bin"
    if form == "plain":
        source.write_bytes(pickle.dumps(values["evil"], protocol=2))
    else:
        saved(tmp_path, values, _use_new_zipfile_serialization=form == "zip")
    message = refusal(source)
    assert "posix.system" in message
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "value",
    [Code(bytearray, 10**10), Code(torch.Size, [1]), Code(set, []), Code(complex, 1), torch.device("cpu")],
)
def test_what_torch_would_load_but_is_no_tensor_is_not_even_made(tmp_path, value):
    began = time.monotonic()
    assert "which is more than tensors" in refusal(saved(tmp_path, {"x": value}))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"x": 3}, "'x' is a int, not a tensor"),
        ({"x": None}, "'x' is a NoneType"),
        ({"x": "y"}, "'x' is a str"),
        ({"state_dict": {"x": torch.zeros(1)}}, "'state_dict' is a dict"),
        ({"x": [torch.zeros(1)]}, "'x' is a list"),
        ({3: torch.zeros(1)}, "3 is no name of a tensor"),
        ({"a\nb": torch.zeros(1)}, "'a\\nb' is no name of a tensor"),
        ({"x" * 2000: torch.zeros(1)}, "is no name of a tensor"),
        ([torch.zeros(1)], "holds a list, expected a mapping"),
        (torch.zeros(1), "holds a Tensor, expected a mapping"),
        ({}, "holds no tensor"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, "which is more than tensors"),
        ({"x": torch.eye(2).to_sparse()}, "which is more than tensors"),
        ({"x": torch.empty(2, device="meta")}, "which is more than tensors"),
        ({"x": torch.zeros(1).expand(1000, 1000)}, "shows 4 stored bytes as 4000000"),
        ({"x": torch.zeros(1).expand(2**40)}, "shows 4 stored bytes as 4398046511104"),
        ({"x": 2**61}, "holds the number 2305843009213693952"),
    ],
)  # fmt: skip
def test_anything_but_names_with_plain_tensors_is_refused(tmp_path, value, words):
    assert words in refusal(saved(tmp_path, value))


def test_many_views_of_few_numbers_are_refused(tmp_path):
    whole = torch.zeros(10_000)
    assert "bytes together, but the file is" in refusal(saved(tmp_path, {f"x{i}": whole for i in range(100)}))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(tmp_path, zipped):
    source = saved(tmp_path, tensors(), _use_new_zipfile_serialization=zipped)
    content = source.read_bytes()
    for end in [*range(0, len(content), 97), len(content) - 1]:
        source.write_bytes(content[:end])
        refusal(source)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_read_or_refused(tmp_path, zipped):
    source = saved(tmp_path, tensors(), _use_new_zipfile_serialization=zipped)
    content = source.read_bytes()
    for place in range(0, len(content), 23):
        source.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        target = source.with_name("out.safetensors")
        target.unlink(missing_ok=True)
        try:
            convert_pickle(source, target)
        except AdapterError:
            assert not target.exists()


def rezipped(source, change=lambda archive: None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        change(archive)
    return source


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    source = saved(tmp_path, tensors())

    def add(archive):
        with archive.open("archive/data/bomb", "w", force_zip64=True) as entry:
            for _ in range(100):
                entry.write(b"\0" * 2**20)

    rezipped(source, add, zipfile.ZIP_DEFLATED)
    assert source.stat().st_size < 2**20
    began = time.monotonic()
    assert "is compressed, which torch.save never does" in refusal(source)
    assert time.monotonic() - began < 2


def test_a_zip_without_or_with_two_objects_is_refused(tmp_path):
    source = saved(tmp_path, tensors())
    rezipped(source, lambda archive: archive.writestr("other/data.pkl", b"x"))
    assert "it holds 2 data.pkl" in refusal(source)
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("archive/x", b"")
    assert "it holds 0 data.pkl" in refusal(source)


def test_a_directory_that_claims_gigabytes_is_not_read(tmp_path):
    source = saved(tmp_path, tensors())
    content = bytearray(source.read_bytes())
    place = content.rindex(b"PK\x05\x06")
    content[place + 12 : place + 16] = struct.pack("<I", 3 * 10**9)
    with source.open("r+b") as file:
        file.write(bytes(content))
    assert "directory is damaged" in refusal(source)


def test_a_pickle_of_millions_of_instructions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled, "MAX_INSTRUCTIONS", 1000)
    source = saved(tmp_path, {str(i): torch.zeros(1) for i in range(100)})
    assert "more than 1000 instructions" in refusal(source)


def test_files_beyond_the_limits_are_refused_by_their_length(tmp_path, monkeypatch):
    source = tmp_path / "adapter_model.bin"
    with source.open("wb") as file:
        file.truncate(8 * 10**9 + 1)
    assert "8000000001 bytes long" in refusal(source)
    saved(tmp_path, tensors(), _use_new_zipfile_serialization=False)
    monkeypatch.setattr(pickled, "MAX_LEGACY_BYTES", 100)
    assert "torch before 1.6" in refusal(source)


def test_a_big_endian_file_is_refused(tmp_path):
    source = saved(tmp_path, tensors())
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)
    assert "big-endian" in refusal(source)


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"PK\x03\x04", b"\x80\x02.", b"\x80\x04K\x01.", json.dumps({}).encode(), b"\0" * 5000],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "adapter_model.bin").write_bytes(content)
    refusal(tmp_path / "adapter_model.bin")


def test_a_text_of_gigabytes_in_a_short_pickle_is_refused(tmp_path):
    endless = b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"abc."
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", endless)
    for content in (stream.getvalue(), endless):
        (tmp_path / "adapter_model.bin").write_bytes(content)
        assert "damaged" in refusal(tmp_path / "adapter_model.bin")


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_tensors_that_are_not_plain_would_be_refused_even_if_torch_made_them(value):
    with pytest.raises(AdapterError, match="'x' is no plain tensor"):
        pickled._check_tensor(Path("a.bin"), "x", value)


def test_dtypes_that_safetensors_does_not_have_would_be_refused():
    with pytest.raises(AdapterError, match=r"dtype torch\.complex64, which safetensors does not have"):
        pickled._dtype(Path("a.bin"), "x", torch.zeros(1, dtype=torch.complex64))


def test_a_large_tensor_with_gaps_is_refused_because_it_would_have_to_be_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled, "MAPPED_BYTES", 256)
    assert "not stored row by row" in refusal(saved(tmp_path, {"x": torch.zeros(20, 10).T}))


def test_a_pickle_longer_than_any_real_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled, "MAX_OBJECT_BYTES", 100)
    assert "its data.pkl is longer than 100 bytes" in refusal(saved(tmp_path, tensors()))


def test_a_disk_that_is_full_leaves_no_half_file(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = saved(tmp_path, tensors())
    write = ScratchFile.write
    monkeypatch.setattr(
        ScratchFile, "write", lambda self, data: write(self, data) if self.n_bytes == 0 else full(self, data)
    )
    with pytest.raises(OSError, match="No space"):
        convert_pickle(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
