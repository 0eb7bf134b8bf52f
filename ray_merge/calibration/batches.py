"""A task's data -> batches for the base, the same ones on every machine.

Rows are sampled, made into examples, ordered by length (so that little is padding), and padded on the right to the
longest of their batch. Padding is always masked out, so what stands in it reaches no moment. torch is imported when
a function runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_merge.calibration.examples import (
    PIXELS,
    Example,
    check_alike,
    choose_columns,
    from_row,
    from_tokens,
    read_text,
)
from ray_merge.calibration.files import find_files
from ray_merge.calibration.limits import limits_of
from ray_merge.calibration.rows import Rows, sample_rows
from ray_merge.recipe import Calibration, DataSource
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.store import Stores

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B inputs, right padded to the longest one's L tokens; what the data lack is None.

    Args:
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 for a token and 0 for padding.
        token_type_ids: (B, L) int64.
        pixel_values: (B, C, H, W) float32.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    pixel_values: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """All inputs of a task.

    Args:
        batches: in order of length.
        rows: how many inputs.
        tokens: that are not masked; 0 for images alone.
        cut: how many inputs had more tokens than `calibration.max_length`.
        sha256: of the batches' content, 64 hex digits.
        row_numbers: of each input in the order of the batches: its row over all files, from 0.
    """

    batches: tuple[Batch, ...]
    rows: int
    tokens: int
    cut: int
    sha256: str
    row_numbers: tuple[int, ...]


def load_batches(
    source: DataSource,
    calibration: Calibration,
    task: str,
    base: Checkpoint,
    cache_dir: Path,
    stores: Stores,
) -> Calibrated:
    """The sampled inputs of a task, checked against the base.

    Args:
        source: where they are.
        calibration: how many, how long, how large a batch, and the seed.
        task: the adapter's name; the sample depends on it.
        base: headers of the base.
        cache_dir: node-local folder for a remote base's tokenizer.
        stores: opens data and base.

    Raises:
        Refusal: they cannot be used: no data, no such column, not text, too long, token ids that the base lacks,
            images of another shape, no tokenizer.
    """
    where = f"adapters.{task}.data"
    files = find_files(source.path, stores, where)
    rows = Rows(files, source.limit, where)
    columns = choose_columns(source.text, rows.columns, rows.place)
    chosen = sample_rows(rows.n_rows, calibration.samples, calibration.seed, task)
    limits = limits_of(base)
    pad_id = limits.pad_id
    if columns[0] in ("input_ids", PIXELS) and source.text is None:
        made = [
            (row.place, from_row(row, limits, calibration.max_length)) for row in rows.take(chosen, columns)
        ]
    else:
        from ray_merge.calibration.tokens import load_tokenizer, tokenise

        tokenizer = load_tokenizer(base, where, cache_dir, stores)
        pad_id = pad_id if tokenizer.pad_id is None else tokenizer.pad_id
        texts = [(row.place, read_text(row, columns)) for row in rows.take(chosen, columns)]
        tokens = tokenise(tokenizer, [text for _, text in texts], calibration.max_length, where)
        made = [
            (place, from_tokens(place, one, limits, calibration.max_length))
            for (place, _), one in zip(texts, tokens, strict=True)
        ]
    if limits.vocabulary is not None and pad_id >= limits.vocabulary:
        pad_id = 0  # an added [PAD] that the embedding was never grown for
    examples = list(check_alike(made))
    order = sorted(range(len(examples)), key=lambda index: (examples[index].length, index))
    batches = tuple(
        _batch([examples[index] for index in order[start : start + calibration.batch_size]], pad_id)
        for start in range(0, len(order), calibration.batch_size)
    )
    return Calibrated(
        batches=batches,
        rows=len(examples),
        tokens=sum(int(example.mask.sum()) for example in examples if example.mask is not None),
        cut=sum(example.cut for example in examples),
        sha256=content_sha256(batches),
        row_numbers=tuple(chosen[index] for index in order),
    )


def _batch(examples: Sequence[Example], pad_id: int) -> Batch:
    import numpy as np
    import torch

    pixels = [example.pixels for example in examples if example.pixels is not None]
    return Batch(
        input_ids=_padded([example.ids for example in examples], pad_id),
        attention_mask=_padded([example.mask for example in examples], 0),
        token_type_ids=_padded([example.types for example in examples], 0),
        pixel_values=torch.from_numpy(np.stack(pixels)) if pixels else None,
    )


def _padded(rows: Sequence[np.ndarray[Any, Any] | None], fill: int) -> Tensor | None:
    import torch

    there = [row for row in rows if row is not None]
    if not there:
        return None
    padded = torch.full((len(there), max(len(row) for row in there)), fill, dtype=torch.int64)
    for index, row in enumerate(there):
        padded[index, : len(row)] = torch.tensor(row)
    return padded


def content_sha256(batches: Sequence[Batch]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in order."""
    content = hashlib.sha256()
    for index, batch in enumerate(batches):
        for field in fields(batch):
            tensor: Tensor | None = getattr(batch, field.name)
            if tensor is not None:
                content.update(f"{index} {field.name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                content.update(tensor.numpy().tobytes())
    return content.hexdigest()
