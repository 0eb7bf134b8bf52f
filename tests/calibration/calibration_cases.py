"""Tiny data files and bases with a word tokenizer, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ray_merge.calibration import Calibrated, load_batches
from ray_merge.calibration.files import find_files
from ray_merge.calibration.rows import Rows
from ray_merge.recipe import Calibration, DataSource
from ray_merge.storage.checkpoint import Checkpoint, read_checkpoint
from ray_merge.storage.store import Stores, open_store
from tiny import write_base

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "one", "two", "three", "four", "five", "six", "seven", "eight"]
BERT = {
    "model_type": "bert",
    "vocab_size": 16,
    "max_position_embeddings": 8,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
VIT = {"model_type": "vit", "image_size": 2, "num_channels": 3}


def write_tokenizer(folder: Path, *, special: bool = True, **config: Any) -> None:
    """A tokenizer of WORDS, [CLS] a [SEP] b [SEP] like BERT's; its file asks for padding to 128, as MiniLM's does."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(100)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    document = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": names,
        "pad_token": "[PAD]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**document, **config}))


def make_base(
    folder: Path, config: dict[str, Any] | None = None, *, special: bool = True, **tokenizer: Any
) -> Checkpoint:
    """A base with a tokenizer, known from its headers."""
    write_base(folder, config=BERT if config is None else config)
    write_tokenizer(folder, special=special, **tokenizer)
    return read_checkpoint(open_store(str(folder)))


def bare_base(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """A base whose folder holds a tokenizer_config.json and no vocabulary."""
    return read_checkpoint(open_store(str(write_base(folder, config=config))))


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def json_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def open_rows(path: object, limit: int | None = None) -> Rows:
    return Rows(find_files(str(path), Stores(), "here"), limit, "here")


def values(path: object, columns: list[str], limit: int | None = None) -> list[Any]:
    """Those columns of all rows, in order."""
    rows = open_rows(path, limit)
    return [[row.values[name] for name in columns] for row in rows.take(range(rows.n_rows), columns)]


def load(
    base: Checkpoint,
    path: object,
    *,
    task: str = "mnli",
    text: Any = None,
    limit: int | None = None,
    **settings: Any,
) -> Calibrated:
    """The batches of the data at `path`."""
    source = DataSource(path=str(path), text=text, limit=limit)
    return load_batches(
        source, Calibration(**settings), task, base, Path(base.url).parent / "cache", Stores()
    )
