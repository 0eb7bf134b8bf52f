"""What one stage hands to the next: arrays, which Ray's object store shares between processes without a copy.

hidden          (B, L, H) float32 (float64 where that is the arithmetic), None before the first block
attention_mask  (B, L) int64, absent for images
input_ids ...   the model's other inputs: later stages need their shapes, and masks may need their values
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_merge.models.stage_calls import StageInput

START_KEYS = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
"""What config.json may call the token that a decoder begins with."""

Handed = Sequence[Mapping[str, Any]]
"""One mapping of arrays for each batch."""


def handed_on(given: Mapping[str, Any], hidden: Tensor | None) -> Mapping[str, Any]:
    """The arrays for the next stage; pixels are worth nothing behind the embeddings, only their shape is."""
    assert hidden is not None
    kept = {name: values for name, values in given.items() if name not in ("hidden", "pixel_values")}
    if "pixel_values" in given:
        kept["pixel_shape"] = np.array(np.shape(given["pixel_values"]))
    elif "pixel_shape" in given:
        kept["pixel_shape"] = given["pixel_shape"]
    return {**kept, "hidden": as_array(hidden)}


def as_array(tensor: Tensor) -> Any:
    """A tensor as numpy has it: half precision becomes float32."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide.detach().cpu().numpy()


def stage_input(given: Mapping[str, Any], device: str) -> StageInput:
    """The arrays of one batch as a stage takes them."""
    tensors = {name: _tensor(values).to(device) for name, values in given.items() if name != "pixel_shape"}
    if "pixel_shape" in given:
        tensors["pixel_values"] = torch.zeros((), device=device).expand(*map(int, given["pixel_shape"]))
    hidden, mask = tensors.pop("hidden", None), tensors.pop("attention_mask", None)
    return StageInput(
        hidden=hidden, attention_mask=mask, position_ids=tensors.pop("position_ids", None), extras=tensors
    )


def _tensor(values: Any) -> Tensor:
    with warnings.catch_warnings():
        # Arrays of the object store are read-only; nothing here writes to an input.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(values)


def with_decoder_inputs(given: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs of an encoder-decoder with those of its decoder: the same tokens, one to the right, as in training."""
    if "input_ids" not in given or "decoder_input_ids" in given:
        return given
    ids = given["input_ids"]
    start = next((config[key] for key in START_KEYS if isinstance(config.get(key), int)), 0)
    return {
        **given,
        "decoder_input_ids": np.concatenate([np.full_like(ids[:, :1], start), ids[:, :-1]], axis=1),
    }
