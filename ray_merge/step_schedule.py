"""Which step may begin next, and how long what a step handed on is kept; pure bookkeeping for `pool_steps.py`.

Owns: the word Step, the order of steps, the bound on chains under way, and what must run again when a value is lost.
Never: runs a step or looks into a value. The local pool keeps the values themselves here, the Ray pool their refs.

A step begins when all values that it needs are there, never earlier. (Ray could chain calls whose arguments are not
made yet, but then one dead actor fails every call behind it, and a call that waits for an argument blocks its actor.)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Step:
    """One piece of work at one place.

    Attributes:
        id: unique among the steps of one run; it names the step in errors.
        unit: small and picklable; no tensor, no open file.
        place: the worker that does it (the stage), from 0.
        needs: ids of earlier steps whose handed-on values are its arguments, in this order.
        chain: steps that follow each other share it (the task); "" for a step on its own. So many chains are under
            way at once.
    """

    id: str
    unit: Any
    place: int
    needs: tuple[str, ...] = ()
    chain: str = ""


class _State(Enum):
    WAITING = "waiting"
    FLYING = "flying"
    DONE = "done"


class Schedule:
    """The steps of one run; a step is named by its index in the list, which is also its priority.

    Args:
        steps: each after the steps that it needs. List them chain by chain: earlier steps go first at each place.
        n_places: how many places there are.
        in_flight: at most so many chains are begun and not finished; None for no bound. It is overstepped only
            where nothing could go on otherwise, because a chain needs one that has not begun.

    Raises:
        ValueError: an id twice, a need that no earlier step makes, or a place that is not there.
    """

    def __init__(self, steps: Sequence[Step], n_places: int, in_flight: int | None) -> None:
        self.steps = steps
        self.left = len(steps)
        self._in_flight = in_flight
        self._needs = _needs(steps, n_places)
        self._users: list[list[int]] = [[] for _ in steps]
        for index, needs in enumerate(self._needs):
            for need in dict.fromkeys(needs):
                self._users[need].append(index)
        self._users_left = [len(users) for users in self._users]
        self._state = [_State.WAITING] * len(steps)
        self._seen = [False] * len(steps)
        self._values: dict[int, Any] = {}
        self._ready: list[list[int]] = [[] for _ in range(n_places)]
        self._n_flying = 0
        self._chains = [step.chain or f"\0{index}" for index, step in enumerate(steps)]
        self._chain_left = dict.fromkeys(self._chains, 0)
        for chain in self._chains:
            self._chain_left[chain] += 1
        self._open: dict[str, None] = {}
        for index in range(len(steps)):
            self._if_ready(index)

    def peek(self, place: int) -> int | None:
        """The step that may begin at a place now, or None."""
        ready = self._ready[place]
        for index in ready:
            if self._chains[index] in self._open:
                return index
        if not ready or not (
            self._in_flight is None or len(self._open) < self._in_flight or self._is_stuck()
        ):
            return None
        return ready[0]

    def begin(self, index: int) -> list[Any]:
        """Take a step that `peek` named; returns what it is given: the values that it needs, in their order."""
        ready = self._ready[self.steps[index].place]
        del ready[bisect_left(ready, index)]
        self._state[index] = _State.FLYING
        self._n_flying += 1
        self._open[self._chains[index]] = None
        return [self._values[need] for need in self._needs[index]]

    def finish(self, index: int, handed: Any) -> bool:
        """A step is done: keep what it handed on while a step needs it, and drop what it was the last to need.

        Returns:
            Whether its result is new; False for a step that ran again because its value was lost.
        """
        self._state[index] = _State.DONE
        self._n_flying -= 1
        chain = self._chains[index]
        self._chain_left[chain] -= 1
        if not self._chain_left[chain]:
            del self._open[chain]
        for need in dict.fromkeys(self._needs[index]):
            self._users_left[need] -= 1
            if not self._users_left[need]:
                self._values.pop(need, None)
        if self._users_left[index]:
            self._values[index] = handed
            for user in self._users[index]:
                self._if_ready(user)
        is_new = not self._seen[index]
        self._seen[index] = True
        self.left -= is_new
        return is_new

    def give_back(self, index: int) -> None:
        """A step under way did not come to its end: it waits again."""
        self._state[index] = _State.WAITING
        self._n_flying -= 1
        for need in self._needs[index]:
            self._remake(need)
        self._if_ready(index)

    def lost(self, index: int, handed: Any) -> bool:
        """What a step handed on is gone: it runs again where a step still needs it, and so do those before it.

        Args:
            index: the step that made it.
            handed: what is gone; nothing happens where that was made again already.

        Returns:
            Whether it was still the current value.
        """
        if index not in self._values or self._values[index] is not handed:
            return False
        del self._values[index]
        for user in self._users[index]:
            if self._state[user] is _State.WAITING:
                self._unready(user)
        self._remake(index)
        return True

    def expects(self, place: int) -> bool:
        """Whether a chain that has begun goes on there, now or once a step that is under way is done."""
        return any(
            step.place == place
            and self._state[index] is _State.WAITING
            and self._chains[index] in self._open
            and all(need in self._values or self._state[need] is _State.FLYING for need in self._needs[index])
            for index, step in enumerate(self.steps)
        )

    def needs(self, index: int) -> tuple[int, ...]:
        """The steps that a step needs, in the order of what it is given."""
        return self._needs[index]

    def _remake(self, index: int) -> None:
        """Let a finished step wait again if its value is missing, and those whose values it misses in turn."""
        missing = [index]
        while missing:
            index = missing.pop()
            if index in self._values or self._state[index] is not _State.DONE or not self._users_left[index]:
                continue
            self._state[index] = _State.WAITING
            self._chain_left[self._chains[index]] += 1
            self._open[self._chains[index]] = None
            for need in dict.fromkeys(self._needs[index]):
                self._users_left[need] += 1
                missing.append(need)
            self._if_ready(index)

    def _if_ready(self, index: int) -> None:
        if self._state[index] is _State.WAITING and all(need in self._values for need in self._needs[index]):
            insort(self._ready[self.steps[index].place], index)

    def _unready(self, index: int) -> None:
        ready = self._ready[self.steps[index].place]
        at = bisect_left(ready, index)
        if at < len(ready) and ready[at] == index:
            del ready[at]

    def _is_stuck(self) -> bool:
        return not self._n_flying and not any(
            self._chains[index] in self._open for ready in self._ready for index in ready
        )


def _needs(steps: Sequence[Step], n_places: int) -> list[tuple[int, ...]]:
    """The indices of what each step needs.

    Raises:
        ValueError: see `Schedule`.
    """
    at: dict[str, int] = {}
    found: list[tuple[int, ...]] = []
    for index, step in enumerate(steps):
        if step.id in at:
            raise ValueError(f"step id {step.id!r} stands at positions {at[step.id]} and {index} of one run")
        if not 0 <= step.place < n_places:
            raise ValueError(f"step {step.id!r} is for place {step.place}, but the pool has {n_places}")
        late = [need for need in step.needs if need not in at]
        if late:
            raise ValueError(f"step {step.id!r} needs {late[0]!r}, which no step before it makes")
        found.append(tuple(at[need] for need in step.needs))
        at[step.id] = index
    return found


__all__ = ["Schedule", "Step"]
