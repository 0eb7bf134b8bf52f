"""Workers for the tests of the pools: a unit says what to do, and files say what was done.

Ray's workers import this module, so it holds no test.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
