"""What evaluation.json says: normalised scores, fronts of preferences, and the quoting of a hook command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ray_merge.drive.outputs import Target
from ray_merge.errors import Refusal
from ray_merge.evaluate.command import Called, check_command, run_commands
from ray_merge.evaluate.document import normalised, pareto_tables
from ray_merge.spec import Merge
from ray_merge.storage.store import Stores


@pytest.mark.parametrize(
    ("metric", "value", "single", "wanted"),
    [
        ("accuracy", 0.4, 0.8, 50.0),
        ("pearson", -0.4, 0.8, -50.0),
        ("perplexity", 20.0, 5.0, 25.0),
        ("perplexity", math.inf, 5.0, 0.0),
        ("mcc", 0.4, 0.0, None),
        ("spearman", 0.4, -0.2, None),
    ],
)
def test_normalised_is_percent_of_the_single_adapter(metric, value, single, wanted):
    assert normalised(metric, value, single) == wanted


def merge(name: str, preference: dict[str, float] | None) -> Merge:
    return Merge(
        name=name, method="tara_b", adapters=("a", "b"), parameters={"preference": preference, "steps": 5}
    )


def rows(a: float, b: float) -> dict[str, dict[str, Any]]:
    return {"a": {"metric": "accuracy", "value": a}, "b": {"metric": "perplexity", "value": b}}


def test_preferences_on_the_front_are_those_that_no_other_beats_on_every_task():
    weights = [0.1, 0.5, 0.7, 0.9]
    merges = [merge(f"tara/a={one}", {"a": one, "b": 1 - one}) for one in weights]
    merges += [merge("alone", {"a": 0.5, "b": 0.5}), merge("scale/lambda=1", None)]
    # Perplexity is better where it is lower: the third is worse than the second on both.
    scores = [rows(0.2, 4.0), rows(0.6, 6.0), rows(0.5, 7.0), rows(0.9, 9.0), rows(1, 1), rows(1, 1)]
    tables = pareto_tables(merges, {one.name: row for one, row in zip(merges, scores, strict=True)})
    assert list(tables) == ["tara"]
    assert tables["tara"]["metrics"] == {"a": "accuracy", "b": "perplexity"}
    points = tables["tara"]["points"]
    assert [point["dominated"] for point in points] == [False, False, True, False]
    assert points[1]["preference"] == {"a": 0.5, "b": 0.5}
    assert points[1]["scores"] == {"a": 0.6, "b": 6.0}


def test_equal_scores_dominate_nobody_and_one_preference_is_no_front():
    same = [merge("t/x", {"a": 0.2, "b": 0.8}), merge("t/y", {"a": 0.8, "b": 0.2})]
    found = pareto_tables(same, {one.name: rows(0.5, 5.0) for one in same})
    assert [point["dominated"] for point in found["t"]["points"]] == [False, False]
    twice = [merge("t/x", {"a": 0.2, "b": 0.8}), merge("t/y", {"a": 0.2, "b": 0.8})]
    assert pareto_tables(twice, {one.name: rows(0.5, 5.0) for one in twice}) == {}


def test_a_path_with_blanks_and_quotes_reaches_the_command_as_one_word(tmp_path):
    folder = tmp_path / "it's a; touch bad"
    folder.mkdir()
    called = [Called("m/lambda=0.5", str(folder))]
    events: list[Any] = []
    told = run_commands("printf '%s|' {path} {name}; ls {path}/none", called, events.append)
    assert told["m/lambda=0.5"]["stdout_tail"] == f"{folder}|m/lambda=0.5|"
    assert told["m/lambda=0.5"]["exit_code"] == 2
    assert len(events) == 1
    assert not Path("bad").exists()


def test_the_end_of_a_long_output_is_kept():
    told = run_commands("seq 1 5000; echo {name} done", [Called("m", "/")], lambda _: None)["m"]
    assert told["stdout_tail"].endswith("5000\nm done\n")
    assert len(told["stdout_tail"]) == 4000


def test_a_command_cannot_read_a_bucket():
    target = Target(
        root="memory://out", url="memory://out/m", merge_id="0" * 64, inputs={}, complete=True, receipts={}
    )
    with pytest.raises(Refusal, match=r"merge 'm' lies at memory://out/m, and a command reads local folders"):
        check_command("lm_eval {path}", [(merge("m", None), target)], Stores())
