"""Embeddings that a base ties to its head: what an adapter may do to one of the two, and how they are untied.

A checkpoint with tied weights holds one table. LoRA on one of the two modules changes only that one while the
adapter is active (PEFT reads the head's base weight, not the adapted embedding), so a merge into the one table
would be wrong by a lot (289 % of the logits in PEFT's own merge). `tied: untie` gives the head a weight of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_merge.errors import AdapterError, CheckpointError
from ray_merge.fit.draft import Draft
from ray_merge.fit.resolver import Architectures
from ray_merge.spec import SameValues, View
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.modules import StoredModule

if TYPE_CHECKING:
    from ray_merge.models.architecture import Architecture

FLAG = "tie_word_embeddings"

TABLE_WORDS = ("embed", "wte", "shared", "lm_head", "decoder.weight", "embed_out")
"""What the names of tied weights hold in usual models."""


def untied(base: Checkpoint, architectures: Architectures) -> Checkpoint:
    """The base with tensors of their own for its tied head: same bytes, other names.

    Raises:
        CheckpointError: a base whose head is tied in a way that this cannot undo exactly.
    """
    known = architectures.get()
    if not known.tied:
        return base
    if base.config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"{base.url} ties {', '.join(sorted(known.tied))}; an encoder-decoder's head cannot be untied for every "
            "reader (T5 scales its logits by the same flag, transformers 4 would tie them again): remove tied: untie"
        )
    tensors, quantised, twins = dict(base.tensors), dict(base.quantised), {}
    for head, twin in known.tied.items():
        table = _one_tensor(known, twin)
        if table is None or (head in known.slots and _one_tensor(known, head) is None):
            raise CheckpointError(
                f"{base.url}: {twin} is not one tensor on disk, so {head} cannot be untied from it: remove tied: untie"
            )
        # A base may hold a copy of the head already, which readers tie all the same as long as the flag says so.
        name = _one_tensor(known, head) or _disk_name(head, twin, table)
        tensors.setdefault(name, replace(base.tensors[table], name=name))
        twins[name] = table
        if table in quantised:
            quantised.setdefault(name, quantised[table])
    config = _without_flag(base.config)
    return replace(base, tensors=tensors, config=config, untied=twins, quantised=quantised)


def _one_tensor(known: Architecture, name: str) -> str | None:
    slots = known.slots.get(name, ())
    whole = len(slots) == 1 and slots[0].expert is None and slots[0].rows is None
    return slots[0].tensor if whole else None


def _disk_name(head: str, twin: str, table: str) -> str:
    """The head's disk name, through the prefix by which the table's own name differs (`language_model.`)."""
    if twin == table:
        return head
    shared = table.rpartition("model.embed_tokens.weight")
    old_style = shared[1] and shared[0] and not twin.startswith(shared[0])
    return f"{shared[0]}{head}" if old_style else head


def _without_flag(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {**config, FLAG: False}
    for key, value in config.items():
        if isinstance(value, dict) and FLAG in value:
            changed[key] = {**value, FLAG: False}
    return changed


def skip_tied_twin(draft: Draft, module: StoredModule) -> bool:
    """Whether this module's weight is tied to one that the same adapter changes alike (ensure_weight_tying).

    Raises:
        AdapterError: it is tied, and the adapter does not keep the two equal.
    """
    parameter = f"{module.name}.weight"
    if draft.names.slots(parameter):
        return False
    twin = draft.names.tied_to(parameter)
    if twin is None:
        return False
    other = next((one for one in draft.adapter.modules if f"{one.name}.weight" == twin), None)
    if (
        not draft.adapter.settings.tied
        or other is None
        or "A" not in module.tensors
        or "embedding_A" not in other.tensors
    ):
        raise _refusal(draft, module.name, twin)
    for side, across in (("A", "embedding_B"), ("B", "embedding_A")):
        one, two = module.tensors[side], other.tensors[across]  # type: ignore[index]
        if one.shape != tuple(reversed(two.shape)):
            raise _refusal(draft, module.name, twin)
        why = (
            f"{draft.where}: {module.name}.lora_{side} is not the transpose of {other.name}.lora_{across}, though "
            "both are tied; write tied: untie"
        )
        same = SameValues(View(one, one.shape), View(two, two.shape, transpose=True), why)
        draft.same.append(same)
    if "magnitude" in module.tensors:
        # One norm of rows and one of columns: no single table has both.
        raise _refusal(draft, f"{module.name} (DoRA)", twin)
    draft.proven |= {slot.tensor for slot in draft.names.slots(twin)}
    for entry in module.tensors.values():
        draft.ignored[entry.name] = (
            f"equal to the factors of {other.name}, to which the base ties {module.name}"
        )
    return True


def check_tied(draft: Draft) -> None:
    """Refuse a change of a table that the base also uses as its head, unless the file proves that both changed alike.

    `ensure_weight_tying` alone proves nothing: PEFT ties modules of some names only and writes the flag for all.

    Raises:
        AdapterError: the head would change with the embedding, or the other way round.
    """
    changed = {site.tensor: draft.modules[name] for name, site in draft.sites.items() if site.layout != "raw"}
    changed |= {tensor: tensor for tensor in draft.replaced.keys() - draft.tables}
    # An unknown class with tied weights: a saved `lm_head` is no head of its own, though no disk tensor is called so.
    changed |= {head.name: head.name for head in draft.heads}
    tables = _tied_tables(draft, set(changed) - draft.proven)
    for tensor in sorted(tables):
        raise _refusal(draft, changed[tensor], tables[tensor])


def check_tied_tokens(draft: Draft) -> None:
    """Refuse trained tokens of a table whose tied twin lies on disk as a copy: it would not get them.

    Raises:
        AdapterError: the copy and the table would differ, though the base ties the two.
    """
    tables = _tied_tables(draft, set(draft.tokens), copies=True)
    for tensor in sorted(tables):
        raise _refusal(draft, f"{tensor} (trained tokens)", tables[tensor])


def _tied_tables(draft: Draft, tensors: set[str], *, copies: bool = False) -> dict[str, str]:
    # Only embeddings and heads are tied; the class is not loaded for the names of other layers.
    embeddings = {site.tensor for site in draft.sites.values() if site.layout == "embedding"}
    saved = {tensor for tensor, entry in draft.replaced.items() if len(entry.shape) == 2}
    named = {tensor for tensor in tensors if any(word in tensor for word in TABLE_WORDS)}
    suspects = tensors & (embeddings | saved | named)
    known = draft.names.architecture() if suspects else None
    if known is None:
        tied = suspects and draft.names.base.config.get(FLAG) and not draft.untied
        return {name: "the embedding" if "head" in name else "the head" for name in suspects} if tied else {}
    found = {}
    for name, twin in known.tied.items():
        # A copy on disk changes nothing: readers that see the flag tie the two again.
        for one, other in ((twin, name), (name, twin)):
            tensor = next((slot.tensor for slot in known.slots.get(one, ())), None)
            if tensor in suspects and (other in known.slots or not copies):
                found[tensor] = other
    return found


def follow_tables(draft: Draft) -> None:
    """After `tied: untie`, give the head what training kept equal in both: a resized table, trained tokens.

    PEFT saves one of the two, or both; what it saved for the head itself stands.
    """
    for head, table in draft.names.base.untied.items():
        kept_equal = table in draft.tables or (table in draft.proven and table in draft.replaced)
        if kept_equal and head not in draft.replaced:
            draft.replaced[head] = draft.replaced[table]
            draft.tables |= {head} & {head if table in draft.tables else ""}
        if table in draft.tokens and head not in draft.tokens:
            draft.tokens[head] = draft.tokens[table]


def _refusal(draft: Draft, module: str, twin: str) -> AdapterError:
    return AdapterError(
        f"{draft.where}: {module} is tied to {twin.removesuffix('.weight')} in {draft.base_url}: a "
        "merge would change both; "
        "write tied: untie in the recipe to give the head a weight of its own"
    )
