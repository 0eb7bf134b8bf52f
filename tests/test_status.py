"""`ray-merge status`: what the store alone says, at every stage of a run."""

from __future__ import annotations

import json

import pytest

from ray_merge import api
from ray_merge.cli import _exit_code
from ray_merge.errors import RunFailed
from ray_merge.status import status
from ray_merge.storage.commit import MANIFEST, RECEIPTS, RECIPE, REMOVING, TIMELINE
from tiny import write_recipe_files

LEARNING = "c" * 64


@pytest.fixture
def output(tmp_path):
    """Three complete merges: a checkpoint, one with both exports, an adapter in a sweep."""
    document = write_recipe_files(tmp_path)
    document["merges"] = [
        {"name": "m", "merge_method": "task_arithmetic"},
        {"name": "both", "merge_method": "task_arithmetic", "export": "both"},
        {"name": "s", "merge_method": "task_arithmetic", "export": "adapter", "sweep": {"lambda": [0.5]}},
    ]
    api.run(document, engine="local", workers=1, cache_dir=tmp_path / "cache")
    return tmp_path / "out"


def by_name(output, **options):
    return {one.name: one for one in status(str(output), **options)}


def test_complete_merges_have_everything(output):
    found = by_name(output)
    assert list(found) == ["both", "m", "s/lambda=0.5"]
    assert [(one.done, one.of) for one in found.values()] == [(3, 3), (2, 2), (1, 1)]
    for name, one in found.items():
        assert one.complete
        assert one.missing == ()
        assert 0 <= one.age_seconds < 600
        files = [path for path in (output / name).rglob("*") if path.is_file()]
        of_this_run = (f"/{RECEIPTS}/", f"/{TIMELINE}")
        assert one.n_bytes == sum(
            p.stat().st_size for p in files if not any(x in str(p) for x in of_this_run)
        )
    assert _exit_code(["status", str(output)]) == 0


def test_an_unfinished_merge_says_which_objects_it_lacks(output, capsys):
    (output / "both" / MANIFEST).unlink()
    (output / "both" / RECEIPTS / "model-00002-of-00002.safetensors.json").unlink()
    one = by_name(output)["both"]
    assert (one.complete, one.done, one.of) == (False, 2, 3)
    assert one.missing == ("model-00002-of-00002.safetensors", MANIFEST)
    assert _exit_code(["status", str(output), "--json"]) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["complete"], document["of"]) == (2, 3)
    assert "1 of 3 merge(s) are not complete, first both" in printed.err


@pytest.mark.parametrize("damage", [{"began": "noon"}, {"seconds": None}, {"seconds": {"read": "x"}}])
def test_a_receipt_with_damaged_times_counts_and_tells_none(output, damage):
    for path in (output / "m" / RECEIPTS).iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    one = by_name(output)["m"]
    assert (one.complete, one.done, one.age_seconds) == (True, 2, None)


def test_a_receipt_without_its_object_does_not_count(output):
    (output / "m" / MANIFEST).unlink()
    (output / "m" / "model-00001-of-00002.safetensors").unlink()
    one = by_name(output)["m"]
    assert (one.done, one.missing[0]) == (1, "model-00001-of-00002.safetensors")


def test_a_merge_that_has_just_begun_knows_its_objects_from_one_of_the_same_base(output):
    for path in [
        output / "m" / MANIFEST,
        *(output / "m").glob("*.safetensors"),
        *(output / "m" / RECEIPTS).iterdir(),
    ]:
        path.unlink()
    for path in (
        output / "both" / MANIFEST,
        output / "both" / RECEIPTS / "model-00001-of-00002.safetensors.json",
    ):
        path.unlink()
    one = by_name(output)["m"]
    assert (one.done, one.of, one.age_seconds) == (0, 2, None)
    alone = {path: path.rename(output.parent / path.name) for path in (output / "both", output / "s")}
    assert len(alone) == 2
    one = by_name(output)["m"]
    assert (one.done, one.of, one.missing) == (0, None, (MANIFEST,))


def test_steps_of_learning_are_shown_before_a_merge_has_a_folder_and_afterwards(output, capsys):
    found = by_name(output)
    for merge_id, steps in ((LEARNING, (5, 10)), (found["m"].id, (100,))):
        for step in steps:
            path = output / f".ray_merge/learn/{merge_id}/step-{step:06d}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    found = by_name(output)
    assert found["m"].step == 100
    assert found["both"].step is None
    learning = found[f"(learning) {LEARNING[:12]}"]
    assert (learning.complete, learning.step) == (False, 10)
    assert _exit_code(["status", str(output)]) == 1
    assert "(learning) cccccccccccc" in capsys.readouterr().out


def test_a_store_elsewhere_is_looked_at_when_it_is_named(output, tmp_path):
    path = tmp_path / f"state/learn/{LEARNING}/step-000007.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert len(by_name(output)) == 3
    assert by_name(output, store=str(tmp_path / "state"))[f"(learning) {LEARNING[:12]}"].step == 7


def test_one_merge_s_folder_and_the_folder_above_outputs_work_too(output):
    assert list(by_name(output / "m")) == ["."]
    assert list(by_name(output.parent)) == ["out/both", "out/m", "out/s/lambda=0.5"]


def test_where_nothing_was_begun_there_is_nothing_to_be_complete(tmp_path):
    with pytest.raises(RunFailed, match="holds no merge"):
        status(str(tmp_path))
    assert _exit_code(["status", str(tmp_path / "none")]) == 1


def test_a_recipe_that_cannot_be_read_is_an_unfinished_merge(output):
    (output / "m" / MANIFEST).unlink()
    (output / "m" / "ray_merge/recipe.yaml").write_text("a: [")
    one = by_name(output)["m"]
    assert (one.complete, one.of) == (False, None)


@pytest.mark.parametrize("name", [RECIPE, "model-00001-of-00002.safetensors"])
def test_a_manifest_whose_files_are_gone_is_unfinished_and_what_is_gone_is_named(output, name):
    (output / "m" / name).unlink()
    found = by_name(output)
    assert not found["m"].complete
    assert found["m"].missing == (name,)
    assert found["both"].complete


def test_a_merge_that_gc_removes_is_unfinished(output):
    (output / "m" / REMOVING).write_bytes(b"")
    assert not by_name(output)["m"].complete
