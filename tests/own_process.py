"""Work in a process of its own: it starts clusters, or measures what the tests' process would blur."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import psutil


def in_own_process(work: Callable[[], Any]) -> Any:
    """What `work()` returns in a new interpreter; it is known there by module and name, its result is pickled.

    Raises:
        AssertionError: it raised, or its process ended before.
    """
    context = get_context("spawn")
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_do, args=(theirs, work), name=f"tests {work.__name__}")
    process.start()
    theirs.close()  # so that the end of the process shows as the end of the pipe
    try:
        value, failure = answers.recv()
    except EOFError:
        raise AssertionError(f"the process of {work.__name__} has ended without an answer") from None
    finally:
        _end(process.pid)
        process.join()
    assert not failure, failure
    return value


def _end(pid: int | None) -> None:
    """The process and all below it, whatever they do."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _do(answers: Connection, work: Callable[[], Any]) -> None:
    try:
        answers.send((work(), ""))
    except Exception:  # noqa: BLE001  (whatever it is, its test reports it)
        answers.send((None, traceback.format_exc()))
