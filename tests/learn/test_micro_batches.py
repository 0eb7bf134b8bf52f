"""Value and gradient of a batch do not depend on how it is cut, with rows of different lengths."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lessons import make_school
from whole_models import ROWS, exact_norm, factors, run, write_adapter, write_rows

NAMES = ("a", "b")


def _bert(folder):
    make_school(folder)
    return {
        name: {"path": str(folder / name), "data": str(folder / f"{name}.jsonl")} for name in ("two", "one")
    }


def _llama(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    adapters = {}
    for seed, name in enumerate(NAMES):
        some = factors(model, [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)], 2, seed)
        prompts = [[1 + (7 * row + 3 * place + seed) % 19 for place in range(1 + row)] for row in range(ROWS)]
        adapters[name] = {
            "path": write_adapter(folder / name, some, {}, task_type="CAUSAL_LM"),
            "data": write_rows(folder / f"{name}.jsonl", [{"input_ids": one} for one in prompts]),
            "task": "classification",
        }
    return adapters


ENTROPY = {"objective": "entropy", "anchors": "none", "diversity": 0.0, "tokens": 3}
CASES = {
    "nsc": (_bert, "nsc", {"layers": "all"}),
    "entropy of three tokens": (_llama, "tara_a", ENTROPY),
    "agreement of three tokens": (_llama, "adamerging", {"objective": "agreement", "tokens": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_batch_may_be_cut(tmp_path, monkeypatch, case):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    make, method, parameters = CASES[case]
    adapters = make(tmp_path)
    whole, cut = (
        run(
            tmp_path,
            method,
            adapters,
            {**parameters, "micro_batch_size": size},
            output=str(tmp_path / f"out{size}"),
        )
        for size in (0, 1)
    )
    torch.testing.assert_close(cut[1], whole[1], rtol=0, atol=1e-10)
    for site, phi in whole[0].items():
        torch.testing.assert_close(cut[0][site], phi, rtol=0, atol=1e-10)
