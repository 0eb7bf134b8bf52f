"""`gc` on a disk: what it calls left over, what it never touches, and what a run makes of the rest."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

import ray_merge
from ray_merge.cli import main
from ray_merge.gc import parse_age
from ray_merge.storage.commit import MANIFEST, RECEIPTS, RECIPE, REMOVING, probe
from ray_merge.storage.store import open_store
from ray_merge.storage.sweep import LocalSweeper
from zoo import digests, llama_adapters, tiny_llama

DAY = 86400.0
SHARD = "model-00001-of-00004.safetensors"
ID = "ab" * 32


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base")
    llama_adapters(folder / "base", folder / "adapters", 2)
    return folder


def recipe(inputs: Path, output: Path):
    return {
        "base_model": str(inputs / "base"),
        "output": str(output),
        "adapters": {f"a{i}": str(inputs / "adapters" / f"a{i}") for i in range(2)},
        "merges": [
            {"name": "scale", "merge_method": "task_arithmetic", "sweep": {"lambda": [0.2, 0.4]}},
            {"name": "cat", "merge_method": "cat"},
        ],
    }


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    ray_merge.run(recipe(inputs, folder / "out"), engine="local", cache_dir=folder / "cache")
    return folder / "out"


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then), follow_symlinks=False)


@pytest.fixture
def out(whole, tmp_path) -> Path:
    """Two days after a run was killed: `cat` is complete, the sweep is not, and scratch was left."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("0.2", "0.4"):
        (out / "scale" / f"lambda={name}" / MANIFEST).unlink()
        (out / "scale" / f"lambda={name}" / "config.json").unlink()
    write(out / ".ray_merge" / "attempts" / "0123456789ab" / "half.safetensors", b"12345")
    write(out / ".ray_merge" / "moments" / f"{ID}.safetensors")
    write(out / ".ray_merge" / "anchors" / f"{ID}.json")
    write(out / ".ray_merge" / "learn" / ID / "step-000010.safetensors")
    write(out / ".ray_merge" / "put-once")
    write(out / "scale" / "lambda=0.2" / ".tmp-77-0123456789abcdef")
    write(out / "notes.txt", b"mine")
    age(out, 2 * DAY)
    return out


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir() or path.is_symlink()}


def found(result, **wanted):
    return {
        (one.kind, one.path)
        for one in result.leftovers
        if all(getattr(one, name) == value for name, value in wanted.items())
    }


LEFT = {
    ("temporary", "scale/lambda=0.2/.tmp-77-0123456789abcdef"),
    ("attempt", ".ray_merge/attempts/0123456789ab"),
    ("merge", "scale/lambda=0.2"),
    ("merge", "scale/lambda=0.4"),
}


def test_a_listing_removes_nothing(out):
    before = digests(out)
    result = ray_merge.gc(str(out))
    assert found(result) == found(result, kept="", removed=False) == LEFT
    assert digests(out) == before


def test_removal_leaves_the_complete_merge_the_state_and_what_is_not_ours(out, whole):
    result = ray_merge.gc(str(out), remove=True)
    assert found(result, removed=True) == LEFT
    state = {
        "moments/" + ID + ".safetensors",
        "anchors/" + ID + ".json",
        f"learn/{ID}/step-000010.safetensors",
    }
    kept = {f"cat/{name}" for name in files(whole / "cat")}
    assert files(out) == kept | {f".ray_merge/{name}" for name in (*state, "put-once")} | {"notes.txt"}
    assert not (out / "scale").exists()
    assert ray_merge.gc(str(out), remove=True).leftovers == ()


def test_the_recipe_runs_again_where_the_unfinished_merges_were(out, whole, inputs, tmp_path):
    ray_merge.gc(str(out), remove=True)
    (out / "notes.txt").unlink()
    shutil.rmtree(out / ".ray_merge")
    result = ray_merge.run(recipe(inputs, out), engine="local", cache_dir=tmp_path / "cache")
    assert [merge.done for merge in result.merges] == [True, True, False]
    one, other = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.safetensors")}
        for root in (out, whole)
    )
    assert one == other


def test_state_goes_only_when_asked_for_by_name(out):
    result = ray_merge.gc(str(out), remove=True, state=True)
    assert {path for kind, path in found(result, removed=True) if kind == "state"} == {
        f".ray_merge/{name}" for name in ("moments", "anchors", "learn")
    }
    assert [name for name in files(out) if name.startswith(".ray_merge/")] == [".ray_merge/put-once"]


def test_a_store_elsewhere_is_known_by_its_names(out, tmp_path):
    shutil.move(out / ".ray_merge", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "attempts")
    write(tmp_path / "store" / "moments" / "notes.txt")
    age(tmp_path / "store", 2 * DAY)
    ray_merge.gc(str(tmp_path / "store"), remove=True, state=True)
    assert files(tmp_path / "store") == {"put-once", "moments/notes.txt"}


@pytest.mark.parametrize(
    "young", [f"scale/lambda=0.2/{SHARD}", "scale/lambda=0.4/new.safetensors", "cat/" + RECIPE, "notes.txt"]
)
def test_a_run_at_work_anywhere_in_the_output_protects_its_merges(out, young):
    # It wrote the recipe of every merge when it began, and comes to the last of them much later.
    write(out / young, (out / young).read_bytes() if (out / young).exists() else b"x")
    before = {name for name in files(out) if name.startswith(("scale/", "cat/")) and ".tmp-" not in name}
    result = ray_merge.gc(str(out), remove=True)
    assert {path for kind, path in found(result, removed=True) if kind == "merge"} == set()
    assert all("recently" in one.kept for one in result.leftovers if one.kind == "merge")
    assert before <= files(out)


def test_todays_run_does_not_protect_what_was_left_on_another_day(out, tmp_path):
    shutil.copytree(out, tmp_path / "nightly" / "2026-01-01", copy_function=shutil.copy2)
    shutil.copytree(out, tmp_path / "nightly" / "2026-01-02", copy_function=shutil.copy2)
    write(tmp_path / "nightly" / "2026-01-02" / "scale" / "lambda=0.4" / SHARD)
    result = ray_merge.gc(str(tmp_path / "nightly"), remove=True)
    merges = {path for kind, path in found(result, removed=True) if kind == "merge"}
    assert merges == {f"2026-01-01/scale/lambda={value}" for value in ("0.2", "0.4")}


def test_an_attempt_and_a_temporary_file_of_now_are_left_alone(out):
    write(out / ".ray_merge" / "attempts" / "0123456789ab" / "second.safetensors")
    write(out / "scale" / "lambda=0.2" / ".tmp-77-0123456789abcdef")
    before = files(out)
    assert found(ray_merge.gc(str(out), remove=True), removed=True) == set()
    assert files(out) == before


def test_nothing_below_a_manifest_is_removed_whatever_it_is(out):
    write(out / "cat" / ".tmp-77-0123456789abcdef")
    write(out / "cat" / ".ray_merge" / "attempts" / "0123456789ab" / "half")
    write(out / "cat" / ".ray_merge" / "moments" / f"{ID}.safetensors")
    write(out / "cat" / "inner" / RECIPE, (out / "cat" / RECIPE).read_bytes())
    age(out, 2 * DAY)
    before = {name for name in files(out) if name.startswith("cat/")}
    result = ray_merge.gc(str(out), remove=True, state=True)
    assert {name for name in files(out) if name.startswith("cat/")} == before
    assert len(found(result, kept="it lies in a complete merge", removed=False)) == 3


@pytest.mark.parametrize("place", [MANIFEST, "ray_merge"])
def test_a_manifest_behind_a_link_counts(out, tmp_path, place):
    target = out / "scale" / "lambda=0.2" / place
    if target.exists():
        shutil.move(target, tmp_path / "moved")
    target.symlink_to(tmp_path / "moved")
    age(out, 2 * DAY)
    result = ray_merge.gc(str(out), remove=True)
    assert ("merge", "scale/lambda=0.2") not in found(result)
    assert (out / "scale" / "lambda=0.2" / SHARD).exists()


@pytest.mark.parametrize("inside", ["cat", "cat/ray_merge", "cat/ray_merge/receipts"])
def test_a_folder_in_a_complete_merge_is_refused_or_left_alone(out, inside):
    write(out / inside / ".tmp-77-0123456789abcdef")
    age(out, 2 * DAY)
    before = files(out)
    if inside == "cat":
        assert found(ray_merge.gc(str(out / inside), remove=True), removed=True) == set()
    else:
        with pytest.raises(ray_merge.Refusal, match="lies in the complete merge"):
            ray_merge.gc(str(out / inside), remove=True)
    assert files(out) == before


def test_links_out_of_the_output_are_neither_followed_nor_is_their_target_removed(out, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(out / "scale" / "lambda=0.4", elsewhere / "merge")
    write(elsewhere / ".tmp-77-0123456789abcdef")
    write(elsewhere / "attempts" / "0123456789ab" / "half")
    (out / "linked").symlink_to(elsewhere)
    (out / "scale" / "lambda=0.2" / "linked").symlink_to(elsewhere)
    (out / "scale" / "lambda=0.2" / "file").symlink_to(elsewhere / "merge" / SHARD)
    (out / ".ray_merge" / "attempts" / "ba9876543210").symlink_to(elsewhere)
    age(elsewhere, 2 * DAY)
    age(out, 2 * DAY)
    before = digests(elsewhere)
    result = ray_merge.gc(str(out), remove=True, state=True)
    assert not any("linked" in path or "ba9876543210" in path for _, path in found(result))
    assert not (out / "scale").exists()
    assert digests(elsewhere) == before


def test_a_folder_of_somebody_else_is_no_merge(out):
    write(out / "theirs" / RECIPE, b"flour: 500 g\n")
    write(out / "theirs" / "cake.txt")
    write(out / "theirs" / ".tmp-upload")
    write(out / "attempts" / "first" / "essay.txt")
    write(out / "attempts" / "0123456789ab" / "essay.txt")
    (out / "attempts" / "empty").mkdir()
    age(out, 2 * DAY)
    ray_merge.gc(str(out), remove=True)
    theirs = {"theirs/" + RECIPE, "theirs/cake.txt", "theirs/.tmp-upload"}
    assert theirs | {f"attempts/{name}/essay.txt" for name in ("first", "0123456789ab")} <= files(out)
    assert (out / "attempts" / "empty").is_dir()


def test_folders_that_runs_left_empty_go_when_nothing_began_in_them_for_long(out):
    for folder in (out / ".ray_merge", out / ".ray_merge" / "attempts"):
        shutil.rmtree(folder, ignore_errors=True)
    (out / ".ray_merge" / "attempts" / "0123456789ab").mkdir(parents=True)
    ray_merge.gc(str(out), remove=True)
    assert (out / ".ray_merge" / "attempts" / "0123456789ab").is_dir()
    age(out, 2 * DAY)
    ray_merge.gc(str(out))
    assert (out / ".ray_merge").is_dir()
    ray_merge.gc(str(out), remove=True)
    assert not (out / ".ray_merge").exists()


def test_a_recipe_that_is_a_link_is_not_read(out, tmp_path):
    # It may lead to hundreds of megabytes, or to what only the user of this process may read.
    target = out / "scale" / "lambda=0.2" / RECIPE
    shutil.move(target, tmp_path / "moved")
    target.symlink_to(tmp_path / "moved")
    age(out, 2 * DAY)
    assert ("merge", "scale/lambda=0.2") not in found(ray_merge.gc(str(out), remove=True))
    assert (out / "scale" / "lambda=0.2" / SHARD).exists()


def test_ages_on_a_disk_are_counted_by_its_own_clock(out, monkeypatch):
    for path in out.rglob("*"):
        os.utime(path)
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + 2 * DAY)
    result = ray_merge.gc(str(out), remove=True)
    assert found(result, removed=True) == set()
    assert all(one.age_seconds < 600 for one in result.leftovers)


def late_manifest(out: Path, whole: Path, *, mark: bool) -> Path:
    """A manifest that landed when its merge had been removed; with the mark of a gc that was killed, or without."""
    folder = out / "scale" / "lambda=0.2"
    recipe_bytes = (folder / RECIPE).read_bytes()
    shutil.rmtree(folder)
    write(folder / MANIFEST, (whole / "scale" / "lambda=0.2" / MANIFEST).read_bytes())
    if mark:
        write(folder / REMOVING, recipe_bytes)
    age(out, 2 * DAY)
    return folder


@pytest.mark.parametrize("mark", [True, False])
def test_a_manifest_that_came_too_late_is_removed(out, whole, mark):
    folder = late_manifest(out, whole, mark=mark)
    assert ("merge", "scale/lambda=0.2") in found(ray_merge.gc(str(out), remove=True), removed=True)
    assert not folder.exists()


def test_a_run_makes_a_merge_again_under_a_manifest_that_came_too_late(out, whole, inputs, tmp_path):
    folder = late_manifest(out, whole, mark=False)
    (out / "notes.txt").unlink()
    result = ray_merge.run(recipe(inputs, out), engine="local", cache_dir=tmp_path / "cache")
    assert [merge.done for merge in result.merges] == [True, True, False]
    assert (folder / SHARD).read_bytes() == (whole / "scale" / "lambda=0.2" / SHARD).read_bytes()
    assert (folder / RECIPE).exists()


def test_a_complete_merge_whose_recipe_was_removed_by_hand_stays(out):
    (out / "cat" / RECIPE).unlink()
    age(out, 2 * DAY)
    before = {name for name in files(out) if name.startswith("cat/")}
    ray_merge.gc(str(out), remove=True)
    assert {name for name in files(out) if name.startswith("cat/")} == before


def test_a_merge_that_is_completed_while_its_removal_begins_gets_its_recipe_back(out, whole, monkeypatch):
    folder = out / "scale" / "lambda=0.4"
    remove = LocalSweeper.remove

    def late(self, path):
        remove(self, path)
        if path == f"scale/lambda=0.4/{RECIPE}":
            for name in ("config.json", MANIFEST):
                shutil.copy(whole / "scale" / "lambda=0.4" / name, folder / name)

    before = (folder / RECIPE).read_bytes()
    monkeypatch.setattr(LocalSweeper, "remove", late)
    result = ray_merge.gc(str(out), remove=True)
    assert ("merge", "scale/lambda=0.4") in found(result, kept="a run has completed it", removed=False)
    assert (folder / RECIPE).read_bytes() == before
    assert not (folder / REMOVING).exists()
    assert (folder / SHARD).exists()


def test_a_gc_that_was_killed_over_a_complete_merge_is_undone_by_the_next_one(out):
    folder = out / "cat"
    shutil.move(folder / RECIPE, folder / REMOVING)
    recipe_bytes = (folder / REMOVING).read_bytes()
    os.utime(folder / REMOVING)
    ray_merge.gc(str(out), remove=True)  # the mark may be that of a gc at work
    assert (folder / REMOVING).exists()
    assert not (folder / RECIPE).exists()
    age(out, 2 * DAY)
    ray_merge.gc(str(out), remove=True)
    assert (folder / RECIPE).read_bytes() == recipe_bytes
    assert not (folder / REMOVING).exists()
    ray_merge.verify(str(folder), probe=False)


def test_a_removal_that_is_killed_is_finished_by_the_next_one(out, inputs, tmp_path, monkeypatch):
    remove, count = LocalSweeper.remove, []

    def killed(self, path):
        count.append(path)
        if len(count) == 6:
            raise KeyboardInterrupt
        remove(self, path)

    monkeypatch.setattr(LocalSweeper, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        ray_merge.gc(str(out), remove=True)
    monkeypatch.undo()
    folder = out / "scale" / "lambda=0.2"
    assert not (folder / RECIPE).exists()
    assert (folder / REMOVING).exists()
    # A run that begins now must not publish what is half gone.
    with pytest.raises(ray_merge.Refusal, match="being removed"):
        ray_merge.run(recipe(inputs, out), engine="local", cache_dir=tmp_path / "cache")
    ray_merge.gc(str(out), remove=True)
    assert not (out / "scale").exists()


def test_a_merge_that_is_completed_after_the_listing_stays(out, monkeypatch):
    folder = out / "scale" / "lambda=0.4"
    entries = LocalSweeper.entries

    def late(self, below=""):
        if below == "scale/lambda=0.4":
            write(folder / MANIFEST)
            age(folder, 2 * DAY)
        return entries(self, below)

    monkeypatch.setattr(LocalSweeper, "entries", late)
    result = ray_merge.gc(str(out), remove=True)
    assert (folder / SHARD).exists()
    assert (folder / RECIPE).exists()
    assert ("merge", "scale/lambda=0.4") in found(result, removed=False)


@pytest.mark.parametrize("when", ["before its first object", "after its first object"])
def test_a_run_whose_unfinished_merge_is_removed_at_the_same_time_publishes_no_manifest(
    out, inputs, tmp_path, monkeypatch, when
):
    # It has looked at what is there, adopted the shards of the killed run, and has written nothing yet.
    place = "_probe" if when.startswith("before") else "_publish_ready"
    drive, scratch = sys.modules["ray_merge.drive.run"], sys.modules["ray_merge.work.scratch"]
    original, done = getattr(drive, place), []

    def meanwhile(*arguments):
        if not done:
            done.append(ray_merge.gc(str(out), remove=True, older_than="1h"))
        return original(*arguments)

    shutil.rmtree(out / ".ray_merge")
    (out / "notes.txt").unlink()
    for name in ("0.2", "0.4"):
        (out / "scale" / f"lambda={name}" / SHARD).unlink()
    age(out, 2 * DAY)
    monkeypatch.setattr(drive, place, meanwhile)
    monkeypatch.setattr(
        scratch, "STATE_FOLDER", ".elsewhere"
    )  # on S3 scratch is no sign of life in the output
    with pytest.raises(ray_merge.RunFailed, match="removed"):
        ray_merge.run(recipe(inputs, out), engine="local", cache_dir=tmp_path / "cache")
    assert found(done[0], removed=True)
    assert not list((out / "scale").rglob("MANIFEST.json"))
    monkeypatch.undo()
    if (out / "scale").exists():
        ray_merge.gc(str(out), remove=True, older_than=0)


def test_a_run_is_refused_while_the_folder_is_being_removed(out, inputs, tmp_path):
    store = open_store(str(out / "scale" / "lambda=0.2"))
    recipe_bytes = store.read(RECIPE)
    write(out / "scale" / "lambda=0.2" / REMOVING, recipe_bytes)
    (out / "scale" / "lambda=0.2" / RECIPE).unlink()
    merge_id = recipe_bytes.split(b"\n")[0].decode().removeprefix("# merge id: ")
    for _ in range(2):  # the second finds the recipe that the first has put
        with pytest.raises(ray_merge.Refusal, match="being removed"):
            probe(store, recipe_bytes, merge_id)
    with pytest.raises(ray_merge.Refusal, match="being removed"):
        ray_merge.run(recipe(inputs, out), engine="local", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("allowed", "kind"), [(0, ray_merge.Refusal), (1, ray_merge.RunFailed)])
def test_no_rights_are_a_refusal_before_and_a_failure_after_something_was_removed(
    out, monkeypatch, allowed, kind
):
    unlink, count = os.unlink, []

    def denied(name, *, dir_fd=None):
        if dir_fd is None:  # gc's own file that tells the time
            return unlink(name)
        count.append(name)
        if len(count) > allowed:
            raise PermissionError(13, "Permission denied")
        return unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr("ray_merge.storage.sweep.os.unlink", denied)
    with pytest.raises(kind, match="Permission denied"):
        ray_merge.gc(str(out), remove=True)


@pytest.mark.parametrize(
    ("text", "seconds"), [("24h", 86400), ("90m", 5400), ("7d", 604800), ("1.5h", 5400), (30, 30), ("0s", 0)]
)
def test_ages(text, seconds):
    assert parse_age(text) == seconds


def call(arguments, capfd) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    read = capfd.readouterr()
    return int(stopped.value.code or 0), read.out, read.err.strip().rpartition("\n")[2]


@pytest.mark.parametrize("text", ["", "-1h", "1 week", "nan", "inf", "1e400"])
def test_what_is_no_age_is_refused(text, out, capfd):
    code, _, last = call(["gc", str(out), "--older-than", text, "--remove"], capfd)
    assert code == 2
    assert "90m, 24h or 7d" in last


def test_the_command_prints_counts_and_bytes_and_json_says_the_same(out, capfd):
    code, text, _ = call(["gc", str(out)], capfd)
    assert code == 0
    assert "found   attempt    .ray_merge/attempts/0123456789ab: 1 file(s), 5 B, 2 d old" in text
    assert "--remove removes them" in text
    code, text, _ = call(["gc", str(out), "--remove", "--json"], capfd)
    assert code == 0
    document = json.loads(text)
    assert document["totals"]["attempt"] == {"count": 1, "bytes": 5}
    assert all(one["removed"] for one in document["leftovers"])
    code, text, _ = call(["gc", str(out)], capfd)
    assert "nothing to remove" in text


def test_a_folder_that_is_not_there_is_refused(tmp_path, capfd):
    code, _, last = call(["gc", str(tmp_path / "nowhere"), "--remove"], capfd)
    assert code == 2
    assert "no folder that exists" in last


def test_receipts_of_a_removed_merge_go_with_it(out):
    assert any(RECEIPTS in name for name in files(out) if name.startswith("scale/"))
    ray_merge.gc(str(out), remove=True)
    assert not any(name.startswith("scale/") for name in files(out))
