"""Scores of predictions against labels, in float64; definitions as in scikit-learn and scipy.

Where a score is not defined (one class only, a constant side) it is 0, not NaN: a merge that always says the same
must not fall out of a mean. Legend: N rows, K classes, P labels of all tasks together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def accuracy(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Share of equal entries; both int64."""
    return float((predicted_N == labels_N).double().mean())


def f1_macro(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN); the classes are those that occur on either side."""
    table_KK = _confusion(predicted_N, labels_N)
    hits_K = table_KK.diagonal()
    seen_K = table_KK.sum(dim=0) + table_KK.sum(dim=1)
    return float((2 * hits_K / seen_K).mean())


def mcc(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004), -1 to 1; 0 where a side has one class."""
    table_KK = _confusion(predicted_N, labels_N)
    total, right = table_KK.sum(), table_KK.diagonal().sum()
    true_K, made_K = table_KK.sum(dim=1), table_KK.sum(dim=0)
    both = right * total - true_K @ made_K
    scale = torch.sqrt(total**2 - true_K @ true_K) * torch.sqrt(total**2 - made_K @ made_K)
    return float(both / scale) if scale > 0 else 0.0


def pearson(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Correlation of two series; 0 where one is constant."""
    x_N, y_N = predicted_N.double(), labels_N.double()
    # A constant series minus its rounded mean is not exactly zero.
    if len(x_N) < 2 or bool((x_N == x_N[0]).all()) or bool((y_N == y_N[0]).all()):
        return 0.0
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    return max(-1.0, min(1.0, float(x_N @ y_N / (x_N.norm() * y_N.norm()))))


def spearman(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Correlation of ranks, ties with the mean of their ranks; 0 where a series is constant."""
    return pearson(_mean_ranks(predicted_N), _mean_ranks(labels_N))


def perplexity(nats: float, tokens: int) -> float:
    """Exp of the mean negative log-likelihood of a token; inf where that is beyond float64."""
    mean = nats / tokens
    return math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf


def places_in_pool(probabilities_NP: Tensor, right_N: Tensor) -> Tensor:
    """(N,) int64 place of the right label among all, 1 for the first; equal ones count in the order of the pool."""
    right_N1 = right_N[:, None]
    own_N1 = probabilities_NP.gather(1, right_N1)
    earlier_NP = torch.arange(probabilities_NP.shape[1], device=right_N.device)[None, :] < right_N1
    before_NP = (probabilities_NP > own_N1) | ((probabilities_NP == own_N1) & earlier_NP)
    return 1 + before_NP.sum(dim=1)


CLASSES: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1_macro,
    "mcc": mcc,
}
"""Metrics of predicted classes, by the recipe's words."""

NUMBERS: Mapping[str, Callable[[Tensor, Tensor], float]] = {"pearson": pearson, "spearman": spearman}
"""Metrics of predicted numbers."""


def _confusion(predicted_N: Tensor, labels_N: Tensor) -> Tensor:
    """(K, K) float64 counts, label by prediction, of the classes that occur."""
    classes, codes = torch.unique(torch.cat([labels_N, predicted_N]), return_inverse=True)
    n_classes, n_rows = len(classes), len(labels_N)
    cells = codes[:n_rows] * n_classes + codes[n_rows:]
    return torch.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes).double()


def _mean_ranks(values_N: Tensor) -> Tensor:
    """(N,) float64 ranks from 1."""
    _, codes, counts = torch.unique(values_N.double(), return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(dim=0).double() - (counts.double() - 1) / 2
    return ranks[codes]
