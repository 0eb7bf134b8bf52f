"""One kept cluster of three nodes on this machine, and scenarios played on it one after the other.

    python ray_lane.py FOLDER DEADLINE < scenarios.json > verdicts.jsonl

The driver is this process, except where it is killed. Workers find the store through one proxy, whose rule changes
from scenario to scenario. The rerun is the local engine's: bytes do not depend on the engine.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import ray_disturb
from disturb import OwnServer
from judge import Verdict, judge_disturbed, judge_rerun
from nodes import Nodes
from processes import DEADLINE_SECONDS, Ended
from scenarios import Scenario
from world import Reference, World, make_world

import ray_merge
from fault_proxy import FaultProxy, fault_proxy
from ray_merge.errors import RayMergeError
from s3_server import BUCKET, find_weed, free_ports


@dataclass
class RayLane:
    """What all scenarios of this process share."""

    folder: Path
    world: World
    own: OwnServer
    proxy: FaultProxy
    nodes: Nodes
    references: dict[str, tuple[Reference, float]] = field(default_factory=dict)

    def run(self, recipe: dict, cache: Path, engine: str) -> Ended:
        """One run in this process, which has to end within the deadline."""
        ended: list[Ended] = []
        started = time.monotonic()

        def drive() -> None:
            code, last = 0, ""
            try:
                ray_merge.run(recipe, engine=engine, address=self.nodes.address, workers=2, cache_dir=cache)
            except RayMergeError as error:
                code, last = error.exit_code, f"ray-merge: {error}"
            except Exception as error:  # noqa: BLE001  (what the command line says of it)
                code, last = 1, f"ray-merge: internal error: {type(error).__name__}: {error}"
            ended.append(Ended(code, last, time.monotonic() - started))

        thread = Thread(target=drive, daemon=True)
        thread.start()
        thread.join(2 * DEADLINE_SECONDS)  # two workers import torch in it
        if ended:
            return ended[0]
        faulthandler.dump_traceback(all_threads=True)
        return Ended(None, "", time.monotonic() - started)

    def reference(self, recipe: str) -> tuple[Reference, float]:
        """What the local engine publishes undisturbed, and how long Ray takes; Ray must publish the same."""
        if recipe not in self.references:
            local, through_ray = (
                f"s3://{BUCKET}/undisturbed-{engine}-{recipe}" for engine in ("local", "ray")
            )
            end = self.run(self.world.recipe(recipe, "s3", local), self.folder / "cache-local", "local")
            assert end.code == 0, end
            reference = Reference.of(self.world.objects(local), local)
            end = self.run(self.world.recipe(recipe, "s3", through_ray), self.folder / "cache-ray", "ray")
            objects = self.world.objects(through_ray)
            assert end.code == 0, end
            assert reference.wrong(objects, through_ray) == reference.missing(objects) == []
            self.references[recipe] = reference, end.seconds
        return self.references[recipe]

    def play(self, scenario: Scenario) -> Verdict:
        """One scenario from its start to its verdict."""
        started = time.monotonic()
        verdict = Verdict(scenario)
        self.nodes.wait_for_all()
        reference, seconds = self.reference(scenario.recipe)
        output = f"s3://{BUCKET}/chaos-{scenario.kind}-{scenario.number}"
        recipe = self.world.recipe(scenario.recipe, "s3", output)
        cache = self.folder / f"cache-{scenario.number}"
        stage = ray_disturb.Stage(self, scenario, recipe, cache, seconds)
        ends = ray_disturb.disturb(stage)
        verdict.notes = stage.notes
        before = self.world.objects(output)
        judge_disturbed(verdict, ends, before, output, reference)
        if not verdict.hung:
            again = self.run(recipe, cache, "local")
            judge_rerun(verdict, again, self.world.objects(output), output, reference, before)
        verdict.seconds = time.monotonic() - started
        return verdict


def main(folder: Path, deadline: float) -> None:
    scenarios = [Scenario(**document) for document in json.load(sys.stdin)]
    verdicts = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Ray prints to stdout
    weed = find_weed()
    assert weed is not None
    (folder / "server").mkdir()
    own = OwnServer(folder / "server", weed, free_ports())
    with ExitStack() as stack:
        server = own.start()
        stack.callback(own.kill)
        proxy = stack.enter_context(fault_proxy(server.endpoint))
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint  # before the cluster starts: its workers inherit it
        world = make_world(folder / "inputs", server.endpoint)
        nodes = stack.enter_context(Nodes())
        lane = RayLane(folder, world, own, proxy, nodes)
        for scenario in scenarios:
            if time.monotonic() > deadline:
                break
            verdict = lane.play(scenario)
            verdicts.write(json.dumps(verdict.document()) + "\n")
            if verdict.hung:  # its thread is still there, and whatever it holds
                os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
