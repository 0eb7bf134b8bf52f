"""What `calibrate` and `init` print."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray_merge.show_progress import human_bytes

if TYPE_CHECKING:
    from ray_merge.drive.moments import MomentsResult
    from ray_merge.drive.osrm import OsrmResult


def calibrated(result: MomentsResult, *, as_json: bool) -> None:
    """Print what a computation of moments did."""
    if as_json:
        print(json.dumps(moments_json(result), indent=1))
        return
    for check in result.checks:
        print(f"{check.task}: {check.rows} row(s), {check.tokens} token(s)")
    n_parts = len({part for _, part in result.ids})
    tasks = len({task for task, _ in result.ids})
    print(f"{tasks} task(s) x {n_parts} part(s) of the base in {result.index.store}")
    if result.index.unwatched:
        site, why = next(iter(result.index.unwatched.items()))
        print(
            f"{len(result.index.unwatched)} site(s) of adapters have no moments, the first is {site}: {why}"
        )
    if not result.units_run:
        print(f"nothing to do: all {result.reused} object(s) were there")
        return
    print(
        f"{result.computed} object(s) computed ({human_bytes(result.n_bytes)}) in {result.units_run} unit(s) over "
        f"{result.stages} stage(s), {result.reused} reused, {result.seconds:.1f} s"
    )


def moments_json(result: MomentsResult) -> dict[str, Any]:
    """The result as JSON-able data."""
    return {
        "store": result.index.store,
        "stages": result.stages,
        "computed": result.computed,
        "reused": result.reused,
        "units_run": result.units_run,
        "bytes": result.n_bytes,
        "seconds": round(result.seconds, 3),
        "data": [asdict(check) for check in result.checks],
        "objects": [
            {"task": task, "part": part, "id": one, "path": f"moments/{one}.safetensors"}
            for (task, part), one in result.ids.items()
        ],
        "unwatched": dict(result.index.unwatched),
    }


def initialised(result: OsrmResult, *, as_json: bool) -> None:
    """Print what an init did."""
    if as_json:
        print(json.dumps(osrm_json(result), indent=1))
        return
    for adapter in result.adapters:
        print(f"{adapter.task}: {adapter.url}{'' if adapter.done else ' (was there)'}")
        for remark in result.remarks[adapter.task]:
            print(f"    {remark}")
    if result.moments is None:
        print(f"nothing to do: all {len(result.adapters)} adapter(s) were there")
        return
    print(
        f"{sum(one.done for one in result.adapters)} adapter(s) written in {result.units_run} unit(s), moments: "
        f"{result.moments.computed} object(s) computed, {result.moments.reused} reused, {result.seconds:.1f} s"
    )


def osrm_json(result: OsrmResult) -> dict[str, Any]:
    """The result as JSON-able data."""
    return {
        "units_run": result.units_run,
        "seconds": round(result.seconds, 3),
        "moments": None if result.moments is None else moments_json(result.moments),
        "adapters": [
            {
                "task": one.task,
                "id": one.id,
                "url": one.url,
                "done": one.done,
                "remarks": list(result.remarks[one.task]),
                "sites": {site: asdict(found) for site, found in one.sites.items()},
            }
            for one in result.adapters
        ],
    }
