"""The page: head, totals, merges side by side, scores, times, one part per merge.

Pure: the same facts give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from ray_merge.report.markup import Markup, breakable, number, percent, seconds, table, tag
from ray_merge.report.merge_part import merge_part
from ray_merge.report.read import Gathered, MergeFacts
from ray_merge.report.scores import is_merge, scores
from ray_merge.report.style import POLICY, SCRIPT, STYLE
from ray_merge.report.timeline import timeline
from ray_merge.show_progress import human_bytes

MARK = b"<!doctype html>\n<!-- ray-merge report -->\n"
"""How a report begins; nothing else is ever replaced by one."""

OPEN_MERGES = 3
"""So many parts are open from the beginning; of more merges none is."""

MAX_NAMES = 200
"""Of merges that are not complete."""


def page(found: Gathered) -> bytes:
    """The whole file, UTF-8."""
    sections = list(_sections(found))
    body = [
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag(
            "header",
            tag("h1", "Merges, layer by layer"),
            tag("p", tag("code", found.url)),
            _contents(sections),
        ),
        tag("main", *(section for _, _, section in sections), id="content"),
        tag("footer", f"ray-merge {_version()}. Reads the published files; the merges are as they were."),
        # Not escaped and not user data: the policy names its hash.
        Markup(f"<script>{SCRIPT}</script>"),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=Markup(POLICY)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"Merges of {found.url}"),
        Markup(f"<style>{STYLE}</style>"),
    ]
    return MARK + tag("html", tag("head", *head), tag("body", *body), lang="en").encode() + b"\n"


def _version() -> str:
    try:
        return version("ray-merge")
    except PackageNotFoundError:  # run from a checkout
        return "of a checkout"


def _contents(sections: list[tuple[str, str, Markup]]) -> Markup:
    links = (tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in sections)
    buttons = [
        tag("button", f"{word} all parts", type="button", id=f"{word.lower()}-all")
        for word in ("Open", "Close")
    ]
    return tag("nav", tag("ul", *links), *buttons, aria_label="Contents")


def _sections(found: Gathered) -> Iterator[tuple[str, str, Markup]]:
    """(id, title, section)."""
    yield _section("totals", "Totals", _totals(found))
    if found.incomplete or found.damaged:
        yield _section("incomplete", "Not complete", _incomplete(found))
    yield _section("merges", "Merges", _merges(found))
    for index, (folder, document) in enumerate(found.evaluations.items()):
        title = f"Scores of {folder}" if folder else "Scores"
        yield _section(f"scores{index}", title, scores(document, f"s{index}"))
    yield _section("time", "Time", timeline(found.units))
    if found.merges:
        parts = (
            merge_part(one, f"m{index}", found.limit, open_=len(found.merges) <= OPEN_MERGES)
            for index, one in enumerate(found.merges)
        )
        yield _section("details", "Merges in detail", tag("div", *parts))


def _section(key: str, title: str, content: Markup) -> tuple[str, str, Markup]:
    heading = tag("h2", title, id=f"{key}-title")
    return key, title, tag("section", heading, content, id=key, aria_labelledby=f"{key}-title")


def _totals(found: Gathered) -> Markup:
    working = math.fsum(one.seconds for one in found.units)
    facts = [
        ("complete merges", f"{len(found.merges):,}"),
        ("not complete", f"{len(found.incomplete) + len(found.damaged):,}"),
        ("published", human_bytes(sum(one.n_bytes for one in found.merges))),
        ("units", f"{len(found.units):,}"),
        ("workers", f"{len({one.worker for one in found.units}):,}"),
        ("base read by units", human_bytes(sum(one.read for one in found.units))),
        ("time of all workers", seconds(working)),
    ]
    return tag(
        "dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts), class_="facts"
    )


def _incomplete(found: Gathered) -> Markup:
    names = [tag("li", tag("code", name or "the output itself")) for name in found.incomplete[:MAX_NAMES]]
    more = len(found.incomplete) - len(names)
    begun = [
        tag(
            "p",
            f"{len(found.incomplete):,} merge(s) have no manifest and count for nothing; run the recipe again:",
        ),
        tag("ul", *names),
        tag("p", f"and {more:,} more") if more else None,
    ]
    return tag(
        "div",
        *(begun if found.incomplete else ()),
        *(tag("p", sentence) for sentence in found.damaged[:MAX_NAMES]),
        class_="warn",
    )


def _merges(found: Gathered) -> Markup:
    if not found.merges:
        return tag("p", "No merge is complete.")
    means = _means(found)
    rows = [_merge_row(one, f"m{index}", means.get(one.folder)) for index, one in enumerate(found.merges)]
    head = [
        "merge",
        "method",
        "adapters",
        "sites",
        "update norm",
        "rounding took",
        "published",
        "mean %",
        "id",
    ]
    caption = "Complete merges. Rounding: the largest share of an update at one site. Mean: percent of single adapters"
    return table(caption, head, rows, class_="numbers merges")


def _merge_row(one: MergeFacts, key: str, mean: float | None) -> list[object]:
    sites, adapters = one.sites, one.inputs.get("adapters")
    return [
        tag("a", breakable(one.folder), href=f"#{key}"),
        str(one.inputs.get("method")),
        str(len(adapters)) if isinstance(adapters, list) else "",
        f"{sites.n_sites:,}" if sites else "",
        number(sites.norm) if sites else number(None),
        percent(sites.worst[0] if sites and sites.worst else None),
        human_bytes(one.n_bytes),
        number(mean),
        tag("code", str(one.manifest.get("id"))[:12]),
    ]


def _means(found: Gathered) -> dict[str, float]:
    """Folder of a merge -> mean normalised score, where it was scored."""
    means = {}
    for folder, document in found.evaluations.items():
        for name, value in document["means"].items():
            if is_merge(name) and isinstance(value, int | float) and math.isfinite(value):
                means[f"{folder}/{name}" if folder else name] = float(value)
    return means
