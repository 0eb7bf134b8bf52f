"""Fine-tunes one adapter of osrm_suite.py from one of four starts, scores it alone, measures how it meets others.

Owns: the initial A, the loop, the adapter folder with its score. Everything that is random (head, order of rows, A)
comes from the seed and the task, so that adapters of one seed differ in the start of A alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from osrm_moments import eager, factors_of, meeting, moments_of, sites_of
from osrm_tasks import FROM_DATA, Home, Settings, Training
from safetensors.torch import load_file
from torch import Tensor

from ray_merge import init_adapters
from ray_merge.algebra.moments import Moments
from ray_merge.demo import models
from ray_merge.demo.score import score_adapter
from ray_merge.demo.tasks import Task, read_rows
from ray_merge.demo.train import published_folder
from ray_merge.identity import digest

HELD_OUT_ROWS = 128
"""Test rows of each other task that ||A H^T|| is measured on."""

_WARMUP_SHARE = 0.06


def train(home: Home, training: Training) -> dict[str, Any]:
    """Train and publish an adapter folder; returns its row. A finished folder is left alone."""
    target = home.adapter(training)
    if not target.is_dir():
        with published_folder(target) as draft:
            note = _train(home, training, draft)
            (draft / "score.json").write_text(json.dumps(note, sort_keys=True) + "\n")
    return home.note(training)


def _train(home: Home, training: Training, folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, TaskType, get_peft_model

    settings, task = home.settings, home.settings.task(training.task)
    seed = int(digest([training.start.seed, training.task])[:12], 16)
    with models.quiet(), models.one_thread():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets),
            task_type=TaskType.SEQ_CLS,
        )
        base = models.load_classifier(home.base, task)
        eager(base)
        weights = {name: site.weight.detach() for name, site in sites_of(base, settings.targets).items()}
        model = get_peft_model(base, config)
        begin(home, training, model, seed)
        first = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in _layers(model)}
        started = time.process_time()
        loss = fit(home, model, task, seed)
        seconds = time.process_time() - started
        _save(model, task, folder)
    factors = factors_of(folder, settings)
    others = [_seen(home, name, HELD_OUT_ROWS, "test") for name in _others(settings, training)]
    initial = {
        name: type(f)(B=torch.zeros_like(f.B), A=first[name], scale=f.scale) for name, f in factors.items()
    }
    turned = math.fsum(_kept(first[name], f.A) for name, f in factors.items()) / len(factors)
    return {
        "init": training.start.init,
        "seed": training.start.seed,
        "tasks": training.start.n_tasks,
        "samples": training.start.samples,
        "task": training.task,
        "score": score_adapter(home.base, folder, task, home.file(task.name, "test")),
        "loss": loss,
        "before": meeting(initial, weights, others),
        "after": meeting(factors, weights, others),
        "kept": turned,
        "fit_cpu_seconds": round(seconds, 1),
    }


def _others(settings: Settings, training: Training) -> list[str]:
    return [name for name in settings.tasks[: training.start.n_tasks] if name != training.task]


def _layers(model: Any) -> list[tuple[str, Any]]:
    """PEFT's layers by site."""
    return [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]


def _kept(before_RI: Tensor, after_RI: Tensor) -> float:
    """Share of the trained A that lies in the row space of the initial one, in squares."""
    basis_IR = torch.linalg.qr(before_RI.double().T).Q
    return float((after_RI.double() @ basis_IR).square().sum() / after_RI.double().square().sum())


def begin(home: Home, training: Training, model: Any, seed: int) -> None:
    """Overwrite A of every layer, unless the start is PEFT's default."""
    init = training.start.init
    if init == "default":
        return
    shapes = {name: tuple(layer.lora_A["default"].weight.shape) for name, layer in _layers(model)}
    found = osrm_init(home, training) if init in FROM_DATA else random_init(shapes, seed)
    for name, layer in _layers(model):
        layer.lora_A["default"].weight.data.copy_(found[name])


def osrm_init(home: Home, training: Training) -> dict[str, Tensor]:
    """A (R, I) of every site as `ray-merge init` writes it; all tasks of one start are written by the same command."""
    settings, start = home.settings, training.start
    names = settings.tasks[: start.n_tasks]
    output = home.folder / "init" / f"{start.init}-{start.n_tasks}-{start.samples}-{start.seed}"
    recipe = {
        "base_model": str(home.base),
        "base_model_names": [models.BASE_NAME],
        "output": str(home.folder / "init"),
        "adapters": {
            name: {
                "data": str(home.file(name, "train")),
                "task": "regression" if settings.task(name).is_regression else "classification",
            }
            for name in names
        },
        "calibration": {"samples": start.samples, "max_length": settings.max_length, "seed": start.seed},
        "init": {
            "method": "osrm",
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "target_modules": list(settings.targets),
            "mode": settings.mode,
            "row_scale": "peft" if start.init == "osrm_peft" else "orthonormal",
            "output": str(output),
        },
    }
    init_adapters(recipe, engine="local", workers=1)
    tensors = load_file(str(output / training.task / "adapter_model.safetensors"))
    lead, tail = "base_model.model.", ".lora_A.weight"
    return {
        name.removeprefix(lead).removesuffix(tail): A_RI
        for name, A_RI in tensors.items()
        if name.endswith(tail)
    }


def random_init(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Orthonormal rows in uniformly random directions."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, (rank, columns) in shapes.items():
        Q, R = torch.linalg.qr(torch.randn(columns, rank, dtype=torch.float64, generator=draw))
        found[name] = (Q * R.diagonal().sign()).T.float()
    return found


@lru_cache(maxsize=64)
def _seen(home: Home, task: str, rows: int, split: str) -> dict[str, Moments]:
    """Moments of the base model's inputs; the same for every adapter that this process trains."""
    return moments_of(home, task, rows=rows, split=split)


@lru_cache(maxsize=8)
def _rows(home: Home, task: str) -> tuple[list[models.Tokens], list[float]]:
    texts, labels = read_rows(home.file(task, "train"))
    return models.tokenize(models.load_tokenizer(home.base), texts, home.settings.max_length), labels


def fit(home: Home, model: Any, task: Task, seed: int) -> float:
    """Optimise adapter and head in place; returns the mean loss of the last tenth of the steps.

    Dropout stays off, as in the demo's training.
    """
    settings, tokenizer = home.settings, models.load_tokenizer(home.base)
    rows, labels = _rows(home, task.name)
    lengths = [len(row["input_ids"]) for row in rows]
    batches: list[list[int]] = []
    while len(batches) < settings.steps:
        batches += models.shuffled_batches(lengths, settings.batch_size, seed + len(batches))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=0.0)
    warmup = max(1, round(_WARMUP_SHARE * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup)),
    )
    model.eval()
    losses = []
    for batch in batches[: settings.steps]:
        with models.fast_precision():
            logits = model(**models.pad(tokenizer, [rows[index] for index in batch])).logits.float()
        loss = _loss(logits, torch.tensor([labels[index] for index in batch]), task)
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    last = losses[-max(1, settings.steps // 10) :]
    return math.fsum(last) / len(last)


def _loss(logits: Tensor, target: Tensor, task: Task) -> Tensor:
    if task.is_regression:
        return torch.nn.functional.mse_loss(logits.squeeze(-1), target)
    return torch.nn.functional.cross_entropy(logits, target.long())


def _save(model: Any, task: Task, folder: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = models.BASE_NAME
    # "auto" would ask the hub whether the vocabulary was resized; it was not.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    models.save_head(model.base_model.model, task, folder / "head.safetensors")
    (folder / "README.md").unlink(missing_ok=True)
