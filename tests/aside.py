"""Work in processes of its own that begins with the run, while the tests before it use the other core.

`@pytest.mark.aside(work=function)` has `function(aside)` called in a thread at the beginning of the run, one such
function after the other in the order of their tests, and the fixture `aside_result` of that test waits for what it
returns or raises. Such a function starts processes and waits for them; in this process it touches nothing that a test
could see (no global generator, no environment, no working directory). What runs aside must not be about wall time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil


class Aside:
    """One thread that does the pieces in turn.

    Attributes:
        environment: of this process when the run began; tests change theirs.
        path: sys.path of that moment, as a value of PYTHONPATH.
    """

    def __init__(self) -> None:
        self.environment: Mapping[str, str] = dict(os.environ)
        self.path = os.pathsep.join(entry for entry in sys.path if entry)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen[str]] = []
        self._ended = False

    def begin(self, work: Callable[[Aside], Any]) -> Future[Any]:
        """Put a piece of work at the end of the queue."""
        return self._thread.submit(work, self)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """A process that ends with the run at the latest, together with all below it."""
        with self._lock:
            if self._ended:
                raise RuntimeError("the run is over")
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            self._started.append(process)
        return process

    def output(self, command: Sequence[str], seconds: float, **environment: str) -> str:
        """What a process prints; it must end well."""
        process = self.start(command, {**self.environment, "PYTHONPATH": self.path, **environment})
        output, errors = process.communicate(timeout=seconds)
        assert process.returncode == 0, f"{output}{errors}"[-4000:]
        return output

    def close(self) -> None:
        """Drop what has not begun, and end what still runs."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._ended = True
            running = [process for process in self._started if process.poll() is None]
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    one.kill()
        self._thread.shutdown()
