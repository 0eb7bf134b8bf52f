"""Arguments of the Python functions that typer checks where they come from the command line."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ray_merge.errors import Refusal, shown


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number above 0; None stands for the default.

    Raises:
        Refusal: another value.
    """
    if value is None or (type(value) is int and value >= 1):
        return
    raise Refusal(
        f"{name} is {shown(value)}, expected a whole number from 1 on; leave it out for the default"
    )


def check_list(name: str, values: Any) -> None:
    """Refuse what is no list of names; a text would be taken letter by letter.

    Raises:
        Refusal: another value.
    """
    listed = isinstance(values, Collection) and not isinstance(values, str | bytes)
    if listed and all(isinstance(one, str) for one in values):
        return
    advice = f"[{values!r}]" if isinstance(values, str) else '["a", "b"]'
    raise Refusal(f"{name} is {shown(values)}, expected a list of names; write {name}={advice}")
