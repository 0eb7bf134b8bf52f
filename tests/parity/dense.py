"""A second opinion: what each adapter file means, applied to a fresh base in float64 by module type.

Written from the formulas (peers-and-formats.md, 3b to 3e) and sharing no code with PEFT or ray_merge. It reads the
saved folders only, so it also shows that the files hold all there is to know. Several adapters: the sum of each
adapter's delta against the original base, also for DoRA; saved modules, biases and token rows enter as
saved - base.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from variants import CONFIG, PICKLE, WEIGHTS, initial_folder

PREFIX = "base_model.model."
TRAINING_ONLY = ("lora_velora", "lora_monteclora")


def merge(model: nn.Module, folders: Sequence[Path], *, subtract_initial: bool = False) -> nn.Module:
    """`model` with the adapters of `folders` in its weights; its ties are broken where values differ."""
    adapters = [Adapter(model, folder, subtract_initial) for folder in folders]
    sizes = {adapter.vocabulary for adapter in adapters if adapter.vocabulary}
    if sizes:
        model.resize_token_embeddings(sizes.pop(), mean_resizing=False)
    base = {name: value.detach().double() for name, value in _all(model)}
    total: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, value in adapter.new_values(model, base).items():
            delta = value if value.shape != base[name].shape else value - base[name]
            total[name] = total[name] + delta if name in total else delta
    for name, delta in total.items():
        _assign(model, name, base[name] + delta)
    if hasattr(model, "config") and hasattr(model.config, "tie_word_embeddings"):
        model.config.tie_word_embeddings = False
    return model


class Adapter:
    """One saved adapter, its tensors grouped by module."""

    def __init__(self, model: nn.Module, folder: Path, subtract_initial: bool) -> None:
        self.config = json.loads((folder / CONFIG).read_text())
        self.factors, self.whole, self.under, self.rows = _group(_read(folder))
        self.initial = _group(_read(initial_folder(folder)))[0] if subtract_initial else {}
        tables = {
            value.shape[0] for name, value in {**self.whole, **self.under}.items() if _is_table(model, name)
        }
        self.vocabulary = tables.pop() if tables else None

    def new_values(self, model: nn.Module, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name -> its value under this adapter alone, in float64."""
        values = dict(base)
        values.update({name: value.double() for name, value in self.whole.items()})
        changed = set(self.whole)
        for saved, value in self.under.items():
            for name in _ties(model, saved):  # the layer under an adapter: what is tied to it sees it too
                values[name] = value.double()
                changed.add(name)
        for module, factors in self.factors.items():
            for name, value in self._adapted(model, module, factors, values).items():
                values[name] = value
                changed.add(name)
        for module, rows in self.rows.items():
            for name, indices in self._token_targets(model, module):
                table = values[name].clone()
                table[indices] = rows.double()
                values[name] = table
                changed.add(name)
        return {name: values[name] for name in sorted(changed)}

    def _adapted(
        self, model: nn.Module, path: str, factors: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        f = {name: value.double() for name, value in factors.items()}
        if expert := re.fullmatch(r"(.+\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)", path):
            return self._one_expert(expert[1], int(expert[2]), expert[3], f, values)
        name = path.replace(".base_layer", "").replace(".block_sparse_moe.", ".mlp.")
        module, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        weight = f"{name}.weight"
        if isinstance(module, nn.MultiheadAttention):
            # PEFT runs in_proj by hand and never adds its lora_B.bias.
            return {f"{name}.in_proj_weight": values[f"{name}.in_proj_weight"] + self._product(name, f)}
        if isinstance(owner, nn.MultiheadAttention):
            # With the attention as target, PEFT adds the delta of out_proj twice, in forward and in merge
            # (lora/layer.py, MultiheadAttention.merge: by hand, then through out_proj.merge), and looks up rank and
            # alpha by the attention's own name. With out_proj itself as target, its forward is never called.
            times = 2 if ".base_layer.out_proj" in path else 0
            name = name.rpartition(".")[0] if times else name
            result = {weight: values[weight] + times * self._product(name, f)}
        elif isinstance(module, nn.Embedding):
            s = self._scale(name, f["lora_embedding_A"].shape[0])
            V = values[weight] + s * (f["lora_embedding_B"] @ f["lora_embedding_A"]).T
            result = {weight: _dora(V, f, axis=0)}
        elif isinstance(module, nn.modules.conv._ConvNd):
            A, B = f["lora_A.weight"], f["lora_B.weight"]
            R = A.shape[0]
            V = values[weight] + self._scale(name, R) * (B.reshape(-1, R) @ A.reshape(R, -1)).reshape(
                values[weight].shape
            )
            result = {weight: _dora(V, f, axis=tuple(range(1, V.dim())))}
        elif isinstance(module, nn.Linear):
            V_OI = values[weight] + self._product(name, f, self.initial.get(path))
            result = {weight: _dora(V_OI, f, axis=1)}
        elif type(module).__name__ == "Conv1D":
            V_OI = values[weight].T + self._product(name, f, self.initial.get(path))
            result = {weight: _dora(V_OI, f, axis=1).T}
        else:
            return self._parameter(module, name, path.count(".base_layer"), f, values)
        if "lora_B.bias" in f:
            bias = weight.removesuffix("weight") + "bias"
            result[bias] = values[bias] + self._scale(name, f["lora_A.weight"].shape[0]) * f["lora_B.bias"]
        return result

    def _one_expert(
        self, layer: str, expert: int, projection: str, f: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Factors of one expert's layer, as transformers 4 had it, in the stacked parameter of transformers 5."""
        down = projection in ("down_proj", "w2")
        name = f"{layer}mlp.experts.{'down_proj' if down else 'gate_up_proj'}"
        stack, delta = values[name].clone(), self._product(projection, f)
        first = delta.shape[0] if projection in ("up_proj", "w3") else 0
        stack[expert, first : first + delta.shape[0]] += delta
        return {name: stack}

    def _parameter(
        self, module: nn.Module, path: str, depth: int, f: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        wanted = self.config.get("target_parameters") or [
            "gate.weight"
        ]  # a router was an nn.Linear in transformers 4
        own = [name for name, _ in module.named_parameters(recurse=False)]
        hit = [name for name in own if any(f".{path}.{name}".endswith(f".{target}") for target in wanted)]
        name = f"{path}.{hit[len(hit) - 1 - depth]}"
        W, A, B = values[name], f["lora_A.weight"], f["lora_B.weight"]
        if W.dim() == 2:
            return {name: W + self._product(name, f)}
        E = W.shape[0]
        A_Era, B_brE = A.reshape(E, -1, A.shape[1]), B.reshape(B.shape[0], -1, E)
        if self.config.get("lora_B_layout") == "grouped_by_expert":
            B_brE = B.reshape(B.shape[0], E, -1).mT
        delta = self._scale(name, A.shape[0] // E) * torch.einsum("bre,era->eba", B_brE, A_Era)
        return {name: W + (delta.mT if self._reads_input_first(module) else delta)}

    def _reads_input_first(self, module: nn.Module) -> bool:
        """Whether the PEFT that wrote this took [E, d1, d2] as [E, in, out]."""
        version = tuple(int(part) for part in self.config["peft_version"].split(".")[:3])
        transposed = bool(getattr(module, "is_transposed", False))
        if version < (0, 19, 0):
            return True
        return not transposed if version == (0, 19, 0) else transposed

    def _product(
        self, name: str, f: Mapping[str, Tensor], initial: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        A, B = f["lora_A.weight"], f["lora_B.weight"]
        blocks = self.config.get("use_bdlora") or {}
        if any(part in name for part in blocks.get("target_modules_bd_a") or []):
            A = torch.block_diag(*A.chunk(blocks["nblocks"]))
        if any(part in name for part in blocks.get("target_modules_bd_b") or []):
            B = torch.block_diag(*B.chunk(blocks["nblocks"]))
        product = B @ A
        if initial is not None:
            product = product - initial["lora_B.weight"].double() @ initial["lora_A.weight"].double()
        return self._scale(name, A.shape[0]) * product

    def _scale(self, name: str, rank: int) -> float:
        alpha = self.config["lora_alpha"]
        for key, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _token_targets(self, model: nn.Module, module: str) -> list[tuple[str, list[int]]]:
        given = self.config["trainable_token_indices"]
        indices = (
            given if isinstance(given, list) else next(v for k, v in given.items() if module.endswith(k))
        )
        names = _ties(model, f"{module}.weight")
        if isinstance(given, dict) and any(value != indices for value in given.values()):
            names = [f"{module}.weight"]
        return [(name, indices) for name in names]


def _read(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).exists():
        return load_file(folder / WEIGHTS)
    return torch.load(folder / PICKLE, weights_only=True)


def _group(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    whole, under, rows = {}, {}, {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX).replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")
        name = re.sub(r"(\.lora_[AB])\.default\.", r"\1.", name)
        name = name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
        found = re.fullmatch(
            r"(.+)\.(lora_(?:A|B)\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector)", name
        )
        if found:
            factors[found[1]][found[2]] = value
        elif name.endswith(".token_adapter.trainable_tokens_delta"):
            rows[name.removesuffix(".token_adapter.trainable_tokens_delta")] = value
        elif (
            any(part in name for part in TRAINING_ONLY) or ".original_module." in name or "_original" in name
        ):
            continue
        elif ".modules_to_save." in name:
            continue  # a second copy of what is also saved under its plain name
        elif ".base_layer." in name:
            under[name.replace(".token_adapter", "").replace(".base_layer", "")] = value
        else:
            whole[name] = value
    return factors, whole, under, rows


def _is_table(model: nn.Module, name: str) -> bool:
    if not hasattr(getattr(model, "config", None), "vocab_size"):
        return False
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    return any(
        table is not None and model.get_submodule(name.rpartition(".")[0]) is table for table in tables
    )


def _ties(model: nn.Module, name: str) -> list[str]:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    return [other for other, value in _all(model) if value is tensor]


def _dora(V: Tensor, f: Mapping[str, Tensor], axis: int | tuple[int, ...]) -> Tensor:
    if "lora_magnitude_vector" not in f:
        return V
    norm = torch.linalg.vector_norm(V, dim=axis, keepdim=True)
    return f["lora_magnitude_vector"].reshape(norm.shape) * V / norm


def _all(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under every name they have, tied ones too."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        setattr(module, leaf, nn.Parameter(value.to(old.dtype), requires_grad=False))
    else:
        old.copy_(value.to(old.dtype))
