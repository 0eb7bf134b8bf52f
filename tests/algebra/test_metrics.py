"""Metrics against values worked out by hand, and against invariants."""

import math

import pytest
import torch

from ray_merge.algebra.metrics import (
    accuracy,
    f1_macro,
    mcc,
    pearson,
    perplexity,
    places_in_pool,
    spearman,
)

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
GUESSES = torch.tensor([0, 0, 1, 1, 2, 2])
# confusion, label by guess: [[2, 1, 0], [0, 1, 1], [0, 0, 1]]


def test_classes_by_hand():
    assert accuracy(GUESSES, LABELS) == pytest.approx(4 / 6)
    # F1 of 0: 2*2/(2+3), of 1: 2*1/(2+2), of 2: 2*1/(2+1)
    assert f1_macro(GUESSES, LABELS) == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    # c s - sum p t = 4*6 - (2*3 + 2*2 + 2*1) = 12; s^2 - sum p^2 = 24; s^2 - sum t^2 = 36 - 14 = 22
    assert mcc(GUESSES, LABELS) == pytest.approx(12 / math.sqrt(24 * 22))


def test_two_classes_have_the_usual_correlation():
    labels, guesses = torch.tensor([1, 1, 1, 0, 0, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 1, 0])
    tp, tn, fp, fn = 2, 3, 1, 1
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert mcc(guesses, labels) == pytest.approx(wanted)
    assert mcc(guesses, labels) == pytest.approx(pearson(guesses, labels))


def test_classes_that_nobody_names_do_not_count():
    assert f1_macro(torch.tensor([5, 9]), torch.tensor([5, 5])) == pytest.approx((2 / 3 + 0) / 2)
    assert f1_macro(LABELS + 70, LABELS + 70) == mcc(LABELS + 70, LABELS + 70) == 1.0


@pytest.mark.parametrize("metric", [mcc, pearson, spearman])
def test_a_constant_side_scores_zero_and_not_nan(metric):
    assert metric(torch.ones(6, dtype=torch.int64), LABELS) == 0.0
    assert metric(LABELS, torch.ones(6, dtype=torch.int64)) == 0.0


def test_correlations_by_hand():
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 5.0])
    # deviations (-1.5, -.5, .5, 1.5) and (-1.75, .25, -.75, 2.25): 5.5 / sqrt(5 * 8.75)
    assert pearson(x, y) == pytest.approx(5.5 / math.sqrt(5 * 8.75))
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    # ties take the mean of their ranks: (1.5, 1.5, 3, 4) against (1, 2, 3, 4): 4.5 / sqrt(4.5 * 5)
    assert spearman(torch.tensor([7.0, 7.0, 8.0, 9.0]), x) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_spearman_sees_order_alone_and_pearson_a_shift_not_at_all():
    x = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    y = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert spearman(x.exp(), y) == pytest.approx(spearman(x, y))
    assert pearson(1e6 + 3 * x, y) == pytest.approx(pearson(x, y), abs=1e-9)
    assert pearson(x, -2 * x) == pytest.approx(-1.0)


def test_perplexity_of_even_odds_is_the_number_of_choices():
    assert perplexity(10 * math.log(64), 10) == pytest.approx(64)
    assert perplexity(1e6, 1) == math.inf


def test_places_count_what_is_likelier_and_equal_ones_in_order():
    shares = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]])
    assert places_in_pool(shares, torch.tensor([2, 3])).tolist() == [2, 4]
    assert places_in_pool(shares, torch.tensor([3, 0])).tolist() == [3, 1]
    assert places_in_pool(shares, torch.tensor([1, 1])).tolist() == [1, 2]
