"""How long `ray-merge plan` takes, and how much memory, for a base of Llama-3.1-405B's shape and many adapters.

    python benchmarks/plan_scale.py FOLDER [--adapters 1000] [--merges 200] [--layers 126] [--mixed | --apart]

The headers are real and the data are holes (os.truncate): the base alone claims 812 GB and takes a few MB of disk.
Adapters have rank 16 on all seven linears, so that all headers are equal; with --mixed ranks 8 to 64 and five
choices of modules; with --apart every adapter has a rank and a choice of modules in each layer of its own, so that no
two headers have the same tensors. The recipe holds sweeps, combinations, merges of some adapters and one of all.
`plan` runs twice in processes of its own, once as a table and once as JSON; seconds are wall time, memory is the peak
of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ray_merge.spec import DTYPE_BYTES
from ray_merge.storage.headers import make_header

HIDDEN, FFN, KV_ROWS, VOCABULARY, SHARDS = 16384, 53248, 1024, 128256, 191
"""Of Llama-3.1-405B: 128 heads of 128 values, 8 of them for keys and values."""

MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV_ROWS, HIDDEN), "self_attn.v_proj": (KV_ROWS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}  # fmt: skip
"""(outputs, inputs) of the linears of one layer."""

TARGETS = (
    ("self_attn.q_proj", "self_attn.v_proj"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    tuple(MODULES),
)

KEPT = 0.8
"""Share of the modules that an adapter has with --apart."""

Layout = list[tuple[str, str, tuple[int, ...]]]
"""(name, dtype, shape) of the tensors of a file."""


def write_sparse(path: Path, tensors: Layout) -> None:
    """A safetensors file with a real header; its data is one hole."""
    header, _ = make_header(tensors, {"format": "pt"})
    size = len(header)
    for _, dtype, shape in tensors:
        n_items = 1
        for length in shape:
            n_items *= length
        size += n_items * DTYPE_BYTES[dtype]
    path.write_bytes(header)
    os.truncate(path, size)


def base_tensors(layers: int) -> Layout:
    """All tensors of the base in order of the forward pass."""
    tensors: Layout = [("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors += [(f"{prefix}.{name}.weight", "BF16", shape) for name, shape in MODULES.items()]
        tensors += [
            (f"{prefix}.{name}.weight", "BF16", (HIDDEN,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    return [
        *tensors,
        ("model.norm.weight", "BF16", (HIDDEN,)),
        ("lm_head.weight", "BF16", (VOCABULARY, HIDDEN)),
    ]


def make_base(folder: Path, layers: int) -> None:
    """The base checkpoint: files, index and config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = base_tensors(layers)
    weight_map: dict[str, str] = {}
    for index in range(SHARDS):
        part = tensors[len(tensors) * index // SHARDS : len(tensors) * (index + 1) // SHARDS]
        name = f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        write_sparse(folder / name, part)
        weight_map |= {tensor: name for tensor, _, _ in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": 128,
        "num_key_value_heads": 8, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")


def make_adapter(folder: Path, modules: Sequence[tuple[int, str]], rank: int, targets: Sequence[str]) -> None:
    """One adapter with factors of `rank` at each (layer, module)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: Layout = []
    for layer, name in modules:
        outputs, inputs = MODULES[name]
        prefix = f"base_model.model.model.layers.{layer}.{name}"
        tensors += [
            (f"{prefix}.lora_A.weight", "BF16", (rank, inputs)),
            (f"{prefix}.lora_B.weight", "BF16", (outputs, rank)),
        ]
    write_sparse(folder / "adapter_model.safetensors", sorted(tensors))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "meta-llama/Llama-3.1-405B",
        "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05, "bias": "none", "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "target_modules": sorted({name.rpartition(".")[2] for name in targets}), "peft_version": "0.17.1",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def adapter_kinds(
    count: int, layers: int, kind: str
) -> Iterator[tuple[list[tuple[int, str]], int, Sequence[str]]]:
    """(modules, rank, target modules) of each adapter."""
    generator = random.Random(0)
    for index in range(count):
        targets, rank = tuple(MODULES), 16
        if kind == "mixed":
            targets, rank = TARGETS[generator.randrange(len(TARGETS))], generator.choice((8, 16, 32, 64))
        elif kind == "apart":
            rank = 4 + index
        all_modules = [(layer, name) for layer in range(layers) for name in targets]
        kept = [one for one in all_modules if kind != "apart" or generator.random() < KEPT]
        yield kept, rank, targets


def recipe(names: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Entries that expand to `count` merges: one of all adapters, sweeps, pairs, triples, and merges of some."""
    generator = random.Random(1)
    entries: list[dict[str, Any]] = [
        {"name": "all", "merge_method": "task_arithmetic", "parameters": {"lambda": 0.01}},
        {
            "name": "scale", "merge_method": "task_arithmetic", "adapters": list(names[:8]),
            "sweep": {"lambda": [round(0.05 * point, 2) for point in range(1, 21)]},
        },
        {
            "name": "trim", "merge_method": "ties", "adapters": list(names[:10]), "parameters": {"scope": "tensor"},
            "sweep": {"density": [0.1, 0.2, 0.3, 0.5, 0.7], "lambda": [0.4, 0.6, 0.8, 1.0]},
        },
        {
            "name": "pairs", "merge_method": "knots_ties", "adapters": list(names[10:20]),
            "parameters": {"scope": "tensor"}, "combinations": {"choose": 2},
        },
        {
            "name": "triples", "merge_method": "dare_linear", "adapters": list(names[20:28]),
            "parameters": {"density": 0.5}, "combinations": {"choose": 3},
        },
    ]  # fmt: skip
    for index in range(count - 1 - 20 - 20 - 45 - 56):
        some = sorted(generator.sample(list(names), min(len(names), generator.randint(2, 100))))
        method = ("linear", "task_arithmetic", "dare_linear")[index % 3]
        entries.append({"name": f"some-{index}", "merge_method": method, "adapters": some})
    return entries


def make(folder: Path, *, adapters: int, merges: int, layers: int, kind: str) -> Path:
    """Everything that is planned; what is there is used again. Returns the recipe."""
    base, home = folder / f"base-{layers}", folder / f"{kind}-{layers}-{adapters}"
    if not (base / "generation_config.json").is_file():
        make_base(base, layers)
    names = [f"a{index:04d}" for index in range(adapters)]
    for name, (modules, rank, targets) in zip(names, adapter_kinds(adapters, layers, kind), strict=True):
        if not (home / name / "adapter_config.json").is_file():
            make_adapter(home / name, modules, rank, targets)
    document = {
        "base_model": str(base), "base_model_names": ["meta-llama/Llama-3.1-405B"], "output": str(folder / "out"),
        "max_shard_size": "5GB", "adapters": {name: str(home / name) for name in names},
        "merges": recipe(names, merges),
    }  # fmt: skip
    path = folder / f"{kind}.yaml"
    path.write_text(json.dumps(document, indent=1))  # JSON is YAML
    return path


def measured(command: Sequence[str]) -> tuple[float, int, str]:
    """Wall seconds, peak resident bytes and standard output of a process."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024, answer


def main() -> None:
    """Make the files, plan them, print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--merges", type=int, default=200)
    parser.add_argument("--layers", type=int, default=126)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--mixed", action="store_const", dest="kind", const="mixed", default="same")
    kinds.add_argument("--apart", action="store_const", dest="kind", const="apart")
    given = parser.parse_args()
    path = make(
        given.folder.absolute(),
        adapters=given.adapters,
        merges=given.merges,
        layers=given.layers,
        kind=given.kind,
    )
    command = [sys.executable, "-m", "ray_merge", "plan", str(path)]
    cluster = ["--cluster", "workers=64,read=1GB/s,write=500MB/s"]
    for options in ([*cluster], [*cluster, "--json"]):
        seconds, peak, answer = measured([*command, *options])
        print(
            f"{given.kind}, {' '.join(options)}: {seconds:.1f} s, peak {peak / 1e6:.0f} MB, {len(answer)} characters"
        )
        if "--json" in options:
            facts = json.loads(answer)
            print(json.dumps({key: facts[key] for key in ("units", "passes", "read_bytes", "write_bytes")}))
            print(json.dumps(facts.get("estimate"), indent=1))
        else:
            print("\n".join(line[:160] for line in answer.splitlines()[-12:]))


if __name__ == "__main__":
    main()
