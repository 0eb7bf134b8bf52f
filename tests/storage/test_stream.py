import threading

import pytest

from ray_merge.storage.store import open_store
from ray_merge.storage.stream import AHEAD, Reader


def test_ranges_of_several_files_arrive_in_the_order_of_the_requests(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(range(256)))
    requests = [("ab"[i % 2], i, i + 3) for i in range(50)]
    with Reader(open_store(str(tmp_path))) as reader:
        found = list(reader.stream(requests))
        assert found == [bytes(range(start, end)) for _, start, end in requests]
        assert reader.n_bytes == 150
        assert list(reader.stream([])) == []


class Counting:
    """A store that counts the reads that were begun."""

    def __init__(self):
        self.begun = 0
        self.lock = threading.Lock()

    def read(self, path, start, end):
        with self.lock:
            self.begun += 1
        if path == "broken":
            raise OSError("gone")
        return b"x" * (end - start)


def test_no_more_than_a_few_ranges_are_read_ahead():
    store = Counting()
    with Reader(store) as reader:
        for taken, _ in enumerate(reader.stream([("f", i, i + 1) for i in range(100)]), start=1):
            assert store.begun <= taken + AHEAD
    assert store.begun == 100


def test_an_error_of_a_read_reaches_the_caller_where_it_would_have_got_the_bytes():
    with Reader(Counting()) as reader:
        stream = reader.stream([("f", 0, 1), ("broken", 0, 1), ("f", 1, 2)])
        assert next(stream) == b"x"
        with pytest.raises(OSError, match="gone"):
            next(stream)


def test_leaving_early_ends_the_threads():
    with Reader(Counting()) as reader:
        next(reader.stream([("f", i, i + 1) for i in range(100)]))
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(reader.stream([("f", 0, 1)]))
