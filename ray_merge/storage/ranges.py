"""Byte ranges of one object -> fewer, larger requests, and the bytes back to their ranges.

Pure: sees no store. A gap is cheaper to read than a request is to send, so near short ranges share a request; a
request is cut at `request_bytes`, so that one slow answer does not hold up the others and a retry is cheap. Ranges
above `shared_bytes` in all share none: cutting them out of the answer would copy them, for a round trip in hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start`..`end` of the object belong to range `index`, as its piece number `order`."""

    index: int
    order: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Request:
    """One read of bytes `start`..`end` of the object, and what its bytes are for."""

    start: int
    end: int
    pieces: tuple[Piece, ...]

    @property
    def n_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


def plan_requests(
    ranges: Sequence[tuple[int, int]], *, gap_bytes: int, shared_bytes: int, request_bytes: int
) -> tuple[Request, ...]:
    """Requests that cover `ranges`, ordered by start.

    Ranges may overlap, repeat, be empty and come in any order. No request is longer than `request_bytes`;
    neighbours share one when at most `gap_bytes` lie between them and it is at most `shared_bytes` long.

    Raises:
        ValueError: a range with a negative start or with its end before its start; request_bytes < 1.
    """
    if request_bytes < 1 or gap_bytes < 0 or not 0 <= shared_bytes <= request_bytes:
        raise ValueError(
            f"request_bytes={request_bytes} must be >= 1, gap_bytes={gap_bytes} >= 0 "
            f"and shared_bytes={shared_bytes} between 0 and request_bytes"
        )
    for start, end in ranges:
        if start < 0 or end < start:
            raise ValueError(f"({start}, {end}) is no byte range")
    requests: list[Request] = []
    pending: list[Piece] = []
    start = end = 0
    for piece in sorted(_pieces(ranges, request_bytes), key=lambda piece: (piece.start, piece.end)):
        near = piece.start - end <= gap_bytes and max(end, piece.end) - start <= shared_bytes
        if pending and not near:
            requests.append(Request(start, end, tuple(pending)))
            pending = []
        if not pending:
            start, end = piece.start, piece.end
        end = max(end, piece.end)
        pending.append(piece)
    if pending:
        requests.append(Request(start, end, tuple(pending)))
    return tuple(requests)


def _pieces(ranges: Sequence[tuple[int, int]], request_bytes: int) -> Iterable[Piece]:
    for index, (start, end) in enumerate(ranges):
        for order, cut in enumerate(range(start, end, request_bytes)):
            yield Piece(index, order, cut, min(cut + request_bytes, end))


def cut(request: Request, data: bytes) -> list[tuple[Piece, bytes]]:
    """The bytes of each piece out of the answer to `request`.

    Raises:
        ValueError: `data` does not have the request's length.
    """
    if len(data) != request.n_bytes:
        raise ValueError(f"{len(data)} bytes for a request of {request.n_bytes}")
    return [
        (piece, data[piece.start - request.start : piece.end - request.start]) for piece in request.pieces
    ]


def assemble(n_ranges: int, pieces: Iterable[tuple[Piece, bytes]]) -> list[bytes]:
    """The bytes of every range, in the ranges' own order, from pieces that came in any order."""
    found: list[list[tuple[int, bytes]]] = [[] for _ in range(n_ranges)]
    for piece, data in pieces:
        found[piece.index].append((piece.order, data))
    result: list[bytes] = []
    for parts in found:
        # A range read in one piece is handed on as it is: joining would copy it once more.
        result.append(parts[0][1] if len(parts) == 1 else b"".join(data for _, data in sorted(parts)))
        parts.clear()
    return result
