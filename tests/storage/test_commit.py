import hashlib
import json
from dataclasses import asdict, replace

import pytest

from ray_merge.errors import OutputConflict, ShardConflict, StoreUnfit
from ray_merge.spec import Receipt, SiteReport
from ray_merge.storage.commit import (
    FITNESS,
    MANIFEST,
    RECIPE,
    REMOVING,
    broken,
    check_fit,
    commit,
    commit_bytes,
    hash_object,
    id_line,
    pretty_json,
    probe,
    put_receipt,
    read_complete,
    read_manifest,
    read_receipt,
    read_receipts,
    receipt_path,
    recorded_id,
    sizes_of,
)
from ray_merge.storage.store import open_store

ID, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "out"))


def receipt(name="model-1.safetensors", data=b"data", merge_id=ID, **changes):
    made = Receipt(
        merge_id=merge_id,
        name=name,
        n_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        tensors=3,
        unit="group-000/shard-00001",
        sites=(SiteReport(site="q", tensor="q.weight", rank=2, update_norm=0.5, lost_share=0.0),),
        seconds={"read": 0.1},
        worker="host:1",
    )
    return replace(made, **changes)


def publish(store, made, data=b"data"):
    commit_bytes(store, made.name, data, made.merge_id)
    return put_receipt(store, made)


def test_the_first_put_wins_and_equal_bytes_are_adopted(store):
    assert commit_bytes(store, "x", b"data", ID) is False
    assert commit_bytes(store, "x", b"data", ID) is True
    assert store.read("x") == b"data"


def test_other_bytes_are_refused_and_the_first_ones_stay(store):
    commit_bytes(store, "x", b"data", ID)
    with pytest.raises(ShardConflict) as caught:
        commit_bytes(store, "x", b"DATA", OTHER)
    message = str(caught.value)
    for part in (
        f"{store.url}/x",
        hashlib.sha256(b"data").hexdigest()[:12],
        hashlib.sha256(b"DATA").hexdigest()[:12],
    ):
        assert part in message
    assert store.read("x") == b"data"


def test_a_shorter_object_under_the_name_is_a_conflict_and_not_adopted(store):
    commit_bytes(store, "x", b"da", ID)
    with pytest.raises(ShardConflict):
        commit_bytes(store, "x", b"data", ID)


def test_a_scratch_file_is_committed_like_bytes(store, tmp_path):
    source = tmp_path / "scratch"
    source.write_bytes(b"data")
    digest = hashlib.sha256(b"data").hexdigest()
    assert commit(store, "sub/x", source, sha256=digest, merge_id=ID) is False
    assert commit(store, "sub/x", source, sha256=digest, merge_id=ID) is True


def test_hashing_an_object_reads_it_in_chunks(store, monkeypatch):
    monkeypatch.setattr("ray_merge.storage.commit.HASH_CHUNK_BYTES", 3)
    commit_bytes(store, "x", b"0123456789", ID)
    assert hash_object(store, "x") == hashlib.sha256(b"0123456789").hexdigest()


def test_the_probe_marks_the_folder_and_may_be_repeated(store):
    recipe = id_line(ID).encode() + b"base_model: x\n"
    assert recorded_id(store) is None
    probe(store, recipe, ID)
    probe(store, recipe, ID)
    assert recorded_id(store) == ID
    assert store.read(RECIPE) == recipe


def test_the_probe_refuses_a_folder_of_another_merge(store):
    probe(store, id_line(ID).encode(), ID)
    with pytest.raises(OutputConflict, match=f"belongs to merge id {ID}, this is {OTHER}"):
        probe(store, id_line(OTHER).encode(), OTHER)


def test_the_probe_refuses_a_store_that_takes_a_second_put(store):
    class Overwriting:
        url = "x://bucket"

        def put_if_absent(self, path, source, metadata):
            return True

    with pytest.raises(StoreUnfit, match="a second put of the same name was accepted"):
        probe(Overwriting(), id_line(ID).encode(), ID)
    with pytest.raises(StoreUnfit, match="a second put of the same name was accepted"):
        check_fit(Overwriting())


def test_an_output_that_is_fit_may_be_checked_again(store):
    check_fit(store)
    check_fit(store)
    assert [info.path for info in store.list()] == [FITNESS]


def test_a_receipt_is_read_as_it_was_written(store):
    made = receipt()
    assert put_receipt(store, made) == made
    assert read_receipt(store, receipt_path(made.name)) == made


def test_the_receipt_of_another_driver_is_taken_over(store):
    first = put_receipt(store, receipt(worker="host:1"))
    assert put_receipt(store, receipt(worker="host:2")) == first


@pytest.mark.parametrize("change", [{"sha256": "c" * 64}, {"merge_id": OTHER}])
def test_a_receipt_that_proves_other_bytes_is_a_conflict(store, change):
    put_receipt(store, receipt())
    with pytest.raises(ShardConflict, match="receipts"):
        put_receipt(store, receipt(**change))


def test_a_damaged_receipt_in_the_way_is_a_conflict(store):
    store.put_if_absent(receipt_path("model-1.safetensors"), b"{", {})
    with pytest.raises(ShardConflict, match="no readable receipt"):
        put_receipt(store, receipt())


def test_receipts_of_folders_below_do_not_collide(store):
    names = [
        "adapter/adapter_model.safetensors",
        "adapter_model.safetensors",
        "adapter--adapter_model.safetensors",
    ]
    assert len({receipt_path(name) for name in names[:2]}) == 2
    for name in names[:2]:
        publish(store, receipt(name))
    assert sorted(read_receipts(store, ID)) == sorted(names[:2])


def test_a_receipt_counts_while_its_object_is_there_in_full(store, tmp_path):
    publish(store, receipt())
    assert list(read_receipts(store, ID)) == ["model-1.safetensors"]
    (tmp_path / "out" / "model-1.safetensors").write_bytes(b"dat")
    assert read_receipts(store, ID) == {}
    (tmp_path / "out" / "model-1.safetensors").unlink()
    assert read_receipts(store, ID) == {}


def test_receipts_of_another_merge_do_not_count(store):
    publish(store, receipt())
    assert read_receipts(store, OTHER) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"3", b"\xff", b'{"sites": 3}', b'{"sites": [], "future": 1}', b"[" * 50_000],
)
def test_a_damaged_receipt_does_not_count(store, content):
    commit_bytes(store, "model-1.safetensors", b"data", ID)
    store.put_if_absent(receipt_path("model-1.safetensors"), content, {})
    assert read_receipts(store, ID) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"name": 5},
        {"name": ["x"]},
        {"n_bytes": "4"},
        {"n_bytes": 1.0},
        {"sha256": None},
        {"sha256": "00"},
        {"merge_id": None},
    ],
)
def test_a_receipt_that_proves_nothing_is_a_damaged_one(store, change):
    path = receipt_path("model-1.safetensors")
    store.put_if_absent("model-1.safetensors", b"x", {})
    store.put_if_absent(path, pretty_json(asdict(receipt()) | {"n_bytes": 1} | change), {})
    assert read_receipt(store, path) is None
    assert read_receipts(store, ID) == {}


def test_a_receipt_under_the_name_of_another_object_does_not_count(store):
    commit_bytes(store, "model-1.safetensors", b"data", ID)
    store.put_if_absent(receipt_path("model-2.safetensors"), pretty_json(asdict(receipt())), {})
    assert read_receipts(store, ID) == {}


def test_receipts_of_a_merge_in_a_folder_below_do_not_count(store):
    publish(store.sub("lambda=0.2"), receipt())
    assert read_receipts(store, ID) == {}


def test_there_is_no_manifest_until_it_is_put(store):
    assert read_manifest(store) is None
    commit_bytes(store, MANIFEST, pretty_json({"id": ID, "inputs": {}}), ID)
    assert read_manifest(store) == {"id": ID, "inputs": {}}


@pytest.fixture
def manifest(store):
    """Of a complete merge that lies in `store`."""
    probe(store, id_line(ID).encode(), ID)
    commit_bytes(store, "model-1.safetensors", b"data", ID)
    document = {"id": ID, "inputs": {}, "files": [{"name": "model-1.safetensors", "bytes": 4}]}
    commit_bytes(store, MANIFEST, pretty_json(document), ID)
    return document


def test_a_manifest_with_all_that_it_names_is_a_complete_merge(store, manifest):
    assert read_complete(store) == manifest
    assert broken(store, manifest, sizes_of(store), sizes=True) == []


@pytest.mark.parametrize("name", [RECIPE, "model-1.safetensors"])
def test_a_manifest_without_what_it_stands_for_is_no_complete_merge(store, manifest, name):
    (store.local_root / name).unlink()
    assert broken(store, manifest, sizes_of(store)) == [f"{name} is not there"]
    assert read_complete(store) is None


def test_a_merge_that_is_being_removed_is_not_complete(store, manifest):
    store.put_if_absent(REMOVING, b"", {})
    assert broken(store, manifest, sizes_of(store)) == [f"{REMOVING} is there"]
    assert read_complete(store) is None


def test_a_file_of_another_length_is_gone_for_who_publishes_and_edited_for_who_reads(store, manifest):
    (store.local_root / "model-1.safetensors").write_bytes(b"other")
    assert broken(store, manifest, sizes_of(store), sizes=True) == ["model-1.safetensors is not there"]
    assert read_complete(store) == manifest


def test_what_an_old_listing_does_not_show_is_asked_for_by_its_name(store, manifest):
    assert broken(store, manifest, {}, sizes=True) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"inputs": 3}',
        b"[" * 50_000,
        b'{"inputs": {}, "files": 3}',
        b'{"inputs": {}, "files": [{"name": 3, "bytes": 4}]}',
    ],
)
def test_a_manifest_that_is_none_is_refused(store, content):
    store.put_if_absent(MANIFEST, content, {})
    with pytest.raises(OutputConflict, match="MANIFEST"):
        read_manifest(store)


def test_json_for_people_is_deterministic_and_refuses_nan():
    assert pretty_json({"b": 1, "a": [1.5]}) == pretty_json({"a": [1.5], "b": 1})
    assert json.loads(pretty_json({"a": 0.1})) == {"a": 0.1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        pretty_json({"a": float("nan")})
