"""One adapted module of an adapter, as it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray_merge.spec import TensorEntry
from ray_merge.storage.adapter_names import Role


@dataclass(frozen=True, slots=True)
class StoredModule:
    """The tensors of one adapted module, under their roles."""

    name: str
    depth: int
    tensors: Mapping[Role, TensorEntry]
