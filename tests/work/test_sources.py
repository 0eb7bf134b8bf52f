"""The beginnings of output tensors: rows and bytes of the base, of saved tensors, of quantised weights."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantised_files import CASES
from ray_merge.plan import OutTensor
from ray_merge.spec import DTYPE_BYTES, TensorEntry
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.quantised import row_unit
from ray_merge.storage.store import ObjectInfo, Stores, open_store
from ray_merge.storage.stream import CHUNK_BYTES, Reader
from ray_merge.work import sources as module
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.sources import Sources
from tiny import Q0, factors, llama_tensors, plan_of, tables, write_adapter, write_recipe_files

P = "base_model.model."


def tensor_of(rows, columns, dtype="BF16"):
    size = rows * columns * DTYPE_BYTES[dtype]
    return OutTensor("w", TensorEntry("w", dtype, (rows, columns), "f", 1000, 1000 + size), dtype)


def headers_only(**keys) -> Sources:
    return Sources(checkpoint(**keys), None, None)


def checkpoint(**keys) -> Checkpoint:
    config = ObjectInfo("config.json", 2, "")
    given = {
        "url": "",
        "config": {},
        "tensors": {},
        "weight_files": (),
        "config_file": config,
        "side_files": (),
    }
    return Checkpoint(**{**given, **keys})


@pytest.mark.parametrize(
    ("rows", "columns"), [(4096, 4096), (1, 7), (100, 300_000), (33, 5_000_000), (5, 0), (0, 5)]
)
@pytest.mark.parametrize("grid", [1, 16, 256])
def test_spans_cover_every_row_once_on_the_grid(rows, columns, grid):
    spans = headers_only().spans(tensor_of(rows, columns), (0, rows), columns, grid)
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(rows))
    assert all(start % grid == 0 for start, _ in spans)
    row_bytes = 2 * columns
    assert all((stop - start) * row_bytes <= max(CHUNK_BYTES, grid * row_bytes) for start, stop in spans)


def test_the_grid_of_a_slab_begins_at_its_first_row():
    # An expert's update counts its own rows: chunk borders lie `grid` rows apart from where it begins.
    spans = headers_only().spans(tensor_of(1000, 100_000), (310, 700), 100_000, 16)
    assert (spans[0][0], spans[-1][1]) == (310, 700)
    assert all((start - 310) % 16 == 0 for start, _ in spans)
    assert all(one[1] == other[0] for one, other in pairwise(spans))


@contextmanager
def opened(recipe):
    plan = plan_of(recipe)
    cache = Path(plan.base.url).parent / "cache"
    with (
        AdapterFiles(cache, plan.adapters, Stores(), device="cpu", dtype=torch.float32) as files,
        Reader(open_store(plan.base.url)) as reader,
    ):
        yield plan, Sources(plan.base, reader, files)


def out_tensors(plan):
    merge = plan.merges[0]
    return {tensor.name: tensor for shard in plan.shards for tensor in plan.tensors(merge, shard)}


@pytest.mark.parametrize("chunk_bytes", [40, 64, CHUNK_BYTES])
def test_rows_and_bytes_of_the_base_are_those_of_its_file(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    recipe = write_recipe_files(tmp_path)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    with opened(recipe) as (plan, sources):
        for name, tensor in out_tensors(plan).items():
            assert b"".join(sources.raw(tensor)) == stored[name].numpy().tobytes()
            if stored[name].dim() == 2:
                rows, columns = stored[name].shape
                for first, last in ((0, rows), (3, rows - 2), (5, 6)):
                    spans = sources.spans(tensor, (first, last), columns, 1)
                    found = list(sources.rows(tensor, spans, columns))
                    assert [part.shape[0] for part in found] == [stop - start for start, stop in spans]
                    assert torch.equal(torch.cat(found), stored[name][first:last])
                    assert torch.equal(
                        sources.matrix(tensor, (first, last), columns), stored[name][first:last]
                    )


def test_a_tensor_seen_as_longer_or_shorter_rows_keeps_its_order(tmp_path):
    with opened(write_recipe_files(tmp_path)) as (plan, sources):
        tensor = out_tensors(plan)[f"{Q0}.weight"]
        whole = llama_tensors()[f"{Q0}.weight"]
        assert torch.equal(sources.matrix(tensor, (0, 16), 4), whole.reshape(16, 4))
        assert torch.equal(sources.matrix(tensor, (1, 3), 16), whole.reshape(4, 16)[1:3])


def test_a_tensor_that_an_adapter_saved_is_read_from_its_file_in_its_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 48)
    recipe = write_recipe_files(tmp_path)
    table = torch.randn(20, 8).half()
    name = "model.embed_tokens.weight"
    write_adapter(tmp_path / "a", factors(Q0) | tables(20) | {f"{P}{name}": table})
    with opened(recipe) as (plan, sources):
        tensor = out_tensors(plan)[name]
        assert (tensor.owner, tensor.shape, tensor.dtype) == ("a", (20, 8), "F32")
        assert torch.equal(sources.matrix(tensor, (0, 20), 8), table)
        assert torch.equal(sources.matrix(tensor, (17, 20), 8), table[17:])
        assert b"".join(sources.raw(tensor)) == table.numpy().tobytes()


@contextmanager
def quantised(folder, case):
    """A quantised weight, seen as rows, and the values that it decodes to."""
    stored, weight = case.open()
    (folder / "x").write_bytes(stored.bytes)
    name = case.weight
    base = checkpoint(quantised={name: weight})
    n_bytes = 2 * weight.n_rows * weight.shape[-1]
    tensor = OutTensor(name, TensorEntry(name, "BF16", weight.shape, "", 0, n_bytes), "BF16")
    with Reader(open_store(str(folder))) as reader:
        yield Sources(base, reader, None), tensor, weight, stored.whole(weight).to(torch.bfloat16)


@pytest.mark.parametrize("chunk_bytes", [1, 1000, CHUNK_BYTES])
@pytest.mark.parametrize("name", ["fp8 cut blocks", "fp4 blocks over rows", "mxfp4", "int8"])
def test_rows_of_a_quantised_weight_are_decoded_in_units_that_stand_alone(
    tmp_path, monkeypatch, name, chunk_bytes
):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    with quantised(tmp_path, CASES[name]) as (sources, tensor, weight, whole):
        columns = weight.shape[-1]
        spans = sources.spans(tensor, (0, weight.n_rows), columns, 1)
        assert all(start % row_unit(weight) == 0 for start, _ in spans)
        assert len(spans) == (weight.n_rows // row_unit(weight) if chunk_bytes == 1 else len(spans))
        rows = list(sources.rows(tensor, spans, columns))
        assert {part.dtype for part in rows} == {torch.bfloat16}
        assert torch.equal(torch.cat(rows), whole.reshape(-1, columns))
        assert torch.equal(torch.cat(list(sources.raw(tensor))), whole.reshape(-1, columns))
        unit = row_unit(weight)
        part = sources.matrix(tensor, (unit, 2 * unit), columns)
        assert torch.equal(part, whole.reshape(-1, columns)[unit : 2 * unit])
