import math

import pytest
import torch

from ray_merge.algebra.sparsify import drop, magnitude_threshold, mask_seed, random_mask, trim


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0, 1, 17, 99, 100])
def test_trimming_keeps_the_asked_number_of_largest_magnitudes(kept, dtype):
    values = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=dtype)
    trimmed = trim(values, magnitude_threshold(lambda: values.split(3), 100, kept))
    largest = values.flatten().abs().argsort(descending=True)[:kept]
    want = torch.zeros(100, dtype=dtype)
    want[largest] = values.flatten()[largest]
    assert torch.equal(trimmed, want.view(10, 10))


def test_equal_magnitudes_share_one_fate():
    values = torch.tensor([[1.0, -2.0, 2.0, 0.5]])
    assert trim(values, magnitude_threshold(lambda: [values], 4, 1)).tolist() == [[0.0, -2.0, 2.0, 0.0]]


def mask(**changed):
    who = {"seed": 1, "site": "layers.0.q", "adapter": "mnli", "chunk": 0} | changed
    return random_mask((200, 50), 0.3, **who)


def test_a_mask_is_the_same_for_the_same_seed_site_adapter_and_chunk():
    assert torch.equal(mask(), mask())


@pytest.mark.parametrize("changed", [{"seed": 2}, {"site": "layers.1.q"}, {"adapter": "stsb"}, {"chunk": 1}])
def test_a_mask_changes_with_each_of_them(changed):
    assert not torch.equal(mask(), mask(**changed))


def test_names_that_run_together_do_not_share_a_seed():
    assert mask_seed(1, "a", "bc", 0) != mask_seed(1, "ab", "c", 0)


def test_a_mask_keeps_the_asked_share():
    share = float(mask().float().mean())
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 10_000)


def test_a_mask_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    mask()
    assert torch.equal(torch.rand(3), want)


def test_density_one_keeps_everything():
    assert bool(random_mask((40, 40), 1.0, seed=0, site="s", adapter="a", chunk=0).all())


def test_dropping_zeroes_and_rescales():
    values = torch.tensor([[1.0, -2.0, 3.0]])
    kept = torch.tensor([[True, False, True]])
    assert drop(values, kept, 2.0).tolist() == [[2.0, 0.0, 6.0]]
