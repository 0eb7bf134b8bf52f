from __future__ import annotations

import itertools
import random

import pytest

from ray_merge.storage.ranges import Piece, Request, assemble, cut, plan_requests


def read(data: bytes, ranges: list[tuple[int, int]], rng: random.Random, **limits: int) -> list[bytes]:
    requests = list(plan_requests(ranges, **limits))
    rng.shuffle(requests)
    pieces = [piece for request in requests for piece in cut(request, data[request.start : request.end])]
    rng.shuffle(pieces)
    return assemble(len(ranges), pieces)


def random_ranges(rng: random.Random, n_bytes: int) -> list[tuple[int, int]]:
    ranges = []
    for _ in range(rng.randrange(0, 40)):
        start = rng.randrange(0, n_bytes)
        ranges.append((start, min(n_bytes, start + rng.choice([0, 1, 3, 17, 200, n_bytes]))))
    return ranges + rng.sample(ranges, len(ranges) // 4)


@pytest.mark.parametrize("seed", range(60))
def test_every_range_gets_exactly_its_bytes_back(seed):
    rng = random.Random(seed)
    data = rng.randbytes(rng.randrange(1, 1500))
    ranges = random_ranges(rng, len(data))
    gap, longest = rng.choice([0, 1, 10, 5000]), rng.choice([1, 7, 64, 5000])
    limits = {
        "gap_bytes": gap,
        "shared_bytes": rng.choice([0, longest // 2, longest]),
        "request_bytes": longest,
    }
    assert read(data, ranges, rng, **limits) == [data[start:end] for start, end in ranges]


@pytest.mark.parametrize("seed", range(60))
def test_requests_keep_to_length_and_gap_and_no_two_neighbours_could_share_one(seed):
    rng = random.Random(seed)
    ranges = random_ranges(rng, 1500)
    gap, longest = rng.choice([0, 1, 10, 5000]), rng.choice([1, 7, 64, 5000])
    shared = rng.choice([0, longest // 2, longest])
    requests = plan_requests(ranges, gap_bytes=gap, shared_bytes=shared, request_bytes=longest)
    for request in requests:
        assert 0 < request.n_bytes <= (longest if len(request.pieces) == 1 else shared)
        reached = request.start
        for piece in request.pieces:
            assert request.start <= piece.start < piece.end <= request.end
            assert piece.start - reached <= gap
            reached = max(reached, piece.end)
        assert reached == request.end
    for request, following in itertools.pairwise(requests):
        first = following.pieces[0]
        far = first.start - request.end > gap
        assert far or max(request.end, first.end) - request.start > shared


def test_a_gap_of_exactly_the_limit_is_read_and_one_byte_more_is_not():
    assert len(plan_requests([(0, 10), (15, 20)], gap_bytes=5, shared_bytes=100, request_bytes=100)) == 1
    assert len(plan_requests([(0, 10), (16, 20)], gap_bytes=5, shared_bytes=100, request_bytes=100)) == 2


def test_a_long_range_is_cut_and_comes_back_whole():
    requests = plan_requests([(5, 25)], gap_bytes=0, shared_bytes=8, request_bytes=8)
    assert [(request.start, request.end) for request in requests] == [(5, 13), (13, 21), (21, 25)]


def test_empty_ranges_cost_no_request():
    assert plan_requests([(7, 7), (0, 0)], gap_bytes=0, shared_bytes=8, request_bytes=8) == ()
    assert assemble(2, []) == [b"", b""]


def test_a_range_read_alone_is_not_copied():
    data = b"x" * 1000
    (request,) = plan_requests([(0, 1000)], gap_bytes=0, shared_bytes=1000, request_bytes=1000)
    assert assemble(1, cut(request, data))[0] is data


@pytest.mark.parametrize("limits", [(-1, 0, 8), (0, 9, 8), (0, 0, 0), (0, -1, 8)])
def test_impossible_limits_are_refused(limits):
    gap, shared, longest = limits
    with pytest.raises(ValueError, match=f"request_bytes={longest} must be"):
        plan_requests([(0, 1)], gap_bytes=gap, shared_bytes=shared, request_bytes=longest)


def test_long_neighbours_share_no_request():
    limits = {"gap_bytes": 5, "shared_bytes": 20, "request_bytes": 100}
    assert len(plan_requests([(0, 10), (10, 20)], **limits)) == 1
    assert len(plan_requests([(0, 10), (10, 21)], **limits)) == 2


@pytest.mark.parametrize("ranges", [[(-1, 3)], [(4, 3)]])
def test_an_impossible_range_is_refused(ranges):
    with pytest.raises(ValueError, match="no byte range"):
        plan_requests(ranges, gap_bytes=0, shared_bytes=8, request_bytes=8)


def test_an_answer_of_another_length_is_refused():
    with pytest.raises(ValueError, match="3 bytes for a request of 4"):
        cut(Request(0, 4, (Piece(0, 0, 0, 4),)), b"abc")
