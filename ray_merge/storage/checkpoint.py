"""A Hugging Face checkpoint folder, known from its headers: one safetensors file or many with an index.

Owns which files are weights, which are side files, and where each tensor lies. Reads no tensor data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ray_merge.errors import CheckpointError, shown
from ray_merge.spec import DTYPE_BYTES, FLOAT_DTYPES, TensorEntry
from ray_merge.storage.headers import read_header
from ray_merge.storage.ordered import in_order
from ray_merge.storage.quantised import Quantised, find_quantised, quantisation_config
from ray_merge.storage.store import ObjectInfo, Store
from ray_merge.storage.strict_json import MAX_JSON_BYTES, check_depth, parse_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite",
    ".index.json",
)  # fmt: skip
"""Files of a checkpoint that hold or index weights: they would go stale beside merged weights, so are not copied."""

OWN_FOLDERS = ("ray_merge", "adapter", "heads", "emr")
"""What a merge writes beside its checkpoint: a base that is itself a result must not pass them on."""

MAX_SIDE_FILE_BYTES = 256_000_000
"""Tokenizers reach some 30 MB; a larger side file is a weight in disguise and is refused, not copied."""

MAX_SIDE_FILES = 10_000
"""Models have some 20; a home folder that was given by mistake has more than this, and would be copied whole."""

MAX_TENSORS = 500_000
"""The largest model known (Kimi-K2) has some 150,000; each takes half a kB here."""

MAX_FILE_NAME = 255
"""Characters; file systems keep as many bytes."""

CONFIG_TYPES: Mapping[str, type] = {
    "model_type": str, "architectures": list, "tie_word_embeddings": bool, "quantization_config": dict,
    "text_config": dict,
}  # fmt: skip
"""What is read from config.json and must be of this type where it is not null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A base model.

    Args:
        url: its folder.
        config: the parsed config.json.
        tensors: disk name -> where its bytes lie.
        weight_files: the safetensors files that hold them.
        config_file: config.json, as it was when it was read.
        side_files: every other file that a copy of the model needs (tokenizer, generation config ...).
        untied: disk names of tensors that the recipe unties -> the tensors that they were tied to.
        quantised: disk name -> how the weight is stored, where the base is quantised and is to be dequantised.
    """

    url: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    weight_files: tuple[ObjectInfo, ...]
    config_file: ObjectInfo
    side_files: tuple[ObjectInfo, ...]
    untied: Mapping[str, str] = field(default_factory=dict)
    quantised: Mapping[str, Quantised] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.n_bytes for entry in self.tensors.values())


def read_json(store: Store, path: str) -> dict[str, Any]:
    """A JSON object from `path`; CheckpointError when it is missing, no object, or longer or deeper than real ones."""
    where = f"{store.url}/{path}"
    info = store.info(path)
    if info is None:
        raise CheckpointError(f"{where} does not exist")
    if info.n_bytes > MAX_JSON_BYTES:
        raise CheckpointError(f"{where} is {info.n_bytes} bytes long; at most {MAX_JSON_BYTES} are read")
    document = parse_object(store.read(path), where)
    check_depth(document, where)
    return document


def read_checkpoint(store: Store, *, dequantise: bool = False) -> Checkpoint:
    """Headers and config of the checkpoint in `store`.

    Args:
        store: its folder.
        dequantise: show a quantised base as what its weights decode to.

    Raises:
        CheckpointError: no such folder, no safetensors, a truncated or malformed file, a tensor in two files
            or missing from the file that the index names, a quantised base where `dequantise` is false.
    """
    files = {info.path: info for info in store.list()}
    if not files:
        hub = "; a model on a hub is written hf://org/name" if store.local_root is not None else ""
        raise CheckpointError(f"{store.url} does not exist or is empty{hub}")
    config_file = files.get(CONFIG_FILE)
    config = read_json(store, CONFIG_FILE)
    if config_file is None:  # it came while the folder was looked at
        raise CheckpointError(f"{store.url}/{CONFIG_FILE} is not in the folder's listing; run again")
    _check_config(config, f"{store.url}/{CONFIG_FILE}")
    if quantisation_config(config) and not dequantise:
        raise CheckpointError(
            f"{store.url}/{CONFIG_FILE} has a quantization_config: its weights are not the numbers "
            "that the adapters were "
            "added to; give the unquantised base, or write base_numerics: dequantise in the recipe"
        )
    names = _weight_files(store, files)
    tensors: dict[str, TensorEntry] = {}
    for name, header in zip(names, in_order(partial(read_header, store), names), strict=True):
        if len(tensors) + len(header.tensors) > MAX_TENSORS:
            raise CheckpointError(
                f"{store.url} holds more than {MAX_TENSORS} tensors: no model that is known"
            )
        for entry in header.tensors.values():
            if entry.name in tensors:
                raise CheckpointError(
                    f"{store.url}: tensor {entry.name!r} is in {tensors[entry.name].file} and in {name}"
                )
            tensors[entry.name] = entry
    if not tensors:
        raise CheckpointError(f"{store.url}: {', '.join(names[:3])} holds no tensor")
    if INDEX_FILE in files and SINGLE_FILE not in files:
        _check_index(store, tensors)
    side = tuple(info for path, info in sorted(files.items()) if _is_side_file(store, info))
    if len(side) > MAX_SIDE_FILES:
        raise CheckpointError(
            f"{store.url} holds {len(side)} files beside its weights, more than {MAX_SIDE_FILES}: no model's folder; "
            "move the model into one of its own"
        )
    check_links(store, [CONFIG_FILE, *(info.path for info in side)])
    quantised: Mapping[str, Quantised] = {}
    if quantisation_config(config):
        quantised, plain = find_quantised(
            config, tensors, store.url, lambda entry: store.read(entry.file, entry.start, entry.end)
        )
        dtype = decoded_dtype(config)
        tensors = plain | {name: _decoded(name, weight, dtype) for name, weight in quantised.items()}
        config = without_quantisation(config)
    return Checkpoint(
        url=store.url,
        config=config,
        tensors=tensors,
        quantised=quantised,
        weight_files=tuple(files[name] for name in names),
        config_file=config_file,
        side_files=side,
    )


def decoded_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that quantised weights decode to: what config.json calls the model's, else bfloat16."""
    named = config.get("dtype") or config.get("torch_dtype")
    return FLOAT_DTYPES.get(named, "BF16") if isinstance(named, str) else "BF16"


def _decoded(name: str, weight: Quantised, dtype: str) -> TensorEntry:
    """The entry of a weight that no file holds as such: no file, and its own bytes counted from 0."""
    return TensorEntry(name, dtype, weight.shape, "", 0, math.prod(weight.shape) * DTYPE_BYTES[dtype])


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of what the weights decode to."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    text = kept.get("text_config")
    if isinstance(text, dict):
        kept["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return kept


def _check_config(config: Mapping[str, Any], where: str) -> None:
    for key, kind in CONFIG_TYPES.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{where}: {key} is {shown(value)}, expected {_KIND_NAMES[kind]}")
    for name in config.get("architectures") or []:
        if not isinstance(name, str):
            raise CheckpointError(f"{where}: architectures holds {shown(name)}, expected names of classes")
    for key, part in config.items():
        if isinstance(part, dict) and key.endswith("_config") and key != "quantization_config":
            _check_config(part, f"{where}: {key}")
    labels = config.get("num_labels")
    if labels is not None and not (type(labels) is int and 0 <= labels <= MAX_LABELS):
        raise CheckpointError(f"{where}: num_labels is {shown(labels)}, expected a number up to {MAX_LABELS}")


MAX_LABELS = 100_000
"""transformers makes a dictionary of names for them whenever it reads a config.json; ImageNet-22k has 21,841."""

_KIND_NAMES = {str: "a text", list: "a list", bool: "true or false", dict: "a mapping"}


def check_links(store: Store, names: Iterable[str]) -> None:
    """Refuse files that are copied and lie elsewhere: a downloaded folder must not publish what it only points to.

    Weights may be links to anywhere, because only tensors are taken from them.
    """
    if store.local_root is None:
        return
    root = Path(os.path.realpath(store.local_root))
    # The Hub's cache keeps a model's files in models--org--name/blobs and links to them from snapshots/<revision>.
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for name in names:
        target = os.path.realpath(root / name)
        if not any(target.startswith(f"{folder}/") for folder in inside):
            raise CheckpointError(
                f"{store.url}/{name} is a link to {shown(target)}, outside of its folder, and would be copied; "
                "put the file itself there"
            )


def _weight_files(store: Store, files: Mapping[str, ObjectInfo]) -> list[str]:
    if SINGLE_FILE in files:
        return [SINGLE_FILE]
    if INDEX_FILE not in files:
        pickled = next((path for path in sorted(files) if path.endswith((".bin", ".pt", ".pth"))), None)
        hint = f"; {pickled} is a pickle: save the model as safetensors first" if pickled else ""
        raise CheckpointError(f"{store.url} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    names = sorted(set(_weight_map(store).values()))
    for name in names:
        if name not in files:
            raise CheckpointError(f"{store.url}/{INDEX_FILE} names {name}, which does not exist")
    return names


def _weight_map(store: Store) -> dict[str, str]:
    weight_map = read_json(store, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{store.url}/{INDEX_FILE} has no weight_map")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.isprintable() and len(file) <= MAX_FILE_NAME
        if not plain or "/" in file or "\\" in file or file.startswith("."):
            raise CheckpointError(
                f"{store.url}/{INDEX_FILE} puts {shown(name)} into {shown(file)}: not a plain file name"
            )
    return weight_map


def _check_index(store: Store, tensors: Mapping[str, TensorEntry]) -> None:
    weight_map = _weight_map(store)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"{store.url}/{INDEX_FILE} puts {shown(name)} into {file}, which lacks it")
    extra = next((name for name in tensors if name not in weight_map), None)
    if extra is not None:
        raise CheckpointError(
            f"{store.url}: {extra!r} is in {tensors[extra].file} but not in {INDEX_FILE}: stale index?"
        )


def _is_side_file(store: Store, info: ObjectInfo) -> bool:
    if not info.path.isprintable() or "\\" in info.path:
        raise CheckpointError(
            f"{store.url} holds a file {shown(info.path)}, a name that not every store can keep; rename it"
        )
    parts = info.path.split("/")
    hidden = any(part.startswith(".") for part in parts)
    own = len(parts) > 1 and parts[0] in OWN_FOLDERS
    # Beside adapter_config.json transformers would look for an adapter to load.
    if hidden or own or info.path in (CONFIG_FILE, "adapter_config.json"):
        return False
    if info.path.endswith(WEIGHT_SUFFIXES):
        return False
    if info.n_bytes > MAX_SIDE_FILE_BYTES:
        raise CheckpointError(
            f"{store.url}/{info.path} is {info.n_bytes} bytes long: too large for a side file; move it away"
        )
    return True
