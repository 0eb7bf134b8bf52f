"""The weights of one stage: kept as they are stored, made ready just before a module computes with them.

Owns: which weights are read when. Those of the stage's blocks are read at once; what stands before the blocks is read
on first use by the first stage, what stands behind by the last one. A later stage gets NaN for what stands before.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ray_merge.models.conversion import Slot
from ray_merge.models.skeleton import Skeleton
from ray_merge.models.stage_blocks import Running, Stop
from ray_merge.models.stage_parameters import LazyParameters, WidenedTable, nan_parameter
from ray_merge.models.stored_weights import StoredWeights


class StageWeights:
    """Puts itself in place of the parameters of a model.

    Args:
        skeleton: of the model, which is changed.
        own: the stage's blocks.
        weights: of the same skeleton.
        dtype: of the arithmetic.
        device: that holds the weights and computes.

    Attributes:
        running: the call that is under way; None: parameters are NaN.

    Raises:
        RuntimeError: the skeleton is a stage already.
    """

    def __init__(
        self, skeleton: Skeleton, own: range, weights: StoredWeights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.running: Running | None = None
        self._model = skeleton.model
        self._list = skeleton.blocks
        self._own = own
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._loaded: dict[tuple[Slot, ...], Tensor] = {}
        self._lazy: dict[str, LazyParameters] = {}
        with torch.inference_mode(
            False
        ):  # a tensor made in inference mode could never take part in a backward
            self._take_parameters(skeleton.name)
            self._load_blocks()
            self._load_buffers()

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights that are held now."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._loaded.values())

    def block_of(self, name: str) -> int | None:
        """The block that a module or parameter lies in; None: outside of the blocks."""
        return self._list.block_of(name) if self._list else None

    def let_go(self, *, outside_only: bool = False) -> None:
        """Forget what was made ready; what is held as stored stays."""
        for path, lazy in self._lazy.items():
            if not outside_only or self.block_of(path) is None:
                lazy.let_go()

    def _take_parameters(self, name: str) -> None:
        for path, module in self._model.named_modules():
            own = module.__dict__["_parameters"]
            if type(own) is LazyParameters:
                raise RuntimeError(f"this skeleton of {name} is a stage already; build another one")
            if not own:
                continue
            standins = {leaf: value if value is None else self._standin(value) for leaf, value in own.items()}
            lazy = self._lazy[path] = LazyParameters(path, standins, self._weight)
            module.__dict__["_parameters"] = lazy
            module.register_forward_hook(partial(_let_go, lazy))

    def _standin(self, value: nn.Parameter) -> nn.Parameter:
        dtype = self._dtype if value.is_floating_point() else value.dtype
        return nan_parameter(value.shape, dtype, self._device)

    def _load_blocks(self) -> None:
        for path, lazy in self._lazy.items():
            if self.block_of(path) in self._own:
                for leaf, value in lazy.items():
                    name = f"{path}.{leaf}"
                    if value is not None and name in self._weights:
                        self._stored(name)

    def _load_buffers(self) -> None:
        """Those on disk replace what the class computed; any stage may need those outside of the blocks for masks."""
        for path, module in self._model.named_modules():
            block = self.block_of(path)
            for leaf, value in module._buffers.items():
                if value is None or (block is not None and block not in self._own):
                    continue
                name = f"{path}.{leaf}" if path else leaf
                found = self._weights.read(name).view(value.shape) if name in self._weights else value
                wide = value.is_floating_point() and self._dtype == torch.float64
                module._buffers[leaf] = found.to(self._device, torch.float64 if wide else value.dtype)

    def _stored(self, name: str) -> Tensor:
        key = self._weights.key(name)
        if key not in self._loaded:
            with torch.inference_mode(False):
                self._loaded[key] = self._weights.read(name).to(self._device)
        return self._loaded[key]

    def _weight(self, name: str) -> Tensor:
        """What a module computes with."""
        run, block = self.running, self.block_of(name)
        path, _, leaf = name.rpartition(".")
        outside = block is None and self._list is not None
        if outside and run is not None and run.finished:
            raise Stop
        before = outside and self._own.start > 0 and run is not None and not run.began
        if run is None or before or (block is not None and block not in self._own):
            return self._lazy[path].standin(leaf)
        absent = name not in self._weights
        if absent:  # a head that only an adapter has
            weight = self._lazy[path].standin(leaf)
        else:
            weight = self._widened(self._stored(name), self._model.get_submodule(path))
        used = weight if run.altered is None else run.altered(name, weight)
        if absent and used is weight:
            self._weights.read(name)  # its refusal says why the weight is not there
        return used

    def _widened(self, stored: Tensor, module: nn.Module) -> Tensor:
        if not stored.is_floating_point() or stored.dtype == self._dtype:
            return stored
        if isinstance(module, nn.Embedding):
            return WidenedTable(stored, self._dtype)
        return stored.to(self._dtype)


def _let_go(lazy: LazyParameters, *_: Any) -> None:
    lazy.let_go()
