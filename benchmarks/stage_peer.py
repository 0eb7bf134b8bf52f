"""The peer of stages.py: one process, transformers' own forward, plain hooks; prints the seconds of the loop.

python benchmarks/stage_peer.py RECIPE float64|float32
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_merge.calibration import load_batches
from ray_merge.recipe.read import read_recipe
from ray_merge.storage.cache import default_cache_dir
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import Stores, open_store


def main() -> None:
    recipe, _ = read_recipe(sys.argv[1])
    dtype = getattr(torch, sys.argv[2])
    from transformers import AutoModelForCausalLM

    base = read_checkpoint(open_store(recipe.base_model))
    batches = {
        name: load_batches(
            source.data, recipe.calibration, name, base, Path(default_cache_dir()), Stores()
        ).batches
        for name, source in recipe.adapters.items()
    }
    # The base model alone: moments of the blocks need no logits.
    model = AutoModelForCausalLM.from_pretrained(recipe.base_model, dtype=torch.float32).model.eval()
    sums: dict[str, list[Tensor]] = {}
    mask: list[Tensor] = []
    seen: list[Tensor] = []

    def hook(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if seen and seen[-1] is args[0]:  # q and v share their input, as in ours
            return
        seen[:] = [args[0]]
        rows = args[0][mask[-1].bool()].to(dtype)
        gram, total = sums.setdefault(name, [torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype),
                                             torch.zeros(rows.shape[1], dtype=dtype)])  # fmt: skip
        gram.addmm_(rows.T, rows)
        total += rows.sum(0)

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in recipe.init.target_modules:
            module.register_forward_pre_hook(partial(hook, name))
    started = time.monotonic()
    with torch.inference_mode():
        for batches_of in batches.values():
            sums.clear()
            for batch in batches_of:
                mask[:] = [batch.attention_mask]
                seen.clear()
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    print(time.monotonic() - started)


if __name__ == "__main__":
    main()
