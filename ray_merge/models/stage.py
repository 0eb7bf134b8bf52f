"""A stage: consecutive blocks of a transformers model, held by one worker, run forwards and backwards.

Owns: running the model's own forward with the weights of these blocks only. What stands before the blocks
(embeddings, a vision tower) is read by the first stage, what stands behind (norm, head) by the last one and only
when it runs to its end; the other stages compute with NaN in their place and refuse a model whose blocks notice.
Calls are pure: between two of them a stage holds weights as stored, and nothing else. Weights become float32 just
before a module runs and are let go of after it, so a bfloat16 base stays at its own size (stage_weights.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ray_merge.models.skeleton import Skeleton
from ray_merge.models.stage_blocks import Running, StageBlocks
from ray_merge.models.stage_calls import (
    Add,
    Alter,
    LocalGrad,
    Loss,
    StageGrads,
    StageInput,
    StageOutput,
    Watch,
    WeightGrad,
)
from ray_merge.models.stage_grad import nudged, told
from ray_merge.models.stage_weights import StageWeights
from ray_merge.models.stored_weights import StoredWeights

EMBEDS = ("image_embeds", "text_embeds", "pooler_output")
"""What a model without a classifier gives for the whole of an example, the first that there is."""


class Stage:
    """Some consecutive blocks of one model.

    Args:
        skeleton: of the model; the stage changes its modules, so it cannot be used for another stage.
        blocks: which blocks; `range(0)` for a skeleton that has no list of blocks.
        weights: of the same skeleton.
        watched: runtime paths of the modules whose inputs may be asked for, in any stage; default: every Linear and
            Conv1D.
        dtype: of the arithmetic.
        autocast: dtype that matrix products are made in, by torch.autocast; None for `dtype`.
        device: that holds the weights and computes; batches are moved there.

    Attributes:
        blocks: as given.
        watched: those of `watched` that this stage runs: its blocks', the front's in the first stage, the
            back's in the last one (called only in a forward to the end), in module order.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        blocks: range,
        weights: StoredWeights,
        *,
        watched: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.blocks = blocks
        self._list = skeleton.blocks
        self._model = skeleton.model
        self._dtype = dtype
        self._autocast = autocast
        self._device = torch.device(device)
        self._lock = Lock()
        self._check_range(skeleton.name)
        self._weights = StageWeights(skeleton, blocks, weights, dtype, self._device)
        self.watched = self._watchable(watched)
        for path in self.watched:
            module = self._model.get_submodule(path)
            module.register_forward_pre_hook(partial(self._saw, path), with_kwargs=True)
            module.register_forward_hook(partial(self._note, path), with_kwargs=True)
        inside = list(self._model.get_submodule(self._list.path).children()) if self._list else []
        self._blocks = StageBlocks(
            inside, blocks, skeleton.name, partial(self._weights.let_go, outside_only=True)
        )
        arguments = inspect.signature(self._model.forward).parameters.values()
        self._named = frozenset(one.name for one in arguments)
        self._takes_any = any(one.kind is one.VAR_KEYWORD for one in arguments)

    @property
    def is_first(self) -> bool:
        """Whether it holds what stands before the blocks."""
        return self.blocks.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it holds what stands behind the blocks."""
        return self._list is None or self.blocks.stop == self._list.count

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights that it holds now."""
        return self._weights.n_bytes

    def forward(
        self,
        given: StageInput,
        *,
        altered: Alter | None = None,
        watch: Watch | None = None,
        added: Add | None = None,
        to_end: bool = False,
    ) -> StageOutput:
        """One batch through the stage, without gradients.

        Args:
            given: the batch; `hidden` in every stage but the first.
            altered: what every weight is replaced by as it is used; an active adapter is W + dW.
            watch: called with the raw input of each module in `watched`, in the order in which they run.
            added: what is added to the output of each module in `watched`.
            to_end: in the last stage, run norm and head too.

        Raises:
            CheckpointError: the model cannot be cut here, or the checkpoint lacks a weight that is used.
        """
        run = Running(given=given, altered=altered, watch=watch, added=added, to_end=to_end and self.is_last)
        with self._lock, torch.no_grad():
            try:
                run.handed_in = self._handed_in(given)
                return self._output(run)
            finally:
                self._clear()

    def backward(
        self,
        given: StageInput,
        grad_out: Tensor | None = None,
        *,
        altered: Alter | None = None,
        phi: Sequence[Tensor] = (),
        loss: Loss | None = None,
        on_weight_grad: WeightGrad | None = None,
        added: Add | None = None,
        on_input: LocalGrad | None = None,
        recompute: bool = True,
    ) -> StageGrads:
        """Gradients of one batch; runs the stage again from its input, and each block twice where it recomputes.

        Then only hidden states are kept between its blocks, and memory is that of one block's activations.

        Args:
            given: as for `forward`.
            grad_out: of the hidden state that `forward` gave out, (B, L, H); unless there is a loss. Without either,
                `on_input` alone makes gradients.
            altered: as for `forward`; may use `phi`.
            phi: leaves whose gradients are wanted, requires_grad.
            loss: of the last stage, which then runs to its end.
            on_weight_grad: called for each module in `watched` that runs, last one first.
            added: as for `forward`; may use `phi`.
            on_input: of losses on the inputs of modules in `watched`, whose gradients it adds.
            recompute: False keeps the activations of all blocks, which is a third faster; the bits are the same.

        Raises:
            CheckpointError: as `forward`.
            ValueError: both of `grad_out` and `loss`, nothing to go back from, or a loss for a stage that is not the
                last one.
        """
        nothing = grad_out is None and loss is None and on_input is None
        if nothing or (grad_out is not None and loss is not None):
            raise ValueError("a stage goes backwards from either grad_out or a loss, or by on_input")
        if loss is not None and not self.is_last:
            raise ValueError(f"blocks {self.blocks} are not the last ones, so they have no loss")
        run = Running(
            given=given,
            altered=altered,
            weight_grad=on_weight_grad,
            added=added,
            on_input=on_input,
            to_end=loss is not None,
            with_grad=True,
            recompute=recompute,
        )
        with self._lock, torch.enable_grad():
            try:
                return self._grads(run, grad_out, phi, loss)
            finally:
                self._clear()

    # ---- one call

    def _output(self, run: Running) -> StageOutput:
        self._weights.running = run
        given = {
            **run.given.extras,
            "attention_mask": run.given.attention_mask,
            "position_ids": run.given.position_ids,
        }
        asked: dict[str, Any] = {
            name: value.to(self._device) for name, value in given.items() if value is not None
        }
        if "use_cache" in self._named:
            asked["use_cache"] = False
        if not self._takes_any:
            asked = {name: value for name, value in asked.items() if name in self._named}
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            made = self._blocks.run(run, lambda: self._model(**asked))
        hidden = run.hidden if run.hidden is not None else getattr(made, "last_hidden_state", None)
        logits = getattr(made, "logits", None)
        embeds = next((one for name in EMBEDS if (one := getattr(made, name, None)) is not None), None)
        for one in (hidden, logits, embeds):
            self._blocks.check_clean(run.handed_in, one)
        return StageOutput(hidden=hidden, logits=logits, embeds=embeds)

    def _handed_in(self, given: StageInput) -> Tensor | None:
        if self.is_first:
            return None
        if given.hidden is None:
            raise ValueError(f"blocks {self.blocks} need the hidden state of the stage before")
        return given.hidden.detach().to(
            self._device, self._dtype, copy=True
        )  # a block may write to its input

    def _grads(
        self, run: Running, grad_out: Tensor | None, phi: Sequence[Tensor], loss: Loss | None
    ) -> StageGrads:
        leaf = self._handed_in(run.given)
        wanted = list(phi)
        if leaf is not None:
            wanted.append(leaf.requires_grad_())
            run.handed_in = leaf.view_as(leaf)  # a leaf may not be written to
        if run.weight_grad is not None or run.on_input is not None:
            run.anchor = torch.zeros((), dtype=self._dtype, device=self._device, requires_grad=True)
            wanted.append(run.anchor)
        out = self._output(run)
        root = loss(out) if loss is not None else out.hidden
        assert root is not None, "a model that gives out no hidden state needs a loss"
        if loss is None:
            grad_out = torch.zeros_like(root) if grad_out is None else grad_out.to(root)
        grads: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if root.requires_grad and wanted:
            grads = torch.autograd.grad(root, wanted, grad_out, allow_unused=True)
        full = [
            torch.zeros_like(one) if grad is None else grad for one, grad in zip(wanted, grads, strict=True)
        ]
        return StageGrads(
            hidden=full[len(phi)] if leaf is not None else None,
            phi=tuple(full[: len(phi)]),
            loss=root.detach() if loss is not None else None,
        )

    def _clear(self) -> None:
        self._weights.running = None
        self._weights.let_go()

    # ---- what callers see of modules

    def _check_range(self, name: str) -> None:
        count = self._list.count if self._list else 0
        if self.blocks.step != 1 or not 0 <= self.blocks.start <= self.blocks.stop <= count:
            raise ValueError(f"{self.blocks} are not blocks of {name}, which has {count}")
        if self._list and not self.blocks:
            raise ValueError(f"a stage of {name} holds at least one of its {count} blocks")

    def _watchable(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        from transformers.pytorch_utils import Conv1D

        modules = dict(self._model.named_modules())
        if asked is None:
            found = [path for path, one in modules.items() if isinstance(one, (nn.Linear, Conv1D))]
        else:
            unknown = next((path for path in asked if path not in modules), None)
            if unknown is not None:
                raise ValueError(f"the model has no module {unknown}")
            wanted = set(asked)
            found = [path for path in modules if path in wanted]
        return tuple(path for path in found if self._runs(path))

    def _runs(self, path: str) -> bool:
        """Whether this stage runs a module with its weights; outside of the blocks: as far as names can tell."""
        block = self._weights.block_of(path)
        return (self.is_first or self.is_last) if block is None else block in self.blocks

    def _saw(self, path: str, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        run = self._weights.running
        if run is None or (run.watch is None and run.on_input is None) or self._is_idle(run):
            return None
        tensor = _first_tensor(args, kwargs)
        if tensor is None:
            return None
        if self._weights.block_of(path) is None:
            self._blocks.check_clean(run.handed_in, tensor)
        if run.watch is not None:
            run.watch(path, tensor)
        if run.on_input is None or run.anchor is None or not torch.is_grad_enabled():
            return None
        made = nudged(tensor, run.anchor, partial(run.on_input, path))
        return (
            tuple(made if value is tensor else value for value in args),
            {name: made if value is tensor else value for name, value in kwargs.items()},
        )

    def _note(self, path: str, _module: nn.Module, args: Any, kwargs: Any, made: Any) -> Any:
        run = self._weights.running
        if run is None or (run.added is None and run.weight_grad is None) or self._is_idle(run):
            return None
        tensor = _first_tensor(args, kwargs)
        if tensor is None or not isinstance(made, Tensor):
            return None
        changed = None
        if run.added is not None and (more := run.added(path, tensor)) is not None:
            changed = made + more.to(made.dtype)
        if run.weight_grad is not None and run.anchor is not None:
            told_of = made if changed is None else changed
            changed = told(told_of, tensor, run.anchor, partial(run.weight_grad, path))
        return changed

    def _is_idle(self, run: Running) -> bool:
        """Whether the model computes what stands before this stage's blocks, with NaN and for nothing."""
        return not run.began and not self.is_first


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
