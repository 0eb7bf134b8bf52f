"""Every registered method through a whole run, in every space: same bytes for any number of workers, and verified."""

from __future__ import annotations

from pathlib import Path

import pytest

import ray_merge
from ray_merge.methods.registry import METHODS
from ray_merge.verify import verify
from zoo import digests, llama_adapters, tiny_llama

GIVEN = {"svd": {"rank": 3}, "free": {"cutoff": 0.3}}
"""What a method needs, or needs at such tiny weights."""

SAME = [
    ["cat-dense", "task_arithmetic-dense"],
    ["iso_c-core", "iso_c-dense"],
    ["iso_cts-core", "iso_cts-dense"],
    ["knots_ties-knots", "ties-knots"],
    ["tsv_m-core", "tsv_m-dense"],
]
"""Names for the same thing, and spaces that make no difference with the default parameters."""


def merges():
    for method in METHODS:
        if method.needs:
            continue  # moments or phi: needs data of every adapter, which this recipe does not have
        for space in method.spaces:
            words = {"space": space} if "space" in method.declared() else {}
            entry = {"merge_method": method.name, "parameters": {**GIVEN.get(method.name, {}), **words}}
            yield {"name": f"{method.name}-{space}", **entry}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base", layers=2)
    llama_adapters(folder / "base", folder / "adapters", 3)
    return folder


def run(inputs: Path, output: Path, workers: int) -> None:
    recipe = {
        "base_model": str(inputs / "base"),
        "output": str(output),
        "adapters": {f"a{i}": str(inputs / "adapters" / f"a{i}") for i in range(3)},
        "merges": list(merges()),
        "max_shard_size": "20KB",
    }
    ray_merge.run(recipe, engine="local", workers=workers, cache_dir=output.parent / "cache")


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("made")
    for workers in (1, 4):
        run(inputs, folder / str(workers) / "out", workers)
    return {workers: folder / str(workers) / "out" for workers in (1, 4)}


def test_one_worker_and_four_give_the_same_bytes(made):
    assert digests(made[1]) == digests(made[4])


def test_every_method_changes_the_weights_in_its_own_way(made):
    shards = {
        entry["name"]: tuple(
            sha256 for path, sha256 in digests(made[1] / entry["name"]).items() if path.startswith("model-")
        )
        for entry in merges()
    }
    by_content: dict[tuple[str, ...], set[str]] = {}
    for name, content in shards.items():
        by_content.setdefault(content, set()).add(name)
    assert sorted(sorted(names) for names in by_content.values() if len(names) > 1) == SAME


def test_every_merge_is_verified_against_its_factors(made):
    checked = verify(str(made[1]), cache_dir=made[1].parent / "cache")
    assert len(checked) == len(list(merges()))
    assert max(merge.worst for merge in checked) <= 1
    assert all(merge.probed for merge in checked)
