"""Does each adapter fit the base? Names, shapes, heads, and what the adapter calls its base; from headers alone.

Every adapted module must be a float matrix of the base with the factor's outputs and inputs, and no saved head
may stand for a weight of the base. Pure: reads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray_merge.errors import AdapterError, AdapterShapeError
from ray_merge.models.names import Naming, resolve
from ray_merge.recipe import Recipe
from ray_merge.spec import FLOAT_DTYPES, Adapter, Site, TensorEntry
from ray_merge.storage.checkpoint import Checkpoint

TRANSPOSED_MODELS = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt_bigcode_legacy"}
)
"""Model types whose linear weights are HF Conv1D, stored (I, O): a square one cannot be told by its shape."""


def find_sites(base: Checkpoint, adapters: Mapping[str, Adapter]) -> tuple[Naming, dict[str, Site]]:
    """The naming rule and the base weights that adapters touch, by disk name.

    Raises:
        AdapterError: a module without a base weight, a weight that cannot be merged, a head that replaces one.
        AdapterShapeError: a factor that does not fit its base weight.
    """
    naming, disk = resolve(
        {name: adapter.factors for name, adapter in adapters.items()}, base.tensors, base.url
    )
    sites: dict[str, Site] = {}
    for adapter in adapters.values():
        for module, factor in adapter.factors.items():
            entry = base.tensors[disk[module]]
            _check_weight(module, entry, base)
            rows, columns = entry.shape
            source = f"{adapter.url}/{adapter.file}"
            if factor.A.shape[1] != columns:
                raise AdapterShapeError(
                    module, "lora_A", factor.A.shape, source, f"takes {columns} inputs", base.url
                )
            if factor.B.shape[0] != rows:
                raise AdapterShapeError(
                    module, "lora_B", factor.B.shape, source, f"gives {rows} outputs", base.url
                )
            sites[entry.name] = Site(module, entry.name, (rows, columns))
        _check_heads(adapter, naming, base)
    return naming, sites


def _check_weight(module: str, entry: TensorEntry, base: Checkpoint) -> None:
    if len(entry.shape) != 2:
        raise AdapterError(
            f"{module}: base weight {entry.name} has shape {entry.shape}; only matrices are merged"
        )
    if entry.dtype not in FLOAT_DTYPES.values():
        raise AdapterError(f"{module}: base weight {entry.name} is stored as {entry.dtype}, not as floats")
    if base.config.get("model_type") in TRANSPOSED_MODELS:
        raise AdapterError(
            f"{module}: {base.config['model_type']} stores linear weights transposed (HF Conv1D), which is not "
            "supported; merge with PEFT's merge_and_unload"
        )
    if base.config.get("tie_word_embeddings") and re.search(r"(^|\.)(lm_head|embed_out)$", module):
        raise AdapterError(
            f"{module} is tied to the input embedding in {base.url}: a merge would change both; untie them first"
        )


def _check_heads(adapter: Adapter, naming: Naming, base: Checkpoint) -> None:
    for head in adapter.heads:
        module, _, leaf = head.name.rpartition(".")
        weight = naming.disk(module, base.tensors)
        if weight is not None or f"{module}.{leaf}" in base.tensors:
            raise AdapterError(
                f"adapter {adapter.name}: {head.name} (modules_to_save) replaces a weight of the base, which is not "
                "supported; train without modules_to_save on it"
            )


def check_bases(recipe: Recipe, base: Checkpoint, adapters: Mapping[str, Adapter]) -> list[str]:
    """Compare the base that each adapter names with the recipe's; shapes were compared already."""
    accepted = {name.lower() for name in recipe.base_model_names}
    hub = re.fullmatch(r"hf://(?:models/)?([^/@]+/[^/@]+)(?:@.*)?/?", recipe.base_model)
    warnings: dict[str, str] = {}
    named: dict[str, tuple[str, str]] = {}
    for adapter in adapters.values():
        name = str(adapter.config.get("base_model_name_or_path") or "")
        if not name or name.lower() in accepted:
            continue
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        if hub and is_hub_id and name.lower() != hub[1].lower():
            raise AdapterError(
                f"adapter {adapter.name} was trained on {name}, the recipe's base is {hub[1]}; if they are the same "
                f"weights, add base_model_names: [{name}]"
            )
        if is_hub_id:
            named.setdefault(name.lower(), (adapter.name, name))
        if not (hub and is_hub_id) and not _same_folder(name, hub[1] if hub else recipe.base_model):
            warnings[name] = (
                f"adapter {adapter.name} says it was trained on {name}; {recipe.base_model} has the same names and "
                f"shapes, which does not prove the same weights (base_model_names: [{name}] says that it is so)"
            )
    if len(named) > 1:
        (first, one), (second, other) = list(named.values())[:2]
        raise AdapterError(
            f"adapter {first} was trained on {one}, adapter {second} on {other}; if they are the same weights, add "
            f"base_model_names: [{one}, {other}]"
        )
    return list(warnings.values())


def _same_folder(name: str, base: str) -> bool:
    last = name.rstrip("/").rpartition("/")[2].lower()
    return last == base.rstrip("/").rpartition("/")[2].lower()
