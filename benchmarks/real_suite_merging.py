"""One unit of real_suite.py in a process of its own: merge, put each task's head on, score."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from real_suite_units import WITHOUT_ENTROPY, Unit
from torch import Tensor

from ray_merge.drive.events import Event
from ray_merge.errors import RayMergeError

BATCH_ROWS = 64


@dataclass(frozen=True)
class Home:
    """Where everything is, and how much of it is looked at."""

    suite: str
    base: str
    scratch: str
    val_rows: int
    test_rows: int
    max_length: int
    device: str = "cpu"


def run_unit(home: Home, unit: Unit) -> dict[str, Any]:
    """Its row: scores by split and task, their mean, and seconds of this process's CPU."""
    torch.set_num_threads(1)
    began = time.process_time()
    row: dict[str, Any] = {
        "tasks": list(unit.tasks),
        "method": unit.method,
        "role": unit.role,
        "parameters": unit.parameters,
        "seed": unit.seed,
        "regressions": [task for task in unit.tasks if is_regression(home, task)],
        "torch": torch.__version__,
    }
    if home.device != "cpu":
        row["device"] = torch.cuda.get_device_name()
    clock = time.monotonic()
    try:
        row |= _scored(home, unit, began)
    except (
        RayMergeError,
        RuntimeError,
        OSError,
        ValueError,
        KeyError,
    ) as error:  # one unit must not end a night
        row["error"] = f"{type(error).__name__}: {error}"
    row["cpu_seconds"], row["seconds"] = time.process_time() - began, time.monotonic() - clock
    return row


def _scored(home: Home, unit: Unit, began: float) -> dict[str, Any]:
    """What a unit found: learning, seconds, scores."""
    row: dict[str, Any] = {}
    scorer = Scorer(home)
    if unit.method == "single":
        scores = {split: scorer.singles(unit.tasks, split) for split in unit.splits}
        row["merge_seconds"], row["learned"] = 0.0, {}
    else:
        folder = Path(home.scratch) / uuid.uuid4().hex[:12]
        try:
            row["learned"] = merge(home, unit, folder)
            row["merge_seconds"] = time.process_time() - began
            scores = {split: scorer.merged(folder / "m", unit.tasks, split) for split in unit.splits}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    for split, found in scores.items():
        row[split], row[f"{split}_mean"] = found, float(np.mean(list(found.values())))
    return row


def merge(home: Home, unit: Unit, folder: Path) -> dict[str, Any]:
    """Make one checkpoint; returns, if it learned, steps (`here`: those not in the store) and the objective."""
    import ray_merge

    parameters = json.loads(unit.parameters)
    suite = Path(home.suite)
    if unit.method in WITHOUT_ENTROPY:
        parameters["without_entropy"] = "include"
    adapters = {
        name: {
            "path": str(suite / "adapters" / name),
            "data": str(suite / "tasks" / name / "train.parquet"),
            **({"task": "regression"} if is_regression(home, name) else {}),
        }
        for name in unit.tasks
    }
    recipe = {
        "base_model": home.base,
        "output": str(folder),
        "store": str(Path(home.scratch) / "store"),
        "calibration": {"samples": 256, "max_length": home.max_length},
        "stages": 1,
        "adapters": adapters,
        "merges": [{"name": "m", "merge_method": unit.method, "parameters": parameters, "seed": unit.seed}],
    }
    cache = Path(home.scratch) / "cache"
    learning = [0]

    def count(event: Event) -> None:
        learning[0] += event.kind == "learn"

    ray_merge.run(recipe, engine="local", workers=1, device=home.device, cache_dir=cache, progress=count)
    phi = folder / "m" / "ray_merge" / "phi.safetensors"
    if not phi.exists():
        return {}
    from safetensors.torch import load_file

    curve = load_file(phi)["history.objective"].tolist()
    last = float(np.mean(curve[-10:])) if curve else None
    return {"steps": len(curve), "here": learning[0], "first": curve[:1], "last": last}


def is_regression(home: Home, task: str) -> bool:
    """Whether its labels are floats."""
    schema = pq.read_schema(Path(home.suite) / "tasks" / task / "val.parquet")
    return str(schema.field("label").type) in ("float", "double")


class Scorer:
    """Scores by plain transformers, each task with its own adapter's head."""

    def __init__(self, home: Home) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # a head that is missing is put on afterwards
        logging.disable_progress_bar()
        self._home = home
        self._tokenizer = AutoTokenizer.from_pretrained(home.base)

    def merged(self, folder: Path, tasks: Sequence[str], split: str) -> dict[str, float]:
        """Percent by task of one checkpoint."""
        model = self._model(folder)
        return {task: self._score(self._with_head(model, task), task, split) for task in tasks}

    def singles(self, tasks: Sequence[str], split: str) -> dict[str, float]:
        """Percent by task, each with its own adapter by PEFT."""
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        found = {}
        for task in tasks:
            path = str(Path(self._home.suite) / "adapters" / task)
            labels = len(self._head(task)["weight"])
            model = AutoModelForSequenceClassification.from_pretrained(self._home.base, num_labels=labels)
            alone = PeftModel.from_pretrained(model, path).eval().to(self._home.device)
            found[task] = self._score(alone, task, split)
        return found

    def _model(self, folder: Path) -> Any:
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        return model.eval().to(self._home.device)

    def _head(self, task: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        saved = load_file(Path(self._home.suite) / "adapters" / task / "adapter_model.safetensors")
        return {key.rpartition(".")[2]: value for key, value in saved.items() if ".classifier." in key}

    def _with_head(self, model: Any, task: str) -> Any:
        head = self._head(task)
        model.classifier = torch.nn.Linear(*reversed(head["weight"].shape))
        model.classifier.load_state_dict(head)
        model.to(self._home.device)
        model.num_labels = len(head["weight"])
        return model

    def _score(self, model: Any, task: str, split: str) -> float:
        outputs, labels = [], []
        with torch.no_grad():
            for batch, some in self._batches(task, split):
                placed = {name: values.to(self._home.device) for name, values in batch.items()}
                outputs.append(model(**placed).logits.cpu())
                labels.append(some)
        logits_NC, labels_N = torch.cat(outputs).numpy(), np.concatenate(labels)
        if is_regression(self._home, task):
            with np.errstate(invalid="ignore"):
                found = float(np.corrcoef(logits_NC[:, 0], labels_N)[0, 1])
            return 0.0 if np.isnan(found) else 100 * found  # constant or not finite: nothing is predicted
        return 100 * float((logits_NC.argmax(axis=1) == labels_N).mean())

    def _batches(self, task: str, split: str) -> Iterator[tuple[Mapping[str, Tensor], Any]]:
        home = self._home
        table = pq.read_table(Path(home.suite) / "tasks" / task / f"{split}.parquet")
        limit = home.val_rows if split == "val" else home.test_rows
        columns = table.slice(0, limit or None).to_pydict()
        pairs = [columns["text"], *([columns["text_b"]] if "text_b" in columns else [])]
        encoded = self._tokenizer(*pairs, truncation=True, max_length=home.max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        labels = np.array(columns["label"])
        for start in range(0, len(order), BATCH_ROWS):
            some = order[start : start + BATCH_ROWS]
            rows = {key: [values[index] for index in some] for key, values in encoded.items()}
            yield dict(self._tokenizer.pad(rows, return_tensors="pt")), labels[some]
