import pytest
import torch

from ray_merge.algebra import select
from ray_merge.algebra.select import LAUNCH, kth_largest_magnitude, launches

CASES = {
    "normal": lambda g: torch.randn(5000, generator=g, dtype=torch.float64),
    "many equal": lambda g: torch.randint(-3, 4, (5000,), generator=g).double(),
    "all equal": lambda g: torch.full((5000,), -0.75, dtype=torch.float64),
    "zeros": lambda g: torch.zeros(5000, dtype=torch.float64),
    "wide range": lambda g: (
        torch.randn(5000, generator=g, dtype=torch.float64) * 10.0 ** torch.arange(-30, 20, 0.01)
    ),
    "close together": lambda g: 1.0 + 1e-6 * torch.rand(5000, generator=g, dtype=torch.float64),
    "subnormal": lambda g: 1e-42 * torch.rand(5000, generator=g, dtype=torch.float64),
}


@pytest.fixture(params=[(2**14, 2**20), (4, 2**20), (4, 16)], ids=["direct", "two passes", "many passes"])
def limits(request, monkeypatch):
    monkeypatch.setattr(select, "DIRECT", request.param[0])
    monkeypatch.setattr(select, "GATHER", request.param[1])


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_the_kth_magnitude_is_that_of_a_sort(case, dtype):
    values = CASES[case](torch.Generator().manual_seed(1)).to(dtype)
    ordered = values.abs().sort(descending=True).values
    chunks = values.view(50, 100).split(7)
    for k in (1, 2, 999, 2500, 4999, 5000):
        assert kth_largest_magnitude(lambda: chunks, 5000, k) == float(ordered[k - 1])


@pytest.mark.parametrize("k", [0, 11])
def test_a_place_outside_the_entries_is_refused(k):
    with pytest.raises(ValueError, match=f"{k}-th largest of 10"):
        kth_largest_magnitude(lambda: [torch.ones(10)], 10, k)


def test_candidates_held_at_once_stay_below_the_limit(monkeypatch):
    monkeypatch.setattr(select, "DIRECT", 4)
    monkeypatch.setattr(select, "GATHER", 64)
    held = []
    inner = select.kth_largest
    monkeypatch.setattr(
        select, "kth_largest", lambda values, k: (held.append(len(values)), inner(values, k))[1]
    )
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).view(20, 1000)
    kth_largest_magnitude(lambda: values.split(3), 20_000, 4000)
    assert len(held) == 1
    assert held[0] <= 64


def test_chunks_are_counted_together_beside_a_cpu_only():
    half = LAUNCH // 2
    here = [torch.zeros(2, 3), torch.zeros(1, 3)]
    assert [chunk is given for chunk, given in zip(launches(here), here, strict=True)] == [True, True]
    there = [torch.empty(2, half // 2, device="meta") for _ in range(5)]
    assert [len(chunk) for chunk in launches(there)] == [LAUNCH, LAUNCH, half]
