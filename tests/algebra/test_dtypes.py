import pytest
import torch

from ray_merge.algebra.dtypes import to_work, work_dtype


@pytest.mark.parametrize(
    ("dtypes", "want"),
    [
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([], torch.float32),
    ],
)
def test_arithmetic_is_float32_unless_an_input_is_float64(dtypes, want):
    assert work_dtype([torch.zeros(1, dtype=dtype) for dtype in dtypes]) == want


def test_a_tensor_at_an_odd_address_or_transposed_is_copied_to_an_aligned_one():
    whole = torch.arange(101, dtype=torch.float32)
    for tensor in (whole[1:], whole[1:].view(20, 5).T):
        ready = to_work(tensor, torch.float32)
        assert ready.data_ptr() % 64 == 0
        assert ready.is_contiguous()
        assert torch.equal(ready, tensor)


def test_gradients_are_left_behind():
    assert not to_work(torch.ones(2, requires_grad=True), torch.float32).requires_grad
