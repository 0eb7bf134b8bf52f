"""Gradients seen, and added to, while autograd goes backwards through a linear map.

Owns: two autograd functions that change no number on the way forward. The input is saved as autograd saves tensors,
so that recomputing a block makes it again and no block's inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tell = Callable[[Tensor, Tensor], None]
More = Callable[[Tensor], "Tensor | None"]


class _Told(torch.autograd.Function):
    """Hands (input, gradient of the output) to a callback."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, x: Tensor, _anchor: Tensor, tell: Tell) -> Tensor:
        """A copy of `made`: what follows may write to it."""
        ctx.save_for_backward(x)
        ctx.tell = tell
        return made.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Pass the gradient on."""
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.tell(x.detach(), grads[0])
        return grads[0], None, grads[0].new_zeros(()), None


def told(made: Tensor, x: Tensor, anchor: Tensor, tell: Tell) -> Tensor:
    """`made`, such that `tell(x, gradient of made)` is called once when autograd goes backwards.

    Args:
        made: what a module made of x.
        x: its input.
        anchor: a scalar that requires a gradient; asking autograd for it visits every module, also where no weight and
            no input requires one.
        tell: called without gradients.
    """
    apply: Any = _Told.apply
    result: Tensor = apply(made, x, anchor, tell)
    return result


class _Nudged(torch.autograd.Function):
    """Adds what a callback makes of the input to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, more: More) -> Tensor:
        """The same numbers."""
        ctx.save_for_backward(x)
        ctx.more = more
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Pass the gradient on with what is added."""
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            more = ctx.more(x.detach())
        total = grads[0] if more is None else grads[0] + more.to(grads[0])
        return total, grads[0].new_zeros(()), None


def nudged(x: Tensor, anchor: Tensor, more: More) -> Tensor:
    """`x`, such that `more(x)` is added to its gradient, and called once, when autograd goes backwards.

    Args:
        x: a module's input.
        anchor: a scalar that requires a gradient, so that autograd comes by even where nothing before x asks for one.
        more: called without gradients.
    """
    apply: Any = _Nudged.apply
    result: Tensor = apply(x, anchor, more)
    return result
