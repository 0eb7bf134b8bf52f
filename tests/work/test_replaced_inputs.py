"""A base file that is replaced while a unit reads it: no object, no receipt."""

from __future__ import annotations

import os

import pytest

from ray_merge.errors import RunFailed
from ray_merge.pool import Turn, Turns
from ray_merge.work.job import EmrUnit, Job, ShardUnit
from ray_merge.work.worker import MergeWorker
from tiny import llama_tensors, plan_of, write_base, write_recipe_files


class Replacing(Turn):
    """A turn that renames another base into its place when the unit has written its header and begins to merge."""

    def __init__(self, base, other) -> None:
        super().__init__(Turns(1), 0)
        self._base, self._other, self._checks = base, other, 0

    def check(self) -> None:
        self._checks += 1
        if self._checks == 2:
            os.replace(self._other, self._base)


@pytest.mark.parametrize(
    ("unit", "method"), [(ShardUnit(0, ("m",), 0), "task_arithmetic"), (EmrUnit("m", 0), "emr")]
)
def test_a_base_replaced_while_a_unit_reads_it_is_not_published(tmp_path, unit, method):
    recipe = write_recipe_files(tmp_path)
    recipe["merges"][0]["merge_method"] = method
    plan = plan_of(recipe)
    other = write_base(tmp_path / "other", {name: tensor + 1 for name, tensor in llama_tensors().items()})
    out = str(tmp_path / "out")
    places = {
        "outputs": {"m": f"{out}/m"},
        "roots": {"m": out},
        "scratch": out,
        "cache": str(tmp_path / "cache"),
    }
    job = Job(plan=plan, merge_ids={"m": "a" * 64}, attempt="one", **places)
    turn = Replacing(tmp_path / "base/model.safetensors", other / "model.safetensors")
    with turn, pytest.raises(RunFailed, match=r"base/model\.safetensors changed in mid-run: version .* now;"):
        MergeWorker(job).run(unit, turn)
    assert not (other / "model.safetensors").exists()
    assert not (tmp_path / "out/m").exists()
