"""Random adapters, recipes and methods: the exported adapter, reloaded in PEFT, is the merged checkpoint."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ray_merge
from zoo import relative_error

TOLERANCE = 1e-5
VOCAB, HIDDEN = 32, 16

LLAMA = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip
"""Module in a layer -> (outputs, inputs)."""

GPT2 = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=16)
    return GPT2LMHeadModel(config)


FAMILIES = {
    "llama": (llama, "model.layers", LLAMA, "model.embed_tokens"),
    "gpt2": (gpt2, "transformer.h", GPT2, "transformer.wpe"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    found = {}
    for name, (make, *_) in FAMILIES.items():
        torch.manual_seed(0)
        model, folder = make().eval(), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = folder, model
    return found


@st.composite
def adapters(draw, family: str) -> list[dict[str, Any]]:
    """Configs of one to three adapters: other ranks, scales, patterns and targets each."""
    _, _, modules, _ = FAMILIES[family]
    result = []
    for seed in range(draw(st.integers(1, 3))):
        targets = draw(st.lists(st.sampled_from(sorted(modules)), min_size=1, max_size=4, unique=True))
        patterned = draw(st.sampled_from([None, *targets]))
        config: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": draw(st.integers(1, 5)),
            "lora_alpha": draw(st.sampled_from([1, 4, 7.5, 16])), "use_rslora": draw(st.booleans()),
            "target_modules": targets, "peft_version": "0.21.2", "fan_in_fan_out": family == "gpt2",
        }  # fmt: skip
        if patterned:
            config["rank_pattern"] = {patterned: draw(st.integers(1, 4))}
            config["alpha_pattern"] = {patterned: draw(st.sampled_from([2, 3]))}
        result.append(
            {"config": config, "embedding": draw(st.booleans()), "seed": seed + draw(st.integers(0, 99))}
        )
    return result


def write(folder: Path, family: str, given: dict[str, Any]) -> str:
    """The files of one adapter, as PEFT names them."""
    _, layers, modules, embedding = FAMILIES[family]
    config, generator = given["config"], torch.Generator().manual_seed(given["seed"])

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    tensors = {}
    for layer in range(2):
        for target in config["target_modules"]:
            outputs, inputs = modules[target]
            rank = config.get("rank_pattern", {}).get(target, config["r"])
            prefix = f"base_model.model.{layers}.{layer}.{target}.lora_"
            tensors |= {f"{prefix}A.weight": random(rank, inputs), f"{prefix}B.weight": random(outputs, rank)}
    if given["embedding"]:
        rows = VOCAB if family == "llama" else 16
        prefix = f"base_model.model.{embedding}.lora_embedding_"
        tensors |= {f"{prefix}A": random(config["r"], rows), f"{prefix}B": random(HIDDEN, config["r"])}
        config = {**config, "target_modules": [*config["target_modules"], embedding]}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, sort_keys=True))
    return str(folder)


METHODS = [
    ("task_arithmetic", {"lambda": 0.7}),
    ("linear", {}),
    ("cat", {}),
    ("ties", {"scope": "tensor", "density": 0.5, "space": "core"}),
    ("knots_ties", {"scope": "tensor", "density": 0.6}),
    ("dare_linear", {"space": "core", "density": 0.5}),
]


@given(data=st.data())
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_an_exported_adapter_reloaded_in_peft_equals_the_merged_checkpoint(bases, data):
    from peft import PeftModel

    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    base, live = bases[family]
    chosen = data.draw(adapters(family))
    method, parameters = data.draw(st.sampled_from(METHODS))
    with tempfile.TemporaryDirectory() as home:
        paths = {f"a{i}": write(Path(home) / f"a{i}", family, given) for i, given in enumerate(chosen)}
        recipe = {
            "base_model": str(base), "output": f"{home}/out", "adapters": paths,
            "merges": [{"name": "m", "merge_method": method, "parameters": parameters, "export": "both"}],
        }  # fmt: skip
        ray_merge.run(recipe, engine="local", cache_dir=f"{home}/cache")
        merged = type(live).from_pretrained(f"{home}/out/m").eval()
        adapted = PeftModel.from_pretrained(copy.deepcopy(live), f"{home}/out/m/adapter").eval()
        ids = torch.arange(12).reshape(2, 6)
        with torch.no_grad():
            got, want = adapted(ids).logits, merged(ids).logits
        assert relative_error(got, want) < TOLERANCE
        assert all(
            bool(result.probed) for result in ray_merge.verify(f"{home}/out", cache_dir=f"{home}/cache")
        )


@given(data=st.data())
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_truncated_export_keeps_what_it_promises(bases, data):
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    base, _ = bases[family]
    chosen = data.draw(adapters(family))
    wanted = data.draw(
        st.sampled_from(
            [{"export_rank": 1}, {"export_rank": 3}, {"export_tolerance": 0.2}, {"export_tolerance": 0.0}]
        )
    )
    with tempfile.TemporaryDirectory() as home:
        paths = {f"a{i}": write(Path(home) / f"a{i}", family, given) for i, given in enumerate(chosen)}
        merges = [
            {"name": "exact", "merge_method": "cat", "export": "adapter"},
            {"name": "less", "merge_method": "cat", "export": "adapter", **wanted},
        ]
        recipe = {"base_model": str(base), "output": f"{home}/out", "adapters": paths, "merges": merges}
        ray_merge.run(recipe, engine="local", cache_dir=f"{home}/cache")
        exact, less = (deltas(Path(home) / "out" / name) for name in ("exact", "less"))
        errors = reported_errors(Path(home) / "out" / "less")
        assert exact.keys() == less.keys() == errors.keys()
        for module, (delta, _) in exact.items():
            kept, rank = less[module]
            off = float((kept - delta).norm() / delta.norm())
            assert rank <= wanted.get("export_rank", rank)
            assert off <= wanted.get("export_tolerance", 1.0) + 1e-6
            assert errors[module] == pytest.approx(off, abs=1e-5)


def deltas(folder: Path) -> dict[str, tuple[torch.Tensor, int]]:
    """Module -> (B A, rank) of an exported adapter."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    found = {}
    for name, A in tensors.items():
        module, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        if side in ("A.weight", "embedding_A"):
            B = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            found[module] = (B.double() @ A.double(), A.shape[0])
    return found


def reported_errors(folder: Path) -> dict[str, float]:
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "ray_merge" / "sites.parquet").to_pylist()
    return {row["site"]: row["truncation_error"] for row in rows}
