"""What goes into a stage's calls and what comes out, as plain data, and the callbacks that a call takes.

Shape legend beside that of spec.py: B examples, L tokens of each, H width of the hidden state, N = B L.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Alter = Callable[[str, Tensor], Tensor]
"""(runtime name of a parameter, its weight in the stage's dtype) -> the weight to use; must not write to it."""

Watch = Callable[[str, Tensor], None]
"""(runtime path of a module, the first tensor that it is called with); must not write to it."""

WeightGrad = Callable[[str, Tensor, Tensor], None]
"""(runtime path of a Linear or Conv1D, its input (B, L, I), its output's gradient (B, L, O)); last module first."""

Add = Callable[[str, Tensor], Tensor | None]
"""(runtime path of a watched module, its input (..., I)) -> what is added to its output (..., O); None for nothing.

Not called for a module whose parent multiplies by its weight itself; `Alter` sees that weight all the same."""

LocalGrad = Callable[[str, Tensor], Tensor | None]
"""(runtime path of a watched module, its input) -> gradient of a local loss with respect to that input; None for none.

Called once for each run of the module while autograd goes backwards through it, also where nothing before the module
wants a gradient, so that the loss itself can be summed there; what it returns is added."""

Loss = Callable[["StageOutput"], Tensor]
"""What is minimised, a scalar, from the output of the last stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """One batch on its way through the stages.

    Args:
        hidden: what the stage before gave out, (B, L, H); None for the first stage.
        attention_mask: (B, L), 1 = token; None: the model has none or all count.
        position_ids: (B, L); None: the model makes them.
        extras: the other arguments of the model's forward (input_ids, token_type_ids, pixel_values ...). Every stage
            gets them: masks, positions and rotary tables are computed by the model itself, from their shapes.
    """

    hidden: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """What a stage made of a batch.

    Args:
        hidden: (B, L, H) for the next stage; of the last stage: what its last block gave out. None where the model
            has no list of blocks and gives out no hidden state.
        logits: of the last stage that ran to its end, if the class has a head; shape as the class gives them.
        embeds: of the last stage that ran to its end, (B, D): a projection (CLIP), else what a pooler made.
    """

    hidden: Tensor | None = None
    logits: Tensor | None = None
    embeds: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGrads:
    """Gradients of one batch.

    Args:
        hidden: of the stage's input, (B, L, H); None for the first stage.
        phi: one for each tensor of `phi`, of its shape; zeros where nothing depends on it.
        loss: its value, a scalar, where a loss was given.
    """

    hidden: Tensor | None = None
    phi: tuple[Tensor, ...] = ()
    loss: Tensor | None = None
