"""What a run counts, as metrics of Ray, and one log line for each unit.

Every node exports what its processes count to Prometheus, with `ray_` in front of the name: `merge_units_total` here
is `ray_merge_units_total` there (tried with Ray 2.60). Nothing is exported before `ray.init`.

Owns: the names, and what is counted where: seconds, bytes and memory in the worker, by node; units and losses in the
driver, which knows what was repeated and outlives its workers.
A gauge is told again and again: a node drops one that nobody has set for two reports (20 s), and units take minutes.
Never: fails a unit. Never a recipe or a unit as a tag: each value of a tag is a series that Prometheus keeps.
"""

from __future__ import annotations

import logging
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec

from ray.util.metrics import Counter, Gauge, Histogram

from ray_merge.spec import Receipt
from ray_merge.work.osrm_job import Made
from ray_merge.work.stage_job import Stored

BOUNDARIES = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
"""Seconds; quantiles are guessed between two of them."""

WHOLE = "whole"
"""The phase that every unit has: its call, without the wait for its turn."""

AGAIN_SECONDS = 1.0
"""Between two times that a gauge is set."""

logger = logging.getLogger("ray_merge.telemetry")
unit_logger = logging.getLogger("ray_merge.unit")

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Label:
    """What a worker calls itself in the dashboard, in metrics and in its log.

    Attributes:
        kind: of job: merge, moments, learn, osrm, evaluate.
        recipe: as it was named to the driver, or None.
        as_json: whether the log is JSON, with a line for each unit.
    """

    kind: str
    recipe: str | None = None
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Account:
    """What one unit took.

    Attributes:
        seconds: by phase.
        read: bytes of the base.
        written: bytes that were put into the store.
    """

    seconds: Mapping[str, float]
    read: int = 0
    written: int = 0


class _Metrics:
    """All of them; Ray exports only what has been given a value."""

    def __init__(self) -> None:
        self.units = Counter("merge_units_total", "Units by their end: done or failed.", ("kind", "state"))
        self.lost = Counter("merge_workers_lost_total", "Workers that died or went away.", ("kind",))
        self.bytes = Counter(
            "merge_bytes_total", "Bytes read of the base, and written.", ("kind", "direction")
        )
        self.seconds = Histogram(
            "merge_unit_seconds", "Seconds of one unit by phase.", BOUNDARIES, ("kind", "phase")
        )
        self.memory = Gauge("merge_peak_memory_bytes", "Most that a worker has held.", ("kind", "of"))
        self.progress_units = Gauge("merge_progress_units", "Units of what the driver is at.", ("of",))
        self.progress_bytes = Gauge("merge_progress_bytes", "Bytes written of what it is at.", ("of",))


@cache
def _metrics() -> _Metrics:
    return _Metrics()


class _Progress:
    """Of this process as a driver: units and bytes, each done and all; and when they were told (monotonic)."""

    last: tuple[tuple[int, int], tuple[int, int]] | None = None
    told: float = 0.0


def harmless(count: Callable[P, None]) -> Callable[P, None]:
    """A function that counts, and never raises: it says once in a process what went wrong."""
    told: list[str] = []

    @wraps(count)
    def counting(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            count(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  (Ray's metrics are a DeveloperAPI; whatever they do, the unit is done)
            if not told:
                told.append(str(error))
                logger.warning("metrics are incomplete: %s: %s", type(error).__name__, error)

    return counting


@harmless
def unit_ended(kind: str, state: str) -> None:
    """In the driver: a unit is `done` or `failed`."""
    _metrics().units.inc(1, {"kind": kind, "state": state})


@harmless
def worker_lost(kind: str) -> None:
    """In the driver: a worker died, or does not answer."""
    _metrics().lost.inc(1, {"kind": kind})


@harmless
def progressed(units: tuple[int, int], n_bytes: tuple[int, int]) -> None:
    """In the driver: done and all."""
    _Progress.last = units, n_bytes
    _tell_progress()


@harmless
def repeat_progress() -> None:
    """In the driver, while it waits: what was done last is still so."""
    if time.monotonic() - _Progress.told >= AGAIN_SECONDS:
        _tell_progress()


def forget_progress() -> None:
    """In the driver: what it was at has ended."""
    _Progress.last = None


def _tell_progress() -> None:
    if _Progress.last is None:
        return
    _Progress.told = time.monotonic()
    for of, some_units, some_bytes in zip(("done", "all"), *_Progress.last, strict=True):
        _metrics().progress_units.set(some_units, {"of": of})
        _metrics().progress_bytes.set(some_bytes, {"of": of})


@cache
def watch_memory(kind: str) -> None:
    """In the worker: its peak of memory is told from now on, also of a unit that it does not survive."""
    threading.Thread(target=_watch_memory, args=(kind,), name="peak-memory", daemon=True).start()


def _watch_memory(kind: str) -> None:
    while True:
        _tell_memory(kind)
        time.sleep(AGAIN_SECONDS)


@harmless
def _tell_memory(kind: str) -> None:
    for of, held in _peaks().items():
        _metrics().memory.set(held, {"kind": kind, "of": of})


@harmless
def unit_ran(label: Label, unit: str, result: Any, seconds: float) -> None:
    """In the worker: count one unit, and say so in the log.

    Args:
        label: of the worker.
        unit: its id.
        result: what the worker returned.
        seconds: that the call took.
    """
    account = account_of(result, seconds)
    text = f"{label.kind} unit {unit}: {seconds:.3f} s"
    unit_logger.info(text, extra={"recipe": label.recipe, "unit": unit, "seconds": account.seconds})
    kind = {"kind": label.kind}
    for phase, passed in account.seconds.items():
        _metrics().seconds.observe(passed, {**kind, "phase": phase})
    for direction, count in (("read", account.read), ("written", account.written)):
        if count:
            _metrics().bytes.inc(count, {**kind, "direction": direction})
    _tell_memory(label.kind)


def account_of(result: Any, seconds: float) -> Account:
    """What a unit's result says that it took; of results without receipts only the whole is known."""
    stored: Sequence[Any] = result if isinstance(result, list) else [result]
    receipts = [one for one in stored if isinstance(one, Receipt)]
    written = sum(
        one.n_bytes for one in stored if isinstance(one, Receipt | Stored | Made) and not one.adopted
    )
    whole = {WHOLE: round(seconds, 3)}
    if not receipts:
        return Account(whole, written=written)
    last = receipts[-1]  # the objects of one unit share its clock, which the last one read last
    return Account({**last.seconds, **whole}, last.unit_bytes.get("read", 0), written)


def _peaks() -> dict[str, int]:
    peaks = {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    cuda = sys.modules.get("torch.cuda")
    if cuda is not None and getattr(cuda, "is_initialized", bool)():  # another thread may be importing it
        peaks["gpu"] = cuda.max_memory_allocated()
    return peaks


__all__ = [
    "WHOLE",
    "Account",
    "Label",
    "account_of",
    "forget_progress",
    "progressed",
    "repeat_progress",
    "unit_ended",
    "unit_ran",
    "watch_memory",
    "worker_lost",
]
