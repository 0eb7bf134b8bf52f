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
from dataclasses import dataclass, field
from typing import Any

from ray_merge.errors import AdapterError, shown
from ray_merge.storage.patterns import Patterns

HARMLESS = frozenset(
    {
        # identity and bookkeeping
        "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
        "runtime_config",
        # which modules were adapted: the saved tensors decide, these only said where to put them
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        # training only
        "lora_dropout",
        # settings of a variant that is switched on by another key
        "qalora_group_size", "megatron_core",
        # how A and B began; what matters is whether init_lora_weights changed the base
        "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    }
)  # fmt: skip
"""Keys whose value never changes the delta."""

HANDLED = frozenset(
    {
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias", "lora_bias",
        "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "use_dora",
        "use_bdlora", "target_parameters", "peft_version", "lora_B_layout", "monteclora_config", "velora_config",
    }
)  # fmt: skip
"""Keys that change the delta and are read into `Settings`."""

REFUSED = {
    "use_qalora": "QA-LoRA's A acts on pooled inputs, and PEFT itself refuses to merge it; serve it as an adapter",
    "layer_replication": "replicated layers share base weights, so a merge would change the architecture; train "
    "on a base whose layers were copied first",
    "alora_invocation_tokens": "aLoRA is active only after its trigger tokens and cannot be merged; serve it as "
    "an adapter",
    "arrow_config": "an Arrow router picks adapters per token; merge its member adapters instead",
    "kasa_config": "KaSA truncates the base weight; merge it with PEFT's merge_and_unload",
    "megatron_config": "Megatron's tensor-parallel factors; export the adapter to Hugging Face format first",
}
"""Keys that are refused when set, with the reason and the way out."""

TRAINING_ONLY = {"monteclora_config": "lora_monteclora_sampler", "velora_config": "lora_velora_"}
"""Settings whose extra tensors serve training alone: PEFT merges plain B A -> what those tensors' names hold."""

PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")
"""Words for init_lora_weights that leave the base weight as it was; true, false and null do so too."""

MUTATED_INITS = ("pissa", "olora", "corda", "lora_ga")
"""What init_lora_weights begins with where training took s B0 A0 away from the base first."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Rank and scale of every module of one adapter; a pattern's key is matched as PEFT does it."""

    r: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_keys: Patterns
    alpha_keys: Patterns
    rslora: bool

    def rank_of(self, module: str) -> int:
        """The rank that the config claims for `module`; the saved tensor must have it."""
        key = self.rank_keys.first(module) if self.ranks else None
        return self.r if key is None else self.ranks[key]

    def scale_of(self, module: str, rank: int) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA.

        With alpha / r for both, a rank-64 rsLoRA adapter is merged 8 times too weak and nothing fails.
        """
        key = self.alpha_keys.first(module) if self.alphas else None
        alpha = self.alpha if key is None else float(self.alphas[key])
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an adapter's config says about its delta.

    Args:
        scaling: rank and scale of each module.
        bias: "none", "all" or "lora_only": which base biases were trained and saved.
        lora_bias: B has a bias.
        dora: factors come with a magnitude.
        transposed: fan_in_fan_out.
        blocks: BD-LoRA's number of blocks, 0 without it.
        saved: names that end the paths of modules saved whole.
        tokens: indices of trained rows by the end of the embedding's path; "" for the input embedding.
        tied: whether training kept embedding and head equal (ensure_weight_tying).
        parameters: target_parameters, sorted.
        version: of PEFT, as numbers; empty when it was not written.
        expert_layout: "rank_major" or "grouped_by_expert", or "" where nobody says.
        mutated: init_lora_weights where it changed the base, else "".
        training_only: what the names of tensors hold that are used in training only.
    """

    scaling: Scaling
    bias: str = "none"
    lora_bias: bool = False
    dora: bool = False
    transposed: bool = False
    blocks: int = 0
    saved: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: bool = False
    parameters: tuple[str, ...] = ()
    version: tuple[int, ...] = ()
    expert_layout: str = ""
    mutated: str = ""
    training_only: tuple[str, ...] = ()


def read_settings(config: Mapping[str, Any], where: str) -> Settings:
    """The settings of an adapter, every one of which is handled.

    Args:
        config: parsed adapter_config.json.
        where: how messages call the file.

    Raises:
        AdapterError: another PEFT type, a variant that cannot be merged, an unknown key that is set, a value
            that is none.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{where}: peft_type is {shown(kind)}; only LORA merges as factors; PEFT's convert_to_lora turns some "
            "others into it"
        )
    for key, value in config.items():
        if value and key in REFUSED:
            raise AdapterError(f"{where}: {key} is set: {REFUSED[key]}")
        if value and key not in HARMLESS | HANDLED | REFUSED.keys():
            raise AdapterError(
                f"{where}: unknown setting {shown(key)} = {shown(value)}; this version cannot tell what it does to "
                "the delta: merge with the PEFT that wrote it, or upgrade ray-merge"
            )
    for key in ("task_type", "base_model_name_or_path"):
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"{where}: {key} is {shown(config[key])}, expected text")
    bias = config.get("bias", "none") or "none"
    if bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"{where}: bias is {shown(bias)}, expected none, all or lora_only")
    return Settings(
        scaling=_scaling(config, where),
        bias=bias,
        lora_bias=_flag(config, "lora_bias", where),
        dora=_flag(config, "use_dora", where),
        transposed=_flag(config, "fan_in_fan_out", where),
        blocks=_blocks(config, where),
        saved=_names(config, "modules_to_save", where),
        tokens=_tokens(config, where),
        tied=_flag(config, "ensure_weight_tying", where),
        parameters=tuple(sorted(set(_names(config, "target_parameters", where)))),
        version=_version(config, where),
        expert_layout=_expert_layout(config, where),
        mutated=_init(config, where),
        training_only=tuple(part for key, part in TRAINING_ONLY.items() if config.get(key)),
    )


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{where}: {key} is {shown(value)}, expected true or false")
    return bool(value)


def _names(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise AdapterError(f"{where}: {key} is {shown(names)}, expected a list of names")
    return tuple(names)


def _init(config: Mapping[str, Any], where: str) -> str:
    init = config.get("init_lora_weights", True)
    if init is None or isinstance(init, bool) or init in PLAIN_INITS:
        return ""
    word = init if isinstance(init, str) else ""
    if word.startswith(MUTATED_INITS):
        return word
    reason = "unknown, so it cannot be told whether it changed the base"
    if word == "loftq":
        reason = "LoftQ trained against a quantised base that no checkpoint holds; merge it with PEFT into that base"
    raise AdapterError(f"{where}: init_lora_weights is {shown(init)}: {reason}")


def _blocks(config: Mapping[str, Any], where: str) -> int:
    given = config.get("use_bdlora")
    if not given:
        return 0
    blocks = given.get("nblocks") if isinstance(given, Mapping) else None
    if type(blocks) is not int or blocks < 1:
        raise AdapterError(f"{where}: use_bdlora is {shown(given)}, expected a mapping with nblocks >= 1")
    return blocks


def _tokens(config: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    given = config.get("trainable_token_indices") or {}
    by_layer = {"": given} if isinstance(given, list) else given
    if not isinstance(by_layer, Mapping) or not all(
        isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
        for rows in by_layer.values()
    ):
        raise AdapterError(
            f"{where}: trainable_token_indices is {shown(given)}, expected a list of rows, or one for each layer"
        )
    return {str(layer): tuple(rows) for layer, rows in by_layer.items()}


def _version(config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    text = config.get("peft_version")
    if text is None or text == "":
        return ()
    # 0.19.1, 0.19.2.dev0, 0.19.0@UNKNOWN: the numbers in front are what decides.
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text) if isinstance(text, str) else None
    if found is None:
        raise AdapterError(f"{where}: peft_version is {shown(text)}, expected for example 0.21.2")
    return tuple(int(part or 0) for part in found.groups())


def _expert_layout(config: Mapping[str, Any], where: str) -> str:
    layout = config.get("lora_B_layout") or ""
    if layout not in ("", "rank_major", "grouped_by_expert"):
        raise AdapterError(
            f"{where}: lora_B_layout is {shown(layout)}, expected rank_major or grouped_by_expert (Unsloth's words)"
        )
    return str(layout)


def _scaling(config: Mapping[str, Any], where: str) -> Scaling:
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or r < 1:
        raise AdapterError(f"{where}: r is {shown(r)}, expected a whole number >= 1")
    values, keys = {}, {}
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, Mapping):
            raise AdapterError(f"{where}: {key} is {shown(pattern)}, expected a mapping of module names")
        keys[key] = Patterns(pattern, f"{where}: {key}")
        for expression, value in pattern.items():
            _check_number(value, f"{where}: {key} {shown(expression)}", whole=key == "rank_pattern")
        values[key] = pattern
    _check_number(alpha, f"{where}: lora_alpha", whole=False)
    return Scaling(
        r=r,
        alpha=float(alpha),  # type: ignore[arg-type]  # checked above
        ranks=values["rank_pattern"],
        alphas=values["alpha_pattern"],
        rank_keys=keys["rank_pattern"],
        alpha_keys=keys["alpha_pattern"],
        rslora=_flag(config, "use_rslora", where),
    )


def _check_number(value: Any, where: str, *, whole: bool) -> None:
    is_whole = type(value) is int and 1 <= value < 2**31
    is_finite = (
        not isinstance(value, bool)
        and isinstance(value, int | float)
        and abs(value) < 2**63
        and math.isfinite(value)
    )
    if not (is_whole if whole else is_finite):
        raise AdapterError(f"{where} is {shown(value)}, expected a {'whole' if whole else 'finite'} number")
