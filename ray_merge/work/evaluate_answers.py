"""What a causal model says: how likely it finds a text, and how it goes on.

Both run the whole model over small groups of rows: logits over a vocabulary of 128,000 are what takes memory here.
Legend: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_merge.models.losses import NO_TOKEN, next_tokens

Arrays = Mapping[str, Any]

Logits = Callable[[Arrays], Tensor]
"""Arrays of some rows -> (B, L, V) float32."""

LOGIT_BYTES = 128 * 2**20
"""Of one group's logits."""

POSITIONS_AT_ONCE = 32
"""Whose log-softmax is taken in float64."""


def groups(batch: Arrays, vocabulary: int, more: int = 0) -> Iterator[tuple[slice, Arrays]]:
    """A batch in groups of rows whose logits are small, each without columns that are padding alone.

    Args:
        batch: input_ids, attention_mask ... (B, L).
        vocabulary: V.
        more: tokens that will be added to every row.
    """
    mask_BL = batch["attention_mask"]
    n_rows, longest = mask_BL.shape
    step = max(1, LOGIT_BYTES // (4 * vocabulary * (longest + more)))
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        length = int(mask_BL[rows].sum(axis=1).max())
        yield rows, {name: values[rows, :length] for name, values in batch.items()}


def negative_log_likelihood(logits: Tensor, batch: Arrays) -> tuple[float, int]:
    """Sum over all tokens but the first of each row, in nats and float64, and how many tokens that are."""
    ids_BL, mask_BL = (torch.tensor(batch[name]) for name in ("input_ids", "attention_mask"))
    following_BL = next_tokens(ids_BL, mask_BL).to(logits.device)
    there_BL = following_BL != NO_TOKEN
    nats, wanted_N = 0.0, following_BL[there_BL]
    rows_N, columns_N = torch.nonzero(there_BL, as_tuple=True)
    for start in range(0, len(wanted_N), POSITIONS_AT_ONCE):
        some = slice(start, start + POSITIONS_AT_ONCE)
        scores_NV = torch.log_softmax(logits[rows_N[some], columns_N[some]].double(), dim=-1)
        nats -= float(scores_NV.gather(1, wanted_N[some, None]).sum())
    return nats, len(wanted_N)


def continued(
    logits_of: Logits, batch: Arrays, n_tokens: Sequence[int], ends: frozenset[int]
) -> list[list[int]]:
    """The tokens that the model finds likeliest, one after another, without a cache of keys and values.

    Args:
        logits_of: runs the model.
        batch: some rows, padded on the right.
        n_tokens: of each row, at most.
        ends: tokens that end a text; they are not among the result.
    """
    lengths = [int(length) for length in batch["attention_mask"].sum(axis=1)]
    grown = {name: np.pad(values, ((0, 0), (0, max(n_tokens)))) for name, values in batch.items()}
    said: list[list[int]] = [[] for _ in lengths]
    live = list(range(len(lengths)))
    while live:
        longest = max(lengths[row] for row in live)
        logits_BLV = logits_of({name: values[live, :longest] for name, values in grown.items()})
        last_B = torch.tensor([lengths[row] - 1 for row in live], device=logits_BLV.device)
        chosen = logits_BLV[torch.arange(len(live), device=logits_BLV.device), last_B].argmax(dim=-1).tolist()
        going = []
        for row, token in zip(live, chosen, strict=True):
            if token in ends:
                continue
            said[row].append(token)
            grown["input_ids"][row, lengths[row]] = token
            grown["attention_mask"][row, lengths[row]] = 1
            lengths[row] += 1
            if len(said[row]) < n_tokens[row]:
                going.append(row)
        live = going
    return said


def says(said: Sequence[int], text: str, decode: Callable[[Sequence[int]], str]) -> bool:
    """Whether an answer begins with a text, and the text's last word ends there.

    Right if some of the first tokens, decoded and without blanks at the ends, are the text, and what comes behind them
    does not go on with it: no letter or digit right behind a letter or digit, nor a fraction behind a digit. "12" is in
    "12." and in " 12 a", not in "123", "12.5" or "12/7".

    Args:
        said: tokens of the answer.
        text: the label, without blanks at its ends.
        decode: makes text of tokens.
    """
    whole = decode(said)
    made = (decode(said[:count]) for count in range(1, len(said) + 1))
    return any(before.strip() == text and not _goes_on(before, whole[len(before) :]) for before in made)


def _goes_on(before: str, behind: str) -> bool:
    if before[-1:].isdigit() and re.match(r"[.,/]\d", behind):
        return True
    return before[-1:].isalnum() and behind[:1].isalnum()
