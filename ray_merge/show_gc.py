"""What `gc` prints: a line for each leftover, and what they are together."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray_merge.errors import sentence
from ray_merge.show_progress import human_bytes

if TYPE_CHECKING:
    from ray_merge.gc import Collected, Leftover


def collected_json(found: Collected) -> dict[str, Any]:
    """The same as JSON-able data, with totals by kind of what may go or went."""
    totals: dict[str, dict[str, int]] = {}
    for one in found.leftovers:
        if not one.kept:
            total = totals.setdefault(one.kind, {"count": 0, "bytes": 0})
            total["count"], total["bytes"] = total["count"] + 1, total["bytes"] + one.n_bytes
    return {**asdict(found), "leftovers": [asdict(one) for one in found.leftovers], "totals": totals}


def collected(found: Collected) -> None:
    """Print it for a person."""
    for one in found.leftovers:
        print(_line(one))
    going = [one for one in found.leftovers if not one.kept]
    kept = len(found.leftovers) - len(going)
    aside = f"; {kept} more must stay" if kept else ""
    if not going:
        print(f"{found.url}: nothing to remove{aside}")
        return
    files = sum(one.files for one in going if one.kind != "upload")
    uploads = sum(one.kind == "upload" for one in going)
    what = f"{files} file(s) and {uploads} upload(s), {human_bytes(sum(one.n_bytes for one in going))}"
    print(
        f"{found.url}: "
        + (f"removed {what}{aside}" if found.removing else f"{what}{aside}; --remove removes them")
    )


def _line(one: Leftover) -> str:
    word = "removed" if one.removed else "kept" if one.kept else "found"
    unit = "part(s)" if one.kind == "upload" else "file(s)"
    why = f"; {one.kept}" if one.kept else ""
    return sentence(
        f"{word:8}{one.kind:10} {one.path or '.'}: {one.files} {unit}, {human_bytes(one.n_bytes)}, "
        f"{_age(one.age_seconds)} old{why}"
    )


def _age(seconds: float) -> str:
    for name, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{max(seconds, 0.0):.0f} s"
