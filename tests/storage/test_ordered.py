import threading
import time

import pytest

from ray_merge.storage.ordered import in_order


def test_answers_come_in_the_order_of_what_was_asked():
    def read(item):
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(in_order(read, range(50))) == [item * item for item in range(50)]
    assert list(in_order(read, [])) == []
    assert list(in_order(read, [3])) == [9]


def test_the_first_error_in_that_order_is_raised_and_the_rest_is_not_begun():
    begun = []

    def read(item):
        begun.append(item)
        time.sleep(0.01)
        if item in (3, 5):
            raise ValueError(item)
        return item

    with pytest.raises(ValueError, match="3"):
        list(in_order(read, range(2000)))
    assert len(begun) < 2000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ray-merge-headers")]
