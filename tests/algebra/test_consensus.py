import pytest
import torch

from ray_merge.algebra.consensus import Ballot


def made():
    return torch.randn(4, 30, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def cast(values, votes=None, shares=None):
    ballot = Ballot(values[0])
    for index, value in enumerate(values):
        ballot.add(value, None if votes is None else votes[index], 1.0 if shares is None else shares[index])
    return ballot


def test_the_entries_whose_sign_has_the_larger_sum_are_averaged():
    values = made()
    agree = values.sign() == values.sum(0).sign()
    want = (values * agree).sum(0) / agree.sum(0)
    torch.testing.assert_close(cast(values).elect(), want, rtol=1e-13, atol=1e-13)


def test_zeros_do_not_count_as_agreeing():
    values = torch.tensor([[[2.0]], [[0.0]], [[4.0]]])
    assert cast(values).elect().item() == 3.0


def test_votes_may_differ_from_what_is_averaged():
    votes, weights = made(), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    values = votes * weights[:, None, None]
    agree = votes.sign() == votes.sum(0).sign()
    want = (values * agree).sum(0) / agree.sum(0)
    torch.testing.assert_close(cast(values, votes).elect(), want, rtol=1e-13, atol=1e-13)


def test_the_divisor_may_be_a_sum_of_shares_or_left_out():
    values, shares = made(), [0.5, 1.0, 2.0, 0.25]
    agree = values.sign() == values.sum(0).sign()
    total = (values * agree).sum(0)
    divisor = (agree * torch.tensor(shares, dtype=torch.float64)[:, None, None]).sum(0)
    torch.testing.assert_close(cast(values, shares=shares).elect(), total / divisor, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(cast(values, shares=shares).elect(divide=False), total, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("zero_sign", "want"), [(0, [0.0, 3.0, 0.0]), (1, [2.0, 3.0, 0.0]), (-1, [-1.0, 3.0, 0.0])]
)
def test_an_exact_tie_goes_to_whom_the_rule_names(zero_sign, want):
    values = torch.tensor([[[2.0, 3.0, 0.0]], [[-1.0, 0.0, 0.0]], [[-1.0, 0.0, 0.0]]])
    ballot = cast(values)
    assert ballot.has_undecided
    assert ballot.elect(zero_sign).flatten().tolist() == want


def test_entries_that_nobody_kept_are_not_undecided():
    assert not cast(torch.zeros(3, 2, 2)).has_undecided
