"""What stages.py's parity table compares with: hooks on the whole model in this process, float64 sums."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ray_merge.calibration import Batch, load_batches
from ray_merge.models.skeleton import build_skeleton
from ray_merge.moments import calibrate
from ray_merge.recipe.read import read_recipe
from ray_merge.storage.cache import default_cache_dir
from ray_merge.storage.checkpoint import Checkpoint, read_checkpoint
from ray_merge.storage.store import Stores, open_store
from ray_merge.work.moments_file import MomentsFile


class Hooks:
    """Sums of what goes into the modules called `targets`."""

    def __init__(self, model: nn.Module, targets: tuple[str, ...]) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        self.mask: Tensor | None = None
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in targets:
                module.register_forward_pre_hook(partial(self._saw, path))

    def _saw(self, path: str, _module: nn.Module, args: Any) -> None:
        x = args[0]
        masked = self.mask is not None and x.shape[:2] == self.mask.shape
        kept = x[self.mask.bool()] if masked else x.reshape(-1, x.shape[-1])
        self.rows.setdefault(path, []).append(kept.double())


def compare(document: dict[str, Any]) -> tuple[float, float, int, int]:
    """Worst relative error of the Grams and of the means over all sites, how many sites, how many stages."""
    recipe, _ = read_recipe(document)
    result = calibrate(document, engine="ray", workers=3)
    base = read_checkpoint(open_store(recipe.base_model))
    model = getattr(transformers, base.config["architectures"][0]).from_pretrained(
        recipe.base_model, dtype=torch.float32
    )
    hooks = Hooks(model.eval(), tuple(recipe.init.target_modules))
    data = recipe.adapters["one"].data
    loaded = load_batches(data, recipe.calibration, "one", base, Path(default_cache_dir()), Stores())
    with torch.no_grad():
        for batch in loaded.batches:
            hooks.mask = batch.attention_mask
            model(**_arguments(batch))
    worst = {"gram": 0.0, "mean": 0.0}
    n_sites = 0
    paths = _modules(base)
    for site, info in result.index.objects["one"].items():
        rows = torch.cat(hooks.rows[paths[site]])
        moments = MomentsFile(Path(result.index.store) / info.path).moments(site)
        gram, mean = rows.T @ rows, rows.mean(0)
        assert moments.count == len(rows), (site, moments.count, len(rows))
        worst["gram"] = max(worst["gram"], float((moments.gram - gram).norm() / gram.norm()))
        worst["mean"] = max(worst["mean"], float((moments.mean - mean).norm() / mean.norm()))
        n_sites += 1
    return worst["gram"], worst["mean"], n_sites, result.stages


def _arguments(batch: Batch) -> dict[str, Tensor]:
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "token_type_ids": batch.token_type_ids,
        "pixel_values": batch.pixel_values,
    }
    return {name: value for name, value in given.items() if value is not None}


def _modules(base: Checkpoint) -> dict[str, str]:
    """Site -> path of its module in the class that was loaded."""
    skeleton = build_skeleton(base.config, {name: entry.shape for name, entry in base.tensors.items()})
    return {
        slots[0].tensor.removesuffix(".weight"): name.removesuffix(".weight")
        for name, slots in skeleton.slots.items()
        if name.endswith(".weight") and len(slots) == 1
    }
