"""The actor of one place: a stage of the base model, which gets what other stages handed on.

Owns: the actor of steps, declared once at import.
Never: makes a reference. What a step hands on is a return value, so the driver owns it and it outlives the actor.
"""

from __future__ import annotations

from typing import Any

import ray

from ray_merge.runtime.actors import ONCE, WorkerActor


class StepActor(WorkerActor):
    """Runs the steps of one place; its constructor's `arguments` are the place."""

    def run(self, unit: Any, *given: Any) -> tuple[Any, Any]:
        """Run one step; Ray has brought what it is given before the turn begins."""
        with self._turns.queue() as turn:
            result, handed = self._worker.run(unit, given, turn)
        return result, handed


RemoteStepActor = ray.remote(**ONCE)(StepActor)

__all__ = ["RemoteStepActor", "StepActor"]
