"""Declarations of the methods that learn phi: TARA-A, TARA-B, AdaMerging, NSC.

`preset: paper` is what the papers and their code have (methods.md of the design; README says what is known of them);
`preset: default` is what README measures. A parameter that is written out wins over either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_merge.errors import MethodError
from ray_merge.methods import cost, memory
from ray_merge.methods.declare import Interval, Method, choice, flag, integer, number, text

TARA = "TARA, arXiv 2603.26299"
POSITIVE = Interval(0.0, open_low=True)
NOT_NEGATIVE = Interval(0.0)
LAYERS = re.compile(r"all|last|last_quarter|[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*")

ENTROPY_PAPER: Mapping[str, Any] = {
    "objective": "entropy",
    "steps": 500,
    "learning_rate": 1e-3,
    "alpha": 1.0,
    "normalize_entropy": False,
    "diversity": 0.0,
}
"""For tara_a, tara_b and adamerging, which TARA's authors train alike but for the plain sum of adamerging.

From TARA's paper: entropy, 500 steps, 1e-3 (and batch_size 16, init 0.4, which are every preset's). From its authors'
code, where the paper is silent: alpha 1, entropies not divided by ln C, weight_decay 0.01 (AdamW's own). diversity is
ours. The code stops earlier than the paper, after 250 steps (vision) and 90 (NLI). AdaMerging's own code learns a
coefficient for every tensor of fully trained models instead: Adam, 1000 steps of 1e-3 from 0.3, on test rows.
"""

ENTROPY_DEFAULT: Mapping[str, Any] = {
    "objective": "agreement",
    "steps": 60,
    "learning_rate": 3e-2,
    "alpha": 0.05,
    "normalize_entropy": True,
    "diversity": 0.0,
}

NSC_PAPER: Mapping[str, Any] = {
    "steps": 100,
    "learning_rate": 1e-3,
    "layers": "last_quarter",
    "hold_sum": False,
}
"""NSC's paper for its vision experts; for language models it has 500 steps of 3e-4, its code v_proj's inputs alone.

hold_sum is ours: neither paper nor code holds anything.
"""

NSC_DEFAULT: Mapping[str, Any] = NSC_PAPER
"""Measured on six real tasks: 1e-2 with hold_sum lowered omega and the scores with it (README)."""


def check_layers(value: str) -> None:
    """Refuse what names no blocks.

    Raises:
        ValueError: says what may be written.
    """
    if not LAYERS.fullmatch(value):
        raise ValueError("all, last, last_quarter, or numbers of blocks like 3,5 or 8-11")
    for part in value.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise ValueError("the first block before the last one")


def check_pattern(value: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        ValueError: says why.
    """
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from None


PRESET = "whose values the other parameters take: default, or those of the paper"
STEPS = "steps of AdamW; the preset decides"
RATE = "step size of AdamW; the preset decides"
BATCH = "unlabelled rows of each task in one step"
MICRO = "rows that go through the stages together; 0 for the whole batch"
SAMPLES = "unlabelled rows of each task to draw batches from; 0 for all"
GROUPED = "put rows of similar lengths into one batch, so that little is padding"
SHARING = "which weights have one phi: each its own, those of a block, or all of one shape"
RANK = "weight of the penalty 1 - effective rank / attainable rank of the merged updates"
COMMIT = "steps between two states in the store, from which a stopped run goes on"
PRECISION = (
    "of the model's matrix products, by autocast; phi, losses and gradients of phi are never rounded to it"
)
HOLD = (
    "keep the sum of each weight's coefficients over its adapters at the start's, which the null-space ratio cannot "
    "see; the preset decides"
)
OBJECTIVE = (
    "what each task minimises: agreement, the divergence of the merged predictions from those of its own adapter "
    "alone, or their entropy, as in the papers; the preset decides"
)
PREFERENCE = "how much each task counts; divided by their sum"
ALPHA = "smoothness of the Tchebycheff maximum; the preset decides"
ABSOLUTE = "the distance from the anchor on either side, as in the paper; its code has no such bars"
NORMALIZE = "divide each task's entropy by that of a uniform guess, ln C; the preset decides"
DIVERSITY = (
    "weight of the entropy of a batch's mean prediction, which keeps it from one class; the preset decides"
)
ANCHORS = "what each task's entropy is compared with: that of its own adapter alone, or 0"
INCLUDE = "tasks without an entropy of classes: refuse, or include adapters, whose phi learn from the others' losses"
TOKENS = (
    "of a causal model: entropy of the token behind the prompt (1), or over its first n tokens; 0 refuses it"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Learned:
    preset: str = choice("default", ("default", "paper"), PRESET)
    init: float = number(0.4, "phi before the first step")
    steps: int | None = integer(STEPS, NOT_NEGATIVE, required=False)
    learning_rate: float | None = number(None, RATE, POSITIVE)
    weight_decay: float = number(0.01, "of AdamW", NOT_NEGATIVE)
    batch_size: int = integer(BATCH, Interval(1.0), 16)
    micro_batch_size: int = integer(MICRO, NOT_NEGATIVE, 0)
    samples: int = integer(SAMPLES, NOT_NEGATIVE, 0)
    group_by_length: bool = flag(False, GROUPED)
    low: float | None = number(None, "phi is kept at or above it; null for no bound")
    high: float | None = number(None, "phi is kept at or below it; null for no bound")
    sharing: str = choice("site", ("site", "block", "model"), SHARING)
    effective_rank: float = number(0.0, RANK, NOT_NEGATIVE)
    commit_every: int = integer(COMMIT, Interval(1.0), 20)
    precision: str = choice("float32", ("float32", "bfloat16"), PRECISION)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tara(_Learned):
    """tara_a and tara_b."""

    preference: tuple[float, ...] = number(1.0, PREFERENCE, POSITIVE, per_adapter=True)
    objective: str | None = choice(None, ("agreement", "entropy"), OBJECTIVE)
    scalarisation: str = choice("tchebycheff", ("tchebycheff", "linear"), "how values become one loss")
    alpha: float | None = number(None, ALPHA, POSITIVE)
    absolute: bool = flag(False, ABSOLUTE)
    anchors: str = choice("single", ("single", "none"), ANCHORS)
    normalize_entropy: bool | None = flag(None, NORMALIZE)
    diversity: float | None = number(None, DIVERSITY, NOT_NEGATIVE)
    tokens: int = integer(TOKENS, NOT_NEGATIVE, 0)
    without_entropy: str = choice("refuse", ("refuse", "include"), INCLUDE)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaMerging(Tara):
    """adamerging."""

    scalarisation: str = choice("linear", ("tchebycheff", "linear"), "how values become one loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class Nsc(_Learned):
    """nsc."""

    layers: str | None = text(
        None,
        "blocks to measure in: all, last, last_quarter, or numbers like 8-11; the preset decides",
        check_layers,
    )
    modules: str = text("", "regular expression on the paths of modules to measure at", check_pattern)
    hold_sum: bool | None = flag(None, HOLD)


def entropy_rule(values: dict[str, Any]) -> None:
    """Fill in the preset, and refuse a preference that differs between sites."""
    if isinstance(values["preference"], list):
        raise MethodError("preference is one value for each adapter, for the whole merge")
    _fill(values, ENTROPY_PAPER if values["preset"] == "paper" else ENTROPY_DEFAULT)
    _bounds(values)


def nsc_rule(values: dict[str, Any]) -> None:
    """Fill in the preset."""
    _fill(values, NSC_PAPER if values["preset"] == "paper" else NSC_DEFAULT)
    _bounds(values)
    if values["hold_sum"] and (values["low"] is not None or values["high"] is not None):
        raise MethodError("low and high cannot be kept with hold_sum; write `hold_sum: false`")


def _fill(values: dict[str, Any], preset: Mapping[str, Any]) -> None:
    for key, value in preset.items():
        if values[key] is None:
            values[key] = value


def _bounds(values: dict[str, Any]) -> None:
    low, high = values["low"], values["high"]
    if low is not None and high is not None and low > high:
        raise MethodError(f"low is {low:g} and high is {high:g}; phi lies between them")


METHODS: tuple[Method, ...] = (
    Method(
        name="tara_a",
        family="learned",
        summary="sum_ij phi_ij s_i b_ij a_ij^T: one coefficient per rank-1 direction, learned without labels",
        reference=TARA,
        low_rank_spaces=("dense",),
        parameters=Tara,
        factors_only=True,
        needs=("phi",),
        learned="direction",
        rule=entropy_rule,
        sizes=memory.factors,
        work=cost.summed,
        kernel="ray_merge.methods.learned:tara_a",
    ),
    Method(
        name="tara_b",
        family="learned",
        summary="sum_ik phi_ik sigma_k u_k v_ki^T on [delta_1 .. delta_T] = U S V^T, learned without labels",
        reference=TARA,
        low_rank_spaces=("dense",),
        parameters=Tara,
        factors_only=True,
        needs=("phi",),
        learned="shared",
        rule=entropy_rule,
        sizes=memory.combined,
        work=cost.combined,
        kernel="ray_merge.methods.learned:tara_b",
    ),
    Method(
        name="adamerging",
        family="learned",
        summary="sum_i phi_i delta_i: one coefficient per adapter and weight, learned without labels",
        reference="AdaMerging, arXiv 2310.02575, with one coefficient per LoRA module as TARA compares it",
        low_rank_spaces=("dense",),
        parameters=AdaMerging,
        factors_only=True,
        needs=("phi",),
        learned="adapter",
        rule=entropy_rule,
        sizes=memory.factors,
        work=cost.summed,
        kernel="ray_merge.methods.learned:scaled",
    ),
    Method(
        name="nsc",
        family="learned",
        summary="sum_i phi_i delta_i, such that each task's activations stay out of the null space of its own A",
        reference="NSC, arXiv 2603.26317",
        low_rank_spaces=("dense",),
        parameters=Nsc,
        factors_only=True,
        needs=("phi",),
        learned="adapter",
        rule=nsc_rule,
        sizes=memory.factors,
        work=cost.summed,
        kernel="ray_merge.methods.learned:scaled",
    ),
)
