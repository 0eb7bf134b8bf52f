"""What a recipe reads from and writes to, as it is written there."""

from __future__ import annotations

from collections.abc import Iterator

from ray_merge.recipe.model import Recipe


def named_urls(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each place that a run goes to, and what it is for, in words for a message."""
    yield "base_model", recipe.base_model
    yield "output", recipe.output
    if recipe.store is not None:
        yield "store", recipe.store
    for name, adapter in recipe.adapters.items():
        urls = {"path": adapter.path, "initial": adapter.initial}
        urls["data"] = None if adapter.data is None else adapter.data.path
        urls["head"] = None if adapter.head is None else adapter.head.path
        for what, url in urls.items():
            if url is not None:
                yield f"{what} of adapter {name}", url
