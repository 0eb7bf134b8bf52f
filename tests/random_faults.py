"""Seeded faults of a store, by name: which requests each can meet, and what it is in reality.

What a correct client must do with each:

    error500, slow503   S3's InternalError and SlowDown. Nothing was done: try again.
    drop                the connection broke before the server saw the request: try again.
    cut_request         RST in the middle of a request's body, a PUT's too. A server keeps nothing of it: try again.
    lose                the server did it, but its answer never came. Try again, and then "it is there already" must
                        not be taken for somebody else's object: compare the bytes.
    shorten, reset      FIN or RST in the middle of an answer's body: try again, never use the half.
    drip                an answer's body comes a byte at a time, never late enough for a time-out: give up, try again.
    hang                no answer at all until the client goes: its time-out ends it, try again.
    wrong-range         206 with another range than was asked for, and its Content-Range says so: try again.
    halve               half an answer that looks whole (a broken cache or proxy). Whoever knows how many bytes
                        were asked for, or parses what came, notices: try again.
    delay               an answer that is 50 to 400 ms late: wait.
    stale               a listing from earlier (eventual consistency, a caching proxy; S3 itself has not had it since
                        2020). Objects may be there that it does not show: nothing may be made of that but more work.
    false409            ConditionalRequestConflict although nothing else is written: S3 says to try again.
    false412            PreconditionFailed although nothing is there. No store should say so; seen behind proxies that
                        repeat a request themselves. The object is not there: try again, or fail; never go on without.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import fsspec

from fault_proxy import (
    Call,
    CutRequest,
    Delay,
    Drip,
    Drop,
    Fault,
    Halve,
    Hang,
    Lose,
    Reply,
    Reset,
    Shift,
    Shorten,
    Stale,
)

READS = frozenset({"GET"})
WRITES = frozenset({"PUT", "POST"})
ALL = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE"})

KINDS: dict[str, tuple[frozenset[str], Callable[[random.Random], Fault]]] = {
    "error500": (ALL, lambda _: Reply(500, "InternalError")),
    "slow503": (ALL, lambda _: Reply(503, "SlowDown")),
    "drop": (ALL, lambda _: Drop()),
    "cut_request": (WRITES, lambda _: CutRequest()),
    "lose": (WRITES, lambda _: Lose()),
    "shorten": (READS, lambda _: Shorten()),
    "reset": (READS, lambda _: Reset()),
    "halve": (READS, lambda _: Halve()),
    "drip": (READS, lambda _: Drip(0.1)),
    "hang": (ALL, lambda _: Hang()),
    "wrong-range": (READS, lambda _: Shift()),
    "delay": (ALL, lambda rng: Delay(rng.uniform(0.05, 0.4))),
    "stale": (READS, lambda _: Stale()),
    "false409": (WRITES, lambda _: Reply(409, "ConditionalRequestConflict")),
    "false412": (WRITES, lambda _: Reply(412, "PreconditionFailed")),
}
"""Methods that a fault can meet, and what makes one."""

WAITING = ("drip", "hang")
"""Each costs the client's whole time limit: 60 s and more, where `be_impatient` has not set one."""


def be_impatient(seconds: float = 2.0) -> None:
    """Stores that this process opens from now on wait no longer than that for the next byte of an answer."""
    fsspec.config.conf["s3"] = {"config_kwargs": {"read_timeout": seconds}}


class RandomFaults:
    """A rule for `FaultProxy`: each request fails with probability `rate`, in one of the ways `kinds`.

    Whether a request fails depends on the seed, its method and target, and how often that came before, not on
    which thread was first: a seed means nearly the same faults each time.

    Args:
        kinds: names in KINDS.
        rate: 0..1, of the requests that a kind can meet (all of them when it is `delay` or an error).
        seed: any text.
    """

    def __init__(self, kinds: Sequence[str], rate: float, seed: str) -> None:
        self._kinds, self._rate, self._seed = tuple(kinds), rate, seed
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self.made: Counter[str] = Counter()

    def __call__(self, call: Call) -> Fault:
        with self._lock:
            self._seen[call.method, call.target] += 1
            turn = self._seen[call.method, call.target]
        rng = random.Random(f"{self._seed} {call.method} {call.target} {turn}")
        able = [kind for kind in self._kinds if call.method in KINDS[kind][0] and _fits(kind, call)]
        if not able or rng.random() >= self._rate:
            return None
        kind = rng.choice(able)
        with self._lock:
            self.made[kind] += 1
        return KINDS[kind][1](rng)


def _fits(kind: str, call: Call) -> bool:
    # A listing is read by s3fs, which has no limit for a whole answer: only ranges are.
    lists = "list-type=2" in call.target
    return lists if kind == "stale" else not lists if kind in ("drip", "wrong-range") else True
