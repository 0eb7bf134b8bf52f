import datetime

import pytest

from ray_merge.drive.outputs import look, output_root, today
from ray_merge.errors import OutputConflict, RecipeError
from ray_merge.spec import Receipt
from ray_merge.storage.commit import (
    MANIFEST,
    RECIPE,
    REMOVING,
    commit_bytes,
    id_line,
    pretty_json,
    probe,
    put_receipt,
)
from ray_merge.storage.store import Stores, open_store

ID, OTHER = "a" * 64, "b" * 64
INPUTS = {"seed": 0}


def at(tmp_path, name="m", merge_id=ID, inputs=INPUTS):
    return look(str(tmp_path / "out"), name, merge_id, inputs, None, Stores())


def store(tmp_path, name="m"):
    return open_store(str(tmp_path / "out" / name))


def begin(tmp_path, name="m", merge_id=ID):
    probe(store(tmp_path, name), id_line(merge_id).encode(), merge_id)


def complete(tmp_path, name="m", merge_id=ID, inputs=INPUTS):
    begin(tmp_path, name, merge_id)
    commit_bytes(store(tmp_path, name), MANIFEST, pretty_json({"id": merge_id, "inputs": inputs}), merge_id)


def test_date_and_id_are_filled_in():
    assert output_root("s3://b/{date}/x-{id}", ID, "2026-01-31") == f"s3://b/2026-01-31/x-{ID[:12]}"
    assert output_root("/plain/out", ID) == "/plain/out"


def test_without_a_date_it_is_the_day_in_utc():
    before = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = output_root("{date}", ID)
    assert found in (before, today())


@pytest.mark.parametrize(
    "template",
    [
        "/out/{name}",
        "/out/{}",
        "/out/{0}",
        "/out/{",
        "/out/}",
        "/out/{date.year}",
        "/out/{id:>9}",
        "/out/{id!r}",
    ],
)
def test_nothing_else_may_stand_in_braces(template):
    with pytest.raises(RecipeError, match=r"only \{date\} and \{id\} may stand in braces"):
        output_root(template, ID)


@pytest.mark.parametrize("date", ["../..", "2026-1-1", "today", "20260131", "2026-01-31/x", "{id}"])
def test_a_date_has_one_form(date):
    with pytest.raises(RecipeError, match="write it as 2026-01-31"):
        output_root("/out/{date}", ID, date)


def test_an_empty_place_is_free(tmp_path):
    target = at(tmp_path, "s/lambda=0.2")
    assert (target.complete, target.receipts) == (False, {})
    assert target.root == str(tmp_path / "out")
    assert target.url == str(tmp_path / "out" / "s" / "lambda=0.2")
    assert not (tmp_path / "out").exists()


def test_a_complete_merge_is_recognised(tmp_path):
    complete(tmp_path)
    assert at(tmp_path).complete


def test_a_complete_merge_of_other_inputs_is_refused_with_both_ids_and_the_input(tmp_path):
    complete(tmp_path, merge_id=OTHER, inputs={"seed": 7})
    with pytest.raises(OutputConflict) as caught:
        at(tmp_path)
    for part in (OTHER[:12], ID[:12], "seed: 7 there, 0 here", "{id}", str(tmp_path / "out" / "m")):
        assert part in str(caught.value)


def test_a_merge_that_was_begun_is_continued_with_its_receipts(tmp_path):
    begin(tmp_path)
    commit_bytes(store(tmp_path), "model-1.safetensors", b"data", ID)
    put_receipt(
        store(tmp_path),
        Receipt(merge_id=ID, name="model-1.safetensors", n_bytes=4, sha256="0" * 64, tensors=1, unit="u"),
    )
    target = at(tmp_path)
    assert not target.complete
    assert list(target.receipts) == ["model-1.safetensors"]


def test_a_merge_that_was_begun_with_other_inputs_is_refused(tmp_path):
    begin(tmp_path, merge_id=OTHER)
    with pytest.raises(OutputConflict, match=f"holds merge id {OTHER[:12]}, this recipe makes {ID[:12]}"):
        at(tmp_path)


def test_files_of_somebody_else_are_refused(tmp_path):
    (tmp_path / "out" / "m").mkdir(parents=True)
    (tmp_path / "out" / "m" / "thesis.tex").write_text("x")
    with pytest.raises(OutputConflict, match=r"holds something else \(thesis\.tex\)"):
        at(tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_a_receipt_that_gc_was_too_early_for_says_whose_the_folder_is(tmp_path, there):
    """A run went on for a moment after `gc` had taken recipe.yaml, and the object or not."""
    put_receipt(
        store(tmp_path),
        Receipt(merge_id=ID, name="model-1.safetensors", n_bytes=4, sha256="0" * 64, tensors=1, unit="u"),
    )
    if there:
        commit_bytes(store(tmp_path), "model-1.safetensors", b"data", ID)
    assert (at(tmp_path).complete, at(tmp_path).receipts) == (False, {})
    with pytest.raises(OutputConflict, match="holds something else"):
        at(tmp_path, merge_id=OTHER)


def test_state_of_another_recipe_is_not_something_else(tmp_path):
    (tmp_path / "out" / "m" / ".ray_merge" / "attempts" / "x").mkdir(parents=True)
    (tmp_path / "out" / "m" / ".ray_merge" / "attempts" / "x" / "part").write_text("x")
    assert not at(tmp_path).complete


def test_a_merge_inside_another_one_is_refused_both_ways(tmp_path):
    begin(tmp_path, "s", OTHER)
    with pytest.raises(OutputConflict, match=r"is merge id b+, and 's/lambda=1' would lie inside it"):
        at(tmp_path, "s/lambda=1")
    complete(tmp_path, "t/lambda=1", OTHER)
    with pytest.raises(OutputConflict, match=r"holds something else \(lambda=1/"):
        at(tmp_path, "t")


def test_merges_side_by_side_do_not_see_each_other(tmp_path):
    complete(tmp_path, "s/lambda=1", OTHER)
    assert not at(tmp_path, "s/lambda=2").complete
    complete(tmp_path, "s2", OTHER)
    assert not at(tmp_path, "s1").complete


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}"])
def test_a_broken_manifest_is_refused_in_one_sentence(tmp_path, content):
    begin(tmp_path)
    store(tmp_path).put_if_absent(MANIFEST, content, {})
    with pytest.raises(OutputConflict, match=r"MANIFEST\.json is"):
        at(tmp_path)


@pytest.mark.parametrize("name", [RECIPE, "shard"])
def test_a_manifest_whose_files_are_gone_is_made_again_whole(tmp_path, name):
    begin(tmp_path)
    commit_bytes(store(tmp_path), "shard", b"1", ID)
    document = {"id": ID, "inputs": INPUTS, "files": [{"name": "shard", "bytes": 1}]}
    commit_bytes(store(tmp_path), MANIFEST, pretty_json(document), ID)
    assert at(tmp_path).complete
    (tmp_path / "out" / "m" / name).unlink()
    assert (at(tmp_path).complete, at(tmp_path).receipts) == (False, {})
    with pytest.raises(OutputConflict, match="holds merge id"):
        at(tmp_path, merge_id=OTHER)


def test_a_folder_that_gc_removes_is_refused(tmp_path):
    complete(tmp_path)
    store(tmp_path).put_if_absent(REMOVING, b"", {})
    with pytest.raises(OutputConflict, match="being removed"):
        at(tmp_path)
