import pytest
import torch

from ray_merge.demo import models
from ray_merge.demo.models import shuffled_batches
from ray_merge.demo.score import _logits, accuracy, normalised, normalised_mean, pearson


def test_pearson_is_torchs_correlation_and_is_free_of_scale_and_offset():
    generator = torch.Generator().manual_seed(0)
    pair_2N = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    x, y = pair_2N[0].tolist(), pair_2N[1].tolist()
    want = torch.corrcoef(pair_2N)[0, 1].item()
    # 50 terms of float64, so far below 1e-12.
    assert pearson(x, y) == pytest.approx(want, abs=1e-12)
    assert pearson([3 * value - 7 for value in x], y) == pytest.approx(want, abs=1e-12)
    assert pearson([-value for value in x], y) == pytest.approx(-want, abs=1e-12)


def test_a_constant_answer_correlates_with_nothing():
    assert pearson([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0.0


def test_accuracy_is_the_share_of_equal_entries():
    assert accuracy([0, 1, 2, 2], [0.0, 1.0, 1.0, 2.0]) == 0.75


def test_the_normalised_mean_averages_tasks_not_scores():
    merged, single = {"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9}
    assert normalised(0.4, 0.8) == 50.0
    assert normalised_mean(merged, single) == pytest.approx(75.0)


def test_rows_come_back_in_their_own_order_although_they_are_scored_by_length():
    class Lengths(torch.nn.Module):
        def forward(self, input_ids, token_type_ids, attention_mask):
            class Out:
                logits = attention_mask.sum(1, keepdim=True).float()

            return Out

    class Padder:
        def pad(self, batch, return_tensors):
            ids = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(row["input_ids"]) for row in batch], batch_first=True
            )
            return {"input_ids": ids, "token_type_ids": 0 * ids, "attention_mask": (ids > 0).long()}

    lengths = [1 + (7 * row) % 13 for row in range(150)]
    rows = [{"input_ids": [1] * n, "token_type_ids": [0] * n} for n in lengths]
    logits_NO = _logits(Lengths(), Padder(), rows)
    assert logits_NO[:, 0].tolist() == [float(n) for n in lengths]


def test_batches_hold_every_row_once_and_waste_little_padding():
    lengths = [1 + (37 * row) % 31 for row in range(500)]
    batches = shuffled_batches(lengths, 16, seed=3)
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    assert batches == shuffled_batches(lengths, 16, seed=3)
    assert batches != shuffled_batches(lengths, 16, seed=4)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    # Sorted within windows of 8 batches, a batch spans an eighth of the lengths: about 4 of 31.
    assert padded < 1.25 * sum(lengths)


def test_quiet_gives_back_the_settings_it_found():
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    with models.quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_one_thread_gives_back_the_threads_it_found():
    before = torch.get_num_threads()
    with models.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
