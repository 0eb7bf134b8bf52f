"""What lies below an output: complete merges, those that are not, scores. Reads; never writes, needs no torch.

A file that is missing or damaged takes its own part out of the report and is named there; the rest stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import yaml

from ray_merge.drive.learned import PHI
from ray_merge.drive.unit_time import UnitTime, is_size, unit_time
from ray_merge.errors import RayMergeError, Refusal, StoreDenied, StoreError, sentence
from ray_merge.models.blocks import natural_key
from ray_merge.report.curves import Curves, read_curves
from ray_merge.report.limits import Limits, limits
from ray_merge.report.sites import SiteFacts, read_sites
from ray_merge.report.times import units_of
from ray_merge.storage.commit import (
    EVALUATION,
    MANIFEST,
    RECEIPTS,
    RECIPE,
    SITES,
    read_manifest,
    read_receipt,
)
from ray_merge.storage.ordered import in_order
from ray_merge.storage.store import Store

Found = TypeVar("Found")

MAX_RECIPE_BYTES = 4_000_000
"""A larger resolved recipe is not read; a thousand adapters take 200 kB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeFacts:
    """One complete merge.

    Args:
        folder: inside the output; the name that the report uses.
        manifest: as it was published.
        recipe: resolved; empty where it cannot be read.
        sites: None where the table cannot be read.
        curves: of a learned merge.
        problems: what could not be read, in sentences.
    """

    folder: str
    manifest: Mapping[str, Any]
    recipe: Mapping[str, Any]
    sites: SiteFacts | None
    curves: Curves | None
    problems: tuple[str, ...]

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What its id is made of."""
        found: Mapping[str, Any] = self.manifest["inputs"]
        return found

    @property
    def n_bytes(self) -> int:
        """Of all files that the manifest names."""
        return sum(int(entry["bytes"]) for entry in self.files)

    @property
    def files(self) -> Sequence[Mapping[str, Any]]:
        """Name, bytes and sha256 of every published file."""
        given = self.manifest.get("files")
        entries = given if isinstance(given, list) else []
        return [one for one in entries if isinstance(one, dict) and is_size(one.get("bytes"))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Everything that a report is made of.

    Args:
        url: of the output.
        merges: complete ones, by folder.
        incomplete: folders of merges without a manifest.
        damaged: what makes a merge unreadable, in sentences.
        evaluations: folder -> evaluation.json; the folder is "" where it lies in the output itself.
        units: of all receipts, by beginning.
        limit: of what is shown.
    """

    url: str
    merges: tuple[MergeFacts, ...]
    incomplete: tuple[str, ...]
    damaged: tuple[str, ...]
    evaluations: Mapping[str, Mapping[str, Any]]
    units: tuple[UnitTime, ...]
    limit: Limits


def gather(root: Store) -> Gathered:
    """Read what a report needs.

    Raises:
        Refusal: there is neither a merge nor a score below `root`.
        StoreError: the store fails.
    """
    listed = [info.path for info in root.list()]
    complete, begun = _folders_with(MANIFEST, listed), _folders_with(RECIPE, listed)
    scored = _folders_with(EVALUATION, listed)
    if not complete and not begun and not scored:
        raise Refusal(
            f"{root.url} holds no merge (no {MANIFEST}, no {RECIPE}) and no scores; name a recipe's output"
        )
    limit = limits(len(complete))
    merges: list[MergeFacts] = []
    damaged: list[str] = []
    for found in in_order(partial(_merge, root, frozenset(listed), limit), complete):
        if isinstance(found, MergeFacts):
            merges.append(found)
        else:
            damaged.append(found)
    receipts = [path for path in listed if f"/{RECEIPTS}/" in f"/{path}" and path.endswith(".json")]
    times = in_order(partial(_time, root), receipts)
    evaluations = _evaluations(root, scored, damaged)
    return Gathered(
        url=root.url,
        merges=tuple(merges),
        incomplete=tuple(folder for folder in begun if folder not in set(complete)),
        damaged=tuple(damaged),
        evaluations=evaluations,
        units=tuple(units_of(one for one in times if one is not None)),
        limit=limit,
    )


def _folders_with(path: str, listed: Sequence[str]) -> list[str]:
    found = [name.removesuffix(path).rstrip("/") for name in listed if f"/{name}".endswith(f"/{path}")]
    return sorted(found, key=natural_key)


def _merge(root: Store, listed: frozenset[str], limit: Limits, folder: str) -> MergeFacts | str:
    """The facts of a merge, or why there are none."""
    store = root.sub(folder) if folder else root
    try:
        manifest = read_manifest(store)
    except Refusal as error:
        return str(error)
    if manifest is None:
        return f"{store.url}/{MANIFEST} disappeared while it was read"
    problems: list[str] = []

    def part(path: str, read: Callable[[], Found], *, expected: bool = True) -> Found | None:
        if (f"{folder}/{path}" if folder else path) not in listed:
            problems.extend([f"{path} is not there"] if expected else [])
            return None
        try:
            return read()
        except (StoreError, StoreDenied):
            raise  # of the store and not of this file
        except (RayMergeError, ValueError, TypeError, OSError, RecursionError, yaml.YAMLError) as error:
            problems.append(sentence(f"{path} cannot be read ({error})"))
            return None

    sites = part(SITES, lambda: read_sites(store.read(SITES), limit))
    curves = part(PHI, lambda: read_curves(store, PHI, limit.points), expected=False)
    recipe = part(RECIPE, lambda: _recipe(store))
    facts = MergeFacts(
        folder=folder or str(manifest.get("name") or "merge"),
        manifest=manifest,
        recipe=recipe or {},
        sites=sites,
        curves=curves,
        problems=tuple(problems),
    )
    named = manifest.get("files")
    without = len(named) - len(facts.files) if isinstance(named, list) else 0
    if without:
        return replace(facts, problems=(*problems, f"{MANIFEST} names {without} file(s) without a size"))
    return facts


def _recipe(store: Store) -> Mapping[str, Any]:
    info = store.info(RECIPE)
    if info is None or info.n_bytes > MAX_RECIPE_BYTES:
        raise ValueError(f"it has more than {MAX_RECIPE_BYTES} bytes")
    found = yaml.load(store.read(RECIPE), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(found, dict):
        raise ValueError("it is no mapping")  # noqa: TRY004  (the file is wrong, not the program)
    return found


def _time(root: Store, path: str) -> UnitTime | None:
    receipt = read_receipt(root, path)
    return None if receipt is None else unit_time(receipt)


def _evaluations(root: Store, folders: Sequence[str], damaged: list[str]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for folder in folders:
        path = f"{folder}/{EVALUATION}" if folder else EVALUATION
        try:
            document = json.loads(root.read(path))
        except (ValueError, RecursionError) as error:
            damaged.append(sentence(f"{root.url}/{path} is not valid JSON ({error}); run evaluate again"))
            continue
        if isinstance(document, dict) and isinstance(document.get("means"), dict):
            found[folder] = document
        else:
            damaged.append(f"{root.url}/{path} has no means; run evaluate again")
    return found
