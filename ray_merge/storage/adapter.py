"""A PEFT adapter folder, known from its headers: every tensor becomes a factor or a head, or is refused.

Owns the key grammar `base_model.model.<runtime module>.lora_A.weight`. Reads no tensor data.
Layout and deltas: PEFT 0.21 `utils/save_and_load.py`, `tuners/lora/layer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import AdapterError, CheckpointError
from ray_merge.spec import Adapter, FactorEntry, TensorEntry
from ray_merge.storage.adapter_config import Scaling, check_config, pattern_matches
from ray_merge.storage.checkpoint import read_json
from ray_merge.storage.headers import read_header
from ray_merge.storage.store import Store

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = ("F32", "F16", "BF16", "F64")

VARIANT_TENSORS = {
    "lora_embedding_A": "LoRA on an embedding",
    "lora_embedding_B": "LoRA on an embedding",
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_diag": "a KaSA diagonal",
    "lora_E": "an AdaLoRA diagonal",
    "lora_B.bias": "a bias on B (lora_bias)",
    "base_layer": "a changed base layer",
    "token_adapter": "trainable tokens",
}
"""What a tensor name betrays when it is neither a plain factor nor a head."""


@dataclass(frozen=True, slots=True)
class _Pair:
    A: TensorEntry | None = None
    B: TensorEntry | None = None


def read_adapter(name: str, store: Store) -> Adapter:
    """Headers and config of one adapter.

    Args:
        name: the recipe's name of it.
        store: the adapter's folder.

    Raises:
        AdapterError: a variant, tensor, rank or shape that cannot be merged exactly.
        CheckpointError: a missing, truncated or malformed file.
    """
    if store.url.endswith((".safetensors", ".bin", ".json")):
        raise AdapterError(f"adapter {name}: {store.url} is a file; give the folder that holds {CONFIG_FILE}")
    config = read_json(store, CONFIG_FILE)
    scaling = check_config(config, f"adapter {name}: {store.url}/{CONFIG_FILE}")
    if store.info(WEIGHTS_FILE) is None and store.info("adapter_model.bin") is not None:
        raise CheckpointError(
            f"adapter {name}: {store.url} holds a pickle, adapter_model.bin; save it as safetensors"
        )
    info = store.info(WEIGHTS_FILE)  # before the header: a file replaced in between is noticed later
    header = read_header(store, WEIGHTS_FILE)
    where = f"adapter {name}: {store.url}/{WEIGHTS_FILE}"
    pairs, heads = _sort_tensors(header.tensors, config, where)
    factors = {module: _factor(module, pair, scaling, where) for module, pair in sorted(pairs.items())}
    if not factors:
        raise AdapterError(f"{where} holds no LoRA factor")
    _check_patterns(scaling, factors, where)
    return Adapter(
        name=name,
        url=store.url,
        config=config,
        factors=factors,
        heads=tuple(heads),
        file=WEIGHTS_FILE,
        file_bytes=0 if info is None else info.n_bytes,
        file_version="" if info is None else info.version,
    )


def _sort_tensors(
    tensors: Mapping[str, TensorEntry], config: Mapping[str, Any], where: str
) -> tuple[dict[str, _Pair], list[TensorEntry]]:
    pairs: dict[str, _Pair] = {}
    heads: list[TensorEntry] = []
    saved = config.get("modules_to_save") or []
    for key, entry in tensors.items():
        if not key.startswith(PREFIX):
            raise AdapterError(
                f"{where}: tensor {key!r} does not begin with {PREFIX!r}; save the adapter with PEFT"
            )
        runtime = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight", runtime)
        if match and "base_layer" not in match["module"]:
            pair = pairs.get(match["module"], _Pair())
            pairs[match["module"]] = _Pair(entry, pair.B) if match["side"] == "A" else _Pair(pair.A, entry)
        elif _is_head(runtime, saved):
            heads.append(TensorEntry(runtime, entry.dtype, entry.shape, entry.file, entry.start, entry.end))
        else:
            variant = next((text for part, text in VARIANT_TENSORS.items() if part in runtime), None)
            reason = (
                f"is {variant}, which is not supported" if variant else "is neither a factor nor a saved head"
            )
            raise AdapterError(f"{where}: tensor {key!r} {reason}; nothing of an adapter is dropped silently")
    return pairs, heads


def _is_head(runtime: str, saved: Sequence[str]) -> bool:
    # PEFT saves a module of modules_to_save under its plain name; the list names suffixes of module paths.
    module = runtime.rpartition(".")[0]
    if any(part in runtime for part in VARIANT_TENSORS):
        return False
    components = module.split(".")
    return any(name in components or module.endswith(f".{name}") for name in saved)


def _factor(module: str, pair: _Pair, scaling: Scaling, where: str) -> FactorEntry:
    if pair.A is None or pair.B is None:
        have, lack = ("lora_B", "lora_A") if pair.A is None else ("lora_A", "lora_B")
        raise AdapterError(f"{where}: {module} has {have} but no {lack}")
    for side, entry in (("lora_A", pair.A), ("lora_B", pair.B)):
        if entry.dtype not in FLOATS:
            raise AdapterError(
                f"{where}: {module}.{side} is of dtype {entry.dtype}; expected one of {', '.join(FLOATS)}"
            )
        if 0 in entry.shape:
            raise AdapterError(
                f"{where}: {module}.{side} has the empty shape {entry.shape}: a sharded (ZeRO-3, FSDP) training "
                "saved it without gathering; save it again from the gathered model"
            )
        if len(entry.shape) != 2:
            raise AdapterError(
                f"{where}: {module}.{side} has {len(entry.shape)} dimensions {entry.shape}: LoRA on a convolution "
                "is not supported"
            )
    rank = pair.A.shape[0]
    if pair.B.shape[1] != rank:
        raise AdapterError(
            f"{where}: {module}: lora_A {pair.A.shape} has rank {rank} but lora_B {pair.B.shape} has rank "
            f"{pair.B.shape[1]}"
        )
    claimed = scaling.rank_of(module)
    if rank != claimed:
        raise AdapterError(
            f"{where}: {module}: the factors have rank {rank} but {CONFIG_FILE} says {claimed}; the scale "
            "alpha / r would be wrong"
        )
    return FactorEntry(pair.B, pair.A, scaling.scale_of(module, rank), rank)


def _check_patterns(scaling: Scaling, modules: Mapping[str, FactorEntry], where: str) -> None:
    # alpha cannot be checked against a tensor, so a pattern that matches nothing is the only sign of a typo.
    for field, patterns in (("rank_pattern", scaling.rank_pattern), ("alpha_pattern", scaling.alpha_pattern)):
        for key in patterns:
            if not any(pattern_matches(key, module) for module in modules):
                raise AdapterError(
                    f"{where}: {field} {key!r} matches none of the {len(modules)} adapted modules"
                )
