"""Phi of a causal model by the entropy of the tokens that follow its prompts, against plain autograd."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lessons import information
from whole_models import ROWS, Whole, batches, check, exact_norm, factors, run, write_adapter, write_rows

NAMES = ("a", "b")
PLACES = [f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "v_proj")]


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A base of two blocks, and (folder, adapters): two of them with prompts of one to six tokens."""
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    adapters = {}
    for seed, name in enumerate(NAMES):
        some = factors(model, PLACES, 2 + seed, seed)
        prompts = [[1 + (7 * row + 3 * place + seed) % 19 for place in range(1 + row)] for row in range(ROWS)]
        adapters[name] = {
            "path": write_adapter(folder / name, some, {}, task_type="CAUSAL_LM"),
            "data": write_rows(folder / f"{name}.jsonl", [{"input_ids": one} for one in prompts]),
            "task": "classification",
        }
    return folder, adapters


@pytest.mark.parametrize("tokens", [1, 3])
def test_phi_is_that_of_autograd(school, monkeypatch, tokens):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    folder, adapters = school
    parameters = {"objective": "entropy", "anchors": "none", "alpha": 0.1, "diversity": 0.5, "tokens": tokens}
    phi, history = run(
        folder,
        "tara_a",
        adapters,
        {**parameters, "normalize_entropy": True},
        output=str(folder / f"out{tokens}"),
    )
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    whole = Whole(model, [adapters[name]["path"] for name in NAMES], "tara_a")
    given = {name: batches(folder, name, adapters[name]["data"]) for name in NAMES}

    def predictions(batch):
        logits, lengths = whole.model(**batch).logits, batch["attention_mask"].sum(1).tolist()
        if tokens == 1:  # the one behind the prompt
            return torch.stack([logits[row, length - 1] for row, length in enumerate(lengths)])
        return torch.cat([logits[row, : min(tokens, length)] for row, length in enumerate(lengths)])

    def loss(step):
        values = [
            information(predictions(given[name][step]), diversity=0.5, normalise=True) for name in NAMES
        ]
        return 0.1 * torch.logsumexp(torch.stack(values) / 2 / 0.1, 0)

    curve = whole.learn(loss)
    check(phi, whole)
    torch.testing.assert_close(history, torch.tensor(curve, dtype=torch.float64), rtol=0, atol=1e-8)
