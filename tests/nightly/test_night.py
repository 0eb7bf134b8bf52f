"""A folder of recipes for a night, on the engine of this process: tiny real merges."""

from __future__ import annotations

import json
import os
import signal

import pytest
from night_cases import DAY, NEXT, Folder

from ray_merge.errors import Refusal, RunFailed
from ray_merge.nightly import Night, run_night
from ray_merge.nightly.command import run_here
from tiny import Q0, llama_tensors, write_base


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def states(summary):
    return {entry.recipe.rpartition("/")[2]: entry.state for entry in summary.entries}


def test_recipes_run_by_shared_base_and_the_summary_says_what_it_took(folder):
    other = str(folder.root / "other")
    for name, change in (("a", {}), ("b", {"base_model": other}), ("c", {}), ("d", {"base_model": other})):
        folder.recipe(name, **change)
    (folder.root / "recipes" / "notes.txt").write_text("no recipe")
    said: list[str] = []
    summary = run_night(folder.night(), said.append)
    begun = [one.split(".yaml")[0][-1] for one in said if one.endswith("to make")]
    assert begun == ["a", "c", "b", "d"]
    assert summary.complete
    assert summary.url == f"{folder.root}/recipes/summaries/nightly-{DAY}-1.json"
    document = json.loads((folder.root / "recipes/summaries" / f"nightly-{DAY}-1.json").read_text())
    assert document == summary.document()
    assert document["counts"] == {"recipes": {"complete": 4}, "merges": {"complete": 4}}
    assert [row["recipe"][-6] for row in document["results"]] == ["a", "b", "c", "d"]
    for row in document["results"]:
        assert row["units"] == 2
        assert row["unit_seconds"] > 0
        shards = folder.manifest(row["recipe"][-6]).parents[1].glob("*.safetensors")
        assert row["written_bytes"] == sum(path.stat().st_size for path in shards)
    assert document["cost"]["written_bytes"] == sum(row["written_bytes"] for row in document["results"])
    page = (folder.root / "recipes/summaries" / f"nightly-{DAY}-1.html").read_text()
    assert "Complete. Recipes: 4 complete. Merges: 4 complete." in page


def test_the_same_night_again_is_a_no_op_with_a_summary_of_its_own(folder):
    folder.recipe("a")
    first, again = run_night(folder.night()), run_night(folder.night())
    assert (states(first), states(again)) == ({"a.yaml": "complete"}, {"a.yaml": "skipped"})
    assert (first.attempt, again.attempt) == (1, 2)
    assert again.complete
    assert again.document()["cost"]["units"] == 0


def test_what_an_earlier_night_completed_is_skipped_and_only_what_changed_is_made(folder):
    folder.recipe("a")
    run_night(folder.night())
    merges = [*folder.document["merges"], {"name": "new", "merge_method": "linear"}]
    folder.recipe("a", merges=merges)
    summary = run_night(folder.night(NEXT))
    entry = summary.entries[0]
    assert [(merge.name, merge.state) for merge in entry.merges] == [("m", "skipped"), ("new", "complete")]
    assert [merge.date for merge in entry.merges] == [DAY, NEXT]
    assert entry.merges[0].url == str(folder.root / "out" / DAY / "a" / "m")
    assert not folder.manifest("a", NEXT).exists()
    assert folder.manifest("a", NEXT, "new").exists()


def test_what_was_made_years_ago_is_known_from_night_to_night(folder):
    folder.recipe("a")
    run_night(folder.night("2020-01-31"))
    for day in ("2022-01-31", "2024-01-31", "2026-01-31"):  # further apart than days are looked through
        entry = run_night(folder.night(day)).entries[0]
        assert [(merge.state, merge.date) for merge in entry.merges] == [("skipped", "2020-01-31")]
    (folder.root / "recipes/summaries/nightly-2026-02-27-1.json").write_text("[]")  # somebody's own
    assert run_night(folder.night("2026-02-28")).entries[0].state == "skipped"


def test_a_bad_recipe_and_one_that_fails_do_not_stop_the_others(folder):
    broken = llama_tensors()
    broken[f"{Q0}.weight"][0, 0] = float("nan")
    write_base(folder.root / "broken", broken)
    folder.recipe("a", merges=[{"name": "m", "merge_method": "tees"}])
    folder.recipe("b", base_model=str(folder.root / "broken"))
    folder.recipe("c")
    summary = run_night(folder.night())
    assert states(summary) == {"a.yaml": "refused", "b.yaml": "failed", "c.yaml": "complete"}
    assert not summary.complete
    refused, failed, _ = summary.entries
    assert "unknown merge method 'tees'" in refused.why
    assert "NaN" in failed.why
    assert [merge.state for merge in failed.merges] == ["failed"]
    with pytest.raises(RunFailed, match="2 of 3 recipe"):
        run_here(folder.night(), as_json=False)


def test_refusals_alone_can_be_told_from_failures(folder):
    folder.recipe("a", merges=[{"name": "m", "merge_method": "tees"}])
    folder.recipe("c")
    run_here(folder.night(), as_json=False, refused_ok=True)
    assert folder.manifest("c").exists()
    broken = llama_tensors()
    broken[f"{Q0}.weight"][0, 0] = float("nan")
    write_base(folder.root / "broken", broken)
    folder.recipe("b", base_model=str(folder.root / "broken"))
    with pytest.raises(RunFailed, match="2 of 3 recipe"):
        run_here(folder.night(), as_json=False, refused_ok=True)


def test_sigterm_ends_the_night_cleanly_and_the_next_call_goes_on(folder):
    for name in ("a", "b"):
        folder.recipe(name)

    def stop(event):
        if event.kind == "unit":
            os.kill(os.getpid(), signal.SIGTERM)

    summary = run_night(folder.night(), progress=stop)
    assert summary.stopped == "SIGTERM"
    assert states(summary) == {"a.yaml": "failed", "b.yaml": "not reached"}
    assert "the same command makes the rest" in summary.sentence()
    assert json.loads((folder.root / "recipes/summaries" / f"nightly-{DAY}-1.json").read_text())["stopped"]
    again = run_night(folder.night())
    assert states(again) == {"a.yaml": "complete", "b.yaml": "complete"}
    assert again.attempt == 2
    # What the first call's unit published is not paid twice.
    assert sum(entry.units for entry in (*summary.entries, *again.entries)) == 4


def test_results_below_the_folder_are_no_recipes_and_one_file_is_itself(folder):
    path = folder.recipe("a", output=str(folder.root / "recipes/out"))
    assert run_night(folder.night()).complete
    assert list(states(run_night(folder.night()))) == ["a.yaml"]  # not the published recipe.yaml
    single = Night(recipes=path, date=DAY, engine="local", workers=1, cache=folder.root / "cache")
    assert states(run_night(single)) == {"a.yaml": "skipped"}
    assert single.summary_folder == f"{folder.root}/recipes/summaries"


def test_a_folder_without_recipes_and_a_day_that_is_none_are_refused(folder):
    with pytest.raises(Refusal, match=r"no file there ends in \.yaml or \.yml"):
        run_night(folder.night())
    folder.recipe("a")
    for day in ("31.1.2026", "2026-02-30"):
        with pytest.raises(Refusal, match=day):
            run_night(folder.night(day))
    with pytest.raises(Refusal, match="No such file"):
        run_night(Night(recipes=str(folder.root / "none"), date=DAY))


def test_a_summary_that_cannot_be_written_is_a_failed_night_whose_merges_are_there(folder):
    folder.recipe("a")
    (folder.root / "file").write_text("")
    with pytest.raises(RunFailed, match="name another folder by --summary"):
        run_night(folder.night(summary=str(folder.root / "file/below")))
    assert folder.manifest("a").exists()


def test_names_from_recipes_stay_text_in_the_page(folder):
    path = folder.recipe("a")
    os.rename(path, folder.root / "recipes" / "<script>alert(1)<.yaml")
    run_night(folder.night())
    page = (folder.root / "recipes/summaries" / f"nightly-{DAY}-1.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in page  # nothing from outside
