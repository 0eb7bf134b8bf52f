"""The base's tokenizer, and texts as token ids.

The tokenizer comes from the base's side files and from nowhere else: no request leaves the machine, and no code of
the model's folder is run. transformers is imported when a function runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_merge.errors import RayMergeError, RecipeError, Refusal
from ray_merge.models.model_class import quiet_and_offline
from ray_merge.storage.cache import NodeCache
from ray_merge.storage.checkpoint import CONFIG_FILE, Checkpoint
from ray_merge.storage.ordered import in_order
from ray_merge.storage.store import Store, Stores

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", ".model", ".tiktoken", "tekken.json")
"""How the names of files end without one of which no tokenizer can be made."""

SIDE_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".vocab")
"""Of files that a tokenizer may read."""

WAYS_OUT = "put the tokenizer's files into the base's folder, or give data with a column input_ids"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A loaded tokenizer of transformers, and the id that it pads with (None: it has none)."""

    call: Any
    pad_id: int | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a tokenizer makes of one text or pair.

    Args:
        columns: `input_ids`, and `token_type_ids` where the tokenizer makes them.
        cut: it had more than that.
    """

    columns: Mapping[str, list[int]]
    cut: bool


def load_tokenizer(base: Checkpoint, where: str, cache_dir: Path, stores: Stores) -> Tokenizer:
    """The tokenizer in the base's folder.

    Args:
        base: headers of the base.
        where: the recipe's place, for messages.
        cache_dir: node-local folder, where a remote base's small files go.
        stores: opens the base's store.

    Raises:
        Refusal: the folder holds none, or none that transformers can load.
    """
    names = [info.path for info in base.side_files if "/" not in info.path]
    if not any(name.endswith(VOCABULARIES) for name in names):
        raise Refusal(f"{where}: the data are texts, and {base.url} holds no tokenizer; {WAYS_OUT}")
    import transformers

    with _folder(base, cache_dir, stores) as folder, quiet_and_offline():
        try:
            found: Any = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except RayMergeError:  # a signal's
            raise
        except Exception as error:  # tokenizers raise whatever they like, bare Exceptions included
            raise Refusal(
                f"{where}: transformers {transformers.__version__} cannot load the tokenizer in {base.url} "
                f"({_reason(error)}); {WAYS_OUT}"
            ) from error
        ids = (found.pad_token_id, found.eos_token_id)
    return Tokenizer(found, next((one for one in ids if type(one) is int and one >= 0), None))


@contextmanager
def _folder(base: Checkpoint, cache_dir: Path, stores: Stores) -> Iterator[Path]:
    """A local folder with the base's small files: its own, or links to this node's copies."""
    store = stores.open(base.url)
    if store.local_root is not None:
        yield store.local_root
        return
    with tempfile.TemporaryDirectory(prefix="ray-merge-tokenizer-") as name:
        for path, file in _copies(base, store, cache_dir).items():
            (Path(name) / path).symlink_to(file)
        yield Path(name)


def _copies(base: Checkpoint, store: Store, cache_dir: Path) -> Mapping[str, Path]:
    cache = NodeCache(cache_dir / "base")
    wanted = [
        info.path for info in base.side_files if "/" not in info.path and info.path.endswith(SIDE_SUFFIXES)
    ]

    def copy(path: str) -> Path | None:
        info = store.info(path)  # a listing may write a version differently (memory:// does)
        return None if info is None else cache.fetch(store, path, info).path.absolute()

    names = [*wanted, CONFIG_FILE]
    return {path: file for path, file in zip(names, in_order(copy, names), strict=True) if file is not None}


def tokenise(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, ...]], max_length: int, where: str
) -> list[Tokens]:
    """The tokens of each text or pair, special tokens included.

    Args:
        tokenizer: of the base.
        texts: all single, or all pairs.
        max_length: tokens; longer ones are cut, of a pair the longer text first.
        where: the recipe's place, for messages.

    Raises:
        RecipeError: the tokenizer refuses them.
    """
    # padding=False undoes what a tokenizer.json may ask for: sentence-transformers' pads all to 128.
    options = {"padding": False, "return_attention_mask": False}
    try:
        with quiet_and_offline():
            made = tokenizer.call(*_columns(texts), truncation=True, max_length=max_length, **options)
            cut = _cut(tokenizer, texts, made, max_length, options)
    except RayMergeError:
        raise
    except Exception as error:  # the same
        raise RecipeError(
            f"{where}: the base's tokenizer cannot take these texts ({_reason(error)}) at calibration.max_length = "
            f"{max_length}; give it more room, or data with a column input_ids"
        ) from error
    keys = [key for key in ("input_ids", "token_type_ids") if key in made]
    return [Tokens({key: made[key][row] for key in keys}, cut[row]) for row in range(len(texts))]


def _cut(
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, ...]],
    made: Any,
    max_length: int,
    options: Mapping[str, bool],
) -> list[bool]:
    """Which texts were cut: what a fast tokenizer says; the others take full ones once more."""
    encodings = getattr(made, "encodings", None)
    if encodings:
        return [bool(one.overflowing) for one in encodings]
    cut = [False] * len(texts)
    full = [row for row, ids in enumerate(made["input_ids"]) if len(ids) >= max_length]
    if full:
        whole = tokenizer.call(*_columns([texts[row] for row in full]), truncation=False, **options)
        for row, ids in zip(full, whole["input_ids"], strict=True):
            cut[row] = len(ids) > max_length
    return cut


def _columns(texts: Sequence[tuple[str, ...]]) -> list[list[str]]:
    return [list(column) for column in zip(*texts, strict=True)]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
