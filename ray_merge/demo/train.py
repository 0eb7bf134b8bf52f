"""Fine-tunes one LoRA adapter of the demo with PEFT, on the CPU, from nothing but folders of this machine.

Owns: the training settings, the loop, the adapter folder and its head file; a folder appears complete or not at
all. Never does: choosing data, deciding whether a cached adapter is good (`prepare` does), downloads.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_merge.demo import models
from ray_merge.demo.tasks import Task, read_rows

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense")
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How every adapter of the demo is trained; all of it is part of the cache key.

    Args:
        rank: LoRA's r.
        alpha: LoRA's alpha; the delta is `alpha / rank * B @ A`.
        learning_rate: peak of AdamW's rate, after a linear warm-up and before a linear decay to zero.
        warmup_share: share of the steps spent warming up.
        batch_size: rows a step.
        seed: of the initial factors, the head and the order of rows.
        max_steps: stop early (tests); None runs the task's epochs.
    """

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1.5e-3
    warmup_share: float = 0.1
    batch_size: int = 32
    seed: int = 0
    max_steps: int | None = None


@contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its name when the block ends well, and is removed otherwise.

    A killed process leaves a hidden folder that nobody reads. When another process published `target` in the
    meantime, its folder stays and ours is dropped: both were made from the same key.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        yield draft
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def train_adapter(
    task: Task, base_dir: Path, train_file: Path, target_dir: Path, settings: Settings
) -> float:
    """Trains one adapter and saves it with PEFT; returns the seconds it took.

    Args:
        task: what to learn.
        base_dir: the base model's folder, with its tokenizer.
        train_file: parquet with `text` and `label`.
        target_dir: an existing folder that receives adapter_config.json, adapter_model.safetensors (factors
            and classifier), the config.json with the label names, and the head alone in `HEAD_FILE`.
        settings: see `Settings`.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    start = time.perf_counter()
    with models.quiet(), models.one_thread(), torch.random.fork_rng(devices=()):
        torch.manual_seed(settings.seed)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(TARGETS),
            task_type=TaskType.SEQ_CLS,
        )
        model = get_peft_model(models.load_classifier(base_dir, task), config)
        _fit(model, models.load_tokenizer(base_dir), task, train_file, settings)
        _save(model, task, target_dir)
    return time.perf_counter() - start


def _fit(model: Any, tokenizer: Any, task: Task, train_file: Path, settings: Settings) -> None:
    """Optimises the adapter in place. Dropout stays off: it takes 12 % of a step here."""
    import torch

    texts, labels = read_rows(train_file)
    rows = models.tokenize(tokenizer, texts, task.max_length)
    batches = [
        batch
        for epoch in range(task.epochs)
        for batch in models.shuffled_batches(
            [len(row["input_ids"]) for row in rows], settings.batch_size, settings.seed + epoch
        )
    ][: settings.max_steps]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=0.0)
    warmup = max(1, round(settings.warmup_share * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, (len(batches) - step) / max(1, len(batches) - warmup)),
    )
    model.eval()
    for batch in batches:
        target = torch.tensor([labels[index] for index in batch])
        with models.fast_precision():
            logits = model(**models.pad(tokenizer, [rows[index] for index in batch])).logits
        torch.autograd.backward(_loss(logits.float(), target, task))
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def _loss(logits: Tensor, target: Tensor, task: Task) -> Tensor:
    from torch.nn import functional as F

    if task.is_regression:
        return F.mse_loss(logits.squeeze(-1), target)
    return F.cross_entropy(logits, target.long())


def _save(model: Any, task: Task, target_dir: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = models.BASE_NAME
    # "auto" would ask the hub whether the vocabulary was resized; it was not.
    model.save_pretrained(str(target_dir), save_embedding_layers=False)
    model.config.save_pretrained(str(target_dir))
    models.save_head(model.base_model.model, task, target_dir / HEAD_FILE)
    # PEFT's blank model card says nothing about this adapter.
    (target_dir / "README.md").unlink(missing_ok=True)
    for file in target_dir.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner reads
