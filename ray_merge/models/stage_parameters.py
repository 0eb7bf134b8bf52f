"""A module's parameters as a mapping that makes them when they are looked up, and lets go of them afterwards.

Owns: what `module.weight` gives while a stage runs. torch looks parameters up in `module._parameters` whoever asks:
the module's own forward, a parent that uses a child's weight without calling it (attention kernels, DeBERTa's
relative embeddings), and each of two modules that are tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Get = Callable[[str], Tensor]


class LazyParameters(dict[str, Any]):
    """Stands in for `module._parameters`.

    Iterating gives NaNs of the right shape, dtype and device that take no memory, so that `model.device` and
    `model.dtype` are right; looking one up gives the weight.

    Args:
        path: of the module.
        standins: leaf name -> NaNs of its shape, or None for a parameter that is switched off.
        get: runtime name -> weight to compute with.
    """

    def __init__(self, path: str, standins: Mapping[str, nn.Parameter | None], get: Get) -> None:
        super().__init__(standins)
        self._prefix = f"{path}." if path else ""
        self._get = get
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, leaf: str) -> Any:
        standin = super().__getitem__(leaf)
        if standin is None:
            return None
        if leaf not in self._held:
            self._held[leaf] = self._get(self._prefix + leaf)
        return self._held[leaf]

    def standin(self, leaf: str) -> Tensor:
        """NaNs of its shape, without looking the weight up."""
        value: Tensor = super().__getitem__(leaf)
        return value

    def let_go(self) -> None:
        """Forget the weights that were made; a graph that uses them keeps them."""
        self._held.clear()


def nan_parameter(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter of NaNs (of zeros, where the dtype has no NaN) that takes the memory of one."""
    value = torch.full((), torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=device)
    return nn.Parameter(value.expand(shape), requires_grad=False)


class WidenedTable(Tensor):
    """An embedding table that reads as a wider dtype: looking rows up widens these rows only.

    A table of 128 000 rows would otherwise be there a second time, twice as large, for a few hundred rows. Any other
    use than a look-up widens the whole.
    """

    stored: Tensor

    @staticmethod
    def __new__(cls: type[WidenedTable], stored: Tensor, dtype: torch.dtype) -> WidenedTable:
        """Of the shape of `stored`."""
        make: Any = Tensor._make_wrapper_subclass
        table: WidenedTable = make(cls, stored.shape, dtype=dtype, device=stored.device)
        table.stored = stored
        return table

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Look rows up in the stored dtype; anything else sees the widened table."""
        if function is torch.ops.aten.embedding.default and isinstance(args[0], cls):
            table, rows = args[:2]
            return torch.embedding(table.stored, rows).to(table.dtype)
        widened: dict[int, Tensor] = {}

        def widen(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            return widened.setdefault(id(value), value.stored.to(value.dtype))

        return function(*tree_map(widen, args), **tree_map(widen, kwargs or {}))
