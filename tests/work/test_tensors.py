import pytest
import torch
from safetensors.torch import save_file

from ray_merge.spec import TensorEntry, View
from ray_merge.storage.headers import read_header
from ray_merge.storage.store import open_store
from ray_merge.work import tensors as module
from ray_merge.work.tensors import TORCH_DTYPES, TensorFile, as_matrix, from_bytes, to_bytes

ENTRY = TensorEntry("x", "F32", (24,), "f", 0, 96)
DATA = torch.arange(24.0)


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values())
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 4)])
def test_bytes_are_the_elements_in_row_order_and_back(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    data = bytes(to_bytes(tensor))
    assert len(data) == tensor.numel() * tensor.element_size()
    assert torch.equal(from_bytes(data, dtype, shape), tensor)
    if len(shape) == 2:
        assert bytes(to_bytes(tensor.T)) == bytes(to_bytes(tensor.T.contiguous()))


def entry_of(view):
    """Each entry of a view's matrix as the definition says it, one by one; -1 for a zero off the diagonal."""
    kept = DATA.reshape(view.shape)
    if view.pick is not None:
        kept = kept[(slice(None),) * view.pick[0] + (view.pick[1],)]
    rows, columns = kept.shape
    wide = torch.full((rows, columns * view.blocks), 0.0)
    for row in range(rows):
        block = row // (rows // view.blocks)
        for column in range(columns):
            wide[row, block * columns + column] = kept[row, column]
    if view.transpose:
        wide = torch.tensor([[wide[j, i] for j in range(wide.shape[0])] for i in range(wide.shape[1])])
    if view.cut is not None:
        axis, start, stop = view.cut
        wide = wide[start:stop] if axis == 0 else wide[:, start:stop]
    return wide


@pytest.mark.parametrize(
    "view",
    [
        View(ENTRY, (4, 6)),
        View(ENTRY, (4, 6), transpose=True),
        View(ENTRY, (2, 3, 4), (0, 1)),
        View(ENTRY, (2, 3, 4), (1, 2)),
        View(ENTRY, (2, 3, 4), (2, 3), transpose=True),
        View(ENTRY, (4, 6), blocks=2),
        View(ENTRY, (6, 4), blocks=3, transpose=True),
        View(ENTRY, (4, 6), cut=(0, 1, 3)),
        View(ENTRY, (2, 3, 4), (2, 1), 1, True, (1, 0, 1)),
        View(ENTRY, (2, 3, 4), (1, 0), 2, True, (0, 2, 7)),
    ],
)
def test_a_view_is_reshape_pick_blocks_transpose_cut_in_this_order(view):
    got = as_matrix(DATA, view)
    assert torch.equal(got, entry_of(view))
    assert tuple(got.shape) == view.matrix


@pytest.fixture
def stored(tmp_path):
    values = {
        "a": torch.randn(5, 7),
        "b": torch.randn(6).half(),
        "c": torch.randn(3, 4).double(),
        "n": torch.empty(0),
    }
    save_file(values, tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors", values, read_header(open_store(str(tmp_path)), "f.safetensors").tensors


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_picked_part_is_what_the_view_says_of_the_whole(tmp_path, axis, transpose):
    value = torch.randn(24)
    save_file({"x": value}, tmp_path / "f.safetensors")
    entry = read_header(open_store(str(tmp_path)), "f.safetensors").tensors["x"]
    with TensorFile(tmp_path / "f.safetensors") as file:
        for index in range((2, 3, 4)[axis]):
            view = View(entry, (2, 3, 4), (axis, index), 1, transpose, (0, 1, 2))
            assert torch.equal(file.matrix(view), as_matrix(value, view))


def test_a_file_gives_its_tensors_whole_in_pieces_and_as_matrices(stored, monkeypatch):
    path, values, entries = stored
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 4)
    with TensorFile(path) as file:
        for name, value in values.items():
            assert torch.equal(file.read(entries[name]), value)
            pieces = list(file.pieces(entries[name]))
            assert all(piece.numel() <= 4 for piece in pieces)
            assert torch.equal(torch.cat(pieces or [torch.empty(0)]), value.flatten())
        assert torch.equal(
            file.matrix(View(entries["c"], (4, 3), transpose=True)), values["c"].reshape(4, 3).T
        )


def test_parts_of_the_first_axis_are_read_alone_and_other_parts_share_one_reading(stored):
    path, values, entries = stored
    with TensorFile(path) as file:
        reads = []
        read = file.read_bytes
        file.read_bytes = lambda start, end: reads.append(end - start) or read(start, end)
        for index in range(3):
            part = file.matrix(View(entries["a"], (5, 7, 1), (0, index)))
            assert torch.equal(part, values["a"][index][:, None])
        assert reads == [7 * 4] * 3
        del reads[:]
        for _ in range(2):
            for name in "ac":
                shape = (*values[name].shape, 1)
                for index in range(3):
                    part = file.matrix(View(entries[name], shape, (1, index)))
                    assert torch.equal(part, values[name][:, index][:, None])
        assert reads == [entries[name].n_bytes for name in "ac"]


def test_a_file_that_ends_early_is_noticed(stored):
    path, _, entries = stored
    path.write_bytes(path.read_bytes()[:-8])
    last = max(entries.values(), key=lambda entry: entry.end)
    with TensorFile(path) as file, pytest.raises(OSError, match="ends 8 bytes early"):
        file.read(last)
