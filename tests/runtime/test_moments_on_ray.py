"""Moments through three stages in three actors: equal to hooks on the whole model, and whole after kills."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from ray_merge.runtime.session import Session
from ray_merge.runtime.step_pool import RayStepPool
from ray_merge.work.stage_worker import StageWorker
from stage_workers import (
    FAMILIES,
    AnyJobWorker,
    JobOnPool,
    Kill,
    inputs_by_hooks,
    linears,
    make_model,
    moments_by_stages,
    moments_of,
    recipe_for,
    write_pixels,
    write_tokens,
)
from zoo import minilm, smollm2

pytestmark = pytest.mark.ray

REAL_TARGETS = {"minilm": ["query", "value"], "smollm2": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def three_places(ray_session: Session) -> Iterator[RayStepPool]:
    with RayStepPool(AnyJobWorker, 3, session=ray_session, memory_bytes=None) as pool:
        yield pool


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_from_three_stages_on_ray_are_those_of_hooks_on_the_whole_model(
    family, three_places, tmp_path
):
    base = make_model(family, tmp_path / "base")
    write = write_pixels if "image_size" in FAMILIES[family][2] else write_tokens
    data = {"one": write(tmp_path / "one.jsonl", 1), "two": write(tmp_path / "two.jsonl", 2)}
    recipe = recipe_for(base, tmp_path / "out", data, linears(base), stages=3)
    found = moments_by_stages(recipe, tmp_path / "store", tmp_path, partial(JobOnPool, three_places))
    assert found.stages == 3
    assert found.units_run == 6
    for task in data:
        rows = inputs_by_hooks(recipe, task)
        sites = dict(moments_of(found, task))
        assert sorted(sites) == sorted(rows)
        for site, moments in sites.items():
            gram = rows[site].T @ rows[site]
            assert moments.count == len(rows[site]), site
            assert torch.linalg.norm(moments.gram - gram) <= 1e-6 * torch.linalg.norm(gram), site
            assert torch.linalg.norm(moments.mean - rows[site].mean(0)) <= 1e-6 * rows[site].mean(0).norm(), (
                site
            )


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_moments_of_real_models_from_three_stages_are_those_of_hooks_on_the_whole_model(
    name, three_places, tmp_path
):
    base = minilm() if name == "minilm" else smollm2()
    recipe = recipe_for(
        base, tmp_path / "out", {"one": write_tokens(tmp_path / "one.jsonl", 1)}, REAL_TARGETS[name], stages=3
    )
    found = moments_by_stages(recipe, tmp_path / "store", tmp_path, partial(JobOnPool, three_places))
    rows = inputs_by_hooks(recipe, "one")
    sites = dict(moments_of(found, "one"))
    assert sorted(sites) == sorted(rows)
    for site, moments in sites.items():
        gram = rows[site].T @ rows[site]
        assert torch.linalg.norm(moments.gram - gram) <= 1e-6 * torch.linalg.norm(gram), site


@pytest.mark.slow
def test_stages_that_are_killed_anywhere_give_the_same_bytes_and_nothing_is_computed_twice(
    three_places, tmp_path
):
    base = make_model("llama", tmp_path / "base")
    data = {name: write_tokens(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate("abc")}
    recipe = recipe_for(base, tmp_path / "out", data, ["q_proj", "down_proj"], stages=3)
    kills = {
        "c/stage-0": Kill(str(tmp_path / "k0"), "batch", batch=2),
        "b/stage-1": Kill(str(tmp_path / "k1"), "before"),
        "a/stage-2": Kill(str(tmp_path / "k2"), "after"),
    }
    killed = moments_by_stages(
        recipe, tmp_path / "killed", tmp_path, lambda job: JobOnPool(three_places, job, kills)
    )
    assert all((tmp_path / name).exists() for name in ("k0", "k1", "k2"))
    calm = moments_by_stages(recipe, tmp_path / "calm", tmp_path, partial(JobOnPool, three_places))
    assert digests(tmp_path / "killed") == digests(tmp_path / "calm")
    assert len(digests(tmp_path / "calm")) == calm.computed == 3 * 4
    # What was committed before the actor died is adopted by its successor, and counts as not made anew.
    assert killed.computed < 12
    again = moments_by_stages(recipe, tmp_path / "calm", tmp_path, refuse_to_start)
    assert (again.computed, again.reused, again.units_run) == (0, 12, 0)


def digests(store: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in store.rglob("*.safetensors")}


def refuse_to_start(job: object) -> StageWorker:
    raise AssertionError("a pool was started although nothing is missing")
