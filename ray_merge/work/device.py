"""The device and the threads that units compute on."""

from __future__ import annotations

import re
from threading import Lock

import torch

from ray_merge.errors import Refusal


def check_device(device: str) -> None:
    """Refuse a device that this process has not.

    Raises:
        Refusal: unknown, or not there.
    """
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", device)
    if found is None:
        raise Refusal(f"device {device!r} is unknown; use cpu, cuda or cuda:N")
    if device != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        there = f"{torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "no GPU"
        raise Refusal(f"device {device} was asked for, but this worker has {there}; use --device cpu")


class _OneThread:
    """One torch thread while units run, and what was set before afterwards: a worker may live in a user's process.

    Results must not depend on how many cores a node has, and W workers with C threads each on C cores were
    measured 9 times slower than one thread each on small matrices. torch's setting belongs to the process and to
    the thread that makes it, so each unit sets it and the last one that ends restores it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._running = 0
        self._before = 1

    def __enter__(self) -> None:
        with self._lock:
            if not self._running:
                self._before = torch.get_num_threads()
            self._running += 1
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                torch.set_num_threads(self._before)


ONE_THREAD = _OneThread()
