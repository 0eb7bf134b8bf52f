"""The judge notices what it is there for: a chaos runner that passes everything would be worth nothing."""

from __future__ import annotations

import hashlib
import json

import pytest
from judge import Verdict, judge_collected, judge_disturbed, judge_rerun
from processes import Ended
from recipes import FURTHER
from scenarios import Scenario, catalogue
from world import TIMELINE, Reference

from ray_merge.drive.timeline import timeline_table
from ray_merge.spec import Receipt

OUT = "s3://b/out"
RECEIPT = "m/ray_merge/receipts/shard.json"
STATE = ".ray_merge/moments/1.safetensors"


SHA256 = hashlib.sha256(b"weights").hexdigest()


def proof(sha256: str = SHA256, **more: object) -> bytes:
    return json.dumps({"name": "shard", "sha256": sha256, **more}).encode()


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
FAULT = Scenario(0, "fault-lose", "sums", "s3", 0.2, "x")


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


@pytest.mark.parametrize("left", [{}, {STATE: b"sums"}, {"m/shard": b"weights"}])
def test_a_failed_run_may_leave_parts_that_are_right(left):
    assert problems(left) == []


MARKED = {".ray_merge/attempts/1/x": b"half", "m/.tmp-1": b"half"}


@pytest.mark.parametrize("path", MARKED)
@pytest.mark.parametrize("code", [-9, 1, 0])
def test_only_a_killed_run_may_leave_what_is_unfinished(path, code):
    objects = {**(WHOLE if code == 0 else {}), path: MARKED[path]}
    verdict = Verdict(Scenario(0, "kill-driver-disk", "sums", "disk", 0.0, "x"))
    judge_disturbed(verdict, [Ended(code, "ray-merge: why", 1.0)], objects, OUT, REFERENCE)
    assert bool(verdict.left) == bool(verdict.problems) == (code != -9)


def test_what_is_unfinished_in_a_cache_counts_like_that_in_an_output():
    verdict = Verdict(FAULT)
    judge_disturbed(verdict, [Ended(1, "ray-merge: why", 1.0)], {}, OUT, REFERENCE, ["scratch/attempts/1/x"])
    assert len(verdict.left) == 1


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


@pytest.mark.parametrize(
    ("kind", "rate", "passes"),
    [
        ("fault-slow503", 0.1, False),
        ("fault-slow503", 0.2, True),
        ("fault-stale", 0.3, False),
        ("ray-fault-lose", 0.05, False),
        ("ray-kill-worker", 0.0, False),
        ("clock", 0.0, False),
        ("two-drivers", 0.0, False),
        ("kill-server", 0.0, True),
    ],
)
def test_what_a_run_has_to_get_over_by_itself(kind, rate, passes):
    verdict = Verdict(Scenario(0, kind, "sums", "s3", rate, "x"))
    judge_disturbed(verdict, [Ended(1, "ray-merge: why", 1.0)], {}, OUT, REFERENCE)
    assert (verdict.problems == []) == passes


@pytest.mark.parametrize(
    ("kind", "code", "passes"), [("clock", 2, True), ("clock", 1, False), ("two-drivers", 2, False)]
)
def test_only_a_wrong_clock_may_be_refused_for_its_time(kind, code, passes):
    verdict = Verdict(Scenario(0, kind, "sums", "s3", 0.0, "x"))
    said = "ray-merge: listing s3://b was refused: (403 RequestTimeTooSkewed); check the URL"
    judge_disturbed(verdict, [Ended(code, said, 1.0)], {}, OUT, REFERENCE)
    assert (verdict.problems == []) == passes


@pytest.mark.parametrize(("code", "passes"), [(-9, True), (-11, False), (-6, False)])
def test_a_killed_run_may_not_end_by_another_signal(code, passes):
    verdict = Verdict(Scenario(0, "kill-driver-s3", "sums", "s3", 0.0, "x"))
    judge_disturbed(verdict, [Ended(code, "", 1.0)], {}, OUT, REFERENCE)
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


def rerun(after: dict[str, bytes], before: dict[str, bytes], units: int | None = None) -> Verdict:
    verdict = Verdict(FAULT)
    judge_rerun(verdict, Ended(0, "", 1.0), after, OUT, REFERENCE, before, units)
    return verdict


def test_a_rerun_that_does_not_bring_everything_is_a_loss():
    verdict = rerun(without("m/shard"), {})
    assert len(verdict.lost) == 1
    assert verdict.corrupt  # a receipt and a manifest without the shard


def test_a_rerun_that_does_not_bring_the_state_is_a_loss():
    assert rerun(without(STATE), {}).problems == [f"the rerun did not bring {[STATE]}"]


@pytest.mark.parametrize(
    "before", [{RECEIPT: proof(worker="host:1")}, {f"m/{TIMELINE}": timeline(began=2000.0)}], ids=str
)
def test_what_was_there_is_never_written_again(before):
    assert "again" in rerun(WHOLE, {**WHOLE, **before}).corrupt[0]
    assert rerun(WHOLE, WHOLE).problems == []


@pytest.mark.parametrize(
    ("before", "most"),
    [
        (WHOLE, 0),
        ({}, 1),
        (without(RECEIPT), 1),
        (without("m/shard"), 1),
        ({**WHOLE, RECEIPT: b"half"}, 1),
    ],
)
def test_a_rerun_makes_what_is_missing_and_no_more(before, most):
    assert [
        any("units" in lost for lost in rerun(WHOLE, before, units).lost) for units in (most, most + 1)
    ] == [
        False,
        True,
    ]


def test_a_rerun_may_leave_no_more_than_it_found():
    found = {**WHOLE, "m/.tmp-1": b"half"}
    assert rerun(found, found).problems == []
    assert len(rerun({**found, "m/.tmp-2": b"half"}, found).left) == 1


@pytest.mark.parametrize(
    ("left", "after", "code", "part"),
    [
        (["m/shard"], WHOLE, 0, "gc neither takes nor names m/shard"),
        ([], without("m/shard"), 0, "gc took"),
        ([], WHOLE, 1, "gc after the rerun ended with 1"),
    ],
)
def test_what_gc_does_not_find_or_takes_too_much_is_a_problem(left, after, code, part):
    verdict = Verdict(FAULT)
    judge_collected(verdict, Ended(code, "", 1.0), left, after, OUT, REFERENCE)
    assert any(part in problem for problem in verdict.problems)


@pytest.mark.parametrize("change", [{RECEIPT: proof("bb")}, {"m/.tmp-1": b"half"}])
def test_an_undisturbed_run_has_to_prove_what_is_there_and_leave_nothing(change):
    with pytest.raises(AssertionError):
        Reference.of({**WHOLE, **change}, OUT)


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
