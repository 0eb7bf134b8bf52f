"""What the adapters of one merge may not do together: own one parameter twice, or train one token twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_merge.errors import RecipeError
from ray_merge.fit.ranked import RankedFactors, alike, distinct
from ray_merge.spec import Adapter, FactorEntry, Merge, SavedEntry, Site


def check_owners(merge: Merge, adapters: Mapping[str, Adapter], sites: Mapping[str, Site]) -> None:
    """Refuse a merge whose adapters claim one parameter in ways that cannot be combined.

    Raises:
        RecipeError: which two adapters, what they claim, and the way out.
    """
    chosen = [adapters[name] for name in merge.adapters]
    replaced: dict[str, Adapter] = {}
    rows: dict[tuple[str, int], Adapter] = {}
    for adapter in chosen:
        for tensor in adapter.replaced:
            owner = replaced.setdefault(tensor, adapter)
            if owner is not adapter:
                _check_two_owners(merge, tensor, owner, adapter)
        for tensor, tokens in adapter.tokens.items():
            for index in tokens.indices:
                owner = rows.setdefault((tensor, index), adapter)
                if owner is not adapter:
                    raise _refusal(
                        merge,
                        f"adapters {owner.name} and {adapter.name} both train token {index} of {tensor}",
                    )
    first = distinct(chosen)
    contested = _contested(sites)
    marked = [[name for name in alike(adapter.factors) if name in contested] if contested else []
              for adapter in first]  # fmt: skip
    others = [
        (adapter, names) for adapter, names in zip(first, marked, strict=True) if names or adapter.tokens
    ]
    if others or replaced:
        for adapter in first:
            _check_shared_tables(merge, adapter, others, replaced, sites)


def _contested(sites: Mapping[str, Site]) -> set[str]:
    """The sites of tensors that adapters see in different ways: other widths, or another number of rows."""
    by_tensor: dict[str, list[Site]] = {}
    for site in sites.values():
        by_tensor.setdefault(site.tensor, []).append(site)
    return {
        site.name
        for together in by_tensor.values()
        if len({site.shape[1] for site in together}) > 1
        or len({site.start for site in together}) < len(together)
        for site in together
    }


def _check_two_owners(merge: Merge, tensor: str, one: Adapter, other: Adapter) -> None:
    both_tables = tensor in one.tables and tensor in other.tables
    same_shape = one.replaced[tensor].shape == other.replaced[tensor].shape
    if both_tables and same_shape:
        return  # copies that PEFT saved by itself: preflight finds whether they are equal
    if is_head(tensor, one) and is_head(tensor, other):
        return  # heads are kept apart, and the base's stays
    what = "resized the vocabulary in different ways" if both_tables else "both saved a value of its own"
    raise _refusal(merge, f"adapters {one.name} and {other.name} {what} for {tensor} (modules_to_save)")


def is_head(tensor: str, adapter: Adapter) -> bool:
    """Whether a saved module that has a counterpart in the base is a task head: those are kept in heads/ too."""
    saved = adapter.replaced.get(tensor)
    return saved is not None and any(
        (head.start, head.end) == (saved.start, saved.end) for head in adapter.heads
    )


def _check_shared_tables(
    merge: Merge,
    adapter: Adapter,
    others: Sequence[tuple[Adapter, Sequence[str]]],
    replaced: Mapping[str, Adapter],
    sites: Mapping[str, Site],
) -> None:
    """`others`: adapters that train tokens or touch contested sites, and those sites."""
    mine = {sites[name].tensor: sites[name] for name in alike(adapter.factors)}
    for other, contested in others:
        if other is adapter:
            continue
        for tensor in other.tokens:
            if tensor in mine or tensor in adapter.replaced:
                raise _refusal(
                    merge,
                    f"adapter {other.name} trains tokens of {tensor}, which adapter {adapter.name} changes too",
                )
        for name in contested:
            site = sites[name]
            own = mine.get(site.tensor)
            if own is not None and own.shape[1] != site.shape[1]:
                raise _refusal(
                    merge,
                    f"adapters {adapter.name} and {other.name} see {site.tensor} as rows of {own.shape[1]} and of "
                    f"{site.shape[1]} (target_modules and target_parameters)",
                )
            if own is not None and _overlap(site, own):
                raise _refusal(
                    merge,
                    f"adapters {adapter.name} and {other.name} have {own.shape[0]} and {site.shape[0]} rows for "
                    f"{site.tensor}: their vocabularies differ",
                )
    for tensor, site in mine.items():
        owner = replaced.get(tensor)
        if owner is not None and owner is not adapter and _owned_outright(adapter, owner, tensor, site):
            raise _refusal(
                merge,
                f"adapter {owner.name} replaces {tensor} with {owner.replaced[tensor].shape}, which "
                f"adapter {adapter.name} "
                "changes with factors for the base's own",
            )


def _overlap(one: Site, other: Site) -> bool:
    # The same table with another number of rows; slabs of one tensor (experts) never have the same first row.
    return one.name != other.name and one.start == other.start


def _owned_outright(adapter: Adapter, owner: Adapter, tensor: str, site: Site) -> bool:
    is_saved = isinstance(adapter.factors.get(site.name), SavedEntry)
    return is_saved or tensor not in owner.tables or owner.replaced[tensor].shape[0] != site.shape[0]


def has_magnitude(adapters: Sequence[Adapter]) -> str:
    """The first site with a DoRA magnitude, or ""."""
    for adapter in distinct(adapters):
        if isinstance(adapter.factors, RankedFactors):
            continue
        for name, update in adapter.factors.items():
            if isinstance(update, FactorEntry) and update.magnitude is not None:
                return name
    return ""


def _refusal(merge: Merge, what: str) -> RecipeError:
    return RecipeError(
        f"merge {merge.name!r}: {what}; only one of them can be right: merge them apart, or leave one "
        "out with adapters: [...]"
    )
