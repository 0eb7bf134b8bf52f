"""Data and adapters of generation.py: prompts with a short completion, and a small LoRA for each task.

Owns: how a row of the suite becomes a prompt and the text that follows it, and the loop that trains.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_merge.demo.sources import ordered
from ray_merge.demo.tasks import read_rows
from ray_merge.demo.train import published_folder

IGNORED = -100
"""Target of a token without a loss, as cross_entropy has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """How texts of one task are asked about.

    Args:
        source: folder of the suite.
        lead: before the text.
        question: on the next line.
        answers: by label; empty: the text's own last word.
    """

    source: str
    lead: str
    question: str
    answers: tuple[str, ...] = ()

    def row(self, text: str, label: float) -> dict[str, str]:
        """The prompt, and what follows it with its leading blank."""
        answer = self.answers[int(label)] if self.answers else _last_word(text)
        return {"text": f"{self.lead} {text}\n{self.question}", "label": f" {answer}"}


PROMPTS: Mapping[str, Prompt] = {
    "sentiment": Prompt(
        source="sst2", lead="Review:", question="Sentiment:", answers=("negative", "positive")
    ),
    "question": Prompt(
        source="trec",
        lead="Question:",
        question="Type:",
        answers=("description", "entity", "abbreviation", "human", "location", "number"),
    ),
    "last_word": Prompt(source="banking77", lead="Request:", question="Last word:"),
}


def _last_word(text: str) -> str:
    return text.split()[-1].strip("?!.,")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How an adapter is trained."""

    base: str
    targets: tuple[str, ...]
    rank: int
    steps: int
    batch_size: int
    learning_rate: float


def write_data(suite: Path, folder: Path, task: str, rows: Mapping[str, int], words: tuple[int, int]) -> None:
    """Write <task>-{train,test}.jsonl (prompt and label) and <task>-test-whole.jsonl (both as one text).

    Rows are taken in hash order: the suite's files may be sorted.

    Args:
        suite: holds tasks/<source>/{train,test}.parquet.
        folder: must exist.
        task: of PROMPTS.
        rows: how many of each split.
        words: fewest and most of a text.
    """
    prompt = PROMPTS[task]
    for split, count in rows.items():
        texts, labels = read_rows(suite / "tasks" / prompt.source / f"{split}.parquet")
        fitting = [
            (text, label)
            for (text, *_), label in zip(texts, labels, strict=True)
            if words[0] <= len(text.split()) <= words[1] and (prompt.answers or _last_word(text))
        ]
        if not fitting:
            raise SystemExit(
                f"{task}: no text of {split}.parquet has {words[0]} to {words[1]} words; widen --words"
            )
        fitting.sort(key=lambda row: ordered(task, row[0]))
        made = [prompt.row(*row) for row in fitting[:count]]
        _write(folder / f"{task}-{split}.jsonl", made)
        if split == "test":
            _write(
                folder / f"{task}-test-whole.jsonl", [{"text": row["text"] + row["label"]} for row in made]
            )


def _write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(settings: Training, rows: Path, target: Path) -> float:
    """Train and publish an adapter; a finished one is left alone. Returns the CPU seconds that it took."""
    if not target.is_dir():
        with published_folder(target) as draft:
            note = _train(settings, rows, draft)
            (draft / "training.json").write_text(json.dumps(note, sort_keys=True) + "\n")
    return float(json.loads((target / "training.json").read_text())["cpu_seconds"])


def _train(settings: Training, rows: Path, folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"local_files_only": True}
    tokenizer: Any = AutoTokenizer.from_pretrained(settings.base, **given)
    base: Any = AutoModelForCausalLM.from_pretrained(settings.base, dtype=torch.float32, **given)
    torch.manual_seed(0)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base, lora)
    examples = [_tokens(tokenizer, json.loads(line)) for line in rows.read_text().splitlines()]
    began = time.process_time()
    losses = _fit(settings, model, examples)
    # "auto" would ask the hub whether the vocabulary was resized; it was not.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    some = max(1, len(losses) // 5)
    return {
        "cpu_seconds": round(time.process_time() - began, 1),
        "first_loss": math.fsum(losses[:some]) / some,
        "last_loss": math.fsum(losses[-some:]) / some,
    }


def _tokens(tokenizer: Any, row: Mapping[str, str]) -> tuple[list[int], list[int]]:
    """Of the prompt and of what follows, made apart as evaluate makes them."""
    prompt, rest = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("text", "label"))
    return prompt, rest


def _fit(settings: Training, model: Any, examples: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Optimise in place: the mean nats of all tokens plus those of the completions alone, by step."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    order: list[int] = []
    losses = []
    for step in range(settings.steps):
        while len(order) < settings.batch_size:
            order += torch.randperm(len(examples), generator=draw).tolist()
        picked, order = order[: settings.batch_size], order[settings.batch_size :]
        loss = _loss(model, [examples[index] for index in picked])
        torch.autograd.backward(loss)
        rate = settings.learning_rate * min(1.0, (step + 1) / 3, 2 * (1 - step / settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _loss(model: Any, batch: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    longest = max(len(prompt) + len(rest) for prompt, rest in batch)
    ids_BL, all_BL, rest_BL = (torch.full((len(batch), longest), fill) for fill in (0, IGNORED, IGNORED))
    for row, (prompt, rest) in enumerate(batch):
        tokens = torch.tensor(prompt + rest)
        ids_BL[row, : len(tokens)] = tokens
        all_BL[row, 1 : len(tokens)] = tokens[1:]
        rest_BL[row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    # Padding is on the right and attention causal: no token with a target sees it.
    logits_NV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].flatten(0, 1)
    everything, completion = (
        torch.nn.functional.cross_entropy(logits_NV, target_BL[:, 1:].flatten(), ignore_index=IGNORED)
        for target_BL in (all_BL, rest_BL)
    )
    return everything + completion
