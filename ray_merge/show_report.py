"""What `report` prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ray_merge.show_progress import human_bytes

if TYPE_CHECKING:
    from ray_merge.report import Reported


def reported(result: Reported, *, as_json: bool) -> None:
    """Print where the report is, and what it could not read."""
    if as_json:
        print(
            json.dumps(
                {"url": result.url, "bytes": result.n_bytes, **result.document}, indent=1, allow_nan=False
            )
        )
        return
    document = result.document
    for name in document["incomplete"]:
        print(f"missing   {name or 'the output itself'} is not complete")
    for sentence in document["damaged"]:
        print(f"damaged   {sentence}")
    for merge in document["merges"]:
        for problem in merge["problems"]:
            print(f"damaged   {merge['name']}: {problem}")
    print(
        f"written   {result.url} ({human_bytes(result.n_bytes)}): {len(document['merges'])} complete merge(s)"
    )
