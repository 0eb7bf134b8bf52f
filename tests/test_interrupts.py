import os
import signal

import pytest

from ray_merge.errors import RunFailed
from ray_merge.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_exception_and_is_named(number):
    before = signal.getsignal(number)
    with Interrupts() as asked, pytest.raises(RunFailed, match=f"stopped by {number.name}"):
        os.kill(os.getpid(), number)
    assert asked.name == number.name
    assert signal.getsignal(number) is before


def test_the_second_signal_does_not_interrupt_the_tidying_up():
    tidied = False
    with Interrupts() as asked:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except RunFailed:
            os.kill(os.getpid(), signal.SIGINT)
            tidied = True
    assert tidied
    assert asked.name == "SIGTERM"


def test_without_a_signal_nothing_is_named():
    with Interrupts() as asked:
        pass
    assert asked.name == ""
