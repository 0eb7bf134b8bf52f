import threading

import pytest

from ray_merge.storage.store import open_store
from ray_merge.storage.stream import AHEAD, REQUEST_BYTES, Reader

APART = [("f", i, i + 1) for i in range(0, 200, 2)]


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
        self.asked = []
        self.lock = threading.Lock()

    def read(self, path, start, end):
        with self.lock:
            self.begun += 1
            self.asked.append((path, start, end))
        if path == "broken":
            raise OSError("gone")
        return b"x" * (end - start)


def test_no_more_than_a_few_ranges_are_read_ahead():
    store = Counting()
    with Reader(store) as reader:
        for taken, _ in enumerate(reader.stream(APART), start=1):
            assert store.begun <= taken + AHEAD
    assert store.begun == 100


def test_neighbours_share_a_request_and_come_as_they_were_asked_for(tmp_path):
    data = bytes(range(256))
    (tmp_path / "f").write_bytes(data)
    (tmp_path / "g").write_bytes(data[::-1])
    spans = [
        ("f", 0, 3),
        ("f", 3, 3),
        ("f", 3, 10),
        ("f", 12, 20),
        ("g", 20, 30),
        ("g", 30, 31),
        ("f", 31, 32),
    ]
    with Reader(open_store(str(tmp_path))) as reader:
        found = [bytes(one) for one in reader.stream(spans)]
    assert found == [(tmp_path / file).read_bytes()[start:end] for file, start, end in spans]
    store = Counting()
    with Reader(store) as reader:
        list(reader.stream(spans))
    assert sorted(store.asked) == [("f", 0, 10), ("f", 12, 20), ("f", 31, 32), ("g", 20, 31)]


def test_a_request_is_no_longer_than_it_may_be_but_for_a_range_that_is():
    half, whole = REQUEST_BYTES // 2, REQUEST_BYTES
    spans = [("f", at, at + half) for at in range(0, 3 * half, half)] + [
        ("f", 3 * half, 3 * half + 2 * whole)
    ]
    store = Counting()
    with Reader(store) as reader:
        assert [len(one) for one in reader.stream(spans)] == [half, half, half, 2 * whole]
    assert sorted(store.asked) == [
        ("f", 0, whole),
        ("f", whole, whole + half),
        ("f", 3 * half, 3 * half + 2 * whole),
    ]


def test_an_error_of_a_read_reaches_the_caller_where_it_would_have_got_the_bytes():
    with Reader(Counting()) as reader:
        stream = reader.stream([("f", 0, 1), ("broken", 0, 1), ("f", 1, 2)])
        assert next(stream) == b"x"
        with pytest.raises(OSError, match="gone"):
            next(stream)


def test_leaving_early_ends_the_threads():
    with Reader(Counting()) as reader:
        next(reader.stream(APART))
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(reader.stream([("f", 0, 1)]))
