"""What must hold after a scenario, and its one line in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from processes import Ended
from scenarios import Scenario
from world import Reference, is_marked

BEARABLE_RATE = 0.05
"""With 9 attempts a request fails for good once in 10^11: a run has to end well."""

MAY_BE_INTERNAL = ("memory-limit",)
"""MemoryError and "can't start new thread" come from anywhere; the last line says so."""


@dataclass
class Verdict:
    """One scenario's result; `problems` is empty when it passed.

    Args:
        corrupt: objects with other bytes, or that a reader could mistake for a result.
        lost: what an undisturbed rerun did not bring back.
        hung: a driver that was past its deadline.
        said: wrong exit codes and bad last lines.
    """

    scenario: Scenario
    corrupt: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    ends: list[Ended] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        return [*self.corrupt, *self.lost, *self.hung, *self.said]

    def document(self) -> dict[str, object]:
        return {**asdict(self), "engine": self.scenario.engine, "passed": not self.problems}


def judge_disturbed(
    verdict: Verdict, ends: Sequence[Ended], objects: Mapping[str, bytes], output: str, reference: Reference
) -> None:
    """Right after the disturbed run: nothing wrong is there, and the exit code tells the truth."""
    verdict.ends += ends
    scenario = verdict.scenario
    # What gc overtook says by itself that it is no result: its recipe.yaml is gone.
    shown = reference.begun(objects) if scenario.kind == "gc" else objects
    verdict.corrupt += reference.wrong(shown, output)
    missing = reference.missing(objects)
    for end in ends:
        verdict.said += _said(verdict.scenario.kind, end)
        if end.code is None:
            verdict.hung.append(f"no end after {end.seconds:.0f} s: {end.last[:200]}")
        if end.code == 0 and missing:
            verdict.lost.append(f"exit code 0 without {missing[:3]}")
    written = sorted(path for path in objects if not is_marked(path) and not path.endswith("recipe.yaml"))
    if [end.code for end in ends] == [2] and written:
        verdict.said.append(f"exit code 2 and {written[:3]} are there: {ends[0].last[:200]}")
    if scenario.kind.startswith("fault-") and scenario.rate <= BEARABLE_RATE:
        verdict.said += [
            f"exit code {end.code} at {scenario.rate:.0%}: {end.last[:300]}" for end in ends if end.code != 0
        ]
    if scenario.kind == "gc" and verdict.notes.get("gc") not in (0, 1, 2):
        verdict.said.append(f"gc ended with {verdict.notes.get('gc')}: {verdict.notes.get('gc_said')}")
    if verdict.scenario.kind == "two-drivers" and [end.code for end in ends] != [0, 0]:
        verdict.said.append("one of two drivers failed: " + " | ".join(f"{e.code} {e.last}" for e in ends))


def judge_rerun(
    verdict: Verdict, end: Ended, objects: Mapping[str, bytes], output: str, reference: Reference
) -> None:
    """After one undisturbed rerun: the bytes of the undisturbed run, all of them and nothing else."""
    verdict.ends.append(end)
    if end.code is None:
        verdict.hung.append(f"the rerun had no end after {end.seconds:.0f} s")
    elif end.code != 0:
        verdict.lost.append(f"the rerun ended with {end.code}: {end.last[:300]}")
    verdict.corrupt += reference.wrong(objects, output)
    if missing := reference.missing(objects):
        verdict.lost.append(f"the rerun did not bring {missing[:3]}")


def _said(kind: str, end: Ended) -> list[str]:
    if end.code is None or end.code == 0 or (end.code < 0 and ("kill-driver" in kind or kind == "gc")):
        return []
    if kind == "preempted" and end.code in (-9, -15):  # -15: before the command line had begun
        return []
    if end.code not in (1, 2):
        return [f"exit code {end.code}: {end.last[:300]}"]
    if not end.last.startswith("ray-merge: "):
        return [f"exit code {end.code} without a sentence: {end.last[:300]!r}"]
    if "internal error" in end.last and kind not in MAY_BE_INTERNAL:
        return [f"exit code {end.code}: {end.last[:300]}"]
    return []
