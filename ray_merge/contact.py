"""Patience with a server that may be away for a while: a head that restarts, an API server that is upgraded.

Owns how long and how often something is asked again. What is asked must be safe to ask twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ray_merge.errors import ContactLost

Answer = TypeVar("Answer")

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 15.0


class NoContact(Exception):
    """No answer, or one that says that the server cannot answer now; ask again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """Asks until an answer comes.

    Args:
        server: what it is called in messages.
        seconds: how long nobody may answer.
        say: is told once per silence.
    """

    server: str
    seconds: float
    say: Callable[[str], None]

    def __call__(self, ask: Callable[[], Answer]) -> Answer:
        """The answer of `ask()`, which raises NoContact while there is none.

        Raises:
            ContactLost: there was none for `seconds`.
        """
        began, wait = time.monotonic(), FIRST_WAIT_SECONDS
        while True:
            try:
                return ask()
            except NoContact as error:
                silent = time.monotonic() - began
                if silent >= self.seconds:
                    raise ContactLost(self.server, silent, str(error)) from error
                if wait == FIRST_WAIT_SECONDS:
                    self.say(
                        f"{self.server} does not answer ({error}); asking again for {self.seconds:.0f} s"
                    )
            time.sleep(min(wait, max(0.0, began + self.seconds - time.monotonic())))
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
