"""The part of the page about one merge: what went in, what came out, what it did to every layer, how it learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_merge.drive.card import WARN_LOST_SHARE
from ray_merge.identity import flatten
from ray_merge.report.heat import heat_maps
from ray_merge.report.learning import learning
from ray_merge.report.limits import Limits
from ray_merge.report.markup import Markup, breakable, details, join, number, percent, table, tag
from ray_merge.report.read import MergeFacts
from ray_merge.report.sites import FIGURES, SiteFacts
from ray_merge.show_progress import human_bytes

MAX_SETTINGS = 80
"""Rows of the table of settings; 100 adapters have 100 weights."""

MAX_TEXT = 300
"""Characters of one value."""

OWN_TABLES = ("adapters", "base", "data", "method")
"""Inputs of an id that are not shown among the settings."""


def merge_part(merge: MergeFacts, key: str, limit: Limits, *, open_: bool) -> Markup:
    """The section of one merge; `key` is its unique id on the page."""
    method, adapters = str(merge.inputs.get("method")), _dicts(merge.inputs.get("adapters"))
    about = f"{method}, {len(adapters)} adapter(s), id {str(merge.manifest.get('id'))[:12]}"
    summary = join([tag("h3", breakable(merge.folder)), tag("small", about)])
    return details(
        summary,
        *[tag("p", problem, class_="warn") for problem in merge.problems],
        *_layers(merge.sites),
        *_learned(merge, limit, key),
        *_provenance(merge, adapters, limit),
        open_=open_,
        id_=key,
    )


def _layers(sites: SiteFacts | None) -> Iterator[Markup]:
    if sites is None:
        return
    yield tag("h4", "Layers")
    words = f"{sites.n_sites:,} site(s) of the {sites.export}. Whole update: norm {number(sites.norm)}."
    if sites.worst is not None:
        share, site = sites.worst
        words += f" Rounding took at most {percent(share)} of an update, at {site}."
        if share > WARN_LOST_SHARE:
            words += " out_dtype: float32 or export: adapter keeps it."
    if sites.unknown:
        words += f" {sites.unknown:,} value(s) are not finite and count as not known."
    yield tag("p", words, class_="note")
    known = {key for grid in sites.grids for key in grid.values}
    lacking = [figure.title.lower() for figure in FIGURES if figure.key not in known]
    if lacking:
        yield tag(
            "p", f"Not known: {' and '.join(lacking)} (diagnostics: true in the recipe).", class_="note"
        )
    yield tag("div", *heat_maps(sites.grids), class_="maps")


def _learned(merge: MergeFacts, limit: Limits, key: str) -> Iterator[Markup]:
    if merge.curves is not None:
        yield tag("h4", "Learning")
        yield learning(merge.curves, limit, key)


def _provenance(merge: MergeFacts, adapters: Sequence[Mapping[str, Any]], limit: Limits) -> Iterator[Markup]:
    yield tag("h4", "Provenance")
    base = merge.recipe.get("base_model", "not written down")
    facts = [
        ("merge id", tag("code", str(merge.manifest.get("id")))),
        ("base", tag("code", _cut(base))),
        ("method", tag("code", str(merge.inputs.get("method")))),
        ("published", f"{len(merge.files):,} files, {human_bytes(merge.n_bytes)}"),
        ("base numerics", str(merge.manifest.get("base_numerics"))),
        ("manifest format", str(merge.manifest.get("format"))),
    ]
    what = table("What was merged", ["what", "value"], facts, class_="pairs")
    yield tag("div", tag("div", what, _adapters(merge, adapters, limit)), _settings(merge), class_="maps")
    base_files = merge.inputs.get("base")
    versions = sorted(base_files.items()) if isinstance(base_files, dict) else []
    rows = [[name, tag("code", _cut(version))] for name, version in versions]
    yield _files("Files of the base", ["file", "version"], rows, limit)
    published = [
        [str(one.get("name")), human_bytes(one["bytes"]), tag("code", str(one.get("sha256")))]
        for one in merge.files
    ]
    yield _files("Files published", ["file", "size", "sha256"], published, limit)


def _settings(merge: MergeFacts) -> Markup:
    """Parameters, and whatever else decided the bytes."""
    given = {
        key: value for key, value in merge.inputs.items() if key not in OWN_TABLES and key != "parameters"
    }
    leaves = [*flatten(merge.inputs.get("parameters", {})), *flatten(given)]
    rows = [[key, tag("code", _cut(value))] for key, value in leaves[:MAX_SETTINGS]]
    more = f"; {len(leaves) - MAX_SETTINGS} more are in the manifest" if len(leaves) > MAX_SETTINGS else ""
    return table(f"Parameters and settings{more}", ["setting", "value"], rows, class_="pairs")


def _adapters(merge: MergeFacts, adapters: Sequence[Mapping[str, Any]], limit: Limits) -> Markup:
    sources = merge.recipe.get("adapters")
    used = merge.manifest.get("adapters")
    rows = []
    for one in adapters[: limit.adapters]:
        name = str(one.get("name"))
        counts = used.get(name) if isinstance(used, dict) else None
        files = one.get("files")
        versions = sorted(files.items()) if isinstance(files, dict) else []
        weights = [version for file, version in versions if not file.endswith(".json")]
        rows.append(
            [
                name,
                str(counts.get("factors", "")) if isinstance(counts, dict) else "",
                str(counts.get("heads", "")) if isinstance(counts, dict) else "",
                tag("code", _cut(_path(sources, name))),
                tag("code", _cut(" ".join(str(version) for version in weights))),
            ]
        )
    left_out = len(adapters) - len(rows)
    more = f"; {left_out} more are in the manifest" if left_out else ""
    head = ["adapter", "sites", "heads", "path", "weights"]
    return table(f"Adapters in the order of the merge{more}", head, rows, class_="pairs")


def _path(sources: Any, name: str) -> object:
    found = sources.get(name) if isinstance(sources, dict) else None
    return found.get("path", "") if isinstance(found, dict) else found or ""


def _files(title: str, head: Sequence[str], rows: Sequence[Sequence[object]], limit: Limits) -> Markup:
    shown = rows[: limit.files]
    more = f"; {len(rows) - len(shown)} more are in the manifest" if len(rows) > len(shown) else ""
    inner = table(f"{title}{more}", head, shown, class_="pairs")
    return details(f"{title} ({len(rows):,})", inner)


def _dicts(given: Any) -> list[Mapping[str, Any]]:
    return [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []


def _cut(value: object) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ... ({len(text):,} characters)"
