"""What osrm_suite.py works on: its settings, its units of work, and the rows of the six tasks.

Owns: the names of adapters and merges, the parquet files that every unit reads, the folders. Trains and merges nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq

from ray_merge.algebra.osrm import Mode
from ray_merge.demo.tasks import Task, read_rows
from ray_merge.demo.train import published_folder
from ray_merge.identity import digest

TASKS: Mapping[str, int] = {
    "trec": 6, "subj": 2, "sst2": 2, "sst_score": 0, "sick_entailment": 3, "banking77": 77,
}  # fmt: skip
"""Tasks of the suite in their README's order, with their numbers of classes; 0 is a regression."""

INITS: Mapping[str, str] = {
    "default": "PEFT's own: Kaiming uniform",
    "osrm": "OSRM, orthonormal rows",
    "osrm_peft": "OSRM, rows of PEFT's expected norm",
    "random": "random orthonormal rows",
}
"""Where A starts; B starts at zero everywhere. `random` has osrm's norms and no data: what is left is OSRM's own."""

FROM_DATA = ("osrm", "osrm_peft")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What every figure of one table has in common; its digest names the folder.

    Args:
        tasks: in this order; `--tasks N` takes the first N.
        targets: module names as PEFT takes them.
        rank: LoRA's r.
        alpha: LoRA's alpha.
        steps: of AdamW, with linear warm-up and decay.
        batch_size: rows a step.
        learning_rate: its peak, the same for every task and init.
        max_length: tokens kept of a text.
        samples: unlabelled train rows of each partner task that an OSRM init sees.
        test_rows: of each task, the same for every adapter and merge.
        mode: of OSRM: covariance (the paper) or means (the published code).
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    targets: tuple[str, ...] = ("query", "value")
    rank: int = 8
    alpha: int = 16
    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 4e-3
    max_length: int = 64
    samples: int = 128
    test_rows: int = 300
    mode: Mode = "covariance"

    @property
    def id(self) -> str:
        """12 hex digits."""
        return digest(asdict(self))[:12]

    def task(self, name: str) -> Task:
        """The task as the demo's functions take it; its classes have numbers for names."""
        labels = tuple(str(index) for index in range(TASKS[name]))
        return Task(name=name, labels=labels, max_length=self.max_length, rows_per_class=0, epochs=1)


@dataclass(frozen=True, slots=True)
class Start:
    """One way to start a whole set of adapters.

    Args:
        init: of INITS.
        seed: of the head, the order of rows and what is random about A.
        n_tasks: how many tasks there are to merge: an OSRM init sees all but its own.
        samples: rows of each partner task; 0 for an init that sees none.
    """

    init: str
    seed: int
    n_tasks: int
    samples: int

    @property
    def name(self) -> str:
        """Unique; adapters of an init without data do not depend on how many tasks there are."""
        seen = f"-of{self.n_tasks}-n{self.samples}" if self.samples else ""
        return f"{self.init}-seed{self.seed}{seen}"


@dataclass(frozen=True, slots=True)
class Training:
    """One adapter to train."""

    start: Start
    task: str

    @property
    def key(self) -> str:
        """Name of its folder and its row."""
        return f"{self.start.name}-{self.task}"


@dataclass(frozen=True, slots=True)
class Merging:
    """One merge of the first `start.n_tasks` adapters, scored on all of them for a grid of lambdas."""

    start: Start
    method: str

    @property
    def key(self) -> str:
        """Name of its rows."""
        return f"{self.start.name}-merge{self.start.n_tasks}-{self.method}"


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one run of the benchmark."""

    folder: Path
    base: Path
    settings: Settings

    def adapter(self, training: Training) -> Path:
        """PEFT folder with head.safetensors and score.json; complete when it is there."""
        return self.folder / "adapters" / training.key

    def file(self, task: str, split: str) -> Path:
        """Parquet of `train` or `test` rows."""
        return self.folder / "tasks" / task / f"{split}.parquet"

    def texts(self, task: str, split: str, most: int) -> list[tuple[str, ...]]:
        """The first `most` texts of a split, without labels."""
        return read_rows(self.file(task, split))[0][:most]

    def note(self, training: Training) -> dict[str, object]:
        """The row of a finished training."""
        found: dict[str, object] = json.loads((self.adapter(training) / "score.json").read_text())
        return found


def prepare(home: Home, suite: Path) -> None:
    """Write the rows that are used, in a seeded order, so that the first n of them are a sample.

    The order is the same for every seed of a training, and so are the test rows.
    """
    settings = home.settings
    train = max(settings.steps * settings.batch_size, settings.samples)
    most = {"train": train, "test": settings.test_rows}
    for task in settings.tasks:
        target = home.file(task, "train").parent
        if target.is_dir():
            continue
        with published_folder(target) as draft:
            for split, count in most.items():
                table = pq.read_table(suite / "tasks" / task / f"{split}.parquet")
                order = list(range(table.num_rows))
                random.Random(f"{task} {split}").shuffle(order)
                pq.write_table(table.take(order[:count]), draft / f"{split}.parquet")
