"""Where workers may stand: one worker's demand, what a cluster can hold, and the placement group.

Owns: the refusal of a demand that no wait would meet. Ray itself queues such a demand for ever, in silence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_merge.errors import Refusal
from ray_merge.recipe import SPREAD, Placement

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Demand:
    """What one worker asks of its node.

    Attributes:
        num_gpus: whole GPUs.
        memory_bytes: the plan's peak for one worker, or None to ask for no memory.
        num_cpus: CPUs, in hundredths.
    """

    num_gpus: int
    memory_bytes: int | None
    num_cpus: float = 1.0

    def bundle(self) -> dict[str, float]:
        """The demand in Ray's resource names; memory in bytes."""
        wanted = {"CPU": self.num_cpus, "GPU": float(self.num_gpus), "memory": float(self.memory_bytes or 0)}
        return {name: amount for name, amount in wanted.items() if amount}

    def options(self) -> dict[str, Any]:
        """The demand as options of an actor."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        return options if self.memory_bytes is None else {**options, "memory": self.memory_bytes}

    def workers_on(self, resources: dict[str, float]) -> int:
        """How many such workers a node with these resources holds."""
        # In hundredths: 4.0 // 0.1 is 39.
        return min(
            round(100 * resources.get(name, 0.0)) // round(100 * amount)
            for name, amount in self.bundle().items()
        )


def shared_cpus(demand: Demand, workers: int, placement: Placement) -> Demand:
    """The demand with as much of one CPU as leaves room for all workers on the nodes that there are now.

    Unchanged where no share does: the number of CPUs is not what is missing.
    """
    nodes = _nodes(placement)
    for hundredths in range(100, 0, -1):
        share = replace(demand, num_cpus=hundredths / 100)
        if sum(share.workers_on(resources) for resources in nodes) >= workers:
            return share
    return demand


def room_for(demand: Demand, placement: Placement) -> int:
    """How many such workers the nodes that there are now could hold, counting all that they have, in use or not."""
    per_node = [demand.workers_on(resources) for resources in _nodes(placement)]
    return sum(min(count, 1) for count in per_node) if placement.mode == "one_per_node" else sum(per_node)


def refuse_unmeetable(demand: Demand, workers: int, placement: Placement, wait_seconds: float) -> None:
    """Wait until the cluster's nodes could hold all workers, counting all that they have, in use or not.

    Raises:
        Refusal: they cannot after `wait_seconds`; demand and resources are named.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        room = room_for(demand, placement)
        if room >= workers:
            return
        if time.monotonic() >= deadline:
            raise Refusal(unmet(demand, workers, placement, f"has room for {room}"))
        time.sleep(POLL_SECONDS)


def unmet(demand: Demand, workers: int, placement: Placement, found: str) -> str:
    """One sentence: what was asked, what there is, what to do."""
    where = ", one per node" if placement.mode == "one_per_node" else ""
    if placement.labels:
        where += f", on nodes with {_labels(placement.labels)},"
    return (
        f"{workers} worker(s) with {_words(demand.bundle())} each{where} were asked for, but the cluster {found}: "
        f"{len(_nodes(SPREAD))} node(s) with {_words(_asked(ray.cluster_resources))} in all, "
        f"free now {_words(_asked(ray.available_resources))}; ask for fewer workers or less memory, or add nodes"
        f"{_other_labels(placement)}"
    )


def _nodes(placement: Placement) -> list[dict[str, float]]:
    """The resources of each node that is alive and has the labels, in use or not."""
    wanted = placement.labels.items()
    alive = [node for node in _asked(ray.nodes) if node["Alive"]]
    return [node["Resources"] for node in alive if wanted <= node.get("Labels", {}).items()]


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))


def _other_labels(placement: Placement) -> str:
    """What the nodes have under the names that were asked for."""
    if not placement.labels:
        return ""
    there = [
        _labels({name: node.get("Labels", {}).get(name, "(none)") for name in placement.labels})
        for node in _asked(ray.nodes)
        if node["Alive"]
    ]
    return (
        f" ({len(_nodes(placement))} node(s) have these labels; all nodes: {'; '.join(sorted(set(there)))})"
    )


def _asked(question: Callable[[], Any]) -> Any:
    """Call a function of Ray that has no annotations."""
    return question()


def _words(resources: dict[str, float]) -> str:
    parts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    if resources.get("memory"):
        parts.append(f"{int(resources['memory'])} bytes of memory")
    return ", ".join(parts) or "nothing"


def reserve_nodes(demand: Demand, workers: int, placement: Placement, wait_seconds: float) -> PlacementGroup:
    """One bundle on each of `workers` nodes that have the labels.

    Raises:
        Refusal: the nodes are not free within `wait_seconds`.
    """
    selectors = {"bundle_label_selector": [dict(placement.labels)] * workers} if placement.labels else {}
    group: PlacementGroup = placement_group(
        [demand.bundle()] * workers, strategy="STRICT_SPREAD", **selectors
    )
    if group.wait(timeout_seconds=wait_seconds):
        return group
    remove_placement_group(group)
    raise Refusal(unmet(demand, workers, placement, f"did not free them in {wait_seconds:g} s"))


def in_place(placement: Placement, group: PlacementGroup | None, index: int) -> dict[str, Any]:
    """Options that put the actor of worker `index` where it belongs: into its bundle, whose node has the labels."""
    if group is not None:
        bundle = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        return {"scheduling_strategy": bundle}
    selector = {"label_selector": dict(placement.labels)} if placement.labels else {}
    return {"scheduling_strategy": "SPREAD", **selector}


__all__ = [
    "Demand",
    "in_place",
    "refuse_unmeetable",
    "reserve_nodes",
    "room_for",
    "shared_cpus",
    "unmet",
]
