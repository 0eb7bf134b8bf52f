"""The device and the threads that units compute on."""

from __future__ import annotations

import ctypes
import re
import sys
from threading import Lock

import torch

from ray_merge.errors import Refusal

M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -3, -1  # malloc.h
STREAMING = (64 * 2**20, 256 * 2**20)
"""Blocks below the first stay on the heap, which is trimmed above the second: for a stream of chunks, which glibc would
else map and unmap each. 378 MB instead of 397 and a third of the time in the kernel (2.2 GB base, 8 adapters, one
worker); giving blocks back at once takes 319 MB but doubles the run."""
STAGING = (4 * 2**20, 16 * 2**20)
"""For activations and weights in float32, which come in many sizes: on the heap they leave holes. 1220 MB instead of
1540 for one stage of a 3 GB base, and 5 s more in the kernel of 45 s."""


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


def tune_malloc(mmap_bytes: int, trim_bytes: int) -> None:
    """Tell glibc when to map a block of its own and when to give the heap back; one arena, whatever threads do.

    Elsewhere than on glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in (
            (M_ARENA_MAX, 1),
            (M_MMAP_THRESHOLD, mmap_bytes),
            (M_TRIM_THRESHOLD, trim_bytes),
        ):
            mallopt(option, value)
