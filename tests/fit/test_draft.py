import pytest
import torch
import transformers
from fit_cases import DECODER, UNKNOWN, P, dense, fit, pair, random, refusal

from ray_merge.errors import AdapterError
from ray_merge.fit.draft import by_suffix, matrix_shape
from tiny import Q0, factors, llama_tensors


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), (1, 1)), ((5,), (5, 1)), ((5, 3), (5, 3)), ((2, 5, 3), (10, 3)), ((4, 1), (4, 1))],
)
def test_a_parameter_of_any_shape_is_rows(shape, matrix):
    assert matrix_shape(shape) == matrix


def test_the_first_ending_in_order_wins_as_in_peft():
    assert by_suffix(("norm", "model.norm"), "model.norm") == "norm"
    assert by_suffix({"": (1,)}, "anything") == ""
    assert by_suffix(("norm",), "model.layers") is None


EXPERTS = "model.layers.0.mlp.experts"
QWEN = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **DECODER, "num_experts": 3,
    "num_experts_per_tok": 2, "moe_intermediate_size": 6,
}  # fmt: skip


def qwen_base():
    shapes = {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}
    return random({f"{EXPERTS}.{e}.{name}.weight": shape for e in range(3) for name, shape in shapes.items()})


def test_adapters_of_single_experts_are_linear_layers(tmp_path):
    # What transformers 4 had: one module per expert, called as the disk calls it.
    module = f"{EXPERTS}.1.gate_proj"
    tensors = pair(module, 2, 6, 8)
    fitted, adapter = fit(tmp_path, qwen_base(), QWEN, tensors, {"use_rslora": True})
    assert fitted.sites[module].layout == "linear"
    product = tensors[f"{P}{module}.lora_B.weight"].double() @ tensors[f"{P}{module}.lora_A.weight"].double()
    assert torch.allclose(dense(adapter, tmp_path / "a")[module], 4 / 2**0.5 * product, rtol=1e-12)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 fuses nothing")
def test_a_fused_parameter_that_was_saved_whole_is_refused(tmp_path):
    tensors = factors(f"{EXPERTS}.0.gate_proj", rows=6) | {f"{P}{EXPERTS}.down_proj": torch.ones(3, 8, 6)}
    message = refusal(
        AdapterError, fit, tmp_path, qwen_base(), QWEN, tensors, {"modules_to_save": ["experts"]}
    )
    assert f"{EXPERTS}.down_proj is 3 tensors in {tmp_path}/base" in message
    assert "merge it with PEFT" in message


def test_a_name_that_is_nobodys_says_what_the_base_has(tmp_path):
    message = refusal(AdapterError, fit, tmp_path, llama_tensors(), UNKNOWN, factors(f"x.{Q0}.y"))
    assert (
        f"x.{Q0}.y matches nothing in {tmp_path}/base (the base has, for example, lm_head.weight)" in message
    )
