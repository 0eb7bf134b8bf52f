"""`ray-merge inspect`: read every adapter, fit it to the base if there is one, and measure what is left.

An adapter that would be refused never hides another: its reason is kept and the rest goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ray_merge.errors import Refusal
from ray_merge.fit import check_bases, check_owners, fit_adapters
from ray_merge.fit.alone import stand_alone
from ray_merge.inspect.measure import measure
from ray_merge.inspect.report import Found, InspectedPair, Inspection, report
from ray_merge.recipe import Recipe
from ray_merge.spec import Adapter, Merge
from ray_merge.storage.adapter import CONFIG_FILE, Pickles, read_adapter
from ray_merge.storage.cache import cache_folder
from ray_merge.storage.checkpoint import Checkpoint, read_checkpoint, read_json
from ray_merge.storage.store import Stores, redact
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.pickles import unpickler

MAX_NAME = 60
"""Of the 64 characters that a recipe allows, so that a number fits behind it."""


def inspect(
    adapters: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
) -> Inspection:
    """Look at adapters; an adapter that a merge would refuse is reported, not raised.

    Args:
        adapters: folders, local or by URL.
        base: the base model to fit them to.
        cache_dir: node-local folder for adapters and digests.
        allow_pickle: read tensors, and nothing else, from adapter_model.bin.

    Raises:
        Refusal: no adapter is given, or the base cannot be read.
    """
    urls = [str(adapter) for adapter in adapters]
    if not urls:
        raise Refusal("give the folder of at least one adapter")
    cache = cache_folder(cache_dir) / "adapters"
    stores = Stores()
    known = None if base is None else read_checkpoint(stores.open(str(base)), dequantise=True)
    found = [Found(name, url) for name, url in zip(unique_names(urls), urls, strict=True)]
    for one in found:
        try:
            _read(one, stores, unpickler(cache) if allow_pickle else None)
            _fit(one, known, str(base))
            _check(one, cache, stores)
        except Refusal as refusal:
            one.refusal = _sentence(refusal)
    accepted = {one.name: one.adapter for one in found if one.adapter is not None and not one.refusal}
    measured = measure(accepted, {one.name: one.sites for one in found}, cache, stores)
    return Inspection(
        base=None if known is None else known.url,
        adapters=tuple(report(one, measured.sites.get(one.name, {})) for one in found),
        pairs=tuple(
            InspectedPair(first=pair[0], second=pair[1], total=total, sites=measured.pairs[pair])
            for pair, total in measured.totals.items()
        ),
        warnings=() if known is None else tuple(_together(known, str(base), found, accepted)),
    )


def unique_names(urls: Sequence[str]) -> list[str]:
    """A name for each folder that a recipe could use too: its last part, behind its parents' where that is not unique.

    `runs/a/checkpoint-90` and `runs/b/checkpoint-90` become `a-checkpoint-90` and `b-checkpoint-90`.
    """
    # A signed URL is refused when it is opened, and its signature must not be part of a name until then.
    parts = [
        [part for part in re.split(r"[/\\]", redact(url)) if part not in ("", ".", "..")] for url in urls
    ]
    names = [_usable(path[-1:]) for path in parts]
    for depth in (2, 3):
        names = [
            _usable(path[-depth:]) if names.count(name) > 1 else name
            for name, path in zip(names, parts, strict=True)
        ]
    taken: set[str] = set()
    for index, name in enumerate(names):
        number = 2
        while names[index] in taken:
            names[index] = f"{name}-{number}"
            number += 1
        taken.add(names[index])
    return names


def _usable(parts: Sequence[str]) -> str:
    text = re.sub(r"[^A-Za-z0-9._-]", "-", "-".join(parts)).lstrip(".")
    return re.sub(r"_{2,}", "_", text)[-MAX_NAME:].lstrip(".") or "adapter"


def _sentence(refusal: Refusal) -> str:
    text = " ".join(str(refusal).split())
    return text.replace(
        "allow_pickle: true behind its path", "allow_pickle: true behind its path (here --allow-pickle)"
    )


def _read(one: Found, stores: Stores, unpickle: Pickles) -> None:
    store = stores.open(one.url)
    one.url = store.url
    try:
        one.stored = read_adapter(one.name, store, unpickle=unpickle)
        one.config = one.stored.config
    except Refusal:
        with suppress(Refusal):  # what its config says may explain why
            one.config = read_json(store, CONFIG_FILE)
        raise


def _fit(one: Found, base: Checkpoint | None, url: str) -> None:
    assert one.stored is not None
    if base is None:
        alone = stand_alone(one.stored)
        one.adapter, one.sites, one.untold = alone.adapter, alone.sites, alone.untold
        return
    recipe = _recipe(url, [one])
    fitted = fit_adapters(recipe, base, {one.name: one.stored})
    one.warnings += check_bases(recipe, fitted.adapters)
    one.adapter, one.sites = fitted.adapters[one.name], fitted.sites


def _recipe(base: str, found: Sequence[Found]) -> Recipe:
    """The least recipe that names a base and adapters; nothing is merged."""
    return Recipe.model_validate(
        {
            "base_model": base,
            "output": "nowhere",
            "adapters": {one.name: one.url for one in found},
            "merges": [{"name": "inspect", "merge_method": "task_arithmetic"}],
        }
    )


def _check(one: Found, cache: Path, stores: Stores) -> None:
    """Look at every number, as a run does before it writes."""
    assert one.adapter is not None
    with AdapterFiles(cache, {one.name: one.adapter}, stores, device="cpu", dtype=torch.float64) as files:
        files.check(one.name)


def _together(
    base: Checkpoint, url: str, found: Sequence[Found], accepted: Mapping[str, Adapter]
) -> Iterator[str]:
    """Why one merge could not take all adapters that are fine by themselves, and what the base asks for."""
    if base.quantised:
        yield f"{base.url} is quantised: a recipe that merges into it needs base_numerics: dequantise"
    chosen = [one for one in found if one.name in accepted]
    if len(chosen) < 2:
        return
    sites = {name: site for one in chosen for name, site in one.sites.items()}
    merge = Merge(name="of all adapters", method="task_arithmetic", adapters=tuple(accepted), parameters={})
    try:
        check_bases(_recipe(url, chosen), accepted)
        check_owners(merge, accepted, sites)
    except Refusal as refusal:
        yield f"together: {_sentence(refusal)}"
