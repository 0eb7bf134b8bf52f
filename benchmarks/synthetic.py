"""Makes what the benchmarks merge: a random Llama-shaped base in bfloat16 and LoRA adapters on all its linears.

    python benchmarks/synthetic.py FOLDER [--layers 22] [--hidden 2048] [--adapters 8] [--rank 16]

The default is TinyLlama's shape: 1.1 B parameters, 2.2 GB in 5 shards. Weights are random, never zeros, and a
folder that is there already is used again. One layer is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """(O, I) of the seven linears of one layer, in TinyLlama's proportions; at 4096 those of Llama 3 8B."""
    kv, ff = sizes(hidden)
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ff, hidden), "mlp.up_proj": (ff, hidden),
        "mlp.down_proj": (hidden, ff),
    }  # fmt: skip


def sizes(hidden: int) -> tuple[int, int]:
    """Width of keys and of the MLP."""
    return (1024, 14336) if hidden == 4096 else (hidden // 8, hidden * 11 // 4)


def make_base(
    folder: Path, *, layers: int = 22, hidden: int = 2048, vocab: int = 32000, shards: int = 5
) -> Path:
    """A sharded bfloat16 checkpoint that loads with LlamaForCausalLM."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    weight_map: dict[str, str] = {}
    total = 0
    runs = [range(layers * i // shards, layers * (i + 1) // shards) for i in range(shards)]
    for index, run in enumerate(runs):
        tensors = {
            f"model.layers.{layer}.{name}.weight": random(*shape)
            for layer in run
            for name, shape in shapes(hidden).items()
        }
        for layer in run:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        if index == 0:
            tensors["model.embed_tokens.weight"] = random(vocab, hidden)
        if index == shards - 1:
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            tensors["lm_head.weight"] = random(vocab, hidden)
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": sizes(hidden)[1], "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, sizes(hidden)[0] // 64), "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(folder: Path, seed: int, *, layers: int = 22, hidden: int = 2048, rank: int = 16) -> Path:
    """One PEFT adapter on all seven linears, float32, alpha = 2 r."""
    if (folder / "adapter_config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in shapes(hidden).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = (
                torch.randn(rank, columns, generator=generator) / columns**0.5
            )
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "synthetic/llama",
        "r": rank, "lora_alpha": 2 * rank, "target_modules": list(LINEARS), "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make(folder: Path, *, layers: int, hidden: int, adapters: int, rank: int) -> tuple[Path, dict[str, Path]]:
    """Base and adapters below `folder`, which names their sizes."""
    home = folder / f"llama-{layers}x{hidden}"
    base = make_base(home / "base", layers=layers, hidden=hidden)
    made = {
        f"a{i}": make_adapter(home / f"r{rank}" / f"a{i}", i + 1, layers=layers, hidden=hidden, rank=rank)
        for i in range(adapters)
    }
    return base, made


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name the synthetic model's size."""
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    add_options(options)
    given = options.parse_args()
    print(
        make(given.folder, layers=given.layers, hidden=given.hidden, adapters=given.adapters, rank=given.rank)
    )
