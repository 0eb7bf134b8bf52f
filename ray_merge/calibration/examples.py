"""Rows -> examples: which columns are taken, and every check of what stands in them.

Owns the precedence: columns that `data.text` names; else `text` with `text_b` where there is one; else `input_ids`
with its masks and types, and `pixel_values`. `label` is never among them. An example that the base cannot take is
refused here, with file, row, both numbers and the next step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_merge.calibration.columns import Row, check_columns, list_columns
from ray_merge.calibration.limits import Limits
from ray_merge.errors import RecipeError, shown

if TYPE_CHECKING:
    import numpy as np

    from ray_merge.calibration.tokens import Tokens

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
PIXELS = "pixel_values"
ANY = 2**63
"""Above every int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One input, without padding.

    Args:
        ids: (L,) int64, L >= 1; None without tokens.
        mask: (L,) int64 of 0 and 1, its first and last are 1.
        types: (L,) int64, None where the data or the tokenizer have none.
        pixels: (C, H, W) float32.
        cut: it had more tokens than it may have.
    """

    ids: np.ndarray[Any, Any] | None = None
    mask: np.ndarray[Any, Any] | None = None
    types: np.ndarray[Any, Any] | None = None
    pixels: np.ndarray[Any, Any] | None = None
    cut: bool = False

    @property
    def length(self) -> int:
        """Tokens; 0 of an image."""
        return 0 if self.ids is None else len(self.ids)


def choose_columns(text: Sequence[str] | None, there: Sequence[str], place: str) -> tuple[str, ...]:
    """The columns to read.

    Args:
        text: the recipe's `data.text`.
        there: the file's columns.
        place: for messages.

    Raises:
        RecipeError: one is missing, or texts stand beside token ids or images and the recipe does not choose.
    """
    if text is not None:
        check_columns(there, text, place)
        return tuple(text)
    ready = [name for name in ("input_ids", PIXELS) if name in there]
    if "text" in there and ready:
        raise RecipeError(
            f"{place} has both 'text' and {ready[0]!r}; write data: {{path: ..., text: [text]}} for the texts, or "
            "give a file without the column that is not meant"
        )
    if "text" in there:
        return ("text", "text_b") if "text_b" in there else ("text",)
    if ready:
        optional = TOKEN_COLUMNS if "input_ids" in ready else ()
        return tuple(name for name in (*optional, PIXELS) if name in there)
    raise RecipeError(
        f"{place} has no column 'text', 'input_ids' or 'pixel_values'; it has {list_columns(there)}; name its texts "
        "with data: {path: ..., text: [COLUMN]}"
    )


def read_text(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """The text or pair of a row.

    Raises:
        RecipeError: null, or anything but text.
    """
    for name in columns:
        value = row.values[name]
        if not isinstance(value, str):
            what = "null" if value is None else f"{shown(value)} ({type(value).__name__})"
            raise RecipeError(
                f"{row.place}: column {name!r} is {what}, expected text; remove the row, or name another column"
            )
    return tuple(row.values[name] for name in columns)


def from_tokens(place: str, tokens: Tokens, limits: Limits, max_length: int) -> Example:
    """What the tokenizer made of a text.

    Raises:
        RecipeError: no token at all, or what `check_tokens` refuses.
    """
    import numpy as np

    _check_takes_tokens(limits, place)
    ids = np.asarray(tokens.columns["input_ids"], dtype=np.int64)
    if not len(ids):
        raise RecipeError(f"{place}: the text is empty and gives no token; remove the row")
    kinds = tokens.columns.get("token_type_ids")
    types = None if kinds is None else np.asarray(kinds, dtype=np.int64)
    _check_range(
        "token id", ids, limits.vocabulary, place, f"{limits.url}; is its tokenizer another model's?"
    )
    if types is not None and limits.token_types is not None:
        _check_range("token type", types, limits.token_types, place, limits.url)
    check_length(len(ids), limits, max_length, place)
    return Example(ids=ids, mask=np.ones_like(ids), types=types, cut=tokens.cut)


def _check_takes_tokens(limits: Limits, place: str) -> None:
    if limits.vocabulary is None and limits.image is not None:
        raise RecipeError(
            f"{place}: it holds tokens, but {limits.url} takes images of {limits.image}; give data with a column "
            "pixel_values"
        )


def check_length(length: int, limits: Limits, max_length: int, place: str) -> None:
    """Refuse what has more tokens than the base has positions."""
    if limits.positions is not None and length > limits.positions:
        raise RecipeError(
            f"{place}: {length} tokens (calibration.max_length = {max_length}), but {limits.url} takes at most "
            f"{limits.positions} ({limits.positions_key}); set calibration.max_length to {limits.positions} or less"
        )


def from_row(row: Row, limits: Limits, max_length: int) -> Example:
    """A row of token ids, an image, or both; tokens beyond `max_length` are cut, masked ones at both ends dropped.

    Raises:
        RecipeError: a value that is no such thing, or that the base cannot take.
    """
    pixels = _pixels(row, limits) if PIXELS in row.values else None
    if "input_ids" not in row.values:
        return Example(pixels=pixels)
    columns = {
        name: _whole(row.values[name], row.place, name) for name in TOKEN_COLUMNS if name in row.values
    }
    ids = columns["input_ids"]
    _check_takes_tokens(limits, row.place)
    for name, values in columns.items():
        if len(values) != len(ids):
            raise RecipeError(
                f"{row.place}: {name} has {len(values)} values and input_ids has {len(ids)}; write them alike"
            )
    made_by = f"{limits.url}; make them with the base's own tokenizer"
    _check_range("token id", ids, limits.vocabulary, row.place, made_by)
    if "token_type_ids" in columns:
        _check_range("token type", columns["token_type_ids"], limits.token_types, row.place, limits.url)
    trimmed = _trimmed(columns, row.place)
    kept = {name: values[:max_length] for name, values in trimmed.items()}
    check_length(len(kept["input_ids"]), limits, max_length, row.place)
    return Example(
        ids=kept["input_ids"],
        mask=kept["attention_mask"],
        types=kept.get("token_type_ids"),
        pixels=pixels,
        cut=len(trimmed["input_ids"]) > max_length,
    )


def _trimmed(columns: Mapping[str, np.ndarray[Any, Any]], place: str) -> dict[str, np.ndarray[Any, Any]]:
    """The columns between the first and the last token that the mask lets through, and the mask itself."""
    import numpy as np

    mask = columns.get("attention_mask", np.ones_like(columns["input_ids"]))
    other = mask[(mask != 0) & (mask != 1)]
    if len(other):
        raise RecipeError(
            f"{place}: attention_mask holds {other[0]}, expected 0 (padding) or 1 (token); write it so"
        )
    seen = np.flatnonzero(mask)
    if not len(seen):
        raise RecipeError(f"{place}: {_nothing(columns)}; remove the row")
    every = {**columns, "attention_mask": mask}
    return {
        name: values[seen[0] : seen[-1] + 1].astype(np.int64, copy=False) for name, values in every.items()
    }


def _nothing(columns: Mapping[str, Any]) -> str:
    return "attention_mask is all 0" if len(columns["input_ids"]) else "input_ids is empty"


def _numbers(value: Any, kinds: str, expected: str, place: str, name: str) -> np.ndarray[Any, Any]:
    import numpy as np

    try:
        found = value if isinstance(value, np.ndarray) else np.asarray(value)
    except (ValueError, OverflowError) as error:  # lists of different lengths
        raise RecipeError(f"{place}: {name} is ragged, expected {expected}; write it again") from error
    if found.ndim and (not found.size or found.dtype.kind in kinds):
        return found
    given = shown(value) if not found.ndim else f"values of type {found.dtype}"
    raise RecipeError(f"{place}: {name} is {given}, expected {expected}; write it again")


def _whole(value: Any, place: str, name: str) -> np.ndarray[Any, Any]:
    expected = "a list of whole numbers"
    found = _numbers(value, "biu" if name == "attention_mask" else "iu", expected, place, name)
    if found.ndim != 1:
        raise RecipeError(
            f"{place}: {name} has shape {found.shape}, expected {expected}; write one row per text"
        )
    return found


def _check_range(what: str, values: np.ndarray[Any, Any], end: int | None, place: str, whose: str) -> None:
    wrong = [*(values < 0).nonzero()[0][:1], *(values >= (end or ANY)).nonzero()[0][:1]]
    if wrong:
        raise RecipeError(
            f"{place}: {what} {values[wrong[0]]} at position {wrong[0]}, allowed are 0 to {(end or ANY) - 1} in {whose}"
        )


def _pixels(row: Row, limits: Limits) -> np.ndarray[Any, Any]:
    """The image of a row, (C, H, W) float32; a flat list is folded as the base's config says."""
    import numpy as np

    want = limits.image
    if want is None and limits.vocabulary is not None:
        raise RecipeError(
            f"{row.place}: it is an image (pixel_values), but {limits.url} takes token ids; give data with a column "
            "text or input_ids"
        )
    found = _numbers(row.values[PIXELS], "iuf", "numbers, C x H x W", row.place, PIXELS)
    if want is not None and found.ndim == 1 and found.size == np.prod(want):
        found = found.reshape(want)
    fits = found.shape == want if want is not None else found.ndim == 3
    if not fits or not found.size:
        expected = f"{want} or as many numbers in a row ({limits.url})" if want else "three axes, C x H x W"
        raise RecipeError(
            f"{row.place}: pixel_values has shape {found.shape}, expected {expected}; resize the images with the "
            "base's own processor"
        )
    with np.errstate(over="ignore"):
        result = found.astype(np.float32)
    if not np.isfinite(result).all():
        raise RecipeError(f"{row.place}: pixel_values holds NaN or Inf; remove the row")
    return result


def check_alike(examples: Sequence[tuple[str, Example]]) -> Iterator[Example]:
    """The examples of (place, example), once all images are known to have one shape."""
    first = examples[0][1].pixels
    for place, example in examples:
        if first is not None and example.pixels is not None and example.pixels.shape != first.shape:
            raise RecipeError(
                f"{place}: pixel_values has shape {example.pixels.shape}, those before it {first.shape}; resize them"
            )
        yield example
