"""What is done to a run through Ray, by kind of scenario. Each returns how its driver ended."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from processes import Ended
from scenarios import Scenario

from random_faults import RandomFaults

if TYPE_CHECKING:
    from ray_lane import RayLane


@dataclass
class Stage:
    """Where one scenario plays; see `disturb.Stage`."""

    lane: RayLane
    scenario: Scenario
    recipe: dict[str, Any]
    cache: Path
    seconds: float
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def rng(self) -> random.Random:
        return self.scenario.rng

    @property
    def n_objects(self) -> int:
        """That an undisturbed run leaves."""
        reference, _ = self.lane.references[self.scenario.recipe]
        return len(reference.files) + len(reference.receipts)

    def wait_for_objects(self, n_objects: int, ended: Event) -> None:
        """Until so many are there (of none: for a random time), or the run has ended."""
        if not n_objects:
            ended.wait(self.rng.random() * self.seconds * 0.6)
        while n_objects and not ended.is_set() and self.lane.world.count(self.recipe["output"]) < n_objects:
            time.sleep(0.005)

    def run(self) -> Ended:
        return self.lane.run(self.recipe, self.cache, "ray")

    def run_with(self, disturbance: Callable[[Event], None]) -> Ended:
        """A run in a thread, and beside it `disturbance` in this one; its event is set when the run has ended.

        Not the other way round: a server that a thread starts ends with that thread, and Ray's nodes set signal
        handlers when they start.
        """
        ends: list[Ended] = []
        ended = Event()

        def run() -> None:
            ends.append(self.run())
            ended.set()

        thread = Thread(target=run)
        thread.start()
        disturbance(ended)
        thread.join()
        return ends[0]


def storage_faults(stage: Stage) -> list[Ended]:
    """A share of the requests fails on the way, the workers' and the driver's."""
    scenario = stage.scenario
    rule = RandomFaults(scenario.faults, scenario.rate, scenario.seed)
    stage.lane.proxy.begin(rule)
    try:
        ended = stage.run()
    finally:
        stage.notes.update(requests=len(stage.lane.proxy.calls), failed=sum(rule.made.values()), **rule.made)
        stage.lane.proxy.begin(lambda _: None)
    return [ended]


def kill_worker(stage: Stage) -> list[Ended]:
    """kill -9 of a worker when a random number of objects is there, in every other scenario of a second one."""
    rng, nodes = stage.rng, stage.lane.nodes
    killed: list[int] = []

    def kill(ended: Event) -> None:
        for n_objects in sorted(rng.randrange(2 * stage.n_objects // 3) for _ in range(rng.choice([1, 2]))):
            stage.wait_for_objects(n_objects, ended)
            while not ended.is_set():
                if there := nodes.workers():
                    killed.append(rng.choice(there))
                    os.kill(killed[-1], signal.SIGKILL)
                    break
                time.sleep(0.02)

    end = stage.run_with(kill)
    stage.notes["workers killed"] = len(killed)
    return [end]


def lose_node(stage: Stage) -> list[Ended]:
    """kill -9 (or, for a preempted node, SIGTERM) of a raylet in mid-run; a new node comes after 1 to 4 s."""
    rng, nodes = stage.rng, stage.lane.nodes
    index = rng.randrange(2)
    lose = nodes.end_gracefully if stage.scenario.kind == "ray-preempted-node" else nodes.kill_raylet

    def loss(ended: Event) -> None:
        stage.wait_for_objects(rng.randrange(2 * stage.n_objects // 3), ended)
        stage.notes["in mid-run"] = not ended.is_set()
        lose(index)
        time.sleep(rng.uniform(1, 4))
        nodes.replace(index)

    return [stage.run_with(loss)]


def kill_driver(stage: Stage) -> list[Ended]:
    """kill -9 of a driver with a process of its own, when a random number of objects is there."""
    import json

    path = stage.lane.folder / f"recipe-{stage.scenario.number}.json"
    path.write_text(json.dumps(stage.recipe))
    command = [sys.executable, "-m", "ray_merge", "run", str(path), "--address", stage.lane.nodes.address]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, "--workers", "2", "--cache-dir", str(stage.cache)], stdout=2, start_new_session=True
    )
    n_objects = stage.rng.randrange(1, stage.n_objects)
    while process.poll() is None and stage.lane.world.count(stage.recipe["output"]) < n_objects:
        time.sleep(0.005)
    stage.notes["killed"] = process.poll() is None
    process.kill()
    code = process.wait()
    time.sleep(2.0)  # its workers may finish a request before they learn that their driver is gone
    return [Ended(code, "", time.monotonic() - started)]


def kill_server(stage: Stage) -> list[Ended]:
    """The store dies at a random moment and comes back after up to 2 s."""
    rng, own = stage.rng, stage.lane.own

    def away(ended: Event) -> None:
        ended.wait(rng.random() * stage.seconds)
        own.kill()
        time.sleep(rng.random() * 2)
        own.start()

    return [stage.run_with(away)]


DISTURB: dict[str, Callable[[Stage], list[Ended]]] = {
    "ray-kill-worker": kill_worker,
    "ray-kill-raylet": lose_node,
    "ray-preempted-node": lose_node,
    "ray-kill-driver": kill_driver,
    "ray-kill-server": kill_server,
}


def disturb(stage: Stage) -> list[Ended]:
    """Do what the scenario says."""
    return DISTURB.get(stage.scenario.kind, storage_faults)(stage)
