"""The grammar of an adapter's tensor names: `base_model.model.<runtime module>.lora_A.weight` and its relatives.

Owns: what a name says, and the wrappers that are taken off it (torch.compile's `_orig_mod.`, FSDP's
`_fsdp_wrapped_module.`, the adapter name `default.` of in-memory dumps, PEFT's own `base_layer.`). Never looks
at a tensor. Source: PEFT 0.21 `utils/save_and_load.py`, `tuners/lora/model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PREFIX = "base_model.model."

Role = Literal["A", "B", "B.bias", "embedding_A", "embedding_B", "magnitude", "tokens", "saved", "ignored"]

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")

_FACTORS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("A", re.compile(r"(?P<module>.+)\.lora_A(?:\.default)?\.weight")),
    ("B", re.compile(r"(?P<module>.+)\.lora_B(?:\.default)?\.weight")),
    ("B.bias", re.compile(r"(?P<module>.+)\.lora_B(?:\.default)?\.bias")),
    ("embedding_A", re.compile(r"(?P<module>.+)\.lora_embedding_A(?:\.default)?")),
    ("embedding_B", re.compile(r"(?P<module>.+)\.lora_embedding_B(?:\.default)?")),
    # Before PEFT 0.12 the magnitude was a module with a `.weight`.
    ("magnitude", re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")),
    ("tokens", re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")),
)

UNKNOWN_PARTS = {
    "lora_diag": "a KaSA diagonal",
    "lora_E": "an AdaLoRA diagonal",
    "lora_": "a LoRA variant that this version does not know",
    "token_adapter": "a token adapter's state that this version does not know",
    "ranknum": "AdaLoRA's bookkeeping",
}
"""What a tensor name betrays that no rule here takes."""


@dataclass(frozen=True, slots=True)
class Name:
    """What one tensor name says.

    Args:
        role: which part of an update it is.
        module: runtime path of the adapted module, or for `saved` the runtime name of the whole parameter.
        depth: how many times the module was wrapped around the same layer (`experts.base_layer.lora_A`: 1).
        wrapped: for `saved`: it was stored inside an adapted layer (`q_proj.base_layer.bias`).
        why: for `ignored`: the reason.
    """

    role: Role
    module: str
    depth: int = 0
    wrapped: bool = False
    why: str = ""


def unwrap(key: str) -> str:
    """The runtime name behind PEFT's prefix and what compilers and sharders put around modules."""
    return _WRAPPERS.sub("", key).removeprefix(PREFIX)


def read_name(key: str, training_only: Sequence[str] = ()) -> Name | str:
    """What `key` says, or in words why it cannot be told.

    Args:
        key: as stored.
        training_only: parts of names that mark tensors of training alone (MonteCLoRA, VeLoRA).
    """
    runtime = unwrap(key)
    if any(f".{part}" in runtime for part in training_only):
        return Name("ignored", runtime, why="used in training only; the delta is plain B A")
    for role, pattern in _FACTORS:
        match = pattern.fullmatch(runtime)
        if match:
            module, depth = _take_base_layers(match["module"])
            return Name(role, module, depth)
    # A resized table under trained tokens: `embed_tokens.token_adapter.base_layer.weight`.
    runtime = runtime.replace(".token_adapter.base_layer.", ".base_layer.")
    unknown = next((words for part, words in UNKNOWN_PARTS.items() if f".{part}" in runtime), None)
    if unknown:
        return f"is {unknown}"
    if ".original_module." in runtime:
        return Name("ignored", runtime, why="the base's own module, which modules_to_save replaced")
    plain = re.sub(r"\.modules_to_save(?:\.default)?\.", ".", runtime)
    name = _drop_base_layers(plain)
    return Name("saved", name, wrapped=name != plain)


def _take_base_layers(module: str) -> tuple[str, int]:
    """The module without wrappers, and how many of them stood at its end."""
    depth = 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    return _drop_base_layers(module), depth


def _drop_base_layers(name: str) -> str:
    return name.replace(".base_layer.", ".")
