"""What scenarios are about: a tiny real base, adapters, recipes, stores, and what an undisturbed run leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from recipes import LARGE_VOCABULARY, recipe_of, write_rows

from s3_server import BUCKET, make_client
from zoo import llama_adapters, lora, tiny_llama

MANIFEST = "ray_merge/MANIFEST.json"
RECIPE = "ray_merge/recipe.yaml"
TIMELINE = "ray_merge/timeline.parquet"
INPUTS = ("base", "large", "adapters", "data")
STATE = ".ray_merge/"
ATTEMPTS = f"{STATE}attempts/"

TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class World:
    """Inputs on a disk and in a bucket.

    Args:
        folder: INPUTS in it.
        remote: the same, s3://...
        endpoint: of the real server.
    """

    folder: Path
    remote: str
    endpoint: str

    def recipe(self, name: str, store: str, output: str) -> dict[str, Any]:
        """One of recipes.py over inputs in that store ("s3" or "disk")."""
        root = self.remote if store == "s3" else str(self.folder)
        return recipe_of(name, root, self.folder, output)

    def objects(self, output: str) -> dict[str, bytes]:
        """Everything below `output`, seen by another way than the code under test; temporary files too."""
        if not output.startswith("s3://"):
            root = Path(output)
            return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        client, prefix = _client(self.endpoint, os.getpid()), _prefix(output)
        keys = self._keys(prefix)
        return {
            key.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys
        }

    def left(self, output: str) -> list[str]:
        """What is unfinished below `output`: temporary files, files of attempts, uploads in parts."""
        if not output.startswith("s3://"):
            return [path for path in self.objects(output) if is_marked(path)]
        prefix, client = _prefix(output), _client(self.endpoint, os.getpid())
        pages = client.get_paginator("list_multipart_uploads")
        found = pages.paginate(Bucket=BUCKET, Prefix=prefix)
        return [one["Key"].removeprefix(prefix) for page in found for one in page.get("Uploads", ())]

    def count(self, output: str) -> int:
        """How many objects are below `output` that are not temporary."""
        if not output.startswith("s3://"):
            # Not rglob: it fails where a folder goes while it is walked, as that of a run's attempt does.
            found = [(Path(folder), names) for folder, _, names in os.walk(output)]
            paths = (str((folder / name).relative_to(output)) for folder, names in found for name in names)
            return sum(not is_marked(path) for path in paths)
        return len(self._keys(_prefix(output)))

    def _keys(self, prefix: str) -> list[str]:
        client = _client(self.endpoint, os.getpid())
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]


def _prefix(output: str) -> str:
    return f"{urlsplit(output).path.lstrip('/')}/"


@lru_cache
def _client(endpoint: str, pid: int) -> Any:
    """One client for each process: making one takes longer than what most scenarios ask of it."""
    return make_client(endpoint)


def make_world(folder: Path, endpoint: str) -> World:
    """Three adapters of different methods (LoRA, rsLoRA, DoRA) on a Llama of 3 layers in several files.

    And the same Llama with a large vocabulary, and rows of data.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_llama(folder / "plain", layers=3)
    for name, vocabulary in (("base", None), ("large", LARGE_VOCABULARY)):
        model = AutoModelForCausalLM.from_pretrained(folder / "plain")
        if vocabulary is not None:
            torch.manual_seed(0)  # the new rows are drawn
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        model.save_pretrained(folder / name, max_shard_size="60KB")
        shutil.copy(folder / "plain" / "tokenizer_config.json", folder / name)
    write_rows(folder / "data")
    llama_adapters(folder / "base", folder / "adapters", 1)
    for index, options in ((1, {"use_rslora": True}), (2, {"use_dora": True})):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        lora(
            base,
            folder / "adapters" / f"a{index}",
            ["q_proj", "o_proj", "up_proj"],
            seed=index + 1,
            **options,
        )
    client = make_client(endpoint)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).parts[0] in INPUTS:
            client.put_object(
                Bucket=BUCKET, Key=f"chaos-inputs/{path.relative_to(folder)}", Body=path.read_bytes()
            )
    return World(folder, f"s3://{BUCKET}/chaos-inputs", endpoint)


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run published: sha256 by path, without what names the output or times; receipts apart."""

    files: Mapping[str, str]
    receipts: Mapping[str, str]

    @classmethod
    def of(cls, objects: Mapping[str, bytes], output: str) -> Reference:
        """The reference from all objects of an undisturbed run's output, whose proofs have to be true."""
        files = {path: _digest(path, data, output) for path, data in objects.items() if _is_file(path)}
        receipts = {path: _proven(data) for path, data in objects.items() if "/receipts/" in path}
        assert not (marked := [*filter(is_marked, objects)]), marked[:3]
        for path, sha256 in receipts.items():
            assert hashlib.sha256(objects[_proven_object(path, objects[path])]).hexdigest() == sha256, path
        return cls(files, receipts)

    @property
    def n_state(self) -> int:
        """Objects in the store beside the merges."""
        return sum(path.startswith(STATE) for path in self.files)

    def merges(self) -> list[str]:
        return [path.removesuffix(f"/{MANIFEST}") for path in self.files if path.endswith(f"/{MANIFEST}")]

    def wrong(self, objects: Mapping[str, bytes], output: str) -> list[str]:
        """What of a disturbed run's objects a reader could mistake for a result although it is none."""
        problems = []
        for path, data in objects.items():
            if is_marked(path):
                continue
            if path not in self.files and path not in self.receipts:
                problems.append(f"{path}: no undisturbed run writes it")
            elif path in self.receipts:
                problems += self._wrong_receipt(path, data, objects)
            elif _digest(path, data, output) != self.files[path]:
                problems.append(f"{path}: {len(data)} other bytes than an undisturbed run's")
        for merge in self.merges():
            if f"{merge}/{MANIFEST}" in objects and (lacking := self._lacking(merge, objects)):
                problems.append(f"{merge}: a manifest without {lacking[:3]}")
        return problems

    def begun(self, objects: Mapping[str, bytes]) -> dict[str, bytes]:
        """Without what `gc` overtook and no reader counts: merges without recipe.yaml, receipts without object."""
        without = tuple(f"{merge}/" for merge in self.merges() if f"{merge}/{RECIPE}" not in objects)
        return {
            path: data
            for path, data in objects.items()
            if not path.startswith(without)
            and (path not in self.receipts or _proven_object(path, data) in objects)
        }

    def missing(self, objects: Mapping[str, bytes]) -> list[str]:
        """What an undisturbed run has and this does not."""
        return sorted({*self.files, *self.receipts} - set(objects))

    def unproven(self, objects: Mapping[str, bytes]) -> list[str]:
        """Receipts that are not there, or whose object is not."""
        return [
            path
            for path in self.receipts
            if path not in objects or _proven_object(path, objects[path]) not in objects
        ]

    def _lacking(self, merge: str, objects: Mapping[str, bytes]) -> list[str]:
        return [p for p in (*self.files, *self.receipts) if p.startswith(f"{merge}/") and p not in objects]

    def _wrong_receipt(self, path: str, data: bytes, objects: Mapping[str, bytes]) -> list[str]:
        try:
            proven = _proven(data)
        except (ValueError, KeyError):
            return [f"{path}: no whole receipt"]
        if proven != self.receipts[path]:
            return [f"{path}: proves sha256 {proven[:12]}, an undisturbed run's {self.receipts[path][:12]}"]
        proves = _proven_object(path, data)
        return [] if proves in objects else [f"{path}: proves {proves}, which is not there"]


def is_marked(path: str) -> bool:
    """Unfinished, and every reader can see it: an attempt's own folder, or a temporary name."""
    return path.startswith(ATTEMPTS) or any(part.startswith(TEMPORARY) for part in path.split("/"))


def unfinished(cache: Path) -> list[str]:
    """Files of attempts, and temporary ones, in a node's cache folder."""
    paths = (str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())
    return [path for path in paths if is_marked(path) or path.startswith("scratch/attempts/")]


def _is_file(path: str) -> bool:
    return not is_marked(path) and "/receipts/" not in path


def _digest(path: str, data: bytes, output: str) -> str:
    if path.endswith(TIMELINE):
        data = _objects_told(data)
    # recipe.yaml names the output that it was made for.
    known = data.replace(output.encode(), b"OUTPUT") if path.endswith("recipe.yaml") else data
    return hashlib.sha256(known).hexdigest()


def _objects_told(timeline: bytes) -> bytes:
    """What is the same in every run's table, or the bytes of what is no whole table, which equal no other's."""
    try:
        # Neither `read_table` nor BytesIO: they start threads, and this process forks.
        file = pq.ParquetFile(pa.BufferReader(timeline))
        rows = file.read(["object", "kind", "bytes"], use_threads=False).to_pylist()
    except (pa.ArrowException, OSError, ValueError):
        return timeline
    return json.dumps(rows).encode()


def _proven_object(path: str, receipt: bytes) -> str:
    merge, _, _ = path.partition("/ray_merge/receipts/")
    try:
        return f"{merge}/{json.loads(receipt)['name']}"
    except (ValueError, KeyError):  # no whole receipt
        return ""


def _proven(receipt: bytes) -> str:
    return str(json.loads(receipt)["sha256"])
