"""Another process, which keeps the machine's memory at a level, whatever all others take or give back meanwhile.

    python neighbour.py LEVEL MORE

Takes memory until LEVEL bytes of the machine are taken, prints a line, and takes and gives back to keep it so; with
MORE from the moment when a line comes on stdin. Ends with its stdin.
"""

from __future__ import annotations

import select
import sys

import psutil

PIECE_BYTES = 64 << 20


def main(level: int, more: int) -> None:
    held: list[bytes] = []
    said = False
    while True:
        memory = psutil.virtual_memory()
        taken = memory.total - memory.available
        is_there = level <= taken <= level + PIECE_BYTES
        if taken < level:
            held.append(b"x" * PIECE_BYTES)
        elif not is_there and held:
            held.pop()
        if not said and taken >= level:
            said = True
            print("there", flush=True)
        if select.select([sys.stdin], [], [], 0.01 if is_there else 0)[0]:
            if not sys.stdin.readline():
                return
            level += more


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
