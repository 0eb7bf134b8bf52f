import threading
from itertools import pairwise

import pytest

from ray_merge.spec import TensorEntry
from ray_merge.storage.store import open_store
from ray_merge.storage.stream import AHEAD, CHUNK_BYTES, Reader, byte_chunks, row_chunks, rows_to_bytes


def matrix(rows, columns, dtype="BF16", start=1000):
    size = {"BF16": 2, "F32": 4}[dtype]
    return TensorEntry("w", dtype, (rows, columns), "f", start, start + rows * columns * size)


@pytest.mark.parametrize(
    ("rows", "columns"), [(4096, 4096), (1, 7), (100, 300_000), (33, 5_000_000), (5, 0), (0, 5)]
)
@pytest.mark.parametrize("grid", [1, 16, 256])
def test_row_chunks_cover_every_row_once_on_the_grid(rows, columns, grid):
    chunks = row_chunks(matrix(rows, columns), grid)
    assert [row for start, stop in chunks for row in range(start, stop)] == list(range(rows))
    assert all(start % grid == 0 for start, _ in chunks)
    row_bytes = 2 * columns
    assert all((stop - start) * row_bytes <= max(CHUNK_BYTES, grid * row_bytes) for start, stop in chunks)


def test_row_ranges_become_byte_ranges_without_holes():
    entry = matrix(10, 3, "F32", start=80)
    spans = rows_to_bytes(entry, [(0, 4), (4, 10)])
    assert spans == [(80, 80 + 48), (80 + 48, 80 + 120)]
    assert spans[-1][1] == entry.end


@pytest.mark.parametrize("n_bytes", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_byte_chunks_cover_the_tensor_in_whole_elements(n_bytes):
    entry = TensorEntry("w", "U8", (n_bytes,), "f", 24, 24 + n_bytes)
    chunks = byte_chunks(entry)
    assert sum(end - start for start, end in chunks) == n_bytes
    assert all(a[1] == b[0] for a, b in pairwise(chunks))
    assert all((start - entry.start) % 8 == 0 for start, _ in chunks)


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
