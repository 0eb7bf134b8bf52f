"""`ray-merge status`: how far each merge below an output is, also of a job that runs now. Reads the store alone.

A run writes `recipe.yaml` of all its merges when it begins to merge, a receipt after each object, and MANIFEST.json
last; a merge that still learns has nothing but its steps in the store of state. A merge that no run has begun leaves
no trace, so it is not here: `ray-merge plan RECIPE` knows it.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from ray_merge.drive.unit_time import unit_time
from ray_merge.errors import OutputConflict, RunFailed
from ray_merge.methods.catalogue.emr import NAME as EMR
from ray_merge.models.blocks import natural_key
from ray_merge.plan import ADAPTER_OBJECT
from ray_merge.spec import Receipt
from ray_merge.storage.commit import (
    MANIFEST,
    RECEIPTS,
    RECIPE,
    REMOVING,
    STATE_FOLDER,
    TIMELINE,
    gone,
    id_line,
    read_manifest,
    read_receipt,
)
from ray_merge.storage.ordered import in_order
from ray_merge.storage.store import ObjectInfo, Store, open_store

SHARD = re.compile(r"(?:emr/)?model-\d{5}-of-(\d{5})\.safetensors")
STEP = re.compile(r"learn/([0-9a-f]{64})/step-([0-9]{6})\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStatus:
    """One merge.

    Args:
        name: its folder inside the output; of a merge that still learns, `(learning) ` and 12 digits of its id.
        id: 64 hex digits; empty where they cannot be read.
        complete: its manifest is there, with all that it names.
        done: objects that have a receipt.
        of: objects that it will have; None where nothing tells yet.
        n_bytes: published, without what differs between runs: receipts and timeline.parquet.
        age_seconds: since its last receipt, by the workers' clocks; None without one.
        step: of learning; None where it does not learn, or its state lies elsewhere.
        missing: objects without a receipt, as far as they are known, and MANIFEST last; below a manifest, what it
            names and is gone.
    """

    name: str
    id: str
    complete: bool
    done: int
    of: int | None
    n_bytes: int
    age_seconds: float | None
    step: int | None
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Folder:
    """What the listing and the recipe of one merge's folder say."""

    name: str
    files: Mapping[str, int]
    receipts: Sequence[Receipt]
    recipe: Mapping[str, object]
    id: str
    gone: Sequence[str]

    @property
    def complete(self) -> bool:
        return MANIFEST in self.files and REMOVING not in self.files and not self.gone

    @property
    def base(self) -> str:
        return str(self.recipe.get("base_model"))

    @property
    def entry(self) -> Mapping[str, object]:
        merges = self.recipe.get("merges")
        found = merges[0] if isinstance(merges, list) and merges else None
        return found if isinstance(found, dict) else {}


def status(output: str, *, store: str | None = None) -> list[MergeStatus]:
    """How far every merge below an output is.

    Args:
        output: a recipe's output, a folder of several, or one merge's folder.
        store: where the recipe keeps its state, if it says `store:`.

    Raises:
        RunFailed: there is no merge yet.
        StoreDenied: the store refuses.
    """
    root = open_store(output)
    listed = root.list()
    steps = _steps(info.path.rpartition(f"{STATE_FOLDER}/")[2] for info in listed)
    if store is not None:
        steps |= _steps(info.path for info in open_store(store).list("learn"))
    folders = list(in_order(lambda item: _folder(root, *item), _by_folder(listed).items()))
    shards = {folder.base: count for folder in folders if (count := _shards(folder))}
    now = time.time()
    found = [_status(folder, shards.get(folder.base), steps, now) for folder in folders]
    begun = {one.id for one in found}
    found += [_learning(merge_id, step) for merge_id, step in sorted(steps.items()) if merge_id not in begun]
    if not found:
        raise RunFailed(f"{root.url} holds no merge: none was begun, or it is no output of a recipe")
    return found


def _by_folder(listed: Sequence[ObjectInfo]) -> dict[str, dict[str, int]]:
    """Folder of a merge -> its files and their bytes; a file belongs to the innermost merge around it."""
    ends = (f"/{MANIFEST}", f"/{RECIPE}")
    names = {
        f"/{info.path}".removesuffix(end)[1:]
        for info in listed
        for end in ends
        if f"/{info.path}".endswith(end)
    }
    files: dict[str, dict[str, int]] = {name: {} for name in sorted(names, key=natural_key)}
    for info in listed:
        above = next((name for name in _above(info.path) if name in files), None)
        if above is not None:
            files[above][info.path.removeprefix(f"{above}/" if above else "")] = info.n_bytes
    return files


def _above(path: str) -> Iterator[str]:
    """The folders around a file, innermost first, "" last."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def _folder(root: Store, name: str, files: Mapping[str, int]) -> _Folder:
    store = root.sub(name) if name else root
    paths = [path for path in files if path.startswith(f"{RECEIPTS}/") and path.endswith(".json")]
    receipts = [receipt for path in paths if (receipt := read_receipt(store, path)) is not None]
    text = store.read(RECIPE).decode("utf-8", "replace") if RECIPE in files else ""
    merge_id = text.partition("\n")[0].removeprefix(id_line("").rstrip()).strip()
    recipe: object = {}
    if MANIFEST not in files:  # of the complete ones nothing more needs to be known
        try:
            recipe = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, RecursionError):
            recipe = {}
    there = [receipt for receipt in receipts if files.get(receipt.name) == receipt.n_bytes]
    lacking = _gone(store, files) if MANIFEST in files else []
    return _Folder(name, files, there, recipe if isinstance(recipe, dict) else {}, merge_id, lacking)


def _gone(store: Store, files: Mapping[str, int]) -> Sequence[str]:
    try:
        return gone(read_manifest(store) or {}, files)
    except OutputConflict:  # no manifest at all
        return [MANIFEST]


def _shards(folder: _Folder) -> int | None:
    """How many shards its base model has, as the names of its objects say."""
    found = next((match for path in folder.files if (match := SHARD.fullmatch(path))), None)
    return int(found[1]) if found else None


def _status(folder: _Folder, shards: int | None, steps: Mapping[str, int], now: float) -> MergeStatus:
    done = {receipt.name for receipt in folder.receipts}
    names = sorted(done) if folder.complete else _objects(folder, shards)
    missing = () if folder.complete else (*(name for name in names or () if name not in done), MANIFEST)
    if MANIFEST in folder.files:
        missing = tuple(folder.gone)
    times = [unit_time(receipt) for receipt in folder.receipts]
    ends = [told.end for told in times if told is not None and told.began]
    return MergeStatus(
        name=folder.name or ".",
        id=folder.id,
        complete=folder.complete,
        done=len(done),
        of=None if names is None else len(names),
        n_bytes=sum(
            size for path, size in folder.files.items() if not path.startswith((f"{RECEIPTS}/", TIMELINE))
        ),
        age_seconds=max(0.0, now - max(ends)) if ends else None,
        step=steps.get(folder.id),
        missing=missing,
    )


def _objects(folder: _Folder, shards: int | None) -> list[str] | None:
    """What units will make of a merge; None where that cannot be told from the store."""
    export, method = folder.entry.get("export"), folder.entry.get("merge_method")
    if export == "adapter":
        return [ADAPTER_OBJECT]
    # emr has an object beside each shard that its adapters touch, and only headers tell which those are.
    if shards is None or export is None or method == EMR:
        return None
    names = [f"model-{index:05d}-of-{shards:05d}.safetensors" for index in range(1, shards + 1)]
    return names + ([ADAPTER_OBJECT] if export == "both" else [])


def _steps(paths: Iterator[str]) -> dict[str, int]:
    """Merge id -> the last step that is kept."""
    found: defaultdict[str, int] = defaultdict(int)
    for path in paths:
        if match := STEP.fullmatch(path):
            found[match[1]] = max(found[match[1]], int(match[2]))
    return dict(found)


def _learning(merge_id: str, step: int) -> MergeStatus:
    return MergeStatus(
        name=f"(learning) {merge_id[:12]}",
        id=merge_id,
        complete=False,
        done=0,
        of=None,
        n_bytes=0,
        age_seconds=None,
        step=step,
        missing=(MANIFEST,),
    )
