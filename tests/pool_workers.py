"""Workers for the tests of the pools: a unit says what to do, and files say what was done.

Ray's workers import this module, so it holds no test.
"""

import os
import signal
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Echo:
    value: Any

    def __call__(self) -> Any:
        return self.value


@dataclass(frozen=True)
class Raise:
    error: BaseException

    def __call__(self) -> None:
        raise self.error


@dataclass(frozen=True)
class Write:
    """Leave a file with the times of start and end, and return its name."""

    folder: str
    name: str
    seconds: float = 0.0

    def __call__(self) -> str:
        path = Path(self.folder, self.name)
        started = time.time()
        path.write_text("started")
        time.sleep(self.seconds)
        path.write_text(f"{started} {time.time()}")
        return self.name


@dataclass(frozen=True)
class Die:
    """SIGKILL the worker's process in the middle of the unit, the first `times` times."""

    marker: str
    times: int
    value: Any = None

    def __call__(self) -> Any:
        with Path(self.marker).open("a") as file:
            file.write("x")
        time.sleep(0.1)
        if len(Path(self.marker).read_text()) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.value


@dataclass(frozen=True)
class Hog:
    """Take memory until something stops it."""

    limit_bytes: int

    def __call__(self) -> int:
        kept = []
        for _ in range(self.limit_bytes >> 28):
            kept.append(b"\x01" * (1 << 28))
            time.sleep(0.05)
        return len(kept)


@dataclass(frozen=True)
class Look:
    """What a page says after so many seconds, all of which this unit takes."""

    url: str
    seconds: float

    def __call__(self) -> str:
        time.sleep(self.seconds)
        with urllib.request.urlopen(self.url, timeout=10) as page:
            return page.read().decode()


class StepWorker:
    """Does what the unit says."""

    def run(self, unit: Callable[[], Any], turn: Any) -> Any:
        return unit()


@dataclass(frozen=True)
class Factory:
    """Runs `before` and then makes a StepWorker."""

    before: Callable[[], Any]

    def __call__(self) -> StepWorker:
        self.before()
        return StepWorker()


@dataclass(frozen=True)
class ClaimVersion:
    """Make this worker's process say that it runs another Ray."""

    version: str

    def __call__(self) -> None:
        import ray

        ray.__version__ = self.version


@dataclass(frozen=True)
class SleepAfterFirst:
    """Return at once the first time, and sleep from the second time on."""

    marker: str
    seconds: float

    def __call__(self) -> None:
        if Path(self.marker).exists():
            time.sleep(self.seconds)
        Path(self.marker).touch()


class PlaceWorker:
    """The worker of one place: does what the unit says with the place and with what it is given."""

    def __init__(self, place: int) -> None:
        self.place = place

    def run(self, unit: Callable[[int, Any], tuple[Any, Any]], given: Any, turn: Any) -> tuple[Any, Any]:
        return unit(self.place, given)


@dataclass(frozen=True)
class PlaceFactory:
    """Runs `before`, at one place only, and then makes a PlaceWorker."""

    before: Callable[[], Any]
    at: int

    def __call__(self, place: int) -> PlaceWorker:
        if place == self.at:
            self.before()
        return PlaceWorker(place)


@dataclass(frozen=True)
class Mix:
    """Hand on an array made of all that is given, of the place and of a seed; the result is its sum and the pid.

    `before` runs first, so that a unit can also sleep, die or raise on its way.
    """

    seed: int
    before: Callable[[], Any] = Echo(None)
    length: int = 20_000

    def __call__(self, place: int, given: Any) -> tuple[tuple[float, int], Any]:
        self.before()
        row = np.arange(self.length, dtype=np.float64) % (self.seed + 2)
        for index, other in enumerate(given):
            row = row + (index + 2) * np.asarray(other)
        row = np.sin(row + place)
        return (float(row.sum()), os.getpid()), row


def rebuilt(owner: int, payload: bytes) -> "Sealed":
    if os.getpid() == owner:
        raise RuntimeError("what a step handed on was unpickled by the driver")
    return Sealed(owner, payload)


class Sealed:
    """Refuses to be unpickled in the process `owner`."""

    def __init__(self, owner: int, payload: bytes) -> None:
        self.owner, self.payload = owner, payload

    def __reduce__(self) -> Any:
        return rebuilt, (self.owner, self.payload)


@dataclass(frozen=True)
class Seal:
    """Hand on what the driver must not unpickle; the result is how much was given."""

    driver: int
    n_bytes: int

    def __call__(self, place: int, given: Any) -> tuple[int, Sealed]:
        return sum(len(other.payload) for other in given), Sealed(self.driver, bytes(self.n_bytes))


@dataclass(frozen=True)
class RaiseAtFirst:
    """Raise, the first `times` times."""

    marker: str
    error: BaseException
    times: int = 1

    def __call__(self) -> None:
        with Path(self.marker).open("a") as file:
            file.write("x")
        if len(Path(self.marker).read_text()) <= self.times:
            raise self.error
