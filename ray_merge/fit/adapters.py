"""Every adapter of a recipe against its base: each stored tensor gets a site, a place or a refusal.

Owns: the order in which an adapter's parts are fitted, and the `Adapter` made of them. Pure: reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_merge.errors import AdapterError, shown
from ray_merge.fit.draft import Draft
from ray_merge.fit.experts import fit_experts, is_expert_module
from ray_merge.fit.modules import check_orientation, fit_module, is_idle
from ray_merge.fit.ranked import FittedFamily, FittedModules, is_plain
from ray_merge.fit.resolver import Architectures, Resolver, mapped
from ray_merge.fit.saved import check_heads, check_vocabulary, fit_saved, fit_tokens
from ray_merge.fit.tied import check_tied, check_tied_tokens, follow_tables, skip_tied_twin, untied
from ray_merge.recipe import Recipe
from ray_merge.spec import Adapter, Site, used_entries
from ray_merge.storage.adapter import CONFIG_FILE, StoredAdapter
from ray_merge.storage.adapter_config import Settings
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.modules import StoredModule


@dataclass(frozen=True, slots=True)
class Fitted:
    """A base and the adapters that fit it.

    Args:
        base: the base as it will be merged into (with a head of its own after `tied: untie`).
        adapters: by the recipe's names.
        sites: by name, in order of adapters and modules.
        renamed: adapter -> runtime parameter -> disk tensors, where the two differ.
    """

    base: Checkpoint
    adapters: Mapping[str, Adapter]
    sites: Mapping[str, Site]
    renamed: Mapping[str, Mapping[str, tuple[str, ...]]]


def fit_adapters(recipe: Recipe, base: Checkpoint, stored: Mapping[str, StoredAdapter]) -> Fitted:
    """Fit every adapter to the base.

    Raises:
        AdapterError: a tensor without a place, a shape that does not fit, a variant that cannot be proven exact.
    """
    architectures = Architectures(base)
    if recipe.tied == "untie":
        base = untied(base, architectures)
        architectures = Architectures(base)
    adapters: dict[str, Adapter] = {}
    sites: dict[str, Site] = {}
    renamed: dict[str, Mapping[str, tuple[str, ...]]] = {}
    families: dict[tuple[int, tuple[tuple[str, str], ...]], FittedFamily] = {}
    known = FittedModules(base)
    for name, adapter in stored.items():
        source = recipe.adapters[name]
        mapping = {**recipe.key_mapping, **source.key_mapping}
        key = (id(adapter.member.family) if adapter.member else 0, tuple(mapping.items()))
        if adapter.member is not None and key in families:
            adapters[name], renamed[name] = families[key].fitted(adapter), families[key].renamed
            continue
        composed = None if mapping else known.fitted(adapter)
        if composed is not None:
            adapters[name], renamed[name] = composed
            families[key] = FittedFamily(adapters[name], adapter, renamed[name])
            continue
        given, adapter = adapter, mapped(replace(adapter, modules=tuple(adapter.modules)), mapping)
        draft = Draft(adapter, Resolver.of(base, adapter, architectures), recipe.tied == "untie")
        _fit(draft, source.moe_lora_b_layout or "")
        adapters[name] = _finished(draft)
        renamed[name] = _renamed(draft)
        for site in draft.sites.values():
            sites.setdefault(site.name, site)
        if given.member is not None and is_plain(draft):
            families[key] = FittedFamily(adapters[name], given, renamed[name])
            if not mapping:
                known.learn(draft)
    return Fitted(base, adapters, sites, renamed)


def _renamed(draft: Draft) -> Mapping[str, tuple[str, ...]]:
    return {
        key: tuple(slot.tensor for slot in slots)
        for key, slots in draft.names.found.items()
        if slots and (len(slots) > 1 or slots[0].tensor != key)
    }


def _fit(draft: Draft, layout: str) -> None:
    started = initial_modules(draft.adapter)
    fit_saved(draft)
    follow_tables(draft)
    for module in draft.adapter.modules:
        if is_expert_module(draft, module):
            if started:
                raise _unsupported_start(draft, module)
            fit_experts(draft, module, layout)
        elif module.depth:
            raise AdapterError(
                f"{draft.where}: {module.name} has factors around other factors, as PEFT saves target_parameters, but "
                f"{CONFIG_FILE} names none; save the adapter again"
            )
        elif is_idle(draft, module):
            why = "PEFT never applies LoRA on the out_proj of a MultiheadAttention by itself"
            draft.ignored |= {entry.name: why for entry in module.tensors.values()}
        elif not skip_tied_twin(draft, module):
            if started and (draft.adapter.settings.dora or "B.bias" in module.tensors):
                raise _unsupported_start(draft, module)
            fit_module(draft, module, started.get(module.name))
    fit_tokens(draft)
    follow_tables(draft)
    check_vocabulary(draft)
    check_heads(draft)
    check_tied(draft)
    check_tied_tokens(draft)
    check_orientation(draft)
    _check_patterns(draft.adapter.settings, draft)
    _check_consumed(draft)


def _unsupported_start(draft: Draft, module: StoredModule) -> AdapterError:
    return AdapterError(
        f"{draft.where}: {module.name}: an initial adapter can be taken away from plain factors only; "
        "save the adapter with "
        "PEFT's path_initial_model_for_weight_conversion instead"
    )


def initial_modules(adapter: StoredAdapter) -> dict[str, StoredModule]:
    """The modules of the adapter that training started from; needed exactly where the base was changed for it."""
    mutated, initial = adapter.settings.mutated, adapter.initial
    if mutated and initial is None:
        raise AdapterError(
            f"{adapter.where}: init_lora_weights is {mutated!r}, which trains against a changed base; save it again "
            "with path_initial_model_for_weight_conversion, which makes it a plain adapter, or give the "
            "adapter that training "
            "started from as initial: URL behind its path"
        )
    if initial is None:
        return {}
    if not mutated:
        raise AdapterError(
            f"{adapter.where}: it has an initial adapter in the recipe, but its init_lora_weights does "
            "not change the base, "
            "or it was converted already; remove initial"
        )
    names, before = ({module.name for module in one.modules} for one in (adapter, initial))
    if names != before:
        odd = sorted(names ^ before)[0]
        raise AdapterError(
            f"{adapter.where}: it and its initial adapter {initial.url} differ in their modules: {odd}"
        )
    return {module.name: module for module in initial.modules}


def _check_patterns(settings: Settings, draft: Draft) -> None:
    # alpha cannot be checked against a tensor, so a pattern that matches nothing is the only sign of a typo.
    scaling = settings.scaling
    if not scaling.ranks and not scaling.alphas:
        return
    trained = draft.adapter.in_training
    names = [trained(module.name) for module in draft.adapter.modules]
    fused = {module.rpartition("[")[0] for module in draft.modules.values() if module.endswith("]")}
    names += [f"{trained(path)}.{leaf}" for path, _, leaf in (name.rpartition(".") for name in sorted(fused))]
    for field, keys in (("rank_pattern", scaling.rank_keys), ("alpha_pattern", scaling.alpha_keys)):
        for key in keys.unmatched(names)[:1]:
            raise AdapterError(
                f"{draft.where}: {field} {shown(key)} matches none of the {len(names)} adapted modules"
            )


def _check_consumed(draft: Draft) -> None:
    """Every stored tensor is used, is a head, or is ignored for a reason; the rule that the rest of fit/ must keep."""
    stored = [entry for module in draft.adapter.modules for entry in module.tensors.values()]
    stored += [tensor.entry for tensor in draft.adapter.saved] + list(draft.adapter.tokens.values())
    used = {(entry.start, entry.end) for entry in used_entries(draft.updates.values())}
    used |= {(entry.start, entry.end) for entry in (*draft.heads, *draft.replaced.values())}
    used |= {(rows.entry.start, rows.entry.end) for rows in draft.tokens.values()}
    for entry in stored:
        if (entry.start, entry.end) not in used and entry.name not in draft.ignored:
            raise AdapterError(
                f"{draft.where}: tensor {entry.name!r} has no place in {draft.base_url}; nothing of an adapter is "
                "dropped silently"
            )


def _finished(draft: Draft) -> Adapter:
    stored = draft.adapter
    initial = None
    if stored.initial is not None:
        before = Draft(stored.initial, draft.names, draft.untied)
        initial = _finished(before)
    return Adapter(
        name=stored.name,
        url=stored.url,
        config=stored.config,
        factors=draft.updates,
        modules=draft.modules,
        layouts={name: site.layout for name, site in draft.sites.items()},
        heads=tuple(sorted(draft.heads, key=lambda entry: entry.name)),
        replaced=draft.replaced,
        tables=frozenset(draft.tables),
        tokens=draft.tokens,
        same=(*stored.same, *draft.same),
        ignored={**stored.ignored, **draft.ignored},
        names=draft.names.describe(),
        file=stored.file,
        file_bytes=stored.file_bytes,
        file_version=stored.file_version,
        pickled=stored.pickled,
        side_files=tuple((info.path, info.n_bytes, info.version) for info in stored.side_files),
        initial=initial,
    )
