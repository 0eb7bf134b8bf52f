"""timeline.parquet tells what receipts tell, belongs to no proof, and no receipt is too damaged for it."""

import io
import json
import os
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

import ray_merge
from ray_merge.drive.timeline import timeline_table
from ray_merge.spec import Receipt
from ray_merge.storage.commit import MANIFEST, RECEIPTS, TIMELINE
from tiny import write_recipe_files

PLAIN = Receipt(
    merge_id="a" * 64, name="model-1.safetensors", n_bytes=100, sha256="b" * 64, tensors=1, unit="u", began=1000.5,
    seconds={"merge": 1.25, "read": 0.5}, unit_bytes={"read": 70, "decoded": 9}, worker="host:1", adopted=True,
)  # fmt: skip


def rows_of(data):
    return pq.read_table(io.BytesIO(data)).to_pylist()


def row_of(receipt, **attempts):
    (row,) = rows_of(timeline_table({receipt.name: receipt}, attempts))
    return row


def run(folder, document):
    ray_merge.run(document, engine="local", workers=1, cache_dir=folder / "cache")
    return folder / "out"


@pytest.fixture
def document(tmp_path):
    return write_recipe_files(tmp_path) | {
        "merges": [
            {"name": "m", "merge_method": "task_arithmetic", "export": "both"},
            {"name": "emr", "merge_method": "emr"},
        ]
    }


def test_a_run_leaves_a_row_for_each_receipt(tmp_path, document):
    out = run(tmp_path, document)
    for merge, kinds in (("m", {"shard", "adapter"}), ("emr", {"shard", "emr"})):
        rows = {row["object"]: row for row in rows_of((out / merge / TIMELINE).read_bytes())}
        receipts = [json.loads(path.read_text()) for path in (out / merge / RECEIPTS).iterdir()]
        assert rows.keys() == {receipt["name"] for receipt in receipts}
        assert {row["kind"] for row in rows.values()} == kinds
        for receipt in receipts:
            row = rows[receipt["name"]]
            assert (row["unit"], row["worker"]) == (receipt["unit"], receipt["worker"])
            assert row["worker"].endswith(f":{os.getpid()}")
            assert dict(row["seconds"]) == receipt["seconds"]
            assert row["bytes"] == (out / merge / receipt["name"]).stat().st_size
            assert row["unit_bytes_read"] == receipt["unit_bytes"].get("read")
            assert (row["attempts"], row["adopted"]) == (1, False)
            assert row["began"].timestamp() == pytest.approx(receipt["began"], abs=2e-3)
            taken = (row["ended"] - row["began"]).total_seconds()
            assert taken == pytest.approx(sum(receipt["seconds"].values()), abs=2e-3)


def test_the_manifest_does_not_name_it_and_a_merge_without_it_is_whole(tmp_path, document):
    out = run(tmp_path, document)
    named = {entry["name"] for entry in json.loads((out / "m" / MANIFEST).read_text())["files"]}
    assert TIMELINE not in named
    (out / "m" / TIMELINE).unlink()
    assert {one.name for one in ray_merge.verify(str(out))} == {"m", "emr"}
    run(tmp_path, document)
    assert not (out / "m" / TIMELINE).exists()


def test_a_rerun_knows_no_attempts_of_what_was_there_and_lets_a_table_be(tmp_path, document):
    out = run(tmp_path, document)
    first = (out / "emr" / TIMELINE).read_bytes()
    for merge in ("m", "emr"):
        (out / merge / MANIFEST).unlink()
        (out / merge / RECEIPTS / "model-00001-of-00002.safetensors.json").unlink()
    (out / "m" / TIMELINE).unlink()
    run(tmp_path, document)
    rows = {row["object"]: row for row in rows_of((out / "m" / TIMELINE).read_bytes())}
    again = rows.pop("model-00001-of-00002.safetensors")
    assert (again["attempts"], again["adopted"]) == (1, True)
    assert [row["attempts"] for row in rows.values()] == [None, None]
    assert (out / "emr" / TIMELINE).read_bytes() == first


def test_attempts_are_those_of_the_run():
    assert row_of(PLAIN, **{PLAIN.name: 3})["attempts"] == 3


def test_rows_are_sorted_by_object():
    receipts = {name: replace(PLAIN, name=name) for name in ("c", "a", "b")}
    assert [row["object"] for row in rows_of(timeline_table(receipts, {}))] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        ({"began": 0.0}, ["began", "ended"]),
        ({"began": float("inf")}, ["began", "ended"]),
        ({"began": 1e300}, ["began", "ended"]),
        ({"seconds": {"read": 9e10, "merge": 2e10}}, ["ended"]),
        ({"unit_bytes": {"read": -1, "decoded": 2.5}}, ["unit_bytes_read", "unit_bytes_decoded"]),
        ({"unit_bytes": {"read": 2**63, "decoded": True}}, ["unit_bytes_read", "unit_bytes_decoded"]),
        ({"began": "noon"}, ["unit", "worker", "began", "ended", "seconds"]),
        ({"seconds": [1]}, ["unit", "worker", "began", "ended", "seconds"]),
        ({"unit_bytes": None}, ["unit", "worker", "began", "ended", "seconds"]),
    ],
)
def test_what_a_damaged_receipt_does_not_tell_is_null(damage, lost):
    row = row_of(replace(PLAIN, **damage))
    assert row["object"] == PLAIN.name
    assert [row[name] for name in lost] == [None] * len(lost)


def test_words_of_a_damaged_receipt_are_readable():
    row = row_of(replace(PLAIN, worker="\ud800", unit=7, seconds={"\udfff": 1.0, "nan": float("nan")}))
    assert (row["worker"], row["unit"], row["seconds"]) == ("?", "7", [("?", 1.0)])
