"""timeline.parquet: when which worker made which object of a merge, one row for each receipt.

It differs between runs, so the manifest does not name it and nothing is compared with it: whoever completes a merge
first leaves its table, and a later run lets it be. What a damaged receipt does not tell is null.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_merge.drive.unit_time import LATEST, is_size, unit_time
from ray_merge.plan import ADAPTER_OBJECT
from ray_merge.plan.emr import FOLDER as EMR_FOLDER
from ray_merge.spec import Receipt
from ray_merge.storage.commit import TIMELINE
from ray_merge.storage.store import Store

TIMELINE_SCHEMA = pa.schema(
    [
        ("object", pa.string()),
        ("kind", pa.string()),
        ("bytes", pa.int64()),
        ("adopted", pa.bool_()),
        ("unit", pa.string()),
        ("worker", pa.string()),
        ("attempts", pa.int32()),
        ("began", pa.timestamp("ms", "UTC")),
        ("ended", pa.timestamp("ms", "UTC")),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("unit_bytes_read", pa.int64()),
        ("unit_bytes_decoded", pa.int64()),
    ]
)
"""kind: shard, adapter or emr. adopted: the object was there already with the same bytes. worker: host:pid.
attempts: 1 plus the workers that were lost under the unit in the run that wrote the table; null for an object that had
a receipt before it, since nothing keeps that count.
began, ended: from the unit's begin to the receipt, by the worker's clock; null where nobody noted it.
seconds: by phase, together from began to ended.
unit_bytes_*: of the base, by the whole unit and for all of its merges, so the objects of one unit repeat them; null
where they were not counted."""


def put_timeline(
    store: Store, merge_id: str, receipts: Mapping[str, Receipt], attempts: Mapping[str, int]
) -> None:
    """Write the table, unless another driver or an earlier run has: times differ, and the first ones count.

    Args:
        store: the merge's folder.
        merge_id: stored with the object where the store can.
        receipts: of the merge, by object name.
        attempts: by object name, of what this run made.
    """
    store.put_if_absent(TIMELINE, timeline_table(receipts, attempts), {"merge-id": merge_id})


def timeline_table(receipts: Mapping[str, Receipt], attempts: Mapping[str, int]) -> bytes:
    """The table as a parquet file, rows by object name; the arguments are those of `put_timeline`."""
    rows = [_row(receipt, attempts.get(name)) for name, receipt in sorted(receipts.items())]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=TIMELINE_SCHEMA), buffer)
    return buffer.getvalue()


def _row(receipt: Receipt, attempts: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "object": receipt.name,
        "kind": _kind(receipt.name),
        "bytes": receipt.n_bytes,
        "adopted": receipt.adopted is True,
        "attempts": attempts,
    }
    told = unit_time(receipt)
    if told is None:
        return row
    return row | {
        "unit": _text(told.unit),
        "worker": _text(told.worker),
        "began": _milliseconds(told.began) if told.began else None,
        "ended": _milliseconds(told.end) if told.began and told.end < LATEST else None,
        "seconds": [(_text(phase), seconds) for phase, seconds in told.phases.items()],
        "unit_bytes_read": _count(receipt.unit_bytes.get("read")),
        "unit_bytes_decoded": _count(receipt.unit_bytes.get("decoded")),
    }


def _kind(name: str) -> str:
    if name == ADAPTER_OBJECT:
        return "adapter"
    return "emr" if name.startswith(f"{EMR_FOLDER}/") else "shard"


def _milliseconds(moment: float) -> int:
    return round(moment * 1000)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and is_size(value) else None


def _text(text: str) -> str:
    """JSON may hold half a surrogate pair, which parquet refuses."""
    return text.encode("utf-8", "replace").decode()
