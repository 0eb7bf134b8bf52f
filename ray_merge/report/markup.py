"""HTML by construction: what is not markup already is escaped where it is put in, so names from recipes stay text.

    tag("td", name, class_="n")      <td class="n">..escaped..</td>

An f-string of markup is plain text again and would be escaped a second time: wrong to see, and never dangerous.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

VOID = frozenset({"meta", "br", "wbr"})
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
"""Control characters, and those that would turn the direction of the text behind them."""

NOTHING = "\N{EN DASH}"


class Markup(str):
    """HTML; every other string is text."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Text as HTML, good for elements and for attributes in double quotes."""
    if isinstance(text, Markup):
        return text
    plain = str(text).encode("utf-8", "replace").decode()  # JSON may bring lone surrogates
    return Markup(html.escape(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", plain), quote=True))


def join(parts: Iterable[object], between: object = "") -> Markup:
    """Texts and markup, one behind the other."""
    return Markup(escape(between).join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. `class_` is class and `aria_label` is aria-label; None leaves an attribute or a child out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(child for child in children if child is not None)}</{name}>")


def table(
    caption: str, head: Sequence[object], rows: Iterable[Sequence[object]], *, class_: str | None = None
) -> Markup:
    """A table that scrolls by itself where it is wider than the page; the first cell of a row is its heading."""
    top = tag("tr", *(tag("th", one, scope="col") for one in head))
    body = (
        tag("tr", tag("th", first, scope="row"), *(tag("td", one) for one in rest)) for first, *rest in rows
    )
    whole = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *body), class_=class_)
    return scrolling(whole, caption)


def scrolling(what: Markup, name: str) -> Markup:
    """A part that is scrolled sideways by itself; it takes the focus, so that arrow keys move it."""
    return tag("div", what, class_="scroll", tabindex=0, role="group", aria_label=name)


def details(summary: object, *content: object, open_: bool = False, id_: str | None = None) -> Markup:
    """A part that opens on demand."""
    inner = tag("div", *content, class_="inside", id_=id_)
    return tag("details", tag("summary", summary), inner, open_="" if open_ else None)


def breakable(name: object) -> Markup:
    """A long name that may break behind its slashes, commas, colons and dots, but not inside of numbers."""
    parts = re.split(r"(?<=[/,:])(?=[^/,:])|(?<=\.)(?=[A-Za-z*])", str(name))
    return join(parts, tag("wbr"))


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: 3 significant digits, a dash where it is not known or not a number."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "-\N{INFINITY}"
    if not value:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def percent(share: float | None) -> str:
    """A share as percent, with the same digits."""
    return number(share) if share is None or not math.isfinite(share) else f"{number(100 * share)}%"


def seconds(value: float) -> str:
    """A span of time: 0.42 s, 75 s, 12 min, 3.4 h."""
    if value < 120:
        return f"{number(value)} s"
    return f"{number(value / 60)} min" if value < 7200 else f"{number(value / 3600)} h"
