"""Plays scenarios of the local engine: disturb, judge, run again, judge again; several lanes side by side.

A lane is a forked process that plays one scenario after the other, since most of a scenario is waiting. One lane has
a server of its own for the scenarios that kill it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from disturb import OwnServer, Stage, disturb, scratch
from judge import Verdict, judge_collected, judge_disturbed, judge_rerun
from processes import start_command, start_driver
from recipes import settings_of
from scenarios import Scenario
from world import Reference, World, make_world, unfinished

from s3_server import BUCKET, client_environment, find_weed, free_ports


@dataclass
class Lane:
    """One row of scenarios over one server."""

    folder: Path
    world: World
    own: OwnServer | None = None
    references: dict[tuple[str, str], tuple[Reference, float]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return client_environment(self.world.endpoint)

    def output(self, name: str, store: str, folder: Path) -> str:
        return f"s3://{BUCKET}/{name}" if store == "s3" else str(folder / "disk" / name)

    def reference(self, recipe: str, store: str) -> tuple[Reference, float]:
        """What an undisturbed run publishes, and how long it takes."""
        key = (recipe, store)
        if key not in self.references:
            name = f"undisturbed-{self.folder.name}-{recipe}"
            with scratch(self.folder / name) as folder:
                output = self.output(name, store, folder)
                path = _write_recipe(self.world, recipe, store, output, folder)
                cache, before = folder / "cache", settings_of(recipe)
                end = start_driver(path, cache, folder / "log", self.environment, before).wait()
                assert end.code == 0, (folder / "log").read_text()[-3000:]
                self.references[key] = Reference.of(self.world.objects(output), output), end.seconds
        return self.references[key]

    def play(self, scenario: Scenario) -> Verdict:
        """One scenario from its start to its verdict."""
        started = time.monotonic()
        verdict = Verdict(scenario)
        reference, seconds = self.reference(scenario.recipe, scenario.store)
        name = f"chaos-{scenario.kind}-{scenario.number}"
        with scratch(self.folder / name) as folder:
            output = self.output(name, scenario.store, folder)
            path = _write_recipe(self.world, scenario.recipe, scenario.store, output, folder)
            stage = Stage(
                scenario,
                folder,
                path,
                output,
                seconds,
                len(reference.files) + len(reference.receipts),
                reference.n_state,
                partial(self.world.count, output),
                self.environment,
                self.own,
            )
            ends = disturb(stage)
            verdict.notes = stage.notes
            before = self.world.objects(output)
            judge_disturbed(verdict, ends, before, output, reference, unfinished(stage.cache))
            for take_away in stage.limits:
                take_away()
            again = stage.start("again", environment=self.environment).wait()
            objects, units = self.world.objects(output), _units_run(folder / "again.log")
            judge_rerun(verdict, again, objects, output, reference, before, units)
            self._collect(verdict, stage, reference)
            if verdict.problems:
                _keep_logs(folder, self.folder.parent / "failed" / name)
        verdict.seconds = time.monotonic() - started
        return verdict

    def _collect(self, verdict: Verdict, stage: Stage, reference: Reference) -> None:
        """`gc` finds what kills have left, and what lost answers to the begin of an upload have."""
        left = self.world.left(stage.output)
        if left:
            verdict.notes["left for gc"] = len(left)
            command = ["gc", stage.output, "--remove", "--older-than", "0s"]
            end = start_command(command, stage.folder / "collect.log", self.environment).wait()
            said = (stage.folder / "collect.log").read_text(errors="replace")
            left = [path for path in self.world.left(stage.output) if f" {path}: " not in said]
            judge_collected(verdict, end, left, self.world.objects(stage.output), stage.output, reference)


def _units_run(log: Path) -> int:
    """How many units of merges a run began, by its own words."""
    begun = re.findall(r"starting: (\d+) unit\(s\) for \d+ merge", log.read_text(errors="replace"))
    return int(begun[-1]) if begun else 0


def _write_recipe(world: World, recipe: str, store: str, output: str, folder: Path) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(world.recipe(recipe, store, output)))
    return path


def _keep_logs(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for log in [*folder.glob("*.log"), folder / "recipe.json"]:
        shutil.copy(log, to)


def play_all(
    scenarios: Sequence[Scenario],
    folder: Path,
    world: World,
    *,
    lanes: int,
    deadline: float,
    done: Callable[[dict[str, object]], None],
) -> None:
    """Play scenarios until all are done or `deadline` (of time.monotonic) has passed; `done` gets each verdict."""
    killing = [s for s in scenarios if s.kind == "kill-server"]
    others = [s for s in scenarios if s.kind != "kill-server"]
    rows = [others[lane::lanes] for lane in range(lanes)]
    pipes = []
    for number, row in enumerate([*rows, killing]):
        if row:
            pipes.append(_fork_lane(folder / f"lane{number}", world, row, deadline, own=row is killing))
    for verdict in _read(pipes):
        done(verdict)


def _fork_lane(folder: Path, world: World, row: Sequence[Scenario], deadline: float, own: bool) -> int:
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return reader
    os.close(reader)
    folder.mkdir()
    try:
        with ExitStack() as stack, open(writer, "w", buffering=1) as out:
            lane = _own_lane(folder, stack) if own else Lane(folder, world)
            for scenario in row:
                if time.monotonic() > deadline:
                    break
                out.write(json.dumps(lane.play(scenario).document()) + "\n")
    except BaseException:  # noqa: BLE001  (the end of this process)
        traceback.print_exc()
    finally:
        os._exit(0)


def _own_lane(folder: Path, stack: ExitStack) -> Lane:
    weed = find_weed()
    assert weed is not None
    (folder / "server").mkdir()
    own = OwnServer(folder / "server", weed, free_ports())
    server = own.start()
    stack.callback(own.kill)
    return Lane(folder, make_world(folder / "inputs", server.endpoint), own)


def _read(pipes: Sequence[int]) -> Iterator[dict[str, object]]:
    """Lines of all lanes as they come."""
    import selectors

    with selectors.DefaultSelector() as waiting, ExitStack() as stack:
        for pipe in pipes:
            file = stack.enter_context(open(pipe))
            waiting.register(file, selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                line = key.fileobj.readline()
                if line:
                    yield json.loads(line)
                else:
                    waiting.unregister(key.fileobj)
