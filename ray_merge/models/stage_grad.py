"""Input and output gradient of a linear map, seen while autograd goes backwards through it.

Owns: one autograd function that changes nothing. The input is saved as autograd saves tensors, so that recomputing
a block makes it again and no block's inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tell = Callable[[Tensor, Tensor], None]


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
