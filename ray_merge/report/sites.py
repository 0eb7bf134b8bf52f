"""sites.parquet -> a few grids: rows are blocks, columns kinds of module, one value per figure.

Cells put sites together where there are several (experts, blocks beyond the limit); how is said by `Figure.combine`.
Columns that a file lacks, and values that are null or not finite, are unknown and not zero.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ray_merge.models.blocks import natural_key
from ray_merge.report.limits import Limits

OTHERS = "others"
OUTSIDE = "outside the blocks"

Combine = Literal["root", "most", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One thing that heat maps show.

    Args:
        key: column of sites.parquet.
        title: of its map.
        what: in a sentence.
        combine: how several sites become one cell: root of the sum of squares, largest, or mean.
        share: whether it is shown in percent.
        from_zero: whether colours begin at 0 and not at the smallest value.
    """

    key: str
    title: str
    what: str
    combine: Combine
    share: bool = False
    from_zero: bool = True


FIGURES = (
    Figure(
        key="update_norm", title="Update norm", combine="root",
        what="Frobenius norm of what the merge added to the base weight, before rounding",
    ),
    Figure(
        key="lost_share", title="Rounding loss", combine="most", share=True,
        what="share of the update that rounding to the stored dtype took",
    ),
    Figure(
        key="erank_all", title="Effective rank", combine="mean", from_zero=False,
        what="exp(entropy) of the singular values of all rank-1 terms of all adapters in one stack",
    ),
    Figure(
        key="interference", title="Interference", combine="mean",
        what="what the other adapters add on a task's tokens over the output of the base weight: mean over pairs of "
        "adapters, root mean square over tokens",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grid:
    """One list of blocks (`model.layers.`), or what lies outside of any.

    Args:
        title: the list's name.
        rows: labels.
        columns: labels.
        values: figure -> rows of values, None where nothing is known.
        most: sites of the fullest cell.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Mapping[str, tuple[tuple[float | None, ...], ...]]
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """What sites.parquet says of a merge.

    Args:
        n_sites: rows of the export that is shown.
        export: which one: the checkpoint where there is one.
        norm: of the whole update; None where no norm is known.
        worst: largest share that rounding took, and where.
        grids: by list of blocks.
        unknown: values that are there and not finite.
    """

    n_sites: int
    export: str
    norm: float | None
    worst: tuple[float, str] | None
    grids: tuple[Grid, ...]
    unknown: int


Place = tuple[str, int, str]
"""List of blocks, number of the block, kind of module."""


def read_sites(data: bytes, limit: Limits) -> SiteFacts:
    """The facts of a parquet file in memory.

    Raises:
        ValueError: it is no parquet file, or one without sites (pyarrow.ArrowInvalid is one).
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(data))
    there = set(file.schema_arrow.names)
    if "site" not in there:
        raise ValueError(f"it has the columns {', '.join(sorted(there))[:200]} and none of the name site")
    wanted = [name for name in ("site", "export", *(one.key for one in FIGURES)) if name in there]
    columns: dict[str, list[Any]] = file.read(columns=wanted).to_pydict()
    export = "checkpoint" if "checkpoint" in columns.get("export", ["checkpoint"]) else "adapter"
    kept = [index for index, one in enumerate(columns.get("export", [])) if one == export]
    if "export" in columns:
        columns = {name: [values[index] for index in kept] for name, values in columns.items()}
    return _facts(columns, export, limit)


def _facts(columns: Mapping[str, list[Any]], export: str, limit: Limits) -> SiteFacts:
    sites = [str(site) for site in columns["site"]]
    raw = {one.key: columns[one.key] for one in FIGURES if one.key in columns}
    values = {key: [_value(given) for given in some] for key, some in raw.items()}
    norms = [one for one in values.get("update_norm", ()) if one is not None]
    lost = [
        (one, site) for one, site in zip(values.get("lost_share", ()), sites, strict=False) if one is not None
    ]
    return SiteFacts(
        n_sites=len(sites),
        export=export,
        norm=math.hypot(*norms) if norms else None,
        worst=max(lost, key=lambda pair: pair[0], default=None),
        grids=tuple(_grids(sites, values, limit)),
        unknown=sum(
            given is not None and not isinstance(given, list) and known is None
            for key, some in raw.items()
            for given, known in zip(some, values[key], strict=True)
        ),
    )


def _value(given: Any) -> float | None:
    """A number as it is; of T * T numbers the mean of those off the diagonal. None where it is not finite."""
    if isinstance(given, list):
        size = math.isqrt(len(given))
        known = [
            one
            for index, one in enumerate(given)
            if index // max(1, size) != index % max(1, size) and one is not None and math.isfinite(one)
        ]
        return math.fsum(known) / len(known) if known else None
    return float(given) if isinstance(given, int | float) and math.isfinite(given) else None


@lru_cache(maxsize=65_536)
def place(site: str) -> Place:
    """Where a site stands: `model.layers.3.mlp.experts.7.up_proj` -> (`model.layers.`, 3, `mlp.experts.*.up_proj`).

    A site outside of any list has the block -1 and its whole name.
    """
    found = re.match(r"((?:.*?\.)?)([0-9]{1,6})\.(.+)", site)
    if found is None:
        return "", -1, site
    return found[1], int(found[2]), re.sub(r"(?<=[.\[])[0-9]+(?=[.\]]|$)", "*", found[3])


def _grids(
    sites: Sequence[str], values: Mapping[str, Sequence[float | None]], limit: Limits
) -> Iterator[Grid]:
    places = [place(site) for site in sites]
    for prefix in sorted({one[0] for one in places}, key=lambda name: (not name, natural_key(name))):
        own = [index for index, one in enumerate(places) if one[0] == prefix]
        if prefix or own:
            yield _grid(prefix, own, places, values, limit)


def _grid(
    prefix: str,
    own: Sequence[int],
    places: Sequence[Place],
    values: Mapping[str, Sequence[float | None]],
    limit: Limits,
) -> Grid:
    rows, row_of = _rows(sorted({places[index][1] for index in own}), limit.rows)
    columns, column_of = _columns([places[index][2] for index in own], limit.columns)
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in own:
        cells[row_of[places[index][1]], column_of[places[index][2]]].append(index)
    filled = {
        figure.key: tuple(
            tuple(
                _combined(figure.combine, [values[figure.key][index] for index in cells.get((row, column), ())])
                for column in range(len(columns))
            )
            for row in range(len(rows))
        )
        for figure in FIGURES
        if figure.key in values
    }  # fmt: skip
    known = {key: grid for key, grid in filled.items() if any(one is not None for row in grid for one in row)}
    most = max((len(some) for some in cells.values()), default=0)
    return Grid(prefix.rstrip(".") or OUTSIDE, rows, columns, known, most)


def _rows(blocks: Sequence[int], limit: int) -> tuple[tuple[str, ...], dict[int, int]]:
    """Labels of rows, and the row of each block; neighbours share a row where there are too many."""
    step = math.ceil(len(blocks) / limit)
    runs = [blocks[start : start + step] for start in range(0, len(blocks), step)]
    labels = tuple(
        OUTSIDE if run[-1] < 0 else f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs
    )
    return labels, {block: row for row, run in enumerate(runs) for block in run}


def _columns(modules: Sequence[str], limit: int) -> tuple[tuple[str, ...], dict[str, int]]:
    """Labels of columns, and the column of each kind of module; the rarest share one where there are too many."""
    count = Counter(modules)
    order = list(dict.fromkeys(modules))  # of the file: that of the layers
    if len(order) <= limit:
        return tuple(order), {name: column for column, name in enumerate(order)}
    kept = set(sorted(order, key=lambda name: -count[name])[: limit - 1])
    labels = [name for name in order if name in kept]
    at = {name: column for column, name in enumerate(labels)}
    others = f"{OTHERS} ({len(order) - len(kept)})"
    return (*labels, others), {name: at.get(name, len(labels)) for name in order}


def _combined(how: Combine, given: Sequence[float | None]) -> float | None:
    known = [one for one in given if one is not None]
    if not known:
        return None
    if how == "root":
        return math.hypot(*known)
    return max(known) if how == "most" else math.fsum(known) / len(known)
