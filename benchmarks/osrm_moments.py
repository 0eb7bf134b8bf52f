"""What osrm_suite.py measures on activations: moments of inputs, Fisher diagonals, and how updates meet other tasks.

Owns: `moments_of` and `fisher_of`, by plain hooks on a whole float32 model, and `meeting`. Trains and merges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from osrm_tasks import Home, Settings
from torch import Tensor, nn

from ray_merge.algebra.moments import Moments, MomentSums, token_rows
from ray_merge.demo import models
from ray_merge.spec import Factor

BATCH_ROWS = 16


def eager(model: Any) -> None:
    """Plain attention: the backward of the fused one took a third of a training step on this CPU (sst2, 32 rows)."""
    model.set_attn_implementation("eager")


def sites_of(model: Any, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The Linear layers that PEFT would adapt, by name, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.endswith(f".{target}") for target in targets)
    }


def load(home: Home, task: str, adapter: Path | None) -> Any:
    """The base with a head for `task`; with an adapter folder its update is in the weights and its head attached."""
    model = models.load_classifier(home.base, home.settings.task(task))
    eager(model)
    if adapter is not None:
        sites = sites_of(model, home.settings.targets)
        for name, factor in factors_of(adapter, home.settings).items():
            sites[name].weight.data += factor.scale * factor.B @ factor.A
        models.attach_head(model, adapter / "head.safetensors", home.settings.task(task))
    return model


def factors_of(adapter: Path, settings: Settings) -> dict[str, Factor]:
    """The factors of a PEFT folder by site."""
    from safetensors.torch import load_file

    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    lead, tail = "base_model.model.", ".lora_A.weight"
    return {
        name.removeprefix(lead).removesuffix(tail): Factor(
            B=tensors[name.replace("lora_A", "lora_B")], A=A_RI, scale=settings.alpha / settings.rank
        )
        for name, A_RI in tensors.items()
        if name.endswith(tail)
    }


def _batches(home: Home, task: str, split: str, rows: int) -> Iterator[dict[str, Tensor]]:
    tokenizer = models.load_tokenizer(home.base)
    made = models.tokenize(tokenizer, home.texts(task, split, rows), home.settings.max_length)
    for start in range(0, len(made), BATCH_ROWS):
        yield models.pad(tokenizer, made[start : start + BATCH_ROWS])


def moments_of(
    home: Home, task: str, *, rows: int, split: str = "train", adapter: Path | None = None
) -> dict[str, Moments]:
    """Moments of what goes into every site, over the tokens of the first `rows` texts of a split.

    Args:
        home: folders and settings.
        task: whose texts.
        rows: how many texts; padding does not count.
        split: `train`, or `test` for a measurement on rows that no init has seen.
        adapter: folder whose update is active; None for the base model.
    """
    model = load(home, task, adapter)
    sites = sites_of(model, home.settings.targets)
    sums = {name: MomentSums(module.in_features) for name, module in sites.items()}
    mask: Tensor | None = None

    def listen(name: str) -> Any:
        return lambda _, given: sums[name].add(token_rows(given[0], mask))

    with ExitStack() as hooks, torch.inference_mode(), models.one_thread():
        for name, module in sites.items():
            hooks.callback(module.register_forward_pre_hook(listen(name)).remove)
        for batch in _batches(home, task, split, rows):
            mask = batch["attention_mask"]
            model(**batch)
    return {name: some.finish() for name, some in sums.items()}


def fisher_of(home: Home, task: str, adapter: Path, *, rows: int, seed: int) -> dict[str, Tensor]:
    """Fisher diagonals (O, I) of every site of a fine-tuned model: the mean square of per-example gradients.

    Labels are drawn from the model's own prediction, one for each row: with 77 classes the full expectation would take
    77 backward passes. A regression is read as a Gaussian of variance 1, whose expectation needs no draw.
    """
    model = load(home, task, adapter)
    sites = sites_of(model, home.settings.targets)
    model.requires_grad_(False)
    for module in sites.values():  # what lies below the first site needs no backward
        module.weight.requires_grad_()
    found = {name: torch.zeros_like(module.weight) for name, module in sites.items()}
    draw = torch.Generator().manual_seed(seed)

    def keep(name: str) -> Any:
        def hook(_: nn.Module, given: Any, made: Tensor) -> None:
            x_BLI = given[0]
            made.register_hook(lambda grad_BLO: add(name, grad_BLO, x_BLI))  # type: ignore[no-untyped-call]

        return hook

    def add(name: str, grad_BLO: Tensor, x_BLI: Tensor) -> None:
        found[name] += torch.einsum("blo,bli->boi", grad_BLO, x_BLI.detach()).square_().sum(0)

    total = 0
    with ExitStack() as hooks, models.one_thread():
        for name, module in sites.items():
            hooks.callback(module.register_forward_hook(keep(name)).remove)
        for batch in _batches(home, task, "train", rows):
            logits_BK = model(**batch).logits
            total += len(logits_BK)
            if home.settings.task(task).is_regression:
                torch.autograd.backward(logits_BK.sum())
                continue
            labels = torch.multinomial(logits_BK.detach().softmax(-1), 1, generator=draw)[:, 0]
            torch.autograd.backward(nn.functional.cross_entropy(logits_BK, labels, reduction="sum"))
    return {name: sums / total for name, sums in found.items()}


def meeting(
    factors: Mapping[str, Factor],
    weights: Mapping[str, Tensor],
    others: Sequence[Mapping[str, Moments]],
) -> dict[str, float]:
    """How one adapter meets the inputs h of other tasks.

    Args:
        factors: of the adapter, by site.
        weights: W (O, I) of the base, by site.
        others: moments of the other tasks' inputs.

    Returns:
        norm: root mean square of ||A h||, over tokens, tasks and sites: ||A H^T||_F / sqrt(tokens).
        to_chance: ||A h|| against rows of the same norm in random directions, mean over tasks and sites.
        update: ||s B A h|| / ||W h||, the same mean.
    """
    squares, to_chance, updates = [], [], []
    for site, factor in factors.items():
        A, B, W = factor.A.double(), factor.B.double(), weights[site].double()
        for moments in others:
            G = moments[site].gram / moments[site].count
            met = A @ G @ A.T
            square = float(met.trace())
            chance = float(A.square().sum() * G.trace()) / G.shape[0]
            moved = factor.scale**2 * float((B @ met @ B.T).trace())
            squares.append(square)
            to_chance.append(math.sqrt(square / chance))
            updates.append(math.sqrt(max(moved, 0.0) / float((W @ G @ W.T).trace())))
    return {
        "norm": math.sqrt(math.fsum(squares) / len(squares)),
        "to_chance": math.fsum(to_chance) / len(to_chance),
        "update": math.fsum(updates) / len(updates),
    }
