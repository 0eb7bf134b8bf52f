"""A night's summary as one HTML page without any outside resource."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_merge.report.markup import NOTHING, Markup, seconds, table, tag
from ray_merge.show_progress import human_bytes

STYLE = Markup(
    ":root{color-scheme:light dark;--edge:#8884}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1rem}"
    "table{border-collapse:collapse;width:100%}caption{text-align:left;font-weight:600;padding:.5rem 0}"
    "th,td{text-align:left;vertical-align:top;padding:.3rem .6rem;border-bottom:1px solid var(--edge)}"
    "td,th{overflow-wrap:anywhere}.scroll{overflow-x:auto}.bad{font-weight:700}"
)

BAD = ("failed", "refused", "not reached")


def page(document: Mapping[str, Any]) -> str:
    """The page of one summary (`Summary.document`)."""
    title = f"Nightly merges of {document['date']}, attempt {document['attempt']}"
    cost = document["cost"]
    facts = [
        ("started", document["started"]),
        ("took", seconds(document["seconds"])),
        ("cost", f"{seconds(cost['unit_seconds'])} of workers in {cost['units']} unit(s)"),
        ("written", human_bytes(cost["written_bytes"])),
        ("read of base models", human_bytes(cost["read_bytes"])),
        ("recipes", document["recipes"]),
    ]
    if document["stopped"]:
        facts.insert(0, ("stopped early by", document["stopped"]))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", STYLE),
    )
    body = tag(
        "body",
        tag("h1", title),
        tag("p", _verdict(document), class_=None if document["complete"] else "bad"),
        table("What it took", ("figure", "value"), facts),
        tag("h2", "Recipes"),
        table("Every recipe", ("recipe", "state", "took", "cost", "written", "why"), map(_recipe, document["results"])),
        tag("h2", "Merges"),
        table("Every merge", ("merge", "state", "id", "where"), _merges(document)),
    )  # fmt: skip
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _verdict(document: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{number} {state}" for state, number in sorted(document["counts"]["merges"].items()))
    recipes = ", ".join(
        f"{number} {state}" for state, number in sorted(document["counts"]["recipes"].items())
    )
    word = "Complete" if document["complete"] else "Not complete"
    return f"{word}. Recipes: {recipes}. Merges: {counts or 'none known'}."


def _recipe(row: Mapping[str, Any]) -> list[object]:
    ran = row["seconds"] > 0
    return [
        row["recipe"],
        _state(row["state"]),
        seconds(row["seconds"]) if ran else NOTHING,
        seconds(row["unit_seconds"]) if ran else NOTHING,
        human_bytes(row["written_bytes"]) if ran else NOTHING,
        row["why"],
    ]


def _state(state: str) -> Markup:
    return tag("span", state, class_="bad" if state in BAD else None)


def _merges(document: Mapping[str, Any]) -> list[list[object]]:
    return [
        [merge["name"], _state(merge["state"]), merge["id"][:12], merge["url"]]
        for row in document["results"]
        for merge in row["merges"]
    ]
