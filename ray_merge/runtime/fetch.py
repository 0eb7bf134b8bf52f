"""Every `ray.get` and `ray.wait` of this package, and what a failed call is taken for.

Owns: the classes of Ray's errors: DEAD and AWAY say that a worker is lost, all others that the unit failed.
Never: fetches what a step handed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import ray
from ray import ObjectRef
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from ray_merge.errors import RayMergeError
from ray_merge.pool import unit_failed
from ray_merge.runtime.actors import Greeting

DEAD = (ActorDiedError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
AWAY = (ActorUnavailableError, ObjectLostError, GetTimeoutError)
SETTLE_SECONDS = 5.0  # Ray reports the calls of one dead actor within about a second of each other


def wait_for(refs: list[ObjectRef[Any]], count: int, seconds: float) -> list[ObjectRef[Any]]:
    """Those that are there, at most `count`, after at most `seconds`; nothing is brought here."""
    with _own_signals():
        return ray.wait(refs, num_returns=count, timeout=seconds, fetch_local=False)[0]


def fetch(ref: ObjectRef[Any]) -> Any:
    """A small result.

    Raises:
        RayError: whatever the call ended with; see `raise_for`.
    """
    with _own_signals():
        return ray.get(ref, timeout=SETTLE_SECONDS)


def answer(ref: ObjectRef[Any]) -> Greeting | RayError:
    """What came of a greeting: an error of the kinds DEAD and AWAY is an answer too."""
    try:
        greeting: Greeting = fetch(ref)
    except (*DEAD, *AWAY) as error:
        return error
    return greeting


def is_loss(error: RayError) -> bool:
    """Whether the worker is lost; what a call raised is not, even where its class is made of both."""
    return isinstance(error, (*DEAD, *AWAY)) and not isinstance(error, RayTaskError)


def lost_argument(error: RayError) -> str | None:
    """The id of the argument that was gone as the call began (Ray's hexadecimal one), or None."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return str(getattr(cause, "object_ref_hex", "")) if isinstance(cause, ObjectLostError) else None


def raise_for(unit_id: str, attempts: int, error: RayError) -> NoReturn:
    """Raise what a unit's error is to the driver.

    Raises:
        RayMergeError: the unit raised it, or raised something else (`UnitFailed`).
    """
    if not isinstance(error, RayTaskError):
        raise unit_failed(unit_id, attempts, error) from error
    if isinstance(error.cause, RayMergeError):
        raise error.cause from error
    raise unit_failed(unit_id, attempts, error.cause) from error


def hush(ref: ObjectRef[Any]) -> None:
    """Look at an error that is known already; Ray prints those that nobody has looked at."""
    with suppress(RayError), _own_signals():
        ray.get(ref, timeout=0)


@contextmanager
def _own_signals() -> Iterator[None]:
    """What a signal handler raises leaves Ray's compiled calls wrapped in a SystemError; unwrap it."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


__all__ = ["AWAY", "DEAD", "answer", "fetch", "hush", "is_loss", "lost_argument", "raise_for", "wait_for"]
