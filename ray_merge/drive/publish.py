"""From receipts to a complete merge: heads, table, card, side files, index, config.json, MANIFEST last.

Everything here is small and, but for timeline.parquet, deterministic: any driver, at any time, writes the same bytes,
so two drivers that finish the same merge adopt each other's objects.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_merge.drive.card import WARN_LOST_SHARE, model_card
from ray_merge.drive.config import checkpoint_config, vocabulary_owner
from ray_merge.drive.exported_config import exported_config
from ray_merge.drive.learned import PHI, is_learned, learned_lines
from ray_merge.drive.outputs import Target
from ray_merge.drive.rescalers import rescalers_json
from ray_merge.drive.resolved import resolved_recipe
from ray_merge.drive.thresholds import THRESHOLDS, selecting
from ray_merge.drive.timeline import put_timeline
from ray_merge.errors import RunFailed
from ray_merge.models.blocks import natural_key
from ray_merge.plan import ADAPTER_OBJECT, SHARD_METADATA, OutTensor, Plan
from ray_merge.plan.emr import RESCALERS, is_emr
from ray_merge.plan.headed import HEAD_FILE, layout
from ray_merge.plan.labels import label_names, problem_of, saved_rows
from ray_merge.spec import Adapter, Merge, Receipt, SiteReport, TensorEntry
from ray_merge.storage.checkpoint import CONFIG_FILE, INDEX_FILE
from ray_merge.storage.commit import (
    MANIFEST,
    RECIPE,
    REMOVING,
    SITES,
    broken,
    commit_bytes,
    pretty_json,
    recorded_id,
    sizes_of,
)
from ray_merge.storage.headers import make_header
from ray_merge.storage.store import ObjectInfo, Store, Stores, check_unchanged, read_unchanged
from ray_merge.work.pickles import safetensors_of

CARD = "README.md"
MANIFEST_FORMAT = 1

SITE_SCHEMA = pa.schema(
    [
        ("site", pa.string()),
        ("tensor", pa.string()),
        ("export", pa.string()),
        ("layout", pa.string()),
        ("rank", pa.int32()),
        ("update_norm", pa.float64()),
        ("lost_share", pa.float64()),
        ("truncation_error", pa.float64()),
        ("bytes", pa.int64()),
        ("erank_sum", pa.float64()),
        ("erank_deltas", pa.float64()),
        ("erank_all", pa.float64()),
        ("interference", pa.list_(pa.float64())),
        ("activation", pa.list_(pa.float64())),
        ("projection", pa.list_(pa.float64())),
        ("anisotropy", pa.list_(pa.float64())),
        ("directions", pa.list_(pa.float64())),
    ]
)
"""Columns of sites.parquet; what they mean is in `spec.SiteReport`, and from `erank_sum` on, which are null without
`diagnostics: true`, in work/diagnostics.py. Seconds differ between runs: receipts and timeline.parquet have them."""


class _Files:
    """Commits small objects and remembers what the manifest must name."""

    def __init__(self, store: Store, merge_id: str) -> None:
        self.store = store
        self.merge_id = merge_id
        self.entries: list[dict[str, Any]] = []

    def put(self, name: str, data: bytes) -> None:
        commit_bytes(self.store, name, data, self.merge_id)
        self.note(name, len(data), hashlib.sha256(data).hexdigest())

    def note(self, name: str, n_bytes: int, sha256: str) -> None:
        self.entries.append({"name": name, "bytes": n_bytes, "sha256": sha256})


def publish(
    plan: Plan,
    merge: Merge,
    target: Target,
    receipts: Mapping[str, Receipt],
    attempts: Mapping[str, int],
    stores: Stores,
    cache: Path,
) -> list[str]:
    """Complete one merge whose shards and adapter are all receipted.

    Args:
        plan: of the run.
        merge: to be published.
        target: where it goes.
        receipts: of its objects, by name.
        attempts: of the units of those that this run made, by name of the object.
        stores: of this process.
        cache: the node's folder for adapters, where pickles were converted.

    Returns:
        Warnings about what rounding took.
    """
    files = _Files(stores.open(target.url), target.merge_id)
    recipe = resolved_recipe(plan, merge, target.merge_id)
    _check_begun(files, recipe)
    for receipt in sorted(receipts.values(), key=lambda receipt: receipt.name):
        files.note(receipt.name, receipt.n_bytes, receipt.sha256)
    if selecting([merge]):
        found = files.store.read(THRESHOLDS)
        files.note(THRESHOLDS, len(found), hashlib.sha256(found).hexdigest())
    more: list[str] = []
    if is_learned(merge):
        found = files.store.read(PHI)
        files.note(PHI, len(found), hashlib.sha256(found).hexdigest())
        more = learned_lines(found)
    if is_emr(merge):
        files.put(RESCALERS, rescalers_json(plan, merge, receipts))
    for name in merge.adapters:
        if plan.adapters[name].heads:
            files.put(f"heads/{name}.safetensors", head_file(plan, plan.adapters[name], stores, cache))
    reports = {kind: _reports(receipts, kind == "adapter") for kind in ("checkpoint", "adapter")}
    files.put(SITES, _site_table(plan, merge, reports))
    put_timeline(files.store, target.merge_id, receipts, attempts)
    files.put(CARD, model_card(plan, merge, target.merge_id, target.inputs, reports, more))
    if merge.export != "checkpoint":
        by_site = {report.site: report for report in reports["adapter"]}
        files.put("adapter/adapter_config.json", pretty_json(exported_config(plan, merge, by_site)))
    if merge.export != "adapter":
        _put_checkpoint_files(plan, merge, files, stores, cache)
    _check_begun(files, recipe)
    _put_manifest(files, _manifest(plan, merge, target, files))
    return rounding_warnings(merge, reports)


AFTER = "run the recipe again, and give `gc` a longer --older-than"


def _check_begun(files: _Files, recipe: bytes) -> None:
    """Step 3 of a run in `storage.commit`. What this run has put stays, and recipe.yaml says whose it is."""
    store = files.store
    if recorded_id(store) != files.merge_id or store.info(REMOVING) is not None:
        store.put_if_absent(RECIPE, recipe, {"merge-id": files.merge_id})
        raise RunFailed(f"{store.url}/{RECIPE} was removed while this run was at work; {AFTER}")


def _put_manifest(files: _Files, manifest: Mapping[str, Any]) -> None:
    """Steps 4 and 5 of a run in `storage.commit`: nothing may be proven that `gc` has taken away."""
    store = files.store
    commit_bytes(store, MANIFEST, pretty_json(manifest), files.merge_id)
    if why := broken(store, manifest, sizes_of(store), sizes=True):
        raise RunFailed(f"{store.url} was removed while its manifest was written ({'; '.join(why)}); {AFTER}")


def rounding_warnings(merge: Merge, reports: Mapping[str, Sequence[SiteReport]]) -> list[str]:
    """What a person should know of the rounding of a published merge."""
    lossy = [report for some in reports.values() for report in some if report.lost_share > WARN_LOST_SHARE]
    if not lossy:
        return []
    worst = max(lossy, key=lambda report: report.lost_share)
    total = sum(len(some) for some in reports.values())
    return [
        f"merge {merge.name!r}: rounding to the stored dtype took more than {WARN_LOST_SHARE:.0%} of the update at "
        f"{len(lossy)} of {total} site(s), at most {worst.lost_share:.1%} at {worst.site}; out_dtype: float32 or "
        "export: adapter keeps it"
    ]


def _put_checkpoint_files(plan: Plan, merge: Merge, files: _Files, stores: Stores, cache: Path) -> None:
    base = stores.open(plan.base.url)
    tokenizer = vocabulary_owner(plan, merge)
    own = [] if tokenizer is None else [ObjectInfo(*file) for file in tokenizer.side_files]
    taken = {CARD, *(info.path for info in own)}
    for info in plan.base.side_files:
        if info.path not in taken:
            files.put(info.path, read_unchanged(base, info))
    for info in own:
        assert tokenizer is not None
        files.put(info.path, read_unchanged(stores.open(tokenizer.url), info))
    if merge.name in plan.headed and plan.headed[merge.name].added:
        headed = plan.headed[merge.name]
        owner = plan.adapters[headed.adapter]
        files.put(HEAD_FILE, _heads_of(owner, headed.added, SHARD_METADATA, stores, cache))
    files.put(INDEX_FILE, pretty_json(checkpoint_index(plan, merge)))
    files.put(CONFIG_FILE, checkpoint_config(plan, merge, base))


def checkpoint_index(plan: Plan, merge: Merge) -> dict[str, Any]:
    """model.safetensors.index.json; `total_size` is the bytes of all tensors."""
    placed = [(tensor, shard) for shard in plan.shards for tensor in plan.tensors(merge, shard)]
    added = plan.headed[merge.name].added if merge.name in plan.headed else ()
    tensors: list[OutTensor | TensorEntry] = [*(tensor for tensor, _ in placed), *added]
    return {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.n_bytes for tensor in tensors),
        },
        "weight_map": {
            **{tensor.stored_name: shard.name for tensor, shard in placed},
            **{entry.name: HEAD_FILE for entry in added},
        },
    }


def head_file(plan: Plan, adapter: Adapter, stores: Stores, cache: Path) -> bytes:
    """An adapter's heads under their runtime names, as one safetensors file with what a loader must know."""
    ordered = sorted(adapter.heads, key=lambda entry: entry.name)
    labels = saved_rows(ordered)
    task, config = plan.recipe.adapters[adapter.name].task, plan.base.config
    metadata = {
        "format": "pt",
        "task_type": str(adapter.config.get("task_type") or ""),
        "num_labels": str(labels),
        "problem_type": problem_of(config, task, labels),
        "id2label": json.dumps(dict(enumerate(label_names(config, labels)))),
    }
    return _heads_of(adapter, ordered, metadata, stores, cache)


def _heads_of(
    adapter: Adapter, entries: Sequence[TensorEntry], metadata: Mapping[str, str], stores: Stores, cache: Path
) -> bytes:
    """A safetensors file of some tensors of an adapter's heads, as they were saved."""
    store, file = safetensors_of(adapter, stores, cache)
    header, _ = make_header(layout(entries), metadata)
    planned = ObjectInfo(adapter.file, adapter.file_bytes, adapter.file_version)
    kept = store if adapter.pickled else store.pinned([planned])  # a converted pickle is this node's own
    data = header + b"".join(kept.read(file, entry.start, entry.end) for entry in entries)
    check_unchanged(stores.open(adapter.url), planned)
    return data


def _reports(receipts: Mapping[str, Receipt], of_adapter: bool) -> list[SiteReport]:
    chosen = [r for name, r in sorted(receipts.items()) if (name == ADAPTER_OBJECT) == of_adapter]
    reports = [report for receipt in chosen for report in receipt.sites]
    return sorted(reports, key=lambda report: natural_key(report.site))


def _site_table(plan: Plan, merge: Merge, reports: Mapping[str, Sequence[SiteReport]]) -> bytes:
    rows = [
        {
            **asdict(report),
            **report.figures,
            "export": kind,
            "layout": plan.layout(merge, report.site),
            "bytes": report.n_bytes,
        }
        for kind, some in reports.items()
        for report in some
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SITE_SCHEMA), buffer)
    return buffer.getvalue()


def _manifest(plan: Plan, merge: Merge, target: Target, files: _Files) -> dict[str, Any]:
    """Proof that the merge is complete: what went in, every file that came out. Deterministic."""
    adapters = {name: _used(plan.adapters[name]) for name in merge.adapters}
    return {
        "format": MANIFEST_FORMAT,
        "id": target.merge_id,
        "name": merge.name,
        "inputs": target.inputs,
        "adapters": adapters,
        "base_numerics": "dequantised" if plan.base.quantised else "as stored",
        "sites": len(plan.touched(merge)),
        "tensors": 0 if merge.export == "adapter" else len(checkpoint_index(plan, merge)["weight_map"]),
        "files": sorted(files.entries, key=lambda entry: str(entry["name"])),
    }


def _used(adapter: Adapter) -> dict[str, Any]:
    """Where the tensors of an adapter went; `factors` counts sites."""
    return {
        "factors": len(adapter.factors),
        "heads": len(adapter.heads),
        "replaced": sorted(adapter.replaced),
        "tokens": {tensor: list(rows.indices) for tensor, rows in sorted(adapter.tokens.items())},
        "ignored": dict(sorted(adapter.ignored.items())),
    }
