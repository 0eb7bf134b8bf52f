"""`heads: <adapter>` of a merge: a checkpoint that is a sequence-classification model with that adapter's head.

Owns: whether transformers can load it, the names under which its weights lie on disk, and what config.json says. Reads
headers, configs and the padding token of the tokenizer; the model class is built without weights.

A head that the base has a place for takes it, in the shard; other tensors of it go into a file of their own, in the
dtype in which the adapter saved them. The body has the names of the class (`bert.encoder...`) and not of the base
(`encoder...`): transformers 4 refuses a head beside names without their prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_merge.errors import RecipeError
from ray_merge.fit.owners import is_head
from ray_merge.plan.labels import label_names, problem_of
from ray_merge.plan.layout import SHARD_METADATA, OutTensor
from ray_merge.plan.padding import padding_token
from ray_merge.plan.task_heads import adapter_type, head_rows
from ray_merge.recipe import Recipe
from ray_merge.spec import DTYPE_BYTES, FLOAT_DTYPES, Adapter, Merge, Site, TensorEntry
from ray_merge.storage.checkpoint import Checkpoint
from ray_merge.storage.headers import make_header

if TYPE_CHECKING:
    from ray_merge.models.skeleton import Skeleton

HEAD_FILE = "model-head.safetensors"
"""Tensors of a head that the base has no place for."""

SEQ_CLS = "SEQ_CLS"

KEEPS_HEADS = "leave heads out: heads/ holds every head, and ray_merge.load_head attaches one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Headed:
    """What a checkpoint with a head differs in from one without.

    Args:
        adapter: whose head.
        model_class: of transformers, that loads it.
        names: disk name in the base -> in the checkpoint, where they differ.
        replaced: disk name in the base -> the tensor of the head that takes its place.
        added: tensors of the head that the base has no place for, under their runtime names, in file order.
        labels: names of what the head gives a number for.
        problem_type: transformers' word for what they are.
        pad_id: what config.json must name as padding; None where it does so already, or nobody knows.
    """

    adapter: str
    model_class: str
    names: Mapping[str, str]
    replaced: Mapping[str, TensorEntry]
    added: tuple[TensorEntry, ...]
    labels: tuple[str, ...]
    problem_type: str
    pad_id: int | None = None

    def laid_over(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the checkpoint, made of the one that it would have without a head."""
        found = {
            **config,
            "architectures": [self.model_class],
            "num_labels": self.n_labels,
            "id2label": {str(index): label for index, label in enumerate(self.labels)},
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": self.problem_type,
        }
        if self.pad_id is None:
            return found
        text = config.get("text_config")
        if isinstance(text, Mapping):
            return {**found, "text_config": {**text, "pad_token_id": self.pad_id}}
        return {**found, "pad_token_id": self.pad_id}

    def with_head(self, tensors: Sequence[OutTensor]) -> tuple[OutTensor, ...]:
        """The tensors of a shard with those of the head in their places, all under the names of the class."""
        return tuple(
            replace(
                tensor,
                source=self.replaced.get(tensor.name, tensor.source),
                owner=self.adapter if tensor.name in self.replaced else tensor.owner,
                renamed=self.names.get(tensor.name, ""),
            )
            for tensor in tensors
        )

    @property
    def n_labels(self) -> int:
        """How many numbers the head gives."""
        return len(self.labels)

    @property
    def added_bytes(self) -> int:
        """Length of the file of `added`; 0 where there is none."""
        if not self.added:
            return 0
        header, _ = make_header(layout(self.added), SHARD_METADATA)
        return len(header) + sum(math.prod(one.shape) * DTYPE_BYTES[one.dtype] for one in self.added)


def layout(entries: Sequence[TensorEntry]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of each tensor, as the writer takes them."""
    return [(entry.name, entry.dtype, entry.shape) for entry in entries]


def plan_headed(
    recipe: Recipe,
    base: Checkpoint,
    adapters: Mapping[str, Adapter],
    sites: Mapping[str, Site],
    merges: Sequence[Merge],
) -> tuple[dict[str, Headed], list[str]]:
    """What each merge with `heads` is written as, by name of the merge, and warnings.

    Args:
        recipe: the validated recipe.
        base: headers of the base.
        adapters: fitted to it.
        sites: by name.
        merges: all of the plan.

    Raises:
        Refusal: an adapter without a head or with one of another kind, a base without such a class, a head that does
            not fit it, a merge that changes what the head replaces.
    """
    by_adapter: dict[str, tuple[Headed, bool]] = {}
    found: dict[str, Headed] = {}
    warnings: dict[str, None] = {}
    for merge in merges:
        if merge.heads is None:
            continue
        place = f"merge {merge.name!r}: heads: {merge.heads}"
        if merge.heads not in by_adapter:
            by_adapter[merge.heads] = _headed(place, recipe, base, adapters[merge.heads])
        headed, pads = by_adapter[merge.heads]
        _check_untouched(place, merge, headed, adapters, sites)
        pad, warning = (
            (None, "") if pads else padding_token(base, [adapters[name] for name in merge.adapters])
        )
        found[merge.name] = replace(headed, pad_id=pad)
        if warning:
            warnings[f"heads: {merge.heads}: {warning}"] = None
    return found, list(warnings)


def _headed(place: str, recipe: Recipe, base: Checkpoint, adapter: Adapter) -> tuple[Headed, bool]:
    """What a checkpoint with an adapter's head is, and whether its class knows what it pads with."""
    from ray_merge.models.model_class import auto_class
    from ray_merge.models.skeleton import build_skeleton

    if not adapter.heads:
        raise RecipeError(f"{place}: {adapter.url} {_why_headless(adapter)}")
    kind = adapter_type(recipe, adapter)
    if kind != SEQ_CLS:
        raise RecipeError(
            f"{place}: its head is of task type {kind}, and only {SEQ_CLS} heads are written into a checkpoint; write "
            f"adapters.{adapter.name}.task: classification or regression if it is one, or {KEEPS_HEADS}"
        )
    name = auto_class(base.config, SEQ_CLS)
    if name is None:
        raise RecipeError(
            f"{place}: transformers has no class for sequence classification of model_type "
            f"{base.config.get('model_type')!r}; {KEEPS_HEADS}"
        )
    shapes = {tensor: entry.shape for tensor, entry in base.tensors.items()}
    skeleton = build_skeleton(base.config, shapes, name=name)
    n_labels = head_rows(adapter, skeleton)
    replaced, added = _places(place, adapter, skeleton)
    headed = Headed(
        adapter=adapter.name,
        model_class=name,
        names=dict(_prefixed(skeleton)),
        replaced=replaced,
        added=added,
        labels=label_names(base.config, n_labels),
        problem_type=problem_of(base.config, recipe.adapters[adapter.name].task, n_labels),
    )
    config: Any = _check_loads(place, base, adapter, headed).model.config
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return headed, type(pad) is int and pad >= 0  # -1 is no token, and stands in old configs of Llama


def _why_headless(adapter: Adapter) -> str:
    if adapter.replaced and adapter.config.get("task_type") is None:
        return (
            f"names no task_type, so its {next(iter(adapter.replaced))} is a weight like any other and no head; write "
            f"task_type: {SEQ_CLS} into its adapter_config.json, or leave heads out"
        )
    return f"saved no head (modules_to_save); {KEEPS_HEADS}"


def _places(
    place: str, adapter: Adapter, skeleton: Skeleton
) -> tuple[dict[str, TensorEntry], tuple[TensorEntry, ...]]:
    """Which tensors of a head take the place of a disk tensor of the base, and which have none."""
    own = dict(skeleton.model.named_parameters())
    replaced, added = {}, []
    for entry in adapter.heads:
        if entry.name not in own:
            raise RecipeError(
                f"{place}: {adapter.url} saved {entry.name}, but {skeleton.name} has no such parameter; {KEEPS_HEADS}"
            )
        if entry.dtype not in FLOAT_DTYPES.values():
            raise RecipeError(
                f"{place}: {entry.name} is stored as {entry.dtype}, expected floats; {KEEPS_HEADS}"
            )
        disk = [slot.tensor for slot in skeleton.slots.get(entry.name, ())]
        if len(disk) == 1:
            replaced[disk[0]] = entry
        else:
            added.append(entry)
    # Larger elements first keeps every tensor aligned to its dtype, as in shards.
    return replaced, tuple(sorted(added, key=lambda entry: (-DTYPE_BYTES[entry.dtype], entry.name)))


def _prefixed(skeleton: Skeleton) -> Iterator[tuple[str, str]]:
    """Disk names of the body that lack the prefix of the class -> with it.

    Only of modules that lack nothing else: what transformers calls otherwise by a rule of the class (Gemma 3's
    `language_model.model`) it finds by its own name, and version 4 by no other.
    """
    prefix = f"{skeleton.model.base_model_prefix}."
    without = [
        (parameter, slot.tensor)
        for parameter, slots in skeleton.slots.items()
        for slot in slots
        if parameter.startswith(prefix) and not slot.tensor.startswith(prefix)
    ]
    modules = {tensor.partition(".")[0] for parameter, tensor in without if parameter == prefix + tensor}
    for _, tensor in without:
        if tensor.partition(".")[0] in modules:
            yield tensor, prefix + tensor


def _check_loads(place: str, base: Checkpoint, adapter: Adapter, headed: Headed) -> Skeleton:
    """The checkpoint as transformers would load it: every parameter of the class is there, in its shape."""
    from ray_merge.models.skeleton import build_skeleton

    tensors = {**base.tensors, **headed.replaced}
    shapes = {headed.names.get(name, name): entry.shape for name, entry in tensors.items()}
    shapes |= {entry.name: entry.shape for entry in headed.added}
    skeleton = build_skeleton(headed.laid_over(base.config), shapes, name=headed.model_class)
    own = dict(skeleton.model.named_parameters())
    for entry in adapter.heads:
        if tuple(own[entry.name].shape) != entry.shape:
            raise RecipeError(
                f"{place}: {entry.name} of {adapter.url} is {entry.shape}, but {tuple(own[entry.name].shape)} in "
                f"{headed.model_class} of {base.url} with {headed.n_labels} label(s); was it trained on another base?"
            )
    for name in own:
        if name in skeleton.unsupported:
            raise RecipeError(f"{place}: {name}: {skeleton.unsupported[name]}; {KEEPS_HEADS}")
        if name not in skeleton.slots:
            raise RecipeError(
                f"{place}: neither {adapter.url} nor {base.url} holds {name} of {headed.model_class}; save it with the "
                f"adapter (modules_to_save), or {KEEPS_HEADS}"
            )
    return skeleton


def _check_untouched(
    place: str, merge: Merge, headed: Headed, adapters: Mapping[str, Adapter], sites: Mapping[str, Site]
) -> None:
    """No other adapter may change a tensor whose place the head takes, unless as a head of its own."""
    for name in merge.adapters if headed.replaced else ():
        for tensor in adapters[name].replaced:
            if tensor in headed.replaced and not is_head(tensor, adapters[name]):
                raise RecipeError(
                    f"{place} puts its own {tensor} in the base's place, where adapter {name} saved another value "
                    f"(modules_to_save, task_type {adapters[name].config.get('task_type')}); leave {name} out of the "
                    f"merge, or {KEEPS_HEADS}"
                )
        for site in adapters[name].factors:
            if sites[site].tensor in headed.replaced:
                raise RecipeError(
                    f"{place} puts its own {sites[site].tensor} in the base's place, which adapter {name} updates; "
                    f"leave {name} out of the merge, or {KEEPS_HEADS}"
                )
