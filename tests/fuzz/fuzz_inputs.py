"""Inputs of a merge as bytes in memory: a base, two adapters and a recipe that works until a mutation breaks it."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import stat
import struct
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

HIDDEN = 8
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
PREFIX = "base_model.model."
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1}

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Name -> safetensors dtype, shape, bytes."""


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Node:
    """A folder, pipe or socket where a file is expected."""

    kind: int  # stat.S_IFDIR, S_IFIFO or S_IFSOCK


@dataclass(frozen=True)
class Sparse:
    """A file that ends in a hole: long, but of no weight on the disk."""

    start: bytes
    n_bytes: int


Content = bytes | Link | Node | Sparse


@dataclass
class Inputs:
    """What one case puts on the disk.

    Args:
        files: path -> content.
        recipe: as a mapping, whose paths begin with `@/`: the folder that the files are written to.
        recipe_text: its YAML, where a mutation has spoilt the text itself.
        forbidden: paths that are written without any right to read them.
    """

    files: dict[str, Content]
    recipe: Any
    recipe_text: bytes | None = None
    forbidden: set[str] = field(default_factory=set)

    def write(self, folder: Path) -> Any:
        """Put everything into the empty folder `folder`.

        Returns:
            The recipe with real paths: a mapping, or the path of recipe.yaml.
        """
        for name, content in self.files.items():
            _write(folder / name, content, folder)
            if name in self.forbidden:
                (folder / name).chmod(0)
        if self.recipe_text is None:
            return _placed(self.recipe, str(folder))
        path = folder / "recipe.yaml"
        path.write_bytes(self.recipe_text.replace(b"@/", f"{folder}/".encode()))
        return str(path)


def _write(path: Path, content: Content, folder: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if isinstance(content, Link):
        path.symlink_to(content.target.replace("@/", f"{folder}/"))
    elif isinstance(content, Sparse):
        path.write_bytes(content.start)
        os.truncate(path, content.n_bytes)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content.kind == stat.S_IFDIR:
        path.mkdir()
    else:
        os.mknod(path, content.kind | 0o600)


def _placed(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace("@/", f"{folder}/")
    if isinstance(value, dict):
        return {key: _placed(item, folder) for key, item in value.items()}
    return [_placed(item, folder) for item in value] if isinstance(value, list) else value


def floats(count: int, rng: random.Random) -> bytes:
    """Small finite float32 numbers."""
    return struct.pack(f"<{count}f", *(rng.uniform(-1, 1) for _ in range(count)))


def header_of(tensors: Tensors) -> dict[str, Any]:
    """The header as a mapping, without holes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    return header


def file_of(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; `header` is JSON-able or the text itself, `length` what the file claims about it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    return (claimed % 2**64).to_bytes(8, "little") + text + data


def safetensors(tensors: Tensors) -> bytes:
    """A well-formed file."""
    return file_of(header_of(tensors), b"".join(data for _, _, data in tensors.values()))


def zeros(dtype: str, shape: list[int]) -> tuple[str, list[int], bytes]:
    """A tensor of zeros; shapes of more than a few kB are cut short, so that the file lies about them."""
    count = 1
    for size in shape:
        count = min(count * size, 10_000)
    return dtype, shape, b"\0" * (count * WIDTHS.get(dtype, 4))


@cache
def base_tensors() -> Tensors:
    """A Llama of two layers with two projections each."""
    rng = random.Random(0)
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [16, HIDDEN], "model.norm.weight": [HIDDEN]}
    for layer in range(2):
        for module in ("self_attn.q_proj", "self_attn.v_proj"):
            shapes[f"model.layers.{layer}.{module}.weight"] = [HIDDEN, HIDDEN]
    shapes["lm_head.weight"] = [16, HIDDEN]
    return {
        name: ("F32", shape, floats(shape[0] * (shape[1] if shape[1:] else 1), rng))
        for name, shape in shapes.items()
    }


@cache
def adapter_tensors(module: str) -> Tensors:
    """Factors of rank 2 at one module."""
    rng = random.Random(module)
    return {
        f"{PREFIX}{module}.lora_A.weight": ("F32", [2, HIDDEN], floats(2 * HIDDEN, rng)),
        f"{PREFIX}{module}.lora_B.weight": ("F32", [HIDDEN, 2], floats(2 * HIDDEN, rng)),
    }


ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "inference_mode": True,
}

BASE_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "hidden_size": HIDDEN,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "torch_dtype": "float32",
}

RECIPE = {
    "base_model": "@/base",
    "output": "@/out",
    "adapters": {"a": "@/a", "b": "@/b"},
    "merges": [{"name": "m", "merge_method": "task_arithmetic"}],
}


def good_inputs() -> Inputs:
    """Inputs that merge."""
    files: dict[str, Content] = {
        "base/model.safetensors": safetensors(base_tensors()),
        "base/config.json": json.dumps(BASE_CONFIG).encode(),
        "base/tokenizer_config.json": b"{}\n",
    }
    for name, module in zip("ab", MODULES, strict=True):
        files[f"{name}/adapter_config.json"] = json.dumps(ADAPTER_CONFIG).encode()
        files[f"{name}/adapter_model.safetensors"] = safetensors(adapter_tensors(module))
    return Inputs(files, copy.deepcopy(RECIPE))


def strange_inputs() -> Inputs:
    """Inputs whose names fit only if somebody knows the model's class."""
    inputs = good_inputs()
    inputs.files["a/adapter_model.safetensors"] = safetensors(adapter_tensors("nosuch.module"))
    return inputs
