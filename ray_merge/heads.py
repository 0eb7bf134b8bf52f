"""Task heads that were not merged: attach `heads/<adapter>.safetensors` to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ray_merge.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn


def load_head(model: nn.Module, path: str | Path) -> nn.Module:
    """Put an adapter's saved head into a model of the class it was trained in.

    Args:
        model: for example `BertForSequenceClassification` with as many labels as the head.
        path: a `heads/<adapter>.safetensors` that a merge wrote (runtime names, `classifier.weight`).

    Returns:
        The same model, changed in place.

    Raises:
        AdapterError: the model lacks a tensor of the head, or has it in another shape.
    """
    import torch
    from safetensors import safe_open

    own = dict(model.named_parameters())
    with safe_open(str(path), "pt") as file:
        head = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        labels = (file.metadata() or {}).get("num_labels")
    for name, tensor in head.items():
        if name not in own:
            raise AdapterError(f"{path}: the model ({type(model).__name__}) has no {name}")
        if own[name].shape != tensor.shape:
            has = getattr(getattr(model, "config", None), "num_labels", None)
            advice = f"load it with num_labels={labels or tensor.shape[0]}"
            if labels == str(has):  # `classifier.dense` is as wide as the model
                advice = "it has as many labels, so the head was trained on another model"
            raise AdapterError(
                f"{path}: {name} is {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}; {advice}"
            )
    with torch.no_grad():
        for name, tensor in head.items():
            own[name].copy_(tensor)
    return model
