"""The demo's use of transformers: quiet loading, heads, tokens, batches.

Owns: how a sequence classifier is made from a checkpoint folder and a head file, and how texts become batches.
Never does: downloads (every load is `local_files_only`), training, metrics.
torch and transformers are imported when a function runs, so that `ray_merge.demo` costs nothing to import.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_merge.errors import Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from ray_merge.demo.tasks import Task

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""The base's public name; adapters and cards carry it instead of a folder of this machine."""

Tokens = dict[str, list[int]]
"""`input_ids` and `token_type_ids` of one row."""

_WINDOW_BATCHES = 8


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps progress bars and the notices about fresh classifier weights off the terminal; restores all."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread, then on as many as before.

    A batch here is hundreds of products of under a millisecond. On two idle cores a second thread saves a
    third of the time; when anything else runs, its barriers made a training three times slower (measured).
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fast_precision() -> Any:
    """Autocast to bfloat16 where the CPU multiplies it in hardware (1.6 times faster here), else float32."""
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    enabled = any(check() for check in (getattr(torch.cpu, name, None) for name in checks) if check)
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def problem_type(task: Task) -> str:
    """The word transformers has for the task's kind of loss."""
    return "regression" if task.is_regression else "single_label_classification"


def id2label(task: Task) -> dict[int, str]:
    """Class names by index; a regression has one output, named after the task."""
    return dict(enumerate(task.labels or (task.name,)))


def load_classifier(folder: Path, task: Task | None = None) -> Any:
    """A float32 sequence classifier in eval mode from a checkpoint folder, its head fresh unless saved there.

    Args:
        folder: config.json and model.safetensors, with or without the `bert.` prefix.
        task: sets the head's size and the config's label names; None leaves the folder's own.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    words: dict[str, Any] = {}
    if task is not None:
        names = id2label(task)
        words = {
            "num_labels": task.num_labels,
            "problem_type": problem_type(task),
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
        }
    with quiet():
        loaded = AutoModelForSequenceClassification.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32, **words
        )
    return loaded.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    with quiet():
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def save_head(model: Any, task: Task, file: Path) -> None:
    """Writes the classifier of a (PEFT) model under its runtime names, the way a merge writes its heads."""
    from safetensors.torch import save_file

    head = getattr(model.classifier, "modules_to_save", {"default": model.classifier})["default"]
    tensors = {f"classifier.{name}": value.detach().contiguous() for name, value in head.state_dict().items()}
    names = {str(index): name for index, name in id2label(task).items()}
    metadata = {
        "format": "pt",
        "task_type": "SEQ_CLS",
        "num_labels": str(task.num_labels),
        "problem_type": problem_type(task),
        "id2label": json.dumps(names),
    }
    save_file(tensors, str(file), metadata=metadata)


def attach_head(model: Any, head_file: Path, task: Task) -> None:
    """Replaces the model's classifier by the one in `head_file`.

    Raises:
        Refusal: the file holds another number of outputs than the task has labels.
    """
    import torch
    from safetensors.torch import load_file

    head = load_file(str(head_file))
    weight_OI = head["classifier.weight"]
    if weight_OI.shape[0] != task.num_labels:
        raise Refusal(
            f"{head_file}: classifier.weight has {weight_OI.shape[0]} outputs but task {task.name} has "
            f"{task.num_labels}; it is the head of another task"
        )
    classifier = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0])
    classifier.load_state_dict({"weight": weight_OI.float(), "bias": head["classifier.bias"].float()})
    model.classifier = classifier
    model.config.num_labels = task.num_labels


def tokenize(tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int) -> list[Tokens]:
    """Token ids and segment ids by row, for single texts and pairs."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    made = tokenizer(*columns, truncation=True, max_length=max_length, return_token_type_ids=True)
    return [
        {"input_ids": ids, "token_type_ids": segments}
        for ids, segments in zip(made["input_ids"], made["token_type_ids"], strict=True)
    ]


def pad(tokenizer: Any, rows: Sequence[Tokens]) -> dict[str, Tensor]:
    """One batch, padded to its own longest row."""
    batch: dict[str, Tensor] = dict(tokenizer.pad(list(rows), return_tensors="pt"))
    return batch


def shuffled_batches(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Row indices in random batches of rows of like length: within windows of eight batches, sorted.

    Random batches of docstrings are padded to twice their mean length, and the padding costs as much as text.
    """
    draw = random.Random(seed)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    batches = []
    for start in range(0, len(order), batch_size * _WINDOW_BATCHES):
        window = sorted(order[start : start + batch_size * _WINDOW_BATCHES], key=lambda row: lengths[row])
        batches += [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
    draw.shuffle(batches)
    return batches
