"""The vocabulary size in a config.json, where an adapter resized the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "vocab_size"


def with_vocabulary(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any] | None:
    """The config with `after` in place of every vocab_size of `before`; None where it holds none.

    Vision-language models have it in text_config or llm_config, and sometimes at the top as well.
    """
    changed, found = dict(config), False
    for key, value in config.items():
        if key == KEY and value == before and not isinstance(value, bool):
            changed[key], found = after, True
        elif isinstance(value, Mapping) and key.endswith("_config"):
            inner = with_vocabulary(value, before, after)
            if inner is not None:
                changed[key], found = inner, True
    return changed if found else None
