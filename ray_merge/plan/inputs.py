"""The headers and configs that a plan is made of, from wherever base and adapters lie; reads no weights.

The only part of `plan` that touches a store. What cannot be read is refused with its place in the recipe.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from threading import Lock

from ray_merge.errors import CheckpointError, RecipeError
from ray_merge.recipe import Recipe
from ray_merge.spec import Merge
from ray_merge.storage.adapter import CONFIG_FILE as ADAPTER_CONFIG
from ray_merge.storage.adapter import Pickles, StoredAdapter, read_adapter
from ray_merge.storage.checkpoint import CONFIG_FILE as MODEL_CONFIG
from ray_merge.storage.checkpoint import Checkpoint, read_checkpoint
from ray_merge.storage.family import Families
from ray_merge.storage.ordered import in_order
from ray_merge.storage.store import ObjectInfo, Store, Stores


def read_inputs(
    recipe: Recipe, merges: Sequence[Merge], unpickle: Pickles = None
) -> tuple[Checkpoint, dict[str, StoredAdapter]]:
    """Headers and configs of the base and of every adapter that a merge uses.

    Args:
        recipe: the validated recipe.
        merges: to be planned.
        unpickle: converts adapter_model.bin, for adapters whose recipe allows it.
    """
    return read_named(recipe, {name for merge in merges for name in merge.adapters}, unpickle)


def read_named(
    recipe: Recipe, names: Collection[str], unpickle: Pickles = None
) -> tuple[Checkpoint, dict[str, StoredAdapter]]:
    """Headers and configs of the base and of the adapters called `names`, in the recipe's order.

    Raises:
        Refusal: one of them is not there or not whole, and which.
    """
    stores, families = Stores(), Families()
    base = _read_base(recipe, stores)
    chosen = {name: source for name, source in recipe.adapters.items() if name in names}
    missing = next((name for name, source in chosen.items() if source.path is None), None)
    if missing is not None:
        raise RecipeError(
            f"adapter {missing} has no path, which is needed here; give the folder of the adapter as path"
        )

    one_by_one = Lock()

    def convert(store: Store, info: ObjectInfo) -> Path:
        with one_by_one:  # a pickle is fetched whole, and takes its size in memory
            found: Path = unpickle(store, info)
            return found

    def read(name: str) -> StoredAdapter:
        source = chosen[name]
        assert source.path is not None
        _refuse_file(f"adapter {name}", source.path, "the folder that PEFT saved")
        try:
            return read_adapter(
                name,
                stores.open(source.path),
                initial=None if source.initial is None else stores.open(source.initial),
                unpickle=convert if unpickle is not None and source.allow_pickle else None,
                families=families,
            )
        except CheckpointError as error:
            advice = "; give the folder that PEFT saved" if str(error).endswith("does not exist") else ""
            raise CheckpointError(f"adapter {name}: {error}{advice}") from error

    return base, {adapter.name: adapter for adapter in in_order(read, chosen)}


def _read_base(recipe: Recipe, stores: Stores) -> Checkpoint:
    _refuse_file("base_model", recipe.base_model, "the folder of the model")
    store = stores.open(recipe.base_model)
    try:
        return read_checkpoint(store, dequantise=recipe.base_numerics == "dequantise")
    except CheckpointError as error:
        if store.info(MODEL_CONFIG) is not None or store.info(ADAPTER_CONFIG) is None:
            raise
        raise CheckpointError(
            f"base_model: {error}: that is an adapter; give the model that it was trained on"
        ) from error


def _refuse_file(what: str, url: str, wanted: str) -> None:
    if "://" not in url and os.path.isfile(url):
        raise CheckpointError(f"{what}: {url} is a file; give {wanted}")
