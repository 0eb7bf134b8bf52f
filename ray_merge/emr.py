"""The adapters of an EMR merge, one at a time: add `rescaler * mask * unified update` to a base model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_merge.algebra.bits import unpack_rows
from ray_merge.errors import AdapterError
from ray_merge.plan.emr import FOLDER, LEFT, MASKS, METADATA_KEY, RESCALERS, RIGHT, UNIFIED
from ray_merge.spec import DTYPE_BYTES, TensorEntry
from ray_merge.storage.commit import read_manifest
from ray_merge.storage.headers import read_header
from ray_merge.storage.store import Store, open_store
from ray_merge.storage.stream import Reader
from ray_merge.storage.strict_json import parse_object
from ray_merge.work.tensors import TORCH_DTYPES, from_bytes

READ_BYTES = 8 * 2**20
"""Of one request for rows; up to six copies of it in float32 are held while they are added."""

APPLIED = "_ray_merge_emr"
"""Attribute of a model that was changed already: a second adapter would be added to the first."""

DTYPES = {**TORCH_DTYPES, "U8": torch.uint8}


@dataclass(frozen=True, slots=True)
class _Part:
    """One site of the adapter: where its pieces lie and what they are added to.

    Args:
        site: its name.
        pieces: entries by word: unified, masks, left, right.
        tensor: disk name of the weight.
        tensor_shape: of the weight.
        start: first row of the site, where the weight is seen as rows of length I.
        shape: (O, I).
        mask: which of the masks is the adapter's.
    """

    site: str
    pieces: Mapping[str, TensorEntry]
    tensor: str
    tensor_shape: tuple[int, ...]
    start: int
    shape: tuple[int, int]
    mask: int


def load_emr(model: nn.Module, folder: str | Path, adapter: str) -> nn.Module:
    """Turn a base model into what an EMR merge keeps of one of its adapters.

    Args:
        model: the base model that was merged into, loaded in any float dtype; not the merged checkpoint. Its parameters
            need the names and shapes that they have on disk, but for the model's own prefix (`bert.`).
        folder: of the merge: a path, or a URL such as s3://bucket/out/emr.
        adapter: the recipe's name of it. Its classification head is a file of its own: `ray_merge.load_head`.

    Returns:
        The same model, changed in place: parameters are read, added to in float32 (float64 where they are float64) and
        rounded once, a few rows at a time.

    Raises:
        AdapterError: no such merge or adapter; the model lacks a parameter, has it in another shape, ties it to another
            one, is the merged checkpoint itself, or was given an adapter before. The model is then unchanged.
    """
    store = open_store(str(folder))
    rescalers = _rescalers(store, adapter)
    _check_model(model, store)
    parts = list(_parts(store, adapter))
    targets = _targets(model, parts, store.url)
    setattr(model, APPLIED, f"{adapter} of {store.url}")
    with torch.no_grad(), Reader(store) as reader:
        for part, target in zip(parts, targets, strict=True):
            factor = rescalers[part.site] if isinstance(rescalers, dict) else rescalers
            # A copy where the parameter is not contiguous, and then copied back.
            values = target.contiguous()
            _add(reader, part, float(factor), values.view(-1, part.shape[1]))
            if values.data_ptr() != target.data_ptr():
                target.copy_(values)
    return model


def _rescalers(store: Store, adapter: str) -> float | dict[str, float]:
    """The adapter's rescaler, or one for each site."""
    manifest = read_manifest(store)
    names = [] if manifest is None else [entry["name"] for entry in manifest["files"]]
    if RESCALERS not in names:
        what = "is no complete merge" if manifest is None else "is no result of emr"
        raise AdapterError(f"{store.url} {what}; give the folder of one merge with merge_method: emr")
    known: dict[str, Any] = parse_object(store.read(RESCALERS), f"{store.url}/{RESCALERS}")["rescalers"]
    if adapter not in known:
        raise AdapterError(f"{store.url} was made of {', '.join(known)}; there is no adapter {adapter!r}")
    found: float | dict[str, float] = known[adapter]
    return found


def _check_model(model: nn.Module, store: Store) -> None:
    before = getattr(model, APPLIED, None)
    if before is not None:
        raise AdapterError(
            f"this model is {before} already, and updates would add up; load the base model again"
        )
    source, here = str(getattr(model, "name_or_path", "") or ""), store.local_root
    if source and here is not None and os.path.realpath(source) == os.path.realpath(here):
        raise AdapterError(
            f"this model was loaded from {store.url}, which has the unified update in it; load the base model"
        )


def _parts(store: Store, adapter: str) -> Iterator[_Part]:
    """The adapter's sites, by file and place."""
    manifest = read_manifest(store)
    assert manifest is not None
    files = [entry["name"] for entry in manifest["files"] if entry["name"].startswith(f"{FOLDER}/")]
    for file in sorted(name for name in files if name != RESCALERS):
        header = read_header(store, file)
        for site, described in json.loads(header.metadata[METADATA_KEY]).items():
            if adapter not in described["adapters"]:
                continue
            entries = {word: header.tensors.get(f"{site}.{word}") for word in (UNIFIED, MASKS, LEFT, RIGHT)}
            rows, columns = described["shape"]
            yield _Part(
                site=site,
                pieces={word: entry for word, entry in entries.items() if entry is not None},
                tensor=described["tensor"],
                tensor_shape=tuple(described["tensor_shape"]),
                start=described["start"],
                shape=(rows, columns),
                mask=described["adapters"].index(adapter),
            )


def _targets(model: nn.Module, parts: list[_Part], url: str) -> list[Tensor]:
    """The parameter of each part, all of them checked before one is changed."""
    state = model.state_dict()
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    names = [_find(state, part.tensor, prefix) for part in parts]
    missing = next((part.tensor for part, name in zip(parts, names, strict=True) if name is None), None)
    if missing is not None:
        raise AdapterError(
            f"{url}: the model ({type(model).__name__}) has no {missing}; load the base model with a class that keeps "
            "the names of its files (transformers joins the experts of some models when it loads them)"
        )
    sharing: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel() and not tensor.is_meta:
            sharing.setdefault(tensor.data_ptr(), []).append(name)
    found = [name for name in names if name is not None]
    for part, name in zip(parts, found, strict=True):
        _check_target(part, name, state[name], sharing, url)
    return [state[name] for name in found]


def _find(state: Mapping[str, Tensor], disk_name: str, prefix: str) -> str | None:
    """The state-dict name of a tensor on disk: its own, or with the model's prefix before it or taken away."""
    candidates = [disk_name]
    if prefix:
        candidates += [f"{prefix}.{disk_name}", disk_name.removeprefix(f"{prefix}.")]
    return next((name for name in candidates if name in state), None)


def _check_target(part: _Part, name: str, target: Tensor, sharing: Mapping[int, list[str]], url: str) -> None:
    if tuple(target.shape) != part.tensor_shape:
        raise AdapterError(
            f"{url}: {part.tensor} is {part.tensor_shape} there, the model has {tuple(target.shape)}; load the base "
            "model that was merged into"
        )
    if target.dtype not in TORCH_DTYPES.values() or target.is_meta:
        what = "is on the meta device" if target.is_meta else f"is stored as {target.dtype}"
        raise AdapterError(
            f"{url}: {name} of the model {what}; load the base model in float32, bfloat16 or float16"
        )
    twins = [other for other in sharing[target.data_ptr()] if other != name]
    if twins:
        raise AdapterError(
            f"{url}: the model ties {name} to {', '.join(twins)}, which the adapter does not change; untie them first "
            "(tie_word_embeddings: false, and a copy of the weight)"
        )


def _add(reader: Reader, part: _Part, rescaler: float, weight_NI: Tensor) -> None:
    """Add the rescaled and masked update to the site's rows of a weight seen as rows of length I."""
    work = torch.float64 if weight_NI.dtype == torch.float64 else torch.float32
    step = max(1, READ_BYTES // (4 * part.shape[1]))
    spans = [(start, min(start + step, part.shape[0])) for start in range(0, part.shape[0], step)]
    for (start, stop), update_NI in zip(spans, _updates(reader, part, spans, rescaler, work), strict=True):
        rows_NI = weight_NI[part.start + start : part.start + stop]
        rows_NI.copy_(rows_NI.to(work) + update_NI.to(rows_NI.device))


def _updates(
    reader: Reader, part: _Part, spans: list[tuple[int, int]], rescaler: float, work: torch.dtype
) -> Iterator[Tensor]:
    """The update's rows of each span."""
    if LEFT not in part.pieces:
        yield from _coordinates(reader, part, spans, rescaler, work)
        return
    n_directions = part.pieces[UNIFIED].shape[0]
    (product,) = _coordinates(reader, part, [(0, n_directions)], rescaler, work)
    if RIGHT in part.pieces:
        right = part.pieces[RIGHT]
        product = product @ _read(reader, right, [(0, right.shape[0])]).__next__().to(work)
    for left_NP in _read(reader, part.pieces[LEFT], spans):
        yield left_NP.to(work) @ product


def _coordinates(
    reader: Reader, part: _Part, spans: list[tuple[int, int]], rescaler: float, work: torch.dtype
) -> Iterator[Tensor]:
    """Rows of rescaler * mask * unified, span by span."""
    unified = _read(reader, part.pieces[UNIFIED], spans)
    masks = _read(reader, part.pieces[MASKS], spans)
    for unified_NQ, bits_NTC in zip(unified, masks, strict=True):
        mask_NQ = unpack_rows(bits_NTC[:, part.mask], unified_NQ.shape[1])
        yield (unified_NQ.to(work) * rescaler).mul_(mask_NQ)


def _read(reader: Reader, entry: TensorEntry, spans: list[tuple[int, int]]) -> Iterator[Tensor]:
    """Rows of a stored tensor, span by span."""
    row_bytes = entry.n_bytes // entry.shape[0] if entry.shape[0] else 0
    assert row_bytes % DTYPE_BYTES[entry.dtype] == 0
    parts = [
        replace(entry, start=entry.start + start * row_bytes, end=entry.start + stop * row_bytes)
        for start, stop in spans
    ]
    data = reader.stream([(part.file, part.start, part.end) for part in parts])
    for (start, stop), raw in zip(spans, data, strict=True):
        yield from_bytes(raw, DTYPES[entry.dtype], (stop - start, *entry.shape[1:]))
