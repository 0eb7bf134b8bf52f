"""config.json of a merged checkpoint: the base's own, but for what the merge changed.

dtype (out_dtype), tie_word_embeddings (tied: untie), quantization_config (a dequantised base has none), vocab_size
(an adapter that resized the embeddings) and what a head changes (heads).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray_merge.plan import Plan, with_vocabulary
from ray_merge.spec import FLOAT_DTYPES, Adapter, Merge
from ray_merge.storage.store import Store, read_unchanged

DTYPE_NAMES = {stored: name for name, stored in FLOAT_DTYPES.items()}


def checkpoint_config(plan: Plan, merge: Merge, base: Store) -> bytes:
    """config.json of `merge`; the base's bytes where nothing of it changes."""
    config: Mapping[str, Any] = plan.base.config  # already without quantisation and tie (storage, fit)
    dtype: str | None = plan.recipe.out_dtype
    if plan.base.quantised and dtype is None:
        dtype = DTYPE_NAMES[plan.base.tensors[next(iter(plan.base.quantised))].dtype]
    if dtype is not None:
        # transformers 5 writes `dtype`, older ones `torch_dtype`; both read either.
        key = "dtype" if "dtype" in config else "torch_dtype"
        config = {**_with_dtype(config, dtype), key: dtype}
    rows = _vocabulary(plan, merge)
    if rows is not None:
        config = with_vocabulary(config, *rows) or config
    if merge.name in plan.headed:
        config = plan.headed[merge.name].laid_over(config)
    if config is plan.base.config and not plan.base.quantised and not plan.base.untied:
        return read_unchanged(base, plan.base.config_file)
    # Not pretty_json: some configs hold Infinity (Mamba2's time_step_limit), which transformers writes and reads.
    return (json.dumps(config, sort_keys=True, indent=1) + "\n").encode()


def vocabulary_owner(plan: Plan, merge: Merge) -> Adapter | None:
    """The adapter whose tokenizer belongs to the result: the one that resized the embeddings."""
    return next((a for name in merge.adapters if plan.resized(a := plan.adapters[name])), None)


def _vocabulary(plan: Plan, merge: Merge) -> tuple[int, int] | None:
    """(rows of the base, rows of the result) of a resized table."""
    for tensor, (_, entry) in sorted(plan.replaced(merge).items()):
        base = plan.base.tensors[tensor].shape
        if entry.shape != base:
            return base[0], entry.shape[0]
    return None


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    # Vision-language models name the dtype again in text_config and vision_config.
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = dtype
        else:
            nested = isinstance(value, dict) and key.endswith("_config")
            changed[key] = _with_dtype(value, dtype) if nested else value
    return changed
