"""The actors: each holds the worker that its factory made, and nothing that a call leaves behind.

Owns: the actor of units, declared once at import, and the greeting by which the driver learns who answers.
Never: keeps a result, a sum or a reference between calls, so that any call may be repeated on any actor.

A constructor that raises would arrive as the text of an `ActorDiedError`. The error is kept instead and
handed over with the greeting, so that the driver can raise it with its own type.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle

from ray_merge import logs
from ray_merge.errors import RayMergeError
from ray_merge.pool import UNITS_PER_WORKER, Turns, worker_label
from ray_merge.pool_steps import made
from ray_merge.runtime.telemetry import Label, unit_ran, watch_memory


@dataclass(frozen=True)
class Greeting:
    """What an actor says once its worker stands.

    Attributes:
        worker: `host:pid`.
        node: Ray's id of its node.
        ray_version: Ray in the worker's process.
        python_version: Python there, as major.minor.patch.
        error: why there is no worker, an exception of this package's tree, or None.
    """

    worker: str
    node: str
    ray_version: str
    python_version: str
    error: RayMergeError | None


class WorkerActor:
    """A process of the cluster that computes one unit at a time, while it may still upload the one before.

    Args:
        label: what it calls itself.
        pickled_factory: cloudpickle of a callable that makes the worker; bytes, because an argument that
            cannot be unpickled kills an actor before its constructor could say why.
        arguments: of the factory.
    """

    def __init__(self, label: Label, pickled_factory: bytes, *arguments: Any) -> None:
        self._label = label
        if label.as_json:
            logs.set_up_worker()
        self._worker: Any = None
        self._error: RayMergeError | None = None
        self._turns = Turns(1)
        try:
            self._worker = made(lambda: cloudpickle.loads(pickled_factory)(*arguments))
        except RayMergeError as error:
            self._error = error

    def __repr__(self) -> str:
        return f"ray-merge {self._label.kind} worker"  # its name in Ray's dashboard and logs

    def greet(self) -> Greeting:
        """Say who is there; it comes before any unit, and a driver that hears of an error sends none."""
        watch_memory(self._label.kind)
        node = ray.get_runtime_context().get_node_id()
        return Greeting(worker_label(), node, ray.__version__, platform.python_version(), self._error)


class UnitActor(WorkerActor):
    """Runs the units of a `RayPool`."""

    def run(self, unit_id: str, unit: Any) -> Any:
        """Run one unit; its exception travels to the driver."""
        with self._turns.queue() as turn:
            began = time.perf_counter()
            result = self._worker.run(unit, turn)
            unit_ran(self._label, unit_id, result, time.perf_counter() - began)
            return result


# Ray must not restart the actor or repeat a call by itself: with restarts on, every death arrives as
# ActorUnavailableError without its cause (an OOM kill looks like a broken line), and repeated calls run out of order.
ONCE: Any = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}

RemoteUnitActor = ray.remote(**ONCE)(UnitActor)

CALLS_AT_ONCE = UNITS_PER_WORKER + 1
"""Of one actor: its units, and a greeting."""

__all__ = ["CALLS_AT_ONCE", "ONCE", "Greeting", "RemoteUnitActor", "UnitActor", "WorkerActor"]
