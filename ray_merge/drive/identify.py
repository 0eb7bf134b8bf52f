"""Which exact inputs a merge is made of, and the id that follows from them.

A local file is identified by its sha256 (hashed once and remembered by path, size and times), an object by the
store's entity tag. So a moved base keeps its merges' ids, a changed one never does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_merge.calibration import data_identity
from ray_merge.errors import AdapterError, CheckpointError, DataGone, StoreDenied
from ray_merge.identity import ALGORITHM_VERSION, LEARN_VERSION, MOMENTS_VERSION, digest
from ray_merge.methods.registry import get
from ray_merge.plan import Plan
from ray_merge.plan.learn import is_null_space
from ray_merge.plan.statistics import needs_data
from ray_merge.recipe import Calibration, DataSource, Recipe
from ray_merge.spec import Adapter, Merge
from ray_merge.storage.adapter import CONFIG_FILE as ADAPTER_CONFIG
from ray_merge.storage.checkpoint import CONFIG_FILE, Checkpoint, read_checkpoint
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.ordered import in_order
from ray_merge.storage.store import Store, Stores, open_store

Versions = Mapping[str, str]
"""File name -> version of its content."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Content versions of the base's files and of each adapter's files, and what the moments of a task come from."""

    base: Versions
    adapters: Mapping[str, Versions]
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_inputs_identity(
    plan: Plan, digests: DigestCache, stores: Stores, recorded: Mapping[str, Mapping[str, Any]] | None = None
) -> Inputs:
    """Versions of everything that the plan's merges are made of; hashes local files.

    Args:
        plan: whose merges.
        digests: of local files, remembered.
        stores: opens them.
        recorded: what the data, labels and heads of tasks were, from manifests. Who looks at finished merges needs
            none of them, so they may be gone; what is there still counts as it is.
    """
    base = base_versions(plan.base, digests, stores)
    found = in_order(lambda one: _adapter_versions(plan, one, digests, stores), plan.adapters.values())
    adapters = dict(zip(plan.adapters, found, strict=True))
    _check_training_base(plan, base, digests)
    return Inputs(base, adapters, _data(plan, stores, digests, recorded or {}))


def _data(
    plan: Plan, stores: Stores, digests: DigestCache, recorded: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """What the moments of each task come from, where a merge needs them."""
    merging = [merge for merge in plan.merges if needs_data(plan.recipe, merge)]
    labelled = any(merge.parameters.get("labels") == "empirical" for merge in merging)
    headed = {name for merge in merging if _predicts(merge) for name in merge.adapters}
    found: dict[str, Mapping[str, Any]] = {}
    for name in dict.fromkeys(name for merge in merging for name in merge.adapters):
        parts = _parts_of(plan.recipe, name, stores, digests, labelled=labelled, headed=name in headed)
        found[name] = {key: _now_or_then(key, look, recorded.get(name, {})) for key, look in parts.items()}
    return found


def _now_or_then(key: str, look: Callable[[], dict[str, Any]], recorded: Mapping[str, Any]) -> Any:
    """What a part of a task's data is; where it is gone, what it was."""
    try:
        return look()
    except DataGone:
        if key not in recorded:
            raise
        return recorded[key]


def _parts_of(
    recipe: Recipe, name: str, stores: Stores, digests: DigestCache, *, labelled: bool, headed: bool
) -> dict[str, Callable[[], dict[str, Any]]]:
    """How each part is looked at: data, labels, head."""
    source = recipe.adapters[name]
    data, evaluation, head = source.data, source.eval, source.head
    assert data is not None, "plan refuses a merge by moments whose tasks have no data"
    place = f"adapters.{name}"
    parts = {"data": lambda: dict(data_identity(data, stores, digests, where=f"{place}.data"))}
    if labelled and evaluation is not None:
        inputs = DataSource(path=evaluation.path)
        parts["labels"] = lambda: {
            "file": dict(data_identity(inputs, stores, digests, where=f"{place}.eval")),
            "column": evaluation.label,
        }
    if headed and head is not None:
        parts["head"] = lambda: {
            "file": _head_version(f"{place}.head", head.path, stores, digests),
            "logit_scale": head.logit_scale,
        }
    return parts


def _head_version(place: str, path: str, stores: Stores, digests: DigestCache) -> Any:
    folder, _, file = path.rpartition("/")
    store = stores.open(folder or ".")
    if not file or store.info(file) is None:
        raise DataGone(
            f"{place}: there is no {path}; give a safetensors file with one (classes, width) matrix"
        )
    return file_versions(store, [file], digests)[file]


NO_BYTES = ("commit_every",)
"""Parameters that decide no byte of a result."""

NOT_IN_FISHER = ("features", "precision", "sketch_rows")
"""Settings of calibration that moments alone depend on."""

TOKENIZER_FILES = re.compile(
    r"(.*/)?(tokenizer|vocab|merges|spiece|sentencepiece|special_tokens|added_tokens|chat_template)[^/]*|.*\.(model|tiktoken)"
)
"""Side files that decide what a text becomes."""


def calibration_inputs(calibration: Calibration, *, fisher: bool) -> dict[str, Any]:
    """The settings of calibration that decide moments, or Fisher diagonals."""
    found = calibration.model_dump()
    unused = NOT_IN_FISHER if fisher else ("sketch_rows",) if calibration.precision == "full" else ()
    return {key: value for key, value in found.items() if key not in unused}


def model_versions(base: Checkpoint, digests: DigestCache, stores: Stores) -> Versions:
    """Content versions of the files of a base that decide activations: weights, config and tokenizer."""
    side = [info.path for info in base.side_files if TOKENIZER_FILES.fullmatch(info.path)]
    names = [info.path for info in base.weight_files]
    return file_versions(stores.open(base.url), [*names, *side, CONFIG_FILE], digests)


def base_versions(base: Checkpoint, digests: DigestCache, stores: Stores) -> Versions:
    """Content versions of every file of a base."""
    names = [info.path for info in (*base.weight_files, *base.side_files)]
    return file_versions(stores.open(base.url), [*names, CONFIG_FILE], digests)


def _adapter_versions(plan: Plan, adapter: Adapter, digests: DigestCache, stores: Stores) -> Versions:
    """Versions of an adapter's files; those of the adapter that it started from are called `initial/...`."""
    # Tokenizer files matter to a grown vocabulary only.
    resized = [name for name, *_ in adapter.side_files] if plan.resized(adapter) else []
    versions = dict(
        file_versions(stores.open(adapter.url), [ADAPTER_CONFIG, adapter.file, *resized], digests)
    )
    if adapter.initial is not None:
        before = file_versions(
            stores.open(adapter.initial.url), [ADAPTER_CONFIG, adapter.initial.file], digests
        )
        versions |= {f"initial/{name}": version for name, version in before.items()}
    return versions


def file_versions(store: Store, names: list[str], digests: DigestCache) -> Versions:
    """Content versions of some files: sha256 of local ones, the store's entity tags of others."""

    def version(name: str) -> str:
        if store.local_root is not None:
            return f"sha256:{digests.sha256(store.local_root / name)}"
        info = store.info(name)
        if info is None:
            raise CheckpointError(f"{store.url}/{name} disappeared while the run was being planned")
        return f"{info.version}:{info.n_bytes}"

    ordered = sorted(names)
    return dict(zip(ordered, in_order(version, ordered), strict=True))


def _check_training_base(plan: Plan, base: Versions, digests: DigestCache) -> None:
    """Refuse an adapter whose training base is a folder on this machine with other weights.

    Two models of one architecture have the same names and shapes, so only content can tell them apart.
    """
    weights = {info.path: base[info.path] for info in plan.base.weight_files}
    checked: dict[str, bool] = {}
    for adapter in plan.adapters.values():
        name = str(adapter.config.get("base_model_name_or_path") or "")
        known = not name or name in checked or name in plan.recipe.base_model_names
        # os.path.isfile: False too where another machine's path may not be looked at, or is no path at all.
        if known or not os.path.isfile(os.path.join(name, CONFIG_FILE)):
            continue
        checked[name] = True
        store = open_store(name)
        if store.url == plan.base.url or not all(v.startswith("sha256:") for v in weights.values()):
            continue
        try:
            theirs = read_checkpoint(store)
        except (CheckpointError, StoreDenied):
            continue  # whatever lies there now is no base; the recipe's base has matching names and shapes
        found = file_versions(store, [info.path for info in theirs.weight_files], digests)
        if sorted(found.values()) != sorted(weights.values()) and len(found) == len(weights):
            raise AdapterError(
                f"adapter {adapter.name} was trained on {name}, whose weights differ from those of {plan.base.url}; "
                f"if that is meant, add base_model_names: [{name}]"
            )


def merge_inputs(plan: Plan, merge: Merge, inputs: Inputs) -> dict[str, Any]:
    """Everything that decides the bytes of one merge; its digest is the merge id."""
    recipe = plan.recipe
    document = {
        "algorithm": ALGORITHM_VERSION,
        "base": dict(inputs.base),
        "adapters": [_adapter_input(plan, merge, name, inputs.adapters[name]) for name in merge.adapters],
        "method": merge.method,
        "parameters": {key: value for key, value in merge.parameters.items() if key not in NO_BYTES},
        "export": merge.export,
        "seed": merge.seed,
        "dtype": recipe.dtype,
        "out_dtype": recipe.out_dtype,
        "max_shard_size": recipe.max_shard_size,
        "tied": recipe.tied,
        "base_numerics": recipe.base_numerics,
        "key_mapping": list(recipe.key_mapping.items()),
    }
    if merge.export != "checkpoint":
        document |= {"export_rank": merge.export_rank, "export_tolerance": merge.export_tolerance}
    document |= {
        key: value for key in ("export_class", "heads") if (value := getattr(merge, key)) is not None
    }
    method = get(merge.method)
    if method.learned:
        rows = recipe.calibration or Calibration()
        document["learn"] = {"version": LEARN_VERSION, "max_length": rows.max_length, "seed": rows.seed}
        document["data"] = {name: _used_data(merge, inputs.data[name]) for name in merge.adapters}
    if recipe.diagnostics or method.statistics:
        calibration = recipe.calibration or Calibration()
        fisher = method.statistics == "fisher" and not recipe.diagnostics
        document |= {
            "moments": MOMENTS_VERSION,
            "calibration": calibration_inputs(calibration, fisher=fisher),
            "data": {name: _used_data(merge, inputs.data[name]) for name in merge.adapters},
        }
    if recipe.diagnostics:
        document["diagnostics"] = True  # more columns of sites.parquet
    result: dict[str, Any] = json.loads(json.dumps(document))
    return result


def _adapter_input(plan: Plan, merge: Merge, name: str, files: Versions) -> dict[str, Any]:
    source = plan.recipe.adapters[name]
    kept: dict[str, Any] = {}
    # Written into the saved head, and what fisher differentiates; it decides bytes nowhere else.
    differentiated = get(merge.method).statistics == "fisher" or get(merge.method).learned
    if source.task is not None and (plan.adapters[name].heads or differentiated):
        kept["task"] = source.task
    if source.key_mapping:
        kept["key_mapping"] = list(source.key_mapping.items())
    if source.moe_lora_b_layout:
        kept["moe_lora_b_layout"] = source.moe_lora_b_layout
    return {"name": name, "files": dict(files), **kept}


def _used_data(merge: Merge, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a merge takes from a task's data: labels only where it is told to use them, a text head where it is used."""
    kept = ["data"]
    if merge.parameters.get("labels") == "empirical":
        kept.append("labels")
    if _predicts(merge):
        kept.append("head")
    return {key: data[key] for key in kept if key in data}


def _predicts(merge: Merge) -> bool:
    """Whether a merge learns from predictions, which heads make; nsc measures activations."""
    return bool(get(merge.method).learned) and not is_null_space(merge)


def merge_id(inputs: Mapping[str, Any]) -> str:
    """The id of a merge, 64 hex digits."""
    return digest(inputs)
