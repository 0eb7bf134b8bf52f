"""What `inspect` found, as data, and the facts that an adapter's config tells by itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ray_merge.inspect.measure import PairNumbers, SiteNumbers
from ray_merge.spec import Adapter, Site
from ray_merge.storage.adapter import StoredAdapter
from ray_merge.storage.store import redact

VARIANTS: Mapping[str, str] = {
    "use_rslora": "rsLoRA", "use_dora": "DoRA", "lora_bias": "lora_bias", "fan_in_fan_out": "fan_in_fan_out",
    "use_bdlora": "BD-LoRA", "use_qalora": "QA-LoRA", "monteclora_config": "MonteCLoRA", "kasa_config": "KaSA",
    "alora_invocation_tokens": "aLoRA", "arrow_config": "Arrow", "layer_replication": "layer_replication",
    "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern", "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trained tokens", "target_parameters": "target_parameters",
    "ensure_weight_tying": "ensure_weight_tying",
}  # fmt: skip
"""Keys of adapter_config.json that are worth a word when set."""

MAX_TEXT = 200
HUGE = 1e18
"""No alpha is; JSON has whole numbers that no float can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedAdapter:
    """One adapter.

    Args:
        name: last part of its folder, made unique.
        url: its folder.
        refusal: why a merge would refuse it; "" where nothing speaks against it.
        peft_version, task_type, base: what its config says, "" where it says nothing.
        variants: settings beyond plain LoRA, in words.
        modules: adapted modules as stored.
        ranks, scales: all that occur, ascending; of an adapter that is refused, ranks as stored and no scale.
        alphas: all that its config gives.
        saved: parameters saved whole, by runtime name.
        tokens: embedding -> number of trained rows.
        ignored: saved tensors that enter no merge -> why.
        layouts: kind of layer -> sites of that kind; without a base by the shape of the factors alone.
        names: how runtime names became the base's; "" without a base.
        norm: Frobenius norm over all measured sites.
        spectral_norm: largest of them.
        effective_rank: mean over measured sites.
        rank_used: mean over measured sites of effective rank / rank.
        sites: numbers of each.
        notes: what to know about the numbers.
        warnings: what `plan` would warn of.
    """

    name: str
    url: str
    refusal: str
    peft_version: str
    task_type: str
    base: str
    variants: tuple[str, ...]
    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scales: tuple[float, ...]
    saved: tuple[str, ...]
    tokens: Mapping[str, int]
    ignored: Mapping[str, str]
    layouts: Mapping[str, int]
    names: str
    norm: float | None
    spectral_norm: float | None
    effective_rank: float | None
    rank_used: float | None
    sites: tuple[SiteNumbers, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedPair:
    """Two adapters: numbers of each site that both change, and over all of them."""

    first: str
    second: str
    total: PairNumbers
    sites: Mapping[str, PairNumbers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `inspect` found.

    Args:
        base: URL of the base, None without one.
        adapters: in the order asked for.
        pairs: of the adapters that are not refused.
        warnings: what concerns several adapters at once, or the base.
    """

    base: str | None
    adapters: tuple[InspectedAdapter, ...]
    pairs: tuple[InspectedPair, ...]
    warnings: tuple[str, ...]

    @property
    def refused(self) -> tuple[str, ...]:
        """Names of the adapters that a merge would refuse."""
        return tuple(adapter.name for adapter in self.adapters if adapter.refusal)


@dataclass(slots=True)
class Found:
    """One adapter while it is looked at.

    Args:
        name: of it.
        url: as given, then as its store has it.
        config: as far as it could be read.
        stored: its headers, once read.
        adapter: fitted to the base, or standing alone.
        sites: of `adapter`.
        untold: modules that only a base could explain -> (rank as stored, why).
        warnings: of `plan`.
        refusal: the reason, once there is one.
    """

    name: str
    url: str
    config: Mapping[str, Any] = field(default_factory=dict)
    stored: StoredAdapter | None = None
    adapter: Adapter | None = None
    sites: Mapping[str, Site] = field(default_factory=dict)
    untold: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    refusal: str = ""

    @property
    def is_fitted(self) -> bool:
        """Whether a base has said which weights its sites are."""
        return any(site.tensor for site in self.sites.values())


def report(found: Found, measured: Mapping[str, SiteNumbers]) -> InspectedAdapter:
    """All that is known of one adapter.

    Args:
        found: what was read of it.
        measured: its numbers by site; empty where it is refused.
    """
    stored = found.stored
    sites = [*measured.values(), *_untold(found)]
    told = [site for site in sites if site.norm is not None]
    effective = [site.effective_rank or 0.0 for site in told]
    return InspectedAdapter(
        name=found.name,
        url=redact(found.url),
        refusal=found.refusal,
        peft_version=_text(found.config.get("peft_version")),
        task_type=_text(found.config.get("task_type")),
        base=_text(found.config.get("base_model_name_or_path")),
        variants=_variants(found.config),
        modules=0 if stored is None else len(stored.modules),
        ranks=_ascending(site.rank for site in sites) or _stored_ranks(stored),
        alphas=_alphas(found.config),
        scales=_ascending(site.scale for site in sites if site.scale is not None),
        saved=() if stored is None else tuple(tensor.name for tensor in stored.saved),
        tokens=_tokens(stored),
        ignored={} if stored is None else dict(sorted((found.adapter or stored).ignored.items())),
        layouts=dict(sorted(Counter(site.layout for site in found.sites.values()).items())),
        names=found.adapter.names if found.adapter is not None and found.is_fitted else "",
        norm=math.hypot(*(site.norm for site in told if site.norm is not None)) if told else None,
        spectral_norm=max((site.spectral_norm or 0.0 for site in told), default=None),
        effective_rank=_mean(effective),
        rank_used=_mean([rank / site.rank for rank, site in zip(effective, told, strict=True)]),
        sites=tuple(sites),
        notes=tuple(_notes(found, sites)),
        warnings=tuple(found.warnings),
    )


def _untold(found: Found) -> list[SiteNumbers]:
    if found.refusal:
        return []
    return [SiteNumbers(site=name, layout="", rank=rank) for name, (rank, _) in found.untold.items()]


def _tokens(stored: StoredAdapter | None) -> dict[str, int]:
    tokens = {} if stored is None else stored.tokens
    return {name: entry.shape[0] if entry.shape else 0 for name, entry in sorted(tokens.items())}


def _stored_ranks(stored: StoredAdapter | None) -> tuple[int, ...]:
    entries = [
        module.tensors.get("A") or module.tensors["embedding_A"]
        for module in ([] if stored is None else stored.modules)
    ]
    return tuple(sorted({entry.shape[0] for entry in entries if entry.shape}))


def _alphas(config: Mapping[str, Any]) -> tuple[float, ...]:
    """What the config gives, also where a scale is not alpha over the rank (rsLoRA, MultiheadAttention)."""
    pattern = config.get("alpha_pattern")
    given = [config.get("lora_alpha"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    numbers = [value for value in given if isinstance(value, int | float) and not isinstance(value, bool)]
    return _ascending(float(value) for value in numbers if abs(value) < HUGE)


def _variants(config: Mapping[str, Any]) -> tuple[str, ...]:
    words = [word for key, word in VARIANTS.items() if config.get(key)]
    if config.get("bias") not in (None, "none"):
        words.append(f"bias: {_text(config['bias'])}")
    if isinstance(config.get("init_lora_weights"), str):
        words.append(f"init: {_text(config['init_lora_weights'])}")
    return tuple(words)


def _notes(found: Found, sites: Sequence[SiteNumbers]) -> Iterator[str]:
    if found.refusal or found.stored is None:
        return
    settings = found.stored.settings
    if settings.dora:
        yield "DoRA: numbers of the low-rank part s B A; with its magnitude the delta is dense and depends on the base"
    for why, count in Counter(why for _, why in found.untold.values()).items():
        yield f"{count} module(s) hold {why}; they are listed as stored, and have numbers only with a base (--base)"
    if settings.tied and not found.is_fitted:
        yield "ensure_weight_tying: without a base, a table and the head that is tied to it count as two modules"
    beyond = sum(site.scale is not None and site.norm is None for site in sites)
    if beyond:
        yield f"{beyond} site(s) have no numbers: s B A is too large for float64"
    if found.stored.saved or found.stored.tokens or settings.lora_bias:
        yield "parameters saved whole, trained tokens and biases are not part of the numbers"


def _text(value: Any) -> str:
    """A value of a config as text that a terminal can show."""
    text = "" if value is None else str(value)
    return "".join(character if character.isprintable() else "?" for character in text[:MAX_TEXT])


def _ascending(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted({round(value, 6) for value in values}))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
