"""The parity table: every layer kind x variant that PEFT saves, merged, against the unmerged model in float32.

`pytest tests/parity/test_parity_table.py -v` prints it, one line per row (rows.py). Each row is judged twice: the two
references (PEFT's unmerged forward, and dense.py) must agree with each other, and the merged checkpoint with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dense
import pytest
import torch
import yaml
from rows import Row, rows
from torch import Tensor
from variants import initial_folder, quiet, train

import ray_merge
from models import MODELS
from ray_merge.cli import main

TOLERANCE = 1e-5
ROWS = rows()


def of(chosen: list[Row]) -> Any:
    return pytest.mark.parametrize("row", chosen, ids=lambda row: row.id)


@dataclass
class Bench:
    """Bases and adapters, each made once for all tests of this file."""

    home: Path
    trained: dict[str, tuple[list[Path], list[Tensor]]] = field(default_factory=dict)
    logits: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def base(self, model: str) -> Path:
        folder = self.home / "bases" / model
        if not folder.exists():
            MODELS[model].save(folder)
        return folder

    def adapters(self, row: Row) -> tuple[list[Path], list[Tensor]]:
        """Saved folders, and the logits of each live, unmerged PeftModel."""
        if row.id not in self.trained:
            tiny, folders, logits = MODELS[row.model], [], []
            for index, variant in enumerate(row.adapters):
                folders.append(self.home / "adapters" / row.id / f"a{index}")
                live = train(tiny, self.base(row.model), folders[-1], variant, seed=index + 1)
                logits.append(tiny.logits(live))
            self.trained[row.id] = folders, logits
        return self.trained[row.id]

    def once(self, key: tuple[str, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self.logits:
            self.logits[key] = make()
        return self.logits[key]

    def before(self, model: str) -> Tensor:
        """Logits of the base alone."""
        tiny = MODELS[model]
        return self.once((model,), lambda: tiny.logits(tiny.base(self.base(model))))

    def dense(self, row: Row, folders: list[Path]) -> Tensor:
        def make() -> Tensor:
            tiny = MODELS[row.model]
            base = tiny.base(self.base(row.model))
            return tiny.logits(dense.merge(base, folders, subtract_initial="initial" in row.keys))

        return self.once(("dense", row.id, *map(str, folders)), make)

    def all_active(self, row: Row) -> Tensor:
        """The unmerged PeftModel with every adapter of the row active."""
        return self.once(("all", row.id), lambda: self._all_active(row))

    def _all_active(self, row: Row) -> Tensor:
        from peft import PeftModel

        tiny, (folders, _) = MODELS[row.model], self.adapters(row)
        names = [folder.name for folder in folders]
        with quiet():
            model = PeftModel.from_pretrained(
                tiny.base(self.base(row.model)), folders[0], adapter_name=names[0]
            )
            for name, folder in zip(names[1:], folders[1:], strict=True):
                model.load_adapter(folder, adapter_name=name)
            model.base_model.set_adapter(names)
            return tiny.logits(model)

    def reference(self, row: Row) -> Tensor:
        folders, logits = self.adapters(row)
        if row.reference == "dense":
            return self.dense(row, folders)
        return logits[0] if len(folders) == 1 else self.all_active(row)

    def recipe(self, row: Row, output: Path) -> dict[str, Any]:
        adapters = {}
        for folder in self.adapters(row)[0]:
            keys = {k: str(initial_folder(folder)) if v == "{initial}" else v for k, v in row.keys.items()}
            adapters[folder.name] = {"path": str(folder), **keys}
        return {
            "base_model": str(self.base(row.model)),
            "output": str(output),
            "adapters": adapters,
            "merges": [{"name": "m", "merge_method": "task_arithmetic"}],
            **row.recipe,
        }


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    yield Bench(tmp_path_factory.mktemp("parity"))
    torch.use_deterministic_algorithms(False)


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


@of([row for row in ROWS if row.second_opinion])
def test_the_references_agree(row, bench):
    folders, logits = bench.adapters(row)
    if len(folders) == 1 and row.reference == "dense":
        assert relative_error(bench.dense(row, folders), logits[0]) > 0.01, (
            "PEFT is right now: use it as reference"
        )
        return
    for folder, want in zip(folders, logits, strict=True):
        assert relative_error(bench.dense(row, [folder]), want) <= TOLERANCE
    if len(folders) > 1 and row.reference == "peft" and not row.refused:
        assert relative_error(bench.dense(row, folders), bench.all_active(row)) <= TOLERANCE


@of([row for row in ROWS if not row.refused])
def test_the_merged_model_equals_the_unmerged_one(row, bench, tmp_path):
    tiny, want, before = MODELS[row.model], bench.reference(row), bench.before(row.model)
    assert before.shape != want.shape or relative_error(before, want) > 0.01, "the adapters do nothing"
    ray_merge.run(bench.recipe(row, tmp_path / "out"), engine="local", cache_dir=tmp_path / "cache")
    merged = tiny.load(tmp_path / "out" / "m")
    for head in sorted((tmp_path / "out" / "m").glob("heads/*.safetensors")):
        merged = ray_merge.load_head(merged, head)
    assert relative_error(tiny.logits(merged), want) <= TOLERANCE


@of([row for row in ROWS if row.refused])
def test_the_row_is_refused(row, bench, tmp_path, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(bench.recipe(row, tmp_path / "out"), sort_keys=False))
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe), "--engine", "local", "--cache-dir", str(tmp_path / "cache")])
    sentence = capfd.readouterr().err.strip().rpartition("\n")[2]
    assert stopped.value.code == 2, sentence
    assert all(word in sentence for word in row.refused), sentence
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*"))
