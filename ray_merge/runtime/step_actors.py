"""The actor of one place: a stage of the base model, which gets what other stages handed on.

Owns: the actor of steps, declared once at import.
Never: makes a reference. What a step hands on is a return value, so the driver owns it and it outlives the actor.
"""

from __future__ import annotations

import time
from typing import Any

import ray

from ray_merge.runtime.actors import ONCE, WorkerActor
from ray_merge.runtime.telemetry import unit_ran


class StepActor(WorkerActor):
    """Runs the steps of one place; its constructor's `arguments` are the place."""

    def run(self, unit_id: str, unit: Any, *given: Any) -> tuple[Any, Any]:
        """Run one step; Ray has brought what it is given before the turn begins."""
        with self._turns.queue() as turn:
            began = time.perf_counter()
            result, handed = self._worker.run(unit, given, turn)
            unit_ran(self._label, unit_id, result, time.perf_counter() - began)
        return result, handed


RemoteStepActor = ray.remote(**ONCE)(StepActor)

__all__ = ["RemoteStepActor", "StepActor"]
