"""Which token a checkpoint with a head pads with: decoders look at the last token that is not `pad_token_id`.

Without one they refuse batches of more than one row; with another one than the tokenizer pads with they would look at
padding. Reads the small files of the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_merge.spec import Adapter
from ray_merge.storage.checkpoint import Checkpoint, read_json
from ray_merge.storage.store import Store, Stores
from ray_merge.storage.strict_json import MAX_JSON_BYTES

NAMING = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERING = ("tokenizer_config.json", "tokenizer.json")


def padding_token(base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[int | None, str]:
    """What a config.json that names no padding token has to name, and a warning.

    Args:
        base: headers of the base.
        adapters: of the merge; the tokenizer of one that resized the vocabulary becomes the result's.

    Returns:
        None where none is known; "" where there is nothing to warn of.
    """
    text = base.config.get("text_config")
    config = text if isinstance(text, Mapping) else base.config
    owner, size = _vocabulary(base, adapters, config.get("vocab_size"))
    token, number = _of_tokenizer(base, owner)
    if token is not None:
        if number is not None and number < size:
            return number, ""
        what = "not numbered in the tokenizer's files" if number is None else f"{number} of {size} tokens"
        return None, f"the tokenizer's padding token {token!r} is {what}; {_ADVICE}"
    eos = config.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    if type(first) is not int:
        return None, f"neither config.json nor the tokenizer names a padding token; {_ADVICE}"
    if not 0 <= first < size:  # transformers does not build a table without the row that it names
        return None, (
            f"neither config.json nor the tokenizer names a padding token, and eos_token_id is {first} of {size} "
            f"tokens; {_ADVICE}"
        )
    return first, (
        f"neither config.json nor the tokenizer names a padding token, so pad_token_id is eos_token_id ({first}); pad "
        "with it"
    )


_ADVICE = "set model.config.pad_token_id to what you pad with: a decoder takes one row at a time without it"


def _vocabulary(base: Checkpoint, adapters: Sequence[Adapter], said: Any) -> tuple[Adapter | None, float]:
    """The adapter that resized the vocabulary, and how many tokens the result knows; without end if nobody says."""
    for adapter in adapters:
        for tensor, entry in adapter.replaced.items():
            if entry.shape != base.tensors[tensor].shape:
                return adapter, entry.shape[0]
    return None, said if type(said) is int else math.inf


def _of_tokenizer(base: Checkpoint, owner: Adapter | None) -> tuple[str | None, int | None]:
    """The padding token of the result's tokenizer, and its number; None for what its files do not say."""
    url, files = base.url, {info.path: info.n_bytes for info in base.side_files}
    if owner is not None and owner.side_files:
        url, files = owner.url, {name: n_bytes for name, n_bytes, _ in owner.side_files}
    store = Stores().open(url)
    token = next((one for document in _documents(store, files, NAMING) if (one := _named(document))), None)
    if token is None:
        return None, None
    numbers = (_number(document, token) for document in _documents(store, files, NUMBERING))
    return token, next((number for number in numbers if number is not None), None)


def _documents(store: Store, files: Mapping[str, int], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        if files.get(name, MAX_JSON_BYTES + 1) <= MAX_JSON_BYTES:
            yield read_json(store, name)


def _named(document: Mapping[str, Any]) -> str | None:
    token = document.get("pad_token")
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _number(document: Mapping[str, Any], token: str) -> int | None:
    """The number of a special token: by number in tokenizer_config.json, in a list in tokenizer.json."""
    by_number, listed = document.get("added_tokens_decoder"), document.get("added_tokens")
    pairs = list(by_number.items()) if isinstance(by_number, Mapping) else []
    pairs += (
        [(one.get("id"), one) for one in listed if isinstance(one, Mapping)]
        if isinstance(listed, list)
        else []
    )
    for number, one in pairs:
        if isinstance(one, Mapping) and one.get("content") == token and str(number).isdecimal():
            return int(number)
    return None
