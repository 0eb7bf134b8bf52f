"""The matrix of a text head on this worker."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ray_merge.errors import RunFailed
from ray_merge.plan.task_heads import HeadFile
from ray_merge.storage.cache import NodeCache
from ray_merge.storage.store import Stores
from ray_merge.work.tensors import TensorFile


def read_text_head(head: HeadFile, cache: Path, stores: Stores) -> Tensor:
    """(C, D) as stored.

    Raises:
        RunFailed: it holds NaN or Inf.
    """
    cached = NodeCache(cache / "adapters").fetch(stores.open(head.url), head.info.path, head.info)
    with TensorFile(cached.path) as file:
        matrix_CD = torch.clone(file.read(head.entry))
    if not bool(torch.isfinite(matrix_CD).all()):
        raise RunFailed(
            f"{head.url}/{head.info.path}: {head.entry.name} holds NaN or Inf; make the text head again"
        )
    return matrix_CD
