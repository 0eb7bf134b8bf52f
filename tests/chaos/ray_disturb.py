"""What is done to a run through Ray, by kind of scenario. Each returns how its driver ended."""

from __future__ import annotations

import logging
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

import psutil
from processes import Ended
from scenarios import Scenario

from random_faults import RandomFaults

if TYPE_CHECKING:
    from ray_lane import RayLane

MEMORY_ROOM = 3 << 30
"""Bytes between the memory that is taken before a run and where a node's monitor begins to kill: the two workers
take half of them, another process the rest."""

MARGIN = 256 << 20
"""Bytes that the other process leaves until it is told to fill the memory, and takes too much then."""


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


def run_out_of_memory(stage: Stage) -> list[Ended]:
    """Another process fills the machine's memory until the monitor of one node has killed a worker there."""
    rng, nodes, index = stage.rng, stage.lane.nodes, stage.rng.randrange(2)
    reference, _ = stage.lane.references[stage.scenario.recipe]
    memory = psutil.virtual_memory()
    limit = memory.total - memory.available + MEMORY_ROOM
    threshold = f"{limit / memory.total:.4f}"
    nodes.replace(index, RAY_memory_usage_threshold=threshold, RAY_memory_monitor_refresh_ms="50")
    nodes.wait_for_all()
    command = [
        sys.executable,
        str(Path(__file__).parent / "neighbour.py"),
        str(limit - MARGIN),
        str(2 * MARGIN),
    ]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    lost = LostToMemory()

    def fill(ended: Event) -> None:
        # Early: a kill takes 0.3 s, and a run without state no more than 2 s from its first object.
        stage.wait_for_objects(rng.randrange(1, reference.n_state or 3), ended)
        stage.notes["in mid-run"] = not ended.is_set()
        other.stdin.write(b"\n")
        other.stdin.flush()
        while not ended.is_set() and not lost.seen:
            time.sleep(0.01)
        other.kill()
        other.wait()

    logger = logging.getLogger("ray_merge")
    logger.addHandler(lost)
    end = stage.run_with(fill)
    logger.removeHandler(lost)
    stage.notes["workers killed for memory"] = len(lost.seen)
    nodes.replace(index)
    return [end]


class LostToMemory(logging.Handler):
    """Keeps what a run says of workers that Ray's memory monitor killed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "OutOfMemoryError" in record.getMessage():
            self.seen.append(record.getMessage())


DISTURB: dict[str, Callable[[Stage], list[Ended]]] = {
    "ray-kill-worker": kill_worker,
    "ray-kill-raylet": lose_node,
    "ray-preempted-node": lose_node,
    "ray-kill-driver": kill_driver,
    "ray-kill-server": kill_server,
    "ray-out-of-memory": run_out_of_memory,
}


def disturb(stage: Stage) -> list[Ended]:
    """Do what the scenario says."""
    return DISTURB.get(stage.scenario.kind, storage_faults)(stage)
