"""Which transformers class gives one embedding of an example, and how wide it is: what a text head is compared with.

Owns the search for that class: a projection (CLIP) before a pooler, a tower of a model with two before nothing.
Looks at classes, names and shapes only.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_merge.models.skeleton import Skeleton

TOWERS = ("VisionModelWithProjection", "TextModelWithProjection", "VisionModel", "TextModel")
"""How names of classes end that run one tower of a model with two; the first that fits wins."""

PROJECTED = ("image_embeds", "text_embeds")
POOLED = "pooler_output"


def embedding_classes(config: Mapping[str, Any], trained_in: str) -> list[str]:
    """Names of classes that may embed examples, best guess first.

    Args:
        config: the parsed config.json of the base.
        trained_in: name of the class that the adapter was trained in.
    """
    from ray_merge.models.model_class import class_candidates

    whole = list(class_candidates(config, task_type="FEATURE_EXTRACTION"))
    families = [_family(name) for name in (trained_in, *whole) if name.endswith(("Model", "Projection"))]
    towers = [f"{family}{tower}" for tower in TOWERS for family in dict.fromkeys(families)]
    known = [name for name in towers if name in class_candidates(config, class_name=name)]
    return list(dict.fromkeys([*known, trained_in, *whole]))


def embedding_width(skeleton: Skeleton) -> int | None:
    """D of the one embedding that a class gives out; None where it gives none, or those of two towers.

    It is the length of the last parameter: of the projection, the pooler or, where a pooler has none, the last norm.
    """
    given = _given_out(type(skeleton.model))
    projected = [name for name in PROJECTED if name in given]
    if len(projected) > 1 or not (projected or POOLED in given):
        return None
    *_, last = skeleton.model.parameters()
    return last.shape[0]


def misses(skeleton: Skeleton, sites: Sequence[str], saved: Sequence[str]) -> bool:
    """Whether a class lacks some of an adapter's sites, or a parameter that neither the base nor the adapter holds.

    Args:
        skeleton: of the class.
        sites: names of the adapter's.
        saved: runtime names of what the adapter saved whole.
    """
    stored = {slot.tensor.removesuffix(".weight") for slots in skeleton.slots.values() for slot in slots}
    there = {*skeleton.slots, *saved}
    return any(site.partition("[")[0] not in stored for site in sites) or any(
        name not in there for name, _ in skeleton.model.named_parameters()
    )


def _family(name: str) -> str:
    plain = name.removesuffix("WithProjection").removesuffix("Model")
    return plain.removesuffix("Vision").removesuffix("Text")


def _given_out(model_class: type) -> frozenset[str]:
    """The names of what a class's forward says that it returns."""
    try:
        said = typing.get_type_hints(model_class.forward).get("return")  # type: ignore[attr-defined]
    except NameError:  # a hint of a library that is not installed
        return frozenset()
    kinds = typing.get_args(said) or (said,)
    return frozenset(field.name for kind in kinds if is_dataclass(kind) for field in fields(kind))
