"""adapter_config.json: which PEFT settings merge exactly, and which are refused by name.

Owns the table of config keys and the scale formula. An adapter is merged exactly or not at all: a key that is
neither known to be harmless nor handled is an error as soon as it is set, because PEFT's next variant will
arrive as a new key (PEFT itself drops unknown keys with a warning).

Sources: PEFT 0.21 `tuners/lora/config.py`, `tuners/lora/layer.py` (scaling), `utils/other.py`
(`get_pattern_key`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import AdapterError

HARMLESS = frozenset(
    {
        # identity and bookkeeping
        "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
        "peft_version", "runtime_config",
        # which modules were adapted: the saved tensors decide, these only said where to put them
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        # scale: handled below
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
        # training only
        "lora_dropout",
        # heads: handled by the reader of the tensors
        "modules_to_save",
        # settings of variants that are refused through their own switch
        "qalora_group_size", "megatron_core",
    }
)  # fmt: skip
"""Keys whose value never changes the delta beyond what the reader handles."""

REFUSED = {
    "fan_in_fan_out": "a transposed layer (HF Conv1D); train on a Linear model or merge it with PEFT",
    "use_dora": "DoRA is not additive; merge it with PEFT's merge_and_unload",
    "lora_bias": "lora_bias adds a bias to B; train without it",
    "use_qalora": "QA-LoRA's A acts on pooled inputs; PEFT itself refuses to merge it",
    "use_bdlora": "BD-LoRA stores block-diagonal factors; merge it with PEFT",
    "target_parameters": "LoRA on raw parameters (MoE experts) has several layouts; merge it with PEFT",
    "trainable_token_indices": "trainable tokens replace embedding rows; train without them",
    "layer_replication": "replicated layers share base weights; a merge would change the architecture",
    "alora_invocation_tokens": "aLoRA is active only after its trigger tokens and cannot be merged",
    "arrow_config": "an Arrow router picks adapters per token; merge its member adapters instead",
    "kasa_config": "KaSA truncates the base weight; merge it with PEFT",
    "megatron_config": "tensor-parallel Megatron factors; export the adapter to Hugging Face format first",
    "monteclora_config": "MonteCLoRA saves training-only tensors; convert it with PEFT",
    "velora_config": "VeLoRA saves training-only tensors; convert it with PEFT",
    "loftq_config": "LoftQ changed the base; save the adapter with path_initial_model_for_weight_conversion",
    "corda_config": "CorDA changed the base; save the adapter with path_initial_model_for_weight_conversion",
    "lora_ga_config": "LoRA-GA changed the base; save it with path_initial_model_for_weight_conversion",
    "ensure_weight_tying": "the adapter ties embedding and head; train them apart",
}
"""Keys that change the delta: refused when set, with the reason and the way out."""

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base weight as it was."""

SETTING_ONLY = {"eva_config": "init_lora_weights"}
"""Keys that only parametrise an initialisation which leaves the base alone."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Rank and scale of every module of one adapter."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool

    def rank_of(self, module: str) -> int:
        """The rank that the config claims for `module`; the saved tensor must have it."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale_of(self, module: str, rank: int) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA.

        With alpha / r for both, a rank-64 rsLoRA adapter is merged 8 times too weak and nothing fails.
        """
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def pattern_matches(key: str, module: str) -> bool:
    """PEFT's rule: the pattern is a suffix of the module path, whole components only, as a regex."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _by_pattern(patterns: Mapping[str, Any], module: str, default: float) -> Any:
    # First match in file order: PEFT saves JSON with sorted keys and looks them up in that order.
    return next((value for key, value in patterns.items() if pattern_matches(key, module)), default)


def check_config(config: Mapping[str, Any], where: str) -> Scaling:
    """The scaling of an adapter whose every setting can be merged exactly.

    Args:
        config: parsed adapter_config.json.
        where: how messages call the file.

    Raises:
        AdapterError: another PEFT type, a variant that cannot be merged, an unknown key that is set.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{where}: peft_type is {kind!r}; only LORA merges as factors (see PEFT's convert_to_lora)"
        )
    bias = config.get("bias", "none")
    if bias != "none":
        raise AdapterError(
            f"{where}: bias is {bias!r}: trained base biases are not supported; train with bias: none"
        )
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise AdapterError(
            f"{where}: init_lora_weights is {init!r}, which trains against a changed base; save the adapter again "
            "with path_initial_model_for_weight_conversion, which turns it into a plain one"
        )
    for key, value in config.items():
        if value and key in REFUSED:
            raise AdapterError(f"{where}: {key} is set: {REFUSED[key]}")
        known = (
            key in HARMLESS or key in REFUSED or key in SETTING_ONLY or key in ("bias", "init_lora_weights")
        )
        if value and not known:
            raise AdapterError(
                f"{where}: unknown setting {key} = {value!r}; this version cannot tell what it does to the delta"
            )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise AdapterError(f"{where}: modules_to_save is {saved!r}, expected a list of module names")
    return _scaling(config, where)


def _scaling(config: Mapping[str, Any], where: str) -> Scaling:
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or r < 1:
        raise AdapterError(f"{where}: r is {r!r}, expected a whole number >= 1")
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, Mapping):
            raise AdapterError(f"{where}: {key} is {pattern!r}, expected a mapping of module names")
        for expression, value in pattern.items():
            _check_pattern(expression, value, key, where)
        patterns[key] = pattern
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{where}: lora_alpha is {alpha!r}, expected a finite number")
    return Scaling(
        r, float(alpha), patterns["rank_pattern"], patterns["alpha_pattern"], bool(config.get("use_rslora"))
    )


def _check_pattern(expression: str, value: Any, key: str, where: str) -> None:
    try:
        re.compile(rf"(.*\.)?({expression})$")  # as it will be used: `(?i)q` is valid only by itself
    except re.error as error:
        raise AdapterError(f"{where}: {key} {expression!r} is not a regular expression ({error})") from error
    whole = type(value) is int and value >= 1
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not (whole if key == "rank_pattern" else number):
        raise AdapterError(f"{where}: {key} {expression!r} is {value!r}, expected a number")
