"""What the adapters do to each other's tokens, from moments alone.

Owns: root mean squares over a task's tokens h of |s B A h| and |A h|, for every adapter and every task. Never reads
tokens. Float64.
Formula: the mean of |X h|^2 is tr(X G X^T) / count; OSRM (arXiv 2505.22934) makes |A_j h_i| small for j != i, and
|s_j B_j A_j h_i| is what it is meant to make small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_merge.algebra.moments import Moments
from ray_merge.algebra.sketch import SketchedMoments
from ray_merge.spec import Factor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Interference:
    """Root mean squares at one site; row i is the tokens of task i, column j is adapter j.

    Args:
        updates: (D, T) float64: of |s_j B_j A_j h_i|, what adapter j adds to the output.
        activations: (D, T) float64: of |A_j h_i|.
    """

    updates: Tensor
    activations: Tensor


def interference(factors: Sequence[Factor], moments: Sequence[Moments | SketchedMoments]) -> Interference:
    """Every adapter against the tokens of every task.

    Args:
        factors: T of them, inputs in the columns of A; none of DoRA. A rank of 0 gives zeros.
        moments: D of them, of the same site; they need not be the adapters' own tasks.

    Raises:
        ValueError: no moments or factors, moments without tokens, other columns, or DoRA, whose update is not s B A.
    """
    if not factors or not moments:
        raise ValueError(f"interference needs factors and moments, got {len(factors)} and {len(moments)}")
    if any(factor.magnitude is not None for factor in factors):
        raise ValueError("an adapter is DoRA here, whose update depends on the base weight; leave it out")
    updates, activations = [], []
    for one in moments:
        squares = [_mean_squares(factor, one) for factor in factors]
        updates.append([update for update, _ in squares])
        activations.append([activation for _, activation in squares])
    return Interference(updates=_roots(updates), activations=_roots(activations))


def _mean_squares(factor: Factor, moments: Moments | SketchedMoments) -> tuple[float, float]:
    """Means over the tokens of |s B A h|^2 and of |A h|^2."""
    mean_RR = mean_product(factor.A, moments)
    B_OR = factor.scale * factor.B.double()
    return float(((B_OR.T @ B_OR) * mean_RR).sum()), float(mean_RR.trace())


def mean_product(X_KI: Tensor, moments: Moments | SketchedMoments) -> Tensor:
    """Mean over the tokens of (X h)(X h)^T.

    Args:
        X_KI: (K, I), any floating dtype.
        moments: of inputs of I columns. Of a sketch, the middle of what its bound allows is used.

    Returns:
        (K, K) float64.

    Raises:
        ValueError: other columns, or no tokens.
    """
    _check(X_KI, moments)
    exact_KI = X_KI.double()
    if isinstance(moments, SketchedMoments):
        seen_KL = exact_KI @ moments.sketch.double().T
        return (seen_KL @ seen_KL.T + moments.gram_error * (exact_KI @ exact_KI.T)) / moments.count
    return exact_KI @ moments.gram.double() @ exact_KI.T / moments.count


def mean_square(X_KI: Tensor, moments: Moments | SketchedMoments) -> float:
    """Mean over the tokens of |X h|^2: the trace of `mean_product`, without its other entries."""
    _check(X_KI, moments)
    exact_KI = X_KI.double()
    if isinstance(moments, SketchedMoments):
        seen = float((exact_KI @ moments.sketch.double().T).square().sum())
        return (seen + moments.gram_error * float(exact_KI.square().sum())) / moments.count
    return float(((exact_KI @ moments.gram.double()) * exact_KI).sum()) / moments.count


def _check(X_KI: Tensor, moments: Moments | SketchedMoments) -> None:
    if X_KI.ndim != 2 or X_KI.shape[1] != moments.n_columns or moments.count < 1:
        raise ValueError(
            f"a matrix {tuple(X_KI.shape)} was given moments of {moments.n_columns} columns and "
            f"{moments.count} token rows; they must be of the same site and hold tokens"
        )


def _roots(squares: list[list[float]]) -> Tensor:
    return torch.tensor(squares, dtype=torch.float64).clamp(min=0.0).sqrt()
