"""What must hold after a scenario, and its one line in the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from processes import Ended
from scenarios import Scenario
from world import Reference, is_marked

BEARABLE_RATE = 0.1
"""With 9 attempts a request fails for good once in 10^9: a run has to end well."""

HARMLESS = ("fault-stale", "fault-delay")
"""At any rate: no request fails, and what an old listing does not show is asked for by its name."""

ENDS_WELL = (
    "clock",
    "two-drivers",
    "ray-kill-worker",
    "ray-kill-raylet",
    "ray-preempted-node",
    "ray-out-of-memory",
)
"""A run has to get over these by itself: what a lost worker did is done by another one."""

MAY_BE_INTERNAL = ("memory-limit",)
"""MemoryError and "can't start new thread" come from anywhere; the last line says so."""


@dataclass
class Verdict:
    """One scenario's result; `problems` is empty when it passed.

    Args:
        corrupt: objects with other bytes, or that a reader could mistake for a result, or that were written twice.
        lost: what an undisturbed rerun did not bring back, or made although it was there.
        hung: a driver that was past its deadline.
        said: wrong exit codes and bad last lines.
        left: unfinished files of drivers that were not killed, and what `gc` knows nothing of.
    """

    scenario: Scenario
    corrupt: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    ends: list[Ended] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        return [*self.corrupt, *self.lost, *self.hung, *self.said, *self.left]

    def document(self) -> dict[str, object]:
        return {**asdict(self), "engine": self.scenario.engine, "passed": not self.problems}


def judge_disturbed(
    verdict: Verdict,
    ends: Sequence[Ended],
    objects: Mapping[str, bytes],
    output: str,
    reference: Reference,
    scratch: Collection[str] = (),
) -> None:
    """Right after the disturbed run: nothing wrong is there, and the exit code tells the truth.

    Args:
        verdict: what is wrong goes there.
        ends: of its drivers.
        objects: below `output`, all of them.
        output: of the scenario.
        reference: of its recipe.
        scratch: unfinished files in the drivers' cache folder.
    """
    verdict.ends += ends
    scenario = verdict.scenario
    # What gc overtook says by itself that it is no result: its recipe.yaml is gone.
    shown = reference.begun(objects) if scenario.kind == "gc" else objects
    verdict.corrupt += reference.wrong(shown, output)
    missing = reference.missing(objects)
    for end in ends:
        verdict.said += _said(scenario.kind, end)
        if end.code is None:
            verdict.hung.append(f"no end after {end.seconds:.0f} s: {end.last[:200]}")
        if end.code == 0 and missing:
            verdict.lost.append(f"exit code 0 without {missing[:3]}")
        if end.code != 0 and _has_to_end_well(scenario) and not _is_too_early(scenario, end):
            verdict.said.append(f"exit code {end.code} in {scenario.line()}: {end.last[:300]}")
    written = sorted(path for path in objects if not is_marked(path) and not path.endswith("recipe.yaml"))
    if [end.code for end in ends] == [2] and written:
        verdict.said.append(f"exit code 2 and {written[:3]} are there: {ends[0].last[:200]}")
    if scenario.kind == "gc" and verdict.notes.get("gc") not in (0, 1, 2):
        verdict.said.append(f"gc ended with {verdict.notes.get('gc')}: {verdict.notes.get('gc_said')}")
    # Where memory is at its end, the removal may fail too.
    if all(end.code in (0, 1, 2) for end in ends) and scenario.kind not in MAY_BE_INTERNAL:
        verdict.left += _left([*filter(is_marked, objects), *scratch])


def judge_rerun(
    verdict: Verdict,
    end: Ended,
    objects: Mapping[str, bytes],
    output: str,
    reference: Reference,
    before: Mapping[str, bytes],
    units: int | None = None,
) -> None:
    """After one undisturbed rerun: the bytes of the undisturbed run, all of them and nothing else.

    Args:
        verdict: what is wrong goes there.
        end: of the rerun.
        objects: below `output` after it.
        output: of the scenario.
        reference: of its recipe.
        before: the objects before it.
        units: how many it said that it runs; None where it cannot be asked.
    """
    verdict.ends.append(end)
    if end.code is None:
        verdict.hung.append(f"the rerun had no end after {end.seconds:.0f} s")
    elif end.code != 0:
        verdict.lost.append(f"the rerun ended with {end.code}: {end.last[:300]}")
    verdict.corrupt += reference.wrong(objects, output)
    if missing := reference.missing(objects):
        verdict.lost.append(f"the rerun did not bring {missing[:3]}")
    # Receipts and timelines differ from run to run, so that a second put shows.
    again = [path for path, data in before.items() if not is_marked(path) and objects.get(path, data) != data]
    if again:
        verdict.corrupt.append(f"the rerun wrote {again[:3]} again")
    verdict.left += _left([path for path in objects if is_marked(path) and path not in before])
    unproven = len(reference.unproven(before))
    # What gc overtook is made anew, receipts or not.
    if units is not None and units > unproven and verdict.scenario.kind != "gc":
        verdict.lost.append(f"the rerun ran {units} units for {unproven} objects without a receipt")


def judge_collected(
    verdict: Verdict,
    end: Ended,
    left: Sequence[str],
    objects: Mapping[str, bytes],
    output: str,
    reference: Reference,
) -> None:
    """After `gc` at the end: `left`, unfinished and neither removed nor named, is empty; the rest is there."""
    if end.code != 0:
        verdict.said.append(f"gc after the rerun ended with {end.code}: {end.last[:300]}")
    verdict.left += [f"gc neither takes nor names {path}" for path in left[:3]]
    verdict.corrupt += reference.wrong(objects, output)
    if missing := reference.missing(objects):
        verdict.lost.append(f"gc took {missing[:3]}")


def _has_to_end_well(scenario: Scenario) -> bool:
    bearable = "fault-" in scenario.kind and scenario.rate <= BEARABLE_RATE
    return bearable or scenario.kind in (*ENDS_WELL, *HARMLESS)


def _is_too_early(scenario: Scenario, end: Ended) -> bool:
    """A clock that is a day behind signs requests that the server refuses, and says so, before anything is written."""
    return scenario.kind == "clock" and end.code == 2 and "RequestTimeTooSkewed" in end.last


def _left(paths: Sequence[str]) -> list[str]:
    return [f"{len(paths)} unfinished files, first {sorted(paths)[:3]}"] if paths else []


def _said(kind: str, end: Ended) -> list[str]:
    if end.code is None or end.code == 0 or (end.code == -9 and ("kill-driver" in kind or kind == "gc")):
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
