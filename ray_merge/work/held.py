"""The frozen weights of one stage, with what else of the model a worker looks at; read on first use, kept for good."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ray_merge.errors import RunFailed
from ray_merge.models.conversion import Slot
from ray_merge.models.skeleton import build_skeleton
from ray_merge.models.stage import Stage
from ray_merge.models.stage_calls import StageInput
from ray_merge.models.stored_weights import StoredWeights
from ray_merge.plan.moments import MomentsPlan
from ray_merge.storage.store import Stores
from ray_merge.work.hand_on import with_decoder_inputs


class Held:
    """One stage of a model in this process.

    Args:
        plan: which model, which modules are watched, and where it is cut.
        place: which stage.
        stores: opens the base.
        device: torch device.
        dtype: of the arithmetic.
        autocast: dtype that matrix products are made in, None for `dtype`.

    Attributes:
        stage: the weights.
        weights: reads more of them.
        slots: runtime parameter -> the disk tensors that it is made of.
        decodes: whether the class takes the inputs of a decoder besides.
    """

    def __init__(
        self,
        plan: MomentsPlan,
        place: int,
        stores: Stores,
        device: str,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
    ) -> None:
        base = plan.base
        shapes = {name: entry.shape for name, entry in base.tensors.items()}
        skeleton = build_skeleton(base.config, shapes, name=plan.class_name)
        self.weights = StoredWeights(base, stores.open(base.url), skeleton.slots, skeleton.unsupported)
        watched = [path for part in plan.parts for path in part.modules.values()]
        config: Any = skeleton.model.config
        named = inspect.signature(skeleton.model.forward).parameters
        self._config: Mapping[str, Any] = base.config
        self.decodes = bool(base.config.get("is_encoder_decoder")) and "decoder_input_ids" in named
        self.text_config = config.get_text_config()
        self.pad = stated_pad(self.text_config)
        self.slots: Mapping[str, Sequence[Slot]] = skeleton.slots
        more = {} if autocast is None else {"autocast": autocast}
        self.stage = Stage(
            skeleton,
            range(*plan.stages[place]),
            self.weights,
            watched=watched,
            dtype=dtype,
            device=device,
            **more,
        )

    def decoding(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs of one batch with those of a decoder, where the class has one."""
        return with_decoder_inputs(inputs, self._config) if self.decodes else inputs

    def padded(self, given: StageInput) -> StageInput:
        """Padding as the model tells it: decoders with a classifier look at the last token that is not pad_token_id.

        Where config.json names none, padding gets an id that no token of the batch has.
        """
        ids, mask = given.extras.get("input_ids"), given.attention_mask
        return given if ids is None or mask is None else self._padded(given, ids, mask)

    def _padded(self, given: StageInput, ids: Tensor, mask: Tensor) -> StageInput:
        size = int(self.text_config.vocab_size)
        used = set(ids[mask.bool()].tolist())
        pad = (
            self.pad if self.pad is not None else next((one for one in range(size) if one not in used), None)
        )
        if pad is None and len(ids) > 1:
            raise RunFailed(
                f"a batch holds every one of {size} tokens, so none is left to pad with; write calibration: "
                "{batch_size: 1}"
            )
        self.text_config.pad_token_id = pad
        filled = ids if pad is None else ids.masked_fill(mask == 0, pad)
        return replace(given, extras={**given.extras, "input_ids": filled})


def stated_pad(config: Any) -> int | None:
    """The padding token of a model's text part as its config.json has it; None for none, or one beyond its tokens."""
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < getattr(config, "vocab_size", 0) else None
