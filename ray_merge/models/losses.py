"""Log-likelihoods whose gradients a Fisher diagonal is the mean square of.

Owns: what is differentiated for each kind of head and of labels. A classifier's label is one of C classes; a
regression's is its output plus N(0, 1); a causal model's are the tokens that follow, each given those before it.
The expected square over all labels is exact: for a regression sum_k (d f_k)^2; for a classifier with logits z

    E_y (d log p_y)^2 = d z^T (diag(p) - p p^T) d z = sum_k (v_k . d z)^2,    k = 1 .. C - 1
    v_k = sqrt(p_k s_(k+1) / s_k) (e_k - sum_(j > k) p_j e_j / s_(k+1)),    s_k = sum_(j >= k) p_j

which is one backward pass fewer than there are classes. Never: reads labels, knows stages.
Legend: B examples, L tokens, C outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from statistics import NormalDist

import torch
from torch import Tensor

from ray_merge.errors import CheckpointError

NO_TOKEN = -1
"""Stands where no token follows."""

POSITIONS_AT_ONCE = 32
"""A row of probabilities of 128 000 tokens takes 1 MB in float64."""


def check_logits(head: str, logits: Tensor, n_outputs: int, n_tokens: int | None) -> None:
    """Refuse logits that are not what the head was taken for.

    Args:
        head: classification, regression or causal.
        logits: (B, C), or (B, L, V) of a causal model.
        n_outputs: C.
        n_tokens: L.

    Raises:
        CheckpointError: another shape.
    """
    wanted = 3 if head == "causal" else 2
    size = n_tokens if head == "causal" else n_outputs
    if logits.dim() != wanted or logits.shape[1] != size:
        shape = f"(B, {size}, V)" if head == "causal" else f"(B, {size})"
        raise CheckpointError(
            f"the model gives logits {tuple(logits.shape)} where {head} needs {shape}; correct `task` of the adapter "
            "in the recipe, or use a merge method that needs no labels"
        )


def expected_passes(head: str, n_outputs: int) -> int:
    """How many scores `expected_score` has."""
    return n_outputs if head == "regression" else n_outputs - 1


def expected_score(head: str, logits_BC: Tensor, index: int) -> Tensor:
    """A scalar; its squared gradients in one example, summed over all `index`, are the expected ones over labels."""
    if head == "regression":
        return logits_BC[:, index].sum()
    p_BC = torch.softmax(logits_BC.detach().double(), dim=-1)
    tiny = torch.finfo(torch.float64).tiny
    tail_B = p_BC[:, index:].sum(dim=-1).clamp_(min=tiny)
    rest_B = p_BC[:, index + 1 :].sum(dim=-1)
    v_BC = torch.zeros_like(p_BC)
    v_BC[:, index] = 1
    v_BC[:, index + 1 :] = -p_BC[:, index + 1 :] / rest_B.clamp(min=tiny)[:, None]
    v_BC *= (p_BC[:, index] * rest_B / tail_B).sqrt_()[:, None]
    return (v_BC.to(logits_BC) * logits_BC).sum()


def label_score(head: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The log-likelihood of labels, up to what does not depend on the model; a scalar, the sum over examples.

    Args:
        head: classification, regression or causal.
        logits: (B, C) or (B, L, V).
        labels: (B,) int64 classes; (B, C) residuals label - output; (B, L) int64 the token behind each position.
    """
    if head == "regression":
        return (logits * labels.to(logits)).sum()
    if head == "classification":
        return torch.log_softmax(logits, dim=-1).gather(1, labels[:, None]).sum()
    there_BL = labels != NO_TOKEN
    chosen_N = logits[there_BL]
    picked_N = chosen_N.gather(1, labels[there_BL][:, None])[:, 0]
    return (picked_N - torch.logsumexp(chosen_N, dim=-1)).sum()


def drawn_labels(
    head: str, logits: Tensor, input_ids: Tensor | None, mask: Tensor | None, draws: Sequence[Random]
) -> Tensor:
    """Labels drawn by the model's own probabilities, as `label_score` takes them.

    Args:
        head: classification, regression or causal.
        logits: (B, C) or (B, L, V).
        input_ids: (B, L), of a causal model.
        mask: (B, L), 1 = token; None: all are.
        draws: one generator for each example.
    """
    logits = logits.detach()
    if head == "regression":
        normal = NormalDist()
        rows = [[normal.inv_cdf(_inside(draw)) for _ in range(logits.shape[1])] for draw in draws]
        return torch.tensor(rows, dtype=torch.float64, device=logits.device)
    if head == "classification":
        shares_B = torch.tensor([draw.random() for draw in draws], dtype=torch.float64)
        return _chosen(logits, shares_B.to(logits.device))
    assert input_ids is not None
    labels_BL = next_tokens(input_ids, mask)
    for row, draw in enumerate(draws):
        (places,) = torch.nonzero(labels_BL[row] != NO_TOKEN, as_tuple=True)
        for start in range(0, len(places), POSITIONS_AT_ONCE):
            some = places[start : start + POSITIONS_AT_ONCE]
            shares_N = torch.tensor([draw.random() for _ in some], dtype=torch.float64)
            labels_BL[row, some] = _chosen(logits[row, some], shares_N.to(logits.device))
    return labels_BL


def next_tokens(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) int64: the token behind each position, NO_TOKEN where there is none or either is padding."""
    following_BL = torch.full_like(input_ids, NO_TOKEN)
    following_BL[:, :-1] = input_ids[:, 1:]
    if mask is not None:
        both_BL = mask[:, 1:].bool() & mask[:, :-1].bool()
        following_BL[:, :-1].masked_fill_(~both_BL, NO_TOKEN)
    return following_BL


def _chosen(logits_NC: Tensor, shares_N: Tensor) -> Tensor:
    """The first class at which the summed probability passes a share of the whole."""
    sums_NC = torch.softmax(logits_NC.double(), dim=-1).cumsum(dim=-1)
    targets_N1 = (shares_N * sums_NC[:, -1])[:, None]
    return torch.searchsorted(sums_NC, targets_N1, right=True)[:, 0].clamp_(max=logits_NC.shape[1] - 1)


def _inside(draw: Random) -> float:
    """A number above 0 and below 1."""
    return (int(draw.random() * 2**52) + 0.5) / 2**52
