"""How a stage runs some blocks of a model whose own forward runs around them: skip, hand in, hand out, stop.

Owns: what each block does in place of its forward during one call. The model's forward is never copied or traced:
it makes masks, positions and rotary tables for every block itself. Blocks before the stage hand their input
through, the first own block gets the hidden state of the stage before, and the block behind the last own one ends the
forward with its input, so whatever a model does between two blocks is done exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ray_merge.errors import NotCuttable, RayMergeError
from ray_merge.models.block_list import hidden_name
from ray_merge.models.stage_calls import Add, Alter, LocalGrad, StageInput, Watch, WeightGrad

Call = Callable[..., Any]


class Stop(BaseException):
    """Ends the model's forward; no `except Exception` of a model may swallow it."""


class WrongFormat(Exception):
    """The model's forward did not take what a skipped block gave back."""


@dataclass(slots=True, kw_only=True)
class Running:
    """One call of a stage, while it runs.

    Args:
        given: the batch.
        altered: changes weights.
        watch: sees inputs of modules.
        weight_grad: sees inputs and output gradients of modules.
        added: is added to outputs of modules.
        on_input: adds to the gradients of modules' inputs.
        to_end: whether the forward goes on behind the last block.
        with_grad: whether a backward follows.
        recompute: whether a block's activations are made again when the backward gets there.
    """

    given: StageInput
    altered: Alter | None = None
    watch: Watch | None = None
    weight_grad: WeightGrad | None = None
    added: Add | None = None
    on_input: LocalGrad | None = None
    to_end: bool = False
    with_grad: bool = False
    recompute: bool = True

    anchor: Tensor | None = None
    handed_in: Tensor | None = None
    hidden: Tensor | None = None
    upcoming: int = 0
    began: bool = False
    in_order: bool = True
    first_seen: Tensor | None = None
    n_blocks: int = 0

    @property
    def finished(self) -> bool:
        """Whether the model's last block is done, each was called once, and nothing behind them is asked for."""
        return self.in_order and self.began and self.upcoming == self.n_blocks and not self.to_end


class StageBlocks:
    """Puts itself in place of the forwards of a model's blocks.

    Args:
        blocks: the model's blocks; empty: the model runs as a whole.
        own: which of them this stage holds.
        model_name: for messages.
        began: called when the first own block of a call begins.
    """

    def __init__(
        self, blocks: list[nn.Module], own: range, model_name: str, began: Callable[[], None]
    ) -> None:
        self.own = own
        self.count = len(blocks)
        self._model_name = model_name
        self._began = began
        self._as_tuple = False
        self._run: Running | None = None
        for index, block in enumerate(blocks):
            name = hidden_name(block) or ""
            forward: Any
            if index < own.start:
                forward = partial(self._skip, index, name)
            elif index < own.stop:
                forward = partial(self._compute, index, name, block.forward)
            else:
                forward = partial(self._hand_out, index, name)
            block.forward = forward

    def run(self, running: Running, call: Callable[[], Any]) -> Any:
        """The result of `call`, the model's forward; None where it was stopped.

        A skipped block gives back a tensor or a tuple, as the installed version's blocks do: which one is found by
        trying, and kept.
        """
        running.n_blocks = self.count
        formats = (self._as_tuple, not self._as_tuple) if self.own.start > 0 else (self._as_tuple,)
        problem: Exception | None = None
        for self._as_tuple in formats:
            running.began, running.upcoming, running.first_seen, running.in_order = False, 0, None, True
            self._run = running
            try:
                return call()
            except Stop:
                return None
            except RayMergeError:  # ours, or a signal's
                raise
            except Exception as error:
                if running.began or self.own.start == 0:
                    raise
                problem = error
            finally:
                self._run = None
        why = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        raise self._refusal(f"its forward takes more from block to block than one hidden state ({why})")

    def check_clean(self, given: Tensor | None, made: Tensor | None) -> None:
        """Refuse a result that depends on what stands before the blocks: in later stages that is NaN."""
        if self.own.start == 0 or made is None or not bool(torch.isnan(made).any()):
            return
        if given is not None and bool(torch.isnan(given).any()):
            return
        raise self._refusal(
            "its blocks or head use what it computed before its first block (or their values overflow to NaN)"
        )

    def _refusal(self, why: str) -> NotCuttable:
        return NotCuttable(
            f"{self._model_name} cannot be cut into stages (this one: blocks {self.own.start} to {self.own.stop - 1} "
            f"of {self.count}): {why}; write `stages: 1` in the recipe"
        )

    def _skip(self, index: int, name: str, *args: Any, **kwargs: Any) -> Any:
        run = self._called(index)
        hidden = _hidden(args, kwargs, name)
        self._check_format(run, hidden)
        return (hidden,) if self._as_tuple else hidden

    def _compute(self, index: int, name: str, forward: Call, *args: Any, **kwargs: Any) -> Any:
        run = self._called(index)
        if index == self.own.start and not run.began:
            if self.own.start > 0:
                self._check_format(run, _hidden(args, kwargs, name))
                args, kwargs = _with_hidden(args, kwargs, name, run.handed_in)
            run.began = True
            self._began()
        if run.with_grad and run.recompute:
            # Recomputed when the backward gets here, so that only one block's activations are there at a time.
            forward = partial(_unpacked, forward)
            made = checkpoint(forward, args, kwargs, use_reentrant=False, preserve_rng_state=False)
        else:
            made = forward(*args, **kwargs)
        if index == self.count - 1:
            run.hidden = made[0] if isinstance(made, (tuple, list)) else made
        return made

    def _hand_out(self, index: int, name: str, *args: Any, **kwargs: Any) -> Any:
        run = self._called(index)
        run.hidden = _hidden(args, kwargs, name)
        raise Stop

    def _called(self, index: int) -> Running:
        run = self._run
        assert run is not None, "blocks are called inside of `run` only"
        if index != run.upcoming:
            if len(self.own) < self.count:
                raise self._refusal(f"it runs block {index} where block {run.upcoming} was due")
            run.in_order = False
        run.upcoming = index + 1
        return run

    def _check_format(self, run: Running, hidden: Any) -> None:
        if not isinstance(hidden, Tensor):
            raise WrongFormat(f"a block is called with {type(hidden).__name__}, not with a hidden state")
        if run.first_seen is None:
            run.first_seen = hidden
        elif hidden.shape != run.first_seen.shape:
            raise WrongFormat(
                f"a block is called with a hidden state {tuple(hidden.shape)}, the first one with "
                f"{tuple(run.first_seen.shape)}"
            )


def _unpacked(forward: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`checkpoint` takes keywords of its own, which a block's must not meet."""
    return forward(*args, **kwargs)


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    return args[0] if args else kwargs.get(name)


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, hidden: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {name: hidden})
