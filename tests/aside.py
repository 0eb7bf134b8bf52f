"""Work that begins with the run, in a process of its own, while the tests before it use the other core.

`@pytest.mark.aside(work=function)` has `function()` called in that process as soon as the tests are collected, one such
function after the other in the order of their tests; the fixture `aside_result` of that test waits for what it
returned. The function is known by its module and name, and its result is pickled. It must not be about wall time.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import psutil


class Aside:
    """The process, and what it has answered. Spawned, so that nothing that a test does to this one reaches it."""

    def __init__(self, works: Sequence[Callable[[], Any]]) -> None:
        context = get_context("spawn")
        self._answers, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_do, args=(theirs, list(works)), name="tests aside")
        self._process.start()
        theirs.close()  # so that the end of the process shows as the end of the pipe
        self._known: list[tuple[Any, str]] = []

    def result(self, place: int) -> Any:
        """What the function at that place returned; waits for it.

        Raises:
            AssertionError: it raised, or the process ended before.
        """
        while len(self._known) <= place:
            try:
                self._known.append(self._answers.recv())
            except EOFError:
                raise AssertionError("the process that works aside has ended") from None
        value, failure = self._known[place]
        assert not failure, failure
        return value

    def close(self) -> None:
        """End the process with all below it, whatever they do."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for one in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self._process.join()


def _do(answers: Connection, works: Sequence[Callable[[], Any]]) -> None:
    for work in works:
        try:
            answers.send((work(), ""))
        except Exception:  # noqa: BLE001  (whatever it is, its test reports it)
            answers.send((None, traceback.format_exc()))
