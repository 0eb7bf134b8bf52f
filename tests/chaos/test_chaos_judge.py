"""The judge notices what it is there for: a chaos runner that passes everything would be worth nothing."""

from __future__ import annotations

import json

import pytest
from judge import Verdict, judge_disturbed, judge_rerun
from processes import Ended
from recipes import FURTHER
from scenarios import Scenario, catalogue
from world import TIMELINE, Reference

from ray_merge.drive.timeline import timeline_table
from ray_merge.spec import Receipt

OUT = "s3://b/out"
RECEIPT = "m/ray_merge/receipts/shard.json"
STATE = ".ray_merge/moments/1.safetensors"


def proof(sha256: str = "aa") -> bytes:
    return json.dumps({"name": "shard", "sha256": sha256}).encode()


def timeline(name: str = "shard", began: float = 1000.0) -> bytes:
    receipt = Receipt(
        merge_id="a" * 64, name=name, n_bytes=7, sha256="aa", tensors=1, unit="u", began=began, seconds={"read": 1.0}
    )  # fmt: skip
    return timeline_table({name: receipt}, {})


WHOLE = {
    "m/shard": b"weights",
    RECEIPT: proof(),
    "m/ray_merge/recipe.yaml": f"output: {OUT}".encode(),
    f"m/{TIMELINE}": timeline(),
    "m/ray_merge/MANIFEST.json": b"{}",
    STATE: b"sums",
}
REFERENCE = Reference.of(WHOLE, OUT)
FAULT = Scenario(0, "fault-lose", "sums", "s3", 0.1, "x")


def without(*names: str) -> dict[str, bytes]:
    return {name: data for name, data in WHOLE.items() if name not in names}


def problems(objects: dict[str, bytes], code: int | None = 1, last: str = "ray-merge: why") -> list[str]:
    verdict = Verdict(FAULT)
    judge_disturbed(verdict, [Ended(code, last, 1.0)], objects, "s3://b/other", REFERENCE)
    return verdict.problems


def test_a_whole_result_passes_under_another_output_at_another_time():
    moved = {
        **WHOLE,
        "m/ray_merge/recipe.yaml": b"output: s3://b/other",
        f"m/{TIMELINE}": timeline(began=2000.0),
    }
    assert problems(moved, code=0) == []


@pytest.mark.parametrize(
    "left",
    [
        {},
        {STATE: b"sums"},
        {".ray_merge/attempts/1/x": b"half"},
        {"m/.tmp-1": b"half"},
        {"m/shard": b"weights"},
    ],
)
def test_a_failed_run_may_leave_parts_that_are_right_or_marked(left):
    assert problems(left) == []


@pytest.mark.parametrize(
    ("objects", "part"),
    [
        ({"m/shard": b"other"}, "other bytes"),
        ({"m/strange": b"x"}, "no undisturbed run writes it"),
        ({STATE: b"half"}, "other bytes"),
        ({".ray_merge/learn/1/step-000009.safetensors": b"x"}, "no undisturbed run writes it"),
        ({f"m/{TIMELINE}": timeline("other")}, "other bytes"),
        ({f"m/{TIMELINE}": timeline()[:90]}, "other bytes"),
        (without(f"m/{TIMELINE}"), "a manifest without"),
        ({RECEIPT: proof()}, "which is not there"),
        ({"m/shard": b"weights", RECEIPT: proof("bb")}, "proves sha256 bb"),
        ({"m/shard": b"weights", RECEIPT: proof()[:9]}, "no whole receipt"),
        (without("m/shard", RECEIPT, "m/ray_merge/recipe.yaml"), "a manifest without"),
    ],
)
def test_what_a_reader_could_mistake_for_a_result_is_a_problem(objects, part):
    assert any(part in problem for problem in problems(objects))


@pytest.mark.parametrize(
    ("code", "last", "part"),
    [
        (None, "", "no end"),
        (0, "", "exit code 0 without"),
        (99, "", "exit code 99"),
        (-11, "", "exit code -11"),
        (1, "Traceback", "without a sentence"),
        (1, "ray-merge: internal error: KeyError", "internal error"),
        (2, "ray-merge: no", "exit code 2 and"),
    ],
)
def test_an_end_that_does_not_tell_the_truth_is_a_problem(code, last, part):
    assert any(part in problem for problem in problems({"m/shard": b"weights"}, code, last))


@pytest.mark.parametrize(("rate", "passes"), [(0.05, False), (0.1, True)])
def test_a_run_has_to_end_well_when_few_requests_fail(rate, passes):
    verdict = Verdict(Scenario(0, "fault-slow503", "sums", "s3", rate, "x"))
    judge_disturbed(verdict, [Ended(1, "ray-merge: why", 1.0)], {}, OUT, REFERENCE)
    assert (verdict.problems == []) == passes


@pytest.mark.parametrize(
    ("objects", "gc", "passes"),
    [
        (without("m/ray_merge/recipe.yaml", "m/shard"), 0, True),  # a manifest that landed too late
        (without("m/shard", "m/ray_merge/MANIFEST.json"), 0, True),  # a receipt whose object gc took
        (without("m/shard"), 0, False),
        ({"m/shard": b"other", "m/ray_merge/recipe.yaml": WHOLE["m/ray_merge/recipe.yaml"]}, 0, False),
        ({}, 3, False),
        ({}, None, False),
    ],
)
def test_what_gc_overtook_must_be_known_for_it(objects, gc, passes):
    verdict = Verdict(Scenario(0, "gc", "sums", "s3", 0.0, "x"), notes={"gc": gc})
    judge_disturbed(verdict, [Ended(-9, "", 1.0), Ended(1, "ray-merge: why", 1.0)], objects, OUT, REFERENCE)
    assert (verdict.problems == []) == passes


def test_a_rerun_that_does_not_bring_everything_is_a_loss():
    verdict = Verdict(FAULT)
    judge_rerun(verdict, Ended(0, "", 1.0), without("m/shard"), OUT, REFERENCE)
    assert len(verdict.lost) == 1
    assert verdict.corrupt  # a receipt and a manifest without the shard


def test_a_rerun_that_does_not_bring_the_state_is_a_loss():
    verdict = Verdict(FAULT)
    judge_rerun(verdict, Ended(0, "", 1.0), without(STATE), OUT, REFERENCE)
    assert verdict.problems == [f"the rerun did not bring {[STATE]}"]


def test_the_catalogue_has_what_was_promised():
    scenarios = catalogue(0)
    local = [scenario for scenario in scenarios if scenario.engine == "local"]
    assert len(local) == 492
    assert len(scenarios) - len(local) == 62
    assert sum(s.kind == "kill-driver-s3" for s in local) >= 50
    assert sum("kill" in s.kind for s in scenarios if s.engine == "ray") >= 10
    assert {s.recipe for s in scenarios[528:]} == {*FURTHER, "sums"}
    assert all(s.recipe not in FURTHER for s in scenarios[:528])
    assert len({s.seed for s in scenarios}) == len(scenarios)
    assert scenarios == catalogue(0)
    for engine in ("local", "ray"):
        assert {s.engine for s in catalogue(0, engine)} == {engine}
