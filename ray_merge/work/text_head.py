"""The matrix of a text head on this worker."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ray_merge.plan.text_head import HeadFile
from ray_merge.storage.cache import NodeCache
from ray_merge.storage.store import Stores
from ray_merge.work.tensors import TensorFile


def read_text_head(head: HeadFile, cache: Path, stores: Stores) -> Tensor:
    """(C, D) as stored: the bytes that the plan found finite, or the cache refuses them."""
    cached = NodeCache(cache / "adapters").fetch(stores.open(head.url), head.info.path, head.info)
    with TensorFile(cached.path) as file:
        return torch.clone(file.read(head.entry))
