"""What `status` prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ray_merge.show import PIPE_WIDTH
from ray_merge.show_progress import human_bytes

if TYPE_CHECKING:
    from ray_merge.status import MergeStatus

NOTHING = "-"


def merges(found: Sequence[MergeStatus], *, as_json: bool) -> None:
    """Print how far each merge is."""
    complete = sum(one.complete for one in found)
    if as_json:
        print(
            json.dumps(
                {"complete": complete, "of": len(found), "merges": [asdict(one) for one in found]}, indent=1
            )
        )
        return
    table = Table(
        "merge", "state", "units", "bytes", "last receipt", "step", "missing", box=None, pad_edge=False
    )
    for one in found:
        table.add_row(
            one.name,
            "complete" if one.complete else "unfinished",
            f"{one.done}/{'?' if one.of is None else one.of}",
            human_bytes(one.n_bytes),
            NOTHING if one.age_seconds is None else f"{age(one.age_seconds)} ago",
            NOTHING if one.step is None else str(one.step),
            _missing(one.missing),
        )
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(highlight=False, markup=False, width=width).print(table)
    print(f"{complete} of {len(found)} merge(s) complete")


def age(seconds: float) -> str:
    """A span of time in its largest unit: 12 s, 3 min, 5 h, 2 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _missing(names: Sequence[str]) -> str:
    if not names:
        return NOTHING
    first = names[0].rpartition("/")[2]
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
