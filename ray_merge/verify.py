"""`ray-merge verify`: re-hash every file of every merge, and probe y = (W + dW) x against the factors.

The probe reads the merged weight back from the published bytes and multiplies it with a random vector; the
expected y comes from the base weight and the factors, by another route (two thin products). It needs the base
and the adapters of the recipe to be where they were; data may be gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ray_merge.algebra.grid import chunk_spans
from ray_merge.drive.identify import merge_id, merge_inputs, read_inputs_identity
from ray_merge.drive.learned import PHI, is_learned
from ray_merge.drive.thresholds import read_thresholds
from ray_merge.errors import Refusal, RunFailed
from ray_merge.identity import difference
from ray_merge.methods.context import Thresholds
from ray_merge.moments import Engines
from ray_merge.needed import compute_needed, plan_needed
from ray_merge.plan import OutTensor, Plan, make_plan, read_inputs
from ray_merge.pool_steps import StepPool
from ray_merge.recipe import expand, load_recipe
from ray_merge.spec import DTYPE_BYTES, Factor, Merge, Site, TensorEntry
from ray_merge.storage.commit import MANIFEST, RECIPE, REMOVING, gone, hash_object, read_manifest, sizes_of
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.headers import read_header
from ray_merge.storage.store import Store, Stores, open_store
from ray_merge.storage.stream import Reader
from ray_merge.work.adapter_export import exported_tensors, truncated
from ray_merge.work.deltas import site_deltas
from ray_merge.work.factors import AdapterFiles
from ray_merge.work.factory import AnyStageJob
from ray_merge.work.job import PhiIndex
from ray_merge.work.pickles import unpickler
from ray_merge.work.sources import Sources
from ray_merge.work.stage_job import StageJob
from ray_merge.work.tensors import TORCH_DTYPES, from_bytes

PROBE_SITES = 8
FLOAT32_SLACK = 1e-5
"""Relative to |B| |A| |x|: float32 products of some thousand terms, summed in another order."""

DEVIATIONS = 8.0
"""Rounding errors have random signs: their sum passes 8 times the root of the sum of their squared bounds with
a chance of 2 exp(-32) (Hoeffding), where the sum of the bounds would hide a missing update."""

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """One merge that is what its manifest says.

    Args:
        name: of the merge.
        url: its folder.
        files: how many were re-hashed.
        n_bytes: of them.
        probed: sites whose y was compared.
        worst: the largest |y - expected| over the bound that rounding allows; at most 1.
        unprobed: why no site was compared, where that was asked for.
    """

    name: str
    url: str
    files: int
    n_bytes: int
    probed: int
    worst: float
    unprobed: str = ""


def verify(output: str, *, cache_dir: str | Path | None = None, probe: bool = True) -> list[Verified]:
    """Check every merge below `output`.

    Args:
        output: a recipe's output, or one merge's folder.
        cache_dir: node-local folder for adapters and digests.
        probe: also compare y = (W + dW) x on sampled sites.

    Raises:
        Refusal: there is no complete merge, or the inputs of the probe have changed.
        RunFailed: a merge is not complete, a file (recipe.yaml, too) is missing or has other bytes, or a probe is off.
    """
    root = open_store(output)
    listed = [info.path for info in root.list()]
    names = _folders_with(MANIFEST, listed)
    if not names:
        raise Refusal(
            f"{root.url} holds no complete merge (no {MANIFEST}); run the recipe again to finish it"
        )
    unfinished = [name for name in _folders_with(RECIPE, listed) if name not in names]
    if unfinished:
        raise RunFailed(
            f"{root.url}: {len(unfinished)} of {len(unfinished) + len(names)} merge(s) are not complete, first "
            f"{unfinished[0]} (no {MANIFEST}); run the recipe again to finish them"
        )
    with TemporaryDirectory(prefix="ray-merge-") as temporary:
        cache = Path(cache_dir).expanduser() if cache_dir is not None else Path(temporary)
        return [_verify_merge(root.sub(name) if name else root, cache, probe) for name in names]


def _folders_with(path: str, listed: Sequence[str]) -> list[str]:
    return [name.removesuffix(path).rstrip("/") for name in listed if f"/{name}".endswith(f"/{path}")]


def _verify_merge(store: Store, cache: Path, probe: bool) -> Verified:
    manifest = read_manifest(store)
    assert manifest is not None
    sizes = sizes_of(store)
    if lacking := gone(manifest, sizes):
        raise RunFailed(
            f"{store.url}/{lacking[0]} is missing, and {len(lacking) - 1} more that belong to the manifest; run the "
            "recipe again"
        )
    if REMOVING in sizes:
        raise RunFailed(f"{store.url} is being removed by `ray-merge gc`; run gc --remove to its end")
    n_bytes = 0
    for entry in manifest["files"]:
        size = sizes[entry["name"]]
        found = hash_object(store, entry["name"]) if size == entry["bytes"] else f"{size} bytes"
        if found != entry["sha256"]:
            raise RunFailed(
                f"{store.url}/{entry['name']} is not what was published: {found[:16]}, the manifest says "
                f"{entry['sha256'][:16]} of {entry['bytes']} bytes"
            )
        n_bytes += size
    ratios, unprobed = [], ""
    try:
        ratios = list(_probe(store, manifest, cache)) if probe else []
    except _MomentsGone as error:
        unprobed = str(error)
    return Verified(
        name=manifest["name"],
        url=store.url,
        files=len(manifest["files"]),
        n_bytes=n_bytes,
        probed=len(ratios),
        worst=max(ratios, default=0.0),
        unprobed=unprobed,
    )


class _MomentsGone(Refusal):
    """The moments that a merge was made by are not in the store any more."""


def _gone(job: AnyStageJob) -> StepPool:
    assert isinstance(job, StageJob), "verify computes moments only"
    raise _MomentsGone(
        f"moments that it was made by are not in {job.store} any more; run its recipe with another --output, which "
        "makes them anew"
    )


def _probe(store: Store, manifest: Mapping[str, Any], cache: Path) -> Iterator[float]:
    recipe, source = load_recipe(f"{store.url}/{RECIPE}", store.read(RECIPE).decode())
    merge = expand(recipe, source)[0]
    stores = Stores()
    plan = make_plan(recipe, [merge], *read_inputs(recipe, [merge], unpickler(cache / "adapters")))
    recorded = manifest["inputs"].get("data", {})
    found_now = read_inputs_identity(plan, DigestCache(cache / "digests"), stores, recorded)
    inputs = merge_inputs(plan, merge, found_now)
    if merge_id(inputs) != manifest["id"]:
        raise Refusal(
            f"{store.url}: an input has changed since the merge ({difference(manifest['inputs'], inputs)})"
        )
    dtype = torch.float64 if recipe.dtype == "float64" else torch.float32
    engines = Engines(cache=cache, pools=_gone)
    moments = compute_needed(plan, plan_needed(plan, [merge], engines), engines, lambda _: None)
    merged = _merged_tensors(store, manifest)
    thresholds = read_thresholds(store, merge)
    found = {} if thresholds is None else {merge.name: thresholds}
    begins = {tensor.name: tensor for shard in plan.shards for tensor in plan.tensors(merge, shard)}
    with (
        torch.inference_mode(),
        AdapterFiles(
            cache / "adapters",
            plan.adapters,
            stores,
            device="cpu",
            dtype=dtype,
            moments=moments,
            phi=_phi(plan, merge, store),
        ) as files,
        Reader(stores.open(plan.base.url)) as reader,
    ):
        probe = _Probe(plan, merge, store, merged, begins, files, Sources(plan.base, reader, files), found)
        for site in _sample(plan, merge):
            yield _probe_site(probe, site)


def _phi(plan: Plan, merge: Merge, store: Store) -> Mapping[str, PhiIndex]:
    """The learned coefficients that lie with the merge."""
    info = store.info(PHI) if is_learned(merge) else None
    if info is None:
        return {}
    sites = {site.name: site.name for site in plan.touched(merge)}
    return {merge.name: PhiIndex(store.url, info, sites)}


@dataclass(frozen=True, slots=True)
class _Probe:
    """What every probed site of one merge needs."""

    plan: Plan
    merge: Merge
    store: Store
    merged: Mapping[str, TensorEntry]
    begins: Mapping[str, OutTensor]
    files: AdapterFiles
    sources: Sources
    thresholds: Mapping[str, Thresholds]


def _sample(plan: Plan, merge: Merge) -> Sequence[Site]:
    sites = sorted(plan.touched(merge), key=lambda site: site.name)
    step = max(1, len(sites) // PROBE_SITES)
    return sites[::step][:PROBE_SITES]


def _merged_tensors(store: Store, manifest: Mapping[str, Any]) -> dict[str, TensorEntry]:
    files = [
        e["name"]
        for e in manifest["files"]
        if e["name"].endswith(".safetensors") and not e["name"].startswith(("heads/", "emr/"))
    ]
    return {entry.name: entry for name in files for entry in read_header(store, name).tensors.values()}


def _probe_site(probe: _Probe, site: Site) -> float:
    """|y - expected| over the bound of rounding, at the worst output of one site."""
    x_I = torch.randn(site.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    begin, whole = probe.begins[site.tensor], (site.start, site.start + site.shape[0])
    delta = site_deltas(
        site,
        [probe.merge],
        probe.files,
        lambda: probe.sources.matrix(begin, whole, site.shape[1]),
        probe.thresholds,
    )[0]
    factor = delta.factors()
    if factor is None:
        chunks = (delta.rows(*span).double() for span in chunk_spans(site.shape))
        pairs = [(chunk_NI @ x_I, chunk_NI.abs() @ x_I.abs()) for chunk_NI in chunks]
        update_O, reach_O = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    else:
        update_O, reach_O = _product(factor, x_I)
    ratios = []
    if begin.stored_name in probe.merged:
        ratios += _checkpoint_ratios(probe, site, x_I, update_O, FLOAT32_SLACK * reach_O)
    if factor is not None:
        ratios += _adapter_ratios(probe, site, factor, x_I)
    worst = max(ratios)
    if not worst <= 1.0:
        raise RunFailed(
            f"{probe.store.url}: (W + dW) x at {site.name} is off by {worst:.3g} times what rounding "
            "allows: the published "
            "weight is not base plus update; remove this merge and run again"
        )
    return worst


def _product(factor: Factor, x_I: Tensor) -> tuple[Tensor, Tensor]:
    """B A x, and the same of magnitudes."""
    B_OR, A_RI = factor.B.double(), factor.A.double()
    return B_OR @ (A_RI @ x_I), B_OR.abs() @ (A_RI.abs() @ x_I.abs())


def _checkpoint_ratios(
    probe: _Probe, site: Site, x_I: Tensor, update_O: Tensor, slack_O: Tensor
) -> list[float]:
    entry = probe.merged[probe.begins[site.tensor].stored_name]
    moved, lost = [], []
    spans = [(site.start + start, site.start + stop) for start, stop in chunk_spans(site.shape)]
    if probe.plan.base.quantised:
        spans = probe.sources.spans(
            probe.begins[site.tensor], (site.start, site.start + site.shape[0]), site.shape[1], 1
        )
    # Rows at a time: a weight may be larger than this machine's memory.
    begins = probe.sources.rows(probe.begins[site.tensor], spans, site.shape[1])
    for span, begin_NI in zip(spans, begins, strict=True):
        W_NI, stored_NI = begin_NI.double(), _read(probe.store, _rows(entry, *span, site.shape[1])).double()
        moved.append((stored_NI - W_NI) @ x_I)
        lost.append(torch.linalg.vector_norm(_rounding(stored_NI, entry) * x_I, dim=1))
    off_O, lost_O = torch.cat(moved) - update_O, DEVIATIONS * torch.cat(lost)
    # A small update drowns in the rounding of each output; along the update all outputs count together.
    along_O = update_O / update_O.norm().clamp_min(TINY)
    bound = torch.linalg.vector_norm(along_O * lost_O) + along_O.abs() @ slack_O
    return [_ratio(off_O, lost_O + slack_O), _ratio((along_O @ off_O)[None], bound[None])]


def _adapter_ratios(probe: _Probe, site: Site, factor: Factor, x_I: Tensor) -> list[float]:
    kept, _ = truncated(probe.merge, factor)
    names = [name for name, _ in exported_tensors(probe.plan, probe.merge, site, kept)]
    if any(name not in probe.merged for name in names):
        return []
    A, B = (_read(probe.store, probe.merged[name]).double() for name in names)
    A, B = A.flatten(1), B.flatten(1)
    turned = probe.plan.layout(probe.merge, site.name) in ("conv1d", "embedding")
    stored = Factor(A.T, B.T) if turned else Factor(B, A)
    update_O, reach_O = _product(kept, x_I)
    bound_O = (2 * _step(probe.merged[names[0]]) + FLOAT32_SLACK) * reach_O
    return [_ratio(_product(stored, x_I)[0] - update_O, bound_O)]


def _step(entry: TensorEntry) -> float:
    return torch.finfo(TORCH_DTYPES[entry.dtype]).eps


def _rows(entry: TensorEntry, start: int, stop: int, columns: int) -> TensorEntry:
    """Rows of a stored tensor that is seen with `columns` columns."""
    row_bytes = DTYPE_BYTES[entry.dtype] * columns
    return replace(
        entry,
        shape=(stop - start, columns),
        start=entry.start + start * row_bytes,
        end=entry.start + stop * row_bytes,
    )


def _rounding(stored_NI: Tensor, entry: TensorEntry) -> Tensor:
    """The most that rounding to nearest can have moved each entry."""
    kind = torch.finfo(TORCH_DTYPES[entry.dtype])
    return (stored_NI.abs() + kind.smallest_normal) * (kind.eps / 2)


def _ratio(off_O: Tensor, bound_O: Tensor) -> float:
    return float((off_O.abs() / (bound_O + TINY)).max())


def _read(store: Store, entry: TensorEntry) -> Tensor:
    return from_bytes(store.read(entry.file, entry.start, entry.end), TORCH_DTYPES[entry.dtype], entry.shape)
