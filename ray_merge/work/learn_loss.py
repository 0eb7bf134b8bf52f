"""What learning minimises, for one batch of one task: entropy of predictions, or null-space ratios of activations.

Entropy is a loss on the logits of the last stage. Null-space ratios (NSC) are losses on the inputs of modules, in
whatever stage these run; each adds its gradient where autograd comes by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ray_merge.algebra.moments import token_rows
from ray_merge.algebra.objectives import divergence, information, null_space_ratio
from ray_merge.errors import RunFailed
from ray_merge.models.losses import check_logits
from ray_merge.models.stage_calls import StageInput, StageOutput
from ray_merge.plan.task_heads import TaskHead


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyLoss:
    """f of one batch (algebra/objectives.py), times its share.

    With `objective: entropy` H(p|x) - diversity H(mean p); with `objective: agreement` KL(own || p), where own is what
    the task's own adapter predicts alone.

    Args:
        head: of the task.
        given: the batch.
        parameters: of the merge.
        share: of the predictions of the step's batch of the task.
        own: log p (N, C) of the own adapter, for agreement.
        matrix: (C, D) of a text head; None for the others.
    """

    head: TaskHead
    given: StageInput
    parameters: Mapping[str, Any]
    share: float
    own: Tensor | None = None
    matrix: Tensor | None = None

    def __call__(self, out: StageOutput) -> Tensor:
        """The loss, a scalar."""
        logits_NC = self.predictions(out)
        normalise = bool(self.parameters["normalize_entropy"])
        if self.own is not None:
            return divergence(logits_NC, self.own, normalise=normalise) * self.share
        diversity = float(self.parameters["diversity"])
        return information(logits_NC, diversity=diversity, normalise=normalise) * self.share

    def predictions(self, out: StageOutput) -> Tensor:
        """The logits that count, (N, C)."""
        return _widened(self._rows(self._logits(out)))

    def _logits(self, out: StageOutput) -> Tensor:
        if self.matrix is not None:
            return text_logits(out, self.matrix, self.head)
        if out.logits is None:
            raise RunFailed(f"{self.head.model_class} gave out no logits; use merge_method: nsc")
        ids = self.given.extras.get("input_ids")
        check_logits(self.head.kind, out.logits, self.head.n_outputs, None if ids is None else ids.shape[1])
        return out.logits

    def _rows(self, logits: Tensor) -> Tensor:
        """The predictions that count, (N, C)."""
        if self.head.kind != "causal":
            return logits
        tokens, mask = int(self.parameters["tokens"]), self.given.attention_mask
        ends_B = (
            torch.full((len(logits),), logits.shape[1], device=logits.device)
            if mask is None
            else mask.sum(dim=1)
        )
        if tokens == 1:  # of the token behind the prompt
            return logits[torch.arange(len(logits), device=logits.device), ends_B - 1]
        places_L = torch.arange(logits.shape[1], device=logits.device)
        chosen_BL = (places_L < tokens)[None] & (places_L[None] < ends_B[:, None])
        return logits[chosen_BL]


def _widened(values: Tensor) -> Tensor:
    """In float32 at least: losses of bfloat16 logits would have eight bits."""
    return values if values.dtype == torch.float64 else values.float()


def text_logits(out: StageOutput, matrix: Tensor, head: TaskHead) -> Tensor:
    """logit_scale * cos(embedding, text embedding of each class), (B, C), as CLIP classifies.

    Raises:
        RunFailed: the model gives out no embedding, or one of another width.
    """
    embeds = out.embeds
    if embeds is None or embeds.shape[-1] != matrix.shape[1]:
        got = "no embedding" if embeds is None else f"embeddings of {embeds.shape[-1]} numbers"
        raise RunFailed(
            f"{head.model_class} gives out {got}, but the text head has {matrix.shape[1]} columns; give a head that "
            "was made with this model"
        )
    assert head.file is not None
    embeds = _widened(embeds)
    rows_CD = functional.normalize(matrix.to(embeds), dim=-1)
    return head.file.logit_scale * functional.normalize(embeds, dim=-1) @ rows_CD.T


def _is_by_token(x: Tensor, mask: Tensor | None) -> bool:
    """Whether an input has a row for each token, as `token_rows` takes it; else each example has as many rows."""
    return mask is not None and tuple(x.shape[:-1]) in (tuple(mask.shape), (mask.numel(),))


@dataclass(frozen=True, slots=True, kw_only=True)
class NullSpaceLoss:
    """Mean null-space ratio of a task's activations at its target sites (NSC), times its share.

    A module that runs several times in one forward counts each time.

    Args:
        bases: module path -> orthonormal rows of the own adapter's A there, (R, I).
        n_sites: target sites of the task in all stages.
        mask: (B, L), 1 = token; None where every row counts.
        unmasked: module paths whose rows are no tokens, so that all of them count.
        share: of the rows of the step's batch of the task.
        token_share: of its tokens.
    """

    bases: Mapping[str, Tensor]
    n_sites: int
    mask: Tensor | None
    unmasked: frozenset[str]
    share: float
    token_share: float
    values: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, path: str, x: Tensor) -> Tensor | None:
        """The gradient of this module's part with respect to its input, of the shape of `x`."""
        basis_RI = self.bases.get(path)
        if basis_RI is None:
            return None
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            leaf = x.detach().requires_grad_()
            mask = None if path in self.unmasked else self.mask
            rows_NI = token_rows(leaf, mask)
            share = self.token_share if _is_by_token(x, mask) else self.share
            wide_NI = rows_NI if rows_NI.dtype == torch.float64 else rows_NI.float()
            value = null_space_ratio(wide_NI, basis_RI.to(wide_NI)).mean() * (share / self.n_sites)
            (gradient,) = torch.autograd.grad(value, leaf)
        self.values.setdefault(path, []).append(float(value.detach()))
        return gradient

    def value(self, paths: Sequence[str]) -> float:
        """The part of the loss that these modules have.

        Raises:
            RunFailed: one of them never ran.
        """
        missing = next((path for path in paths if path not in self.values), None)
        if missing is not None:
            raise RunFailed(
                f"nsc: the model never called {missing}, so nothing can be measured there; leave it out by `modules`"
            )
        return sum(sum(self.values[path]) for path in paths)
