"""Names of adapters and merges, which become folders and keys."""

from __future__ import annotations

import re
from typing import Any

from ray_merge.errors import shown

NAME_PATTERN = r"[A-Za-z0-9._-]{1,64}"

BASE = "base"
SINGLE = "single"

EVALUATION_KEYS = ("means", "held_out", "hits", "pareto", "command", "missing", "cut_rows", "notes")
"""What stands beside models in evaluation.json."""

LOWER_IS_BETTER = ("perplexity",)
"""Metrics of evaluation.json of which less is more."""

TAKEN = {
    "ray_merge": "<output>/ray_merge/ holds evaluation.json",
    **dict.fromkeys((BASE, SINGLE, *EVALUATION_KEYS), "evaluation.json uses it for something else"),
}
"""Names that no merge may have, and why. Merges of a sweep begin with their entry's name, so none lies below one."""


def check_name(value: Any) -> str:
    """An adapter or merge name: it becomes a folder, so only `[A-Za-z0-9._-]{1,64}` without `__`.

    A leading dot is refused too: `.ray_merge` is where state lies, `.tmp-` marks unfinished files.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{shown(value)} is no name; write it in quotes")  # noqa: TRY004 (pydantic's)
    text = str(value)
    if not re.fullmatch(NAME_PATTERN, text) or "__" in text or text.startswith("."):
        raise ValueError(
            f"{shown(text)} is no usable name: use up to 64 of A-Z a-z 0-9 . _ - with no '__' and no dot in front"
        )
    return text


def check_merge_name(value: Any) -> str:
    """The name of an entry of `merges`; what a sweep makes of it, `<name>/lambda=0.2`, begins with it."""
    text = check_name(value)
    if text in TAKEN:
        raise ValueError(f"a merge cannot be named {text!r}: {TAKEN[text]}; choose another name")
    return text
