"""What a base can take, from its config.json and headers: ids, positions, token types, image shape."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import RayMergeError
from ray_merge.models.model_class import quiet_and_offline
from ray_merge.storage.checkpoint import Checkpoint

POSITION_KEYS = ("max_position_embeddings", "n_positions")

RESERVING = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "data2vec-text", "esm",
    "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "altclip", "altclip_text_model",
)  # fmt: skip
"""Model types whose first position is padding_idx + 1 (create_position_ids_from_input_ids in their modeling files): a
table of 514 rows takes 512 tokens."""

EMBEDDINGS = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "wte.weight",
    "shared.weight",
    "token_embedding.weight",
)
"""How names of token embeddings end, for a config.json without vocab_size: its class's default is a guess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one base; None where it has none.

    Args:
        url: of the base, for messages.
        vocabulary: token ids are below it.
        positions: tokens of one text.
        positions_key: the number's place in config.json, for messages.
        token_types: token_type_ids are below it.
        image: (C, H, W).
        pad_id: of config.json: pad_token_id, else eos_token_id, else 0.
    """

    url: str
    vocabulary: int | None
    positions: int | None
    positions_key: str
    token_types: int | None
    image: tuple[int, int, int] | None
    pad_id: int


def limits_of(base: Checkpoint) -> Limits:
    """The bounds of a base; those of its text and vision parts where it has both."""
    config = _complete(base.config)
    text, vision = (_part(config, key) for key in ("text_config", "vision_config"))
    positions, key = _positions(text)
    stated = _count(_part(base.config, "text_config").get("vocab_size"))
    vocabulary = stated or _embedding_rows(base) or _count(text.get("vocab_size"))
    pads = [*_ids(text.get("pad_token_id")), *_ids(text.get("eos_token_id")), 0]
    return Limits(
        url=base.url,
        vocabulary=vocabulary,
        positions=positions,
        positions_key=key,
        token_types=_count(text.get("type_vocab_size")),
        image=_image(vision),
        pad_id=next(pad for pad in pads if vocabulary is None or pad < vocabulary),
    )


def _complete(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with what its class takes where config.json says nothing."""
    import transformers

    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        return config
    try:
        with quiet_and_offline():
            whole = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
            values: dict[str, Any] = whole.to_dict()
    except RayMergeError:  # a signal's
        raise
    except Exception:  # noqa: BLE001 - configs and their validators raise whatever they like; building the model tells
        return config
    return values


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = config.get(key)
    return part if isinstance(part, Mapping) else config


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _ids(value: Any) -> list[int]:
    """A token id of a config: a number, a list of them, or nothing."""
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int and one >= 0]


def _positions(config: Mapping[str, Any]) -> tuple[int | None, str]:
    for key in POSITION_KEYS:
        rows = _count(config.get(key))
        if rows is not None:
            first = (_ids(config.get("pad_token_id")) or [1])[0] + 1
            reserved = first if config.get("model_type") in RESERVING else 0
            return rows - reserved, f"{key} = {rows}" + (
                f", of which {reserved} are reserved" * bool(reserved)
            )
    return None, ""


def _embedding_rows(base: Checkpoint) -> int | None:
    rows = [
        entry.shape[0]
        for name, entry in base.tensors.items()
        if name.endswith(EMBEDDINGS) and len(entry.shape) == 2
    ]
    return min(rows, default=None)


def _image(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    size = config.get("image_size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    channels, rows, columns = (_count(config.get("num_channels")) or 3, _count(height), _count(width))
    return None if rows is None or columns is None else (channels, rows, columns)
