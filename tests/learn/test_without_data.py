"""A learned merge is verified and evaluated when its data are gone, and not when they are others."""

import shutil

import pytest

import ray_merge
from lessons import lesson, make_school
from ray_merge.errors import OutputConflict, RecipeError, Refusal

NAMES = ("two", "three")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A recipe of one learned merge with data of its own, and its cache."""
    folder = tmp_path_factory.mktemp("learned")
    make_school(folder)
    parameters = {"steps": 1, "batch_size": 2}
    recipe = lesson(folder, folder / "out", "adamerging", NAMES, parameters=parameters)
    ray_merge.run(recipe, engine="local", cache_dir=folder / "cache")
    return recipe, folder


def evaluate(recipe, folder):
    return ray_merge.evaluate(recipe, engine="local", command="true {name}", cache_dir=folder / "cache")


def test_data_that_are_gone_are_what_the_manifest_says(learned):
    recipe, folder = learned
    for name in NAMES:
        shutil.move(folder / f"{name}.jsonl", folder / f"{name}.away")
    try:
        assert evaluate(recipe, folder).missing == ()
        (one,) = ray_merge.verify(str(folder / "out"), cache_dir=folder / "cache")
        assert one.probed > 0
        elsewhere = {**recipe, "output": str(folder / "elsewhere")}
        with pytest.raises(RecipeError, match=r"adapters\.two\.data: .*two\.jsonl does not exist"):
            evaluate(elsewhere, folder)
        with pytest.raises(RecipeError, match="does not exist"):
            ray_merge.run(recipe, engine="local", cache_dir=folder / "cache")
    finally:
        for name in NAMES:
            shutil.move(folder / f"{name}.away", folder / f"{name}.jsonl")


def test_data_that_are_others_are_no_part_of_the_merge(learned):
    recipe, folder = learned
    recipe = {**recipe, "adapters": {**recipe["adapters"]}}
    other = recipe["adapters"]["three"]["data"]
    recipe["adapters"]["two"] = {**recipe["adapters"]["two"], "data": other}
    with pytest.raises(OutputConflict, match=r"holds merge id .*data\.two"):
        evaluate(recipe, folder)
    rows = folder / "two.jsonl"
    before = rows.read_bytes()
    rows.write_bytes(before + b'{"input_ids": [1, 2]}\n')
    try:
        with pytest.raises(Refusal, match=r"an input has changed since the merge \(data\.two"):
            ray_merge.verify(str(folder / "out"), cache_dir=folder / "cache")
    finally:
        rows.write_bytes(before)
