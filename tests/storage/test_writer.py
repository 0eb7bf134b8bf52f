import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_merge.storage.writer import ScratchFile

LAYOUT = [("w", "F32", (2, 3)), ("e", "F32", (0, 4)), ("b", "BF16", (3,))]


def write(path, parts):
    file = ScratchFile(path, LAYOUT, {"format": "pt"})
    for part in parts:
        file.write(part)
    return file


W = torch.arange(6.0)
B = torch.ones(3, dtype=torch.bfloat16)
DATA = W.numpy().tobytes() + B.view(torch.uint8).numpy().tobytes()


def test_a_written_file_loads_and_is_hashed(tmp_path):
    file = write(tmp_path / "s", [DATA[:7], memoryview(DATA)[7:]])
    sha256 = file.close()
    content = (tmp_path / "s").read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert file.n_bytes == len(content)
    loaded = load_file(tmp_path / "s")
    assert torch.equal(loaded["w"], W.reshape(2, 3))
    assert torch.equal(loaded["b"], B)
    assert loaded["e"].shape == (0, 4)


def test_how_the_bytes_are_cut_does_not_change_the_file(tmp_path):
    one = write(tmp_path / "1", [DATA]).close()
    views = [memoryview(W.numpy().reshape(2, 3)), memoryview(np.empty((0, 4), np.uint8)), b"", DATA[24:]]
    assert write(tmp_path / "2", views).close() == one
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"x", b""])
def test_fewer_or_more_bytes_than_planned_are_noticed(tmp_path, data):
    with pytest.raises(RuntimeError, match=r"wrote \d+ bytes, planned \d+"):
        write(tmp_path / "s", [data]).close()


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "s").write_text("other")
    with pytest.raises(FileExistsError):
        ScratchFile(tmp_path / "s", LAYOUT, {})
    assert (tmp_path / "s").read_text() == "other"


def test_discarding_removes_the_file_at_any_time_and_twice(tmp_path):
    file = write(tmp_path / "s", [DATA[:3]])
    file.discard()
    assert list(tmp_path.iterdir()) == []
    file.discard()


def test_a_file_that_holds_nothing_but_its_header(tmp_path):
    file = ScratchFile(tmp_path / "s", [("e", "F32", (0,))], {})
    file.close()
    assert load_file(tmp_path / "s")["e"].shape == (0,)
