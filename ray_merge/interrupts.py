"""SIGTERM and SIGINT as an exception that is told from all others: a scheduler stops a job, a person presses Ctrl-C.

with Interrupts() as stop:
    ...                        # RunFailed where the signal came
    stop.obey()                # and here, where that one was lost on its way
stop.name                      # "SIGTERM"; empty when nobody asked
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from ray_merge.errors import RunFailed

SIGNALS = (signal.SIGTERM, signal.SIGINT)

WAIT_SECONDS = 0.05
"""How long until it is asked again whether an import is over."""

Handler = Callable[[int, FrameType | None], None]


def after_imports(stop: Handler) -> Handler:
    """A handler that waits while the main thread imports a module, and then does what `stop` does.

    An exception in the middle of an import is taken for a broken module and dropped (transformers does so), or leaves
    half an extension module behind, on which Python crashes later (torch). Uses SIGALRM and its timer.
    Imports in whose course this is called do not count: a script may run from one.

    Args:
        stop: may raise.
    """
    around = _imports(sys._getframe())

    def handle(number: int, frame: FrameType | None) -> None:
        if _imports(frame) > around:
            signal.signal(signal.SIGALRM, lambda _, later: handle(number, later))
            signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
        else:
            stop(number, frame)

    return handle


def _imports(frame: FrameType | None) -> int:
    """How many frames of Python's import system lie on the stack."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count


class Interrupts:
    """Takes both signals over for the time of a `with`; the second one is ignored, since the first is being obeyed."""

    def __init__(self) -> None:
        self.name = ""
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            stop = after_imports(self._stop)
            self._before = [signal.signal(number, stop) for number in SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in zip(SIGNALS, self._before, strict=False):
            signal.signal(number, before)

    def obey(self) -> None:
        """Raise again what a signal has raised inside a callback whose caller (of asyncio, of logging) drops errors."""
        if self.name:
            raise RunFailed(f"stopped by {self.name}")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name = signal.Signals(number).name
            raise RunFailed(f"stopped by {self.name}")
