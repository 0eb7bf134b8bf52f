"""Whole parameters that an adapter saved: biases, modules_to_save, embedding tables, heads, trained tokens.

They hold absolute values, whatever their names say (`trainable_tokens_delta` too):

    a trained bias (bias: all, lora_only)        its delta is `saved - base`, merged like any other
    a module of modules_to_save                  takes the place of the base's; without a counterpart it is a head,
                                                 and of a classifier it is one too unless it is a table of embeddings
    a table that PEFT saved beside embedding     takes the base table's place before any delta; new rows need a
    LoRA, or since the vocabulary grew           new vocab_size
    trained token rows                           are written into the table
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ray_merge.errors import AdapterError
from ray_merge.fit.draft import Draft, by_suffix, matrix_shape
from ray_merge.spec import HEADED_TASKS, SameValues, SavedEntry, TensorEntry, TokenRows, View
from ray_merge.storage.adapter import CONFIG_FILE, StoredTensor
from ray_merge.storage.family import FLOATS

TABLE_NAMES = frozenset(
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_out", "embed_in"}
)
"""Input and output embeddings of usual models; others are known from their class."""


MAX_HEAD_BYTES = 256_000_000
"""A classification head has kilobytes; with 100,000 labels on 512 inputs it has 205 MB."""


def fit_saved(draft: Draft) -> None:
    """Give every saved parameter its place.

    Raises:
        AdapterError: one that the config does not announce, that matches nothing, or of another shape.
    """
    for tensor in draft.adapter.saved:
        module, _, leaf = tensor.name.rpartition(".")
        announced = is_announced(draft, draft.adapter.in_training(tensor.name).rpartition(".")[0])
        slots = draft.names.slots(tensor.name)
        if not slots:
            _without_counterpart(draft, tensor, announced=announced)
            continue
        slot = draft.one_slot(tensor.name, "saving it whole (modules_to_save)")
        base = draft.names.base.tensors[slot.tensor]
        if announced or _is_table(draft, tensor, module, leaf):
            _replace(draft, tensor, slot.tensor, announced=announced)
        elif tensor.entry.dtype not in FLOATS:
            raise AdapterError(
                f"{draft.where}: {tensor.name} is of dtype {tensor.entry.dtype}; expected floats"
            )
        elif "bias" in tensor.name and draft.adapter.settings.bias != "none":
            _same_shape(draft, tensor, base)
            shape = matrix_shape(base.shape)
            site = draft.site(slot, shape, "raw", tensor.name)
            draft.add(site, tensor.name, SavedEntry(View(tensor.entry, shape)))
        else:
            raise AdapterError(
                f"{draft.where}: {tensor.name} is a saved parameter of the base that {CONFIG_FILE} does not announce "
                "(neither modules_to_save nor bias); nothing of an adapter is dropped silently"
            )


def is_announced(draft: Draft, module: str) -> bool:
    """Whether modules_to_save names this module, or one that holds it (`classifier` holds `classifier.dense`)."""
    parts = module.split(".")
    return any(
        by_suffix(draft.adapter.settings.saved, ".".join(parts[:count])) is not None
        for count in range(1, len(parts) + 1)
    )


def _without_counterpart(draft: Draft, tensor: StoredTensor, *, announced: bool) -> None:
    module = tensor.name.rpartition(".")[0]
    tied = draft.names.tied_to(tensor.name)
    if tied is not None:
        _tied_copy(draft, tensor, tied)
    elif (announced or (draft.adapter.settings.bias == "all" and _is_head_bias(draft, tensor, module))) and (
        _may_be_head(draft, tensor.name)
    ):
        draft.heads.append(replace(tensor.entry, name=tensor.name))
    else:
        raise AdapterError(
            f"{draft.where}: tensor {tensor.name!r} is neither a factor nor a saved head nor a parameter of "
            f"{draft.base_url}; nothing of an adapter is dropped silently"
        )


def check_heads(draft: Draft) -> None:
    """Refuse heads that are too large: they pass through the driver when `heads/` is written."""
    n_bytes = sum(entry.n_bytes for entry in draft.heads)
    if n_bytes > MAX_HEAD_BYTES:
        raise AdapterError(
            f"{draft.where}: its heads hold {n_bytes} bytes, more than {MAX_HEAD_BYTES}; a head of that size is a "
            "weight that the base lacks: resize the base first"
        )


def _may_be_head(draft: Draft, name: str) -> bool:
    """Whether a parameter that the base lacks belongs to a new head, and not to a layer that another base has."""
    first = name.split(".")[0]
    if not any(other.split(".")[0] == first for other in draft.names.base.tensors) and first not in _prefixes(
        draft
    ):
        return True
    return draft.names.is_parameter(name)


def _prefixes(draft: Draft) -> set[str]:
    """First components of the adapted modules that the base has: `bert` where its disk names begin with `encoder`."""
    return {module.name.split(".")[0] for module in draft.adapter.modules if "." in module.name}


def _is_head_bias(draft: Draft, tensor: StoredTensor, module: str) -> bool:
    """A bias that training touched in a new head which modules_to_save does not name."""
    others = [saved for saved in draft.adapter.saved if saved is not tensor]
    return "bias" in tensor.name and any(saved.name.rpartition(".")[0] == module for saved in others)


def _tied_copy(draft: Draft, tensor: StoredTensor, tied: str) -> None:
    """A saved copy of a table that the base ties to another one must equal that adapter's own copy of it."""
    twin = next((other for other in draft.adapter.saved if other.name == tied), None)
    comparable = twin is not None and {twin.entry.dtype, tensor.entry.dtype} <= set(FLOATS)
    if twin is None or not comparable or twin.entry.shape != tensor.entry.shape:
        raise AdapterError(
            f"{draft.where}: {tensor.name} was saved, but {draft.base_url} ties it to {tied}; write tied: untie in the "
            "recipe to give it a weight of its own"
        )
    why = f"{draft.where}: {tensor.name} and {tied} are tied in the base but were saved with different values"
    flat = matrix_shape(tensor.entry.shape)
    draft.same.append(
        SameValues(View(tensor.entry, flat), View(twin.entry, flat), f"{why}; write tied: untie")
    )
    draft.ignored[tensor.entry.name] = f"equal to {tied}, to which the base ties it"
    draft.proven |= {slot.tensor for slot in draft.names.slots(tied)}


def _is_table(draft: Draft, tensor: StoredTensor, module: str, leaf: str) -> bool:
    if leaf not in ("weight", "bias"):
        return False
    if "bias" in module.rpartition(".")[2] and draft.adapter.settings.bias == "all":
        return False  # T5's relative_attention_bias is an embedding, which bias: all trains by its name
    if leaf == "bias":  # of an output embedding that was saved whole
        return any(other.name == f"{module}.weight" and _is_table(draft, other, module, "weight")
                   for other in draft.adapter.saved)  # fmt: skip
    if len(tensor.entry.shape) != 2:
        return False
    return module.rpartition(".")[2] in TABLE_NAMES or draft.names.kind(module) == "embedding"


def _replace(draft: Draft, tensor: StoredTensor, disk: str, *, announced: bool) -> None:
    base = draft.names.base.tensors[disk]
    module = tensor.name.rpartition(".")[0]
    table = module.rpartition(".")[2] in TABLE_NAMES or draft.names.kind(module) == "embedding"
    resized = table and tensor.entry.shape[1:] == base.shape[1:]
    headed = draft.adapter.config.get("task_type") in HEADED_TASKS and not table
    if tensor.entry.shape != base.shape and not resized:
        if headed and announced:
            draft.heads.append(replace(tensor.entry, name=tensor.name))  # another number of labels: a head
            return
        _same_shape(draft, tensor, base)
    if tensor.entry.dtype != base.dtype and not {tensor.entry.dtype, base.dtype} <= set(FLOATS):
        raise AdapterError(
            f"{draft.where}: {tensor.name} is stored as {tensor.entry.dtype}, but {base.name} as {base.dtype} in "
            f"{draft.base_url}, which cannot hold its values"
        )
    if disk in draft.replaced:
        raise AdapterError(
            f"{draft.where}: two saved tensors take the place of {disk}; save the adapter again"
        )
    draft.replaced[disk] = tensor.entry
    if not announced:
        draft.tables.add(disk)
    elif headed:
        draft.heads.append(replace(tensor.entry, name=tensor.name))


def check_vocabulary(draft: Draft) -> None:
    """Refuse a resized table whose counterpart PEFT did not save: its new rows exist nowhere.

    Raises:
        AdapterError: the input and output embeddings would have different numbers of rows.
    """
    base = draft.names.base.tensors
    grown = {name: entry for name, entry in draft.replaced.items() if entry.shape != base[name].shape}
    for name, entry in grown.items():
        for other in base.values():
            module = other.name.removesuffix(".weight").rpartition(".")[2]
            is_table = module in TABLE_NAMES and other.shape == base[name].shape
            if is_table and draft.shape(other.name)[0] != entry.shape[0]:
                raise AdapterError(
                    f"{draft.where}: {name} was resized to {entry.shape[0]} rows, but {other.name} was not saved "
                    f"and has {draft.shape(other.name)[0]}: its new rows are lost; save the adapter again with "
                    "save_embedding_layers=True and both embeddings targeted or none"
                )


def _same_shape(draft: Draft, tensor: StoredTensor, base: TensorEntry) -> None:
    if tensor.entry.shape != base.shape:
        raise AdapterError(
            f"{draft.where}: {tensor.name} is {tensor.entry.shape}, but {base.name} is {base.shape} in "
            f"{draft.base_url}; the adapter was trained on another base model"
        )


def fit_tokens(draft: Draft) -> None:
    """Place the trained token rows.

    Raises:
        AdapterError: no indices for a table, another number of rows, rows outside it, LoRA on the same table.
    """
    indices = draft.adapter.settings.tokens
    for module, entry in draft.adapter.tokens.items():
        tied = None if draft.names.slots(f"{module}.weight") else draft.names.tied_to(f"{module}.weight")
        if tied is not None:
            _tied_tokens(draft, module, entry, tied)
            continue
        slot = draft.one_slot(f"{module}.weight", "training of tokens")
        draft.floats(slot.tensor, module)
        if len(draft.shape(slot.tensor)) != 2:
            raise AdapterError(f"{draft.where}: {module} has trained tokens, but {slot.tensor} is no table")
        rows, columns = draft.shape(slot.tensor)
        chosen = _indices(indices, draft.adapter.in_training(module))
        if chosen is None:
            raise AdapterError(
                f"{draft.where}: {module} has trained tokens, but {CONFIG_FILE} has no trainable_token_indices for it"
            )
        if entry.shape != (len(chosen), columns) or len(set(chosen)) != len(chosen):
            raise AdapterError(
                f"{draft.where}: {module} has trained rows of shape {entry.shape}, expected "
                f"{len(chosen)} different rows of "
                f"{columns} (trainable_token_indices)"
            )
        if max(chosen, default=0) >= rows:
            raise AdapterError(
                f"{draft.where}: trainable_token_indices has row {max(chosen)}, but {slot.tensor} has {rows} rows"
            )
        if any(site.tensor == slot.tensor for site in draft.sites.values()):
            raise AdapterError(
                f"{draft.where}: {module} has trained tokens and LoRA at once; PEFT cannot merge both"
            )
        if slot.tensor in draft.tokens:
            raise AdapterError(
                f"{draft.where}: two modules train tokens of {slot.tensor}, which the base ties; write tied: untie"
            )
        draft.tokens[slot.tensor] = TokenRows(entry, chosen)
    if any(indices.values()) and not draft.adapter.tokens:
        raise AdapterError(
            f"{draft.where}: {CONFIG_FILE} names trained tokens, but the adapter holds no row of them"
        )


def _indices(indices: Mapping[str, tuple[int, ...]], module: str) -> tuple[int, ...] | None:
    """The row numbers of a module: its own, or those of all where every entry has the same (tied modules)."""
    layer = by_suffix(tuple(indices), module)
    if layer is not None:
        return indices[layer]
    return next(iter(indices.values())) if len(set(indices.values())) == 1 else None


def _tied_tokens(draft: Draft, module: str, entry: TensorEntry, tied: str) -> None:
    """The head's copy of trained rows, where the base ties it to the embedding: it must equal the embedding's."""
    twin = draft.adapter.tokens.get(tied.removesuffix(".weight"))
    if twin is None or twin.shape != entry.shape or len(set(draft.adapter.settings.tokens.values())) > 1:
        raise AdapterError(
            f"{draft.where}: {module} has trained tokens of its own, but {draft.base_url} ties it to {tied}; write "
            "tied: untie in the recipe to give it a weight of its own"
        )
    why = f"{draft.where}: the trained tokens of {module} and {tied} differ, though the base ties the two"
    flat = matrix_shape(entry.shape)
    draft.same.append(SameValues(View(entry, flat), View(twin, flat), f"{why}; write tied: untie"))
    draft.ignored[entry.name] = f"equal to the rows of {tied}, to which the base ties it"
