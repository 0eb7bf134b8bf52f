"""Where workers may stand: the recipe's key `placement`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

_WORD = "[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
LabelName = Annotated[str, StringConstraints(pattern=f"^([a-z0-9.-]+/)?{_WORD}$")]
LabelValue = Annotated[str, StringConstraints(pattern=f"^{_WORD}$")]
"""A plain value. Ray's selectors `!x` and `in(x, y)` are not taken: a demand that none meets has to be counted."""


class Placement(BaseModel):
    """Placement of the workers over a cluster's nodes; the engine `local` has one node and ignores it.

    Args:
        mode: "spread" as Ray does it, or "one_per_node".
        labels: of the nodes that may hold workers, by name: all must match.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    mode: Literal["spread", "one_per_node"] = "spread"
    labels: dict[LabelName, LabelValue] = {}


SPREAD = Placement()
"""Anywhere."""


def long_form(value: Any) -> Any:
    """`placement: one_per_node` is the short form of `placement: {mode: one_per_node}`."""
    return {"mode": value} if isinstance(value, str) else value


__all__ = ["SPREAD", "Placement", "long_form"]
