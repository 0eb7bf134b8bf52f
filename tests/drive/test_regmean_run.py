"""`run` with regmean: moments are made, stored, reused and verified; the result is that of merge_factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import ray_merge
from ray_merge.errors import RecipeError
from stage_workers import inputs_by_hooks, make_model, recipe_for, write_tokens
from zoo import lora

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.fixture(scope="module", params=TARGETS)
def inputs(request, tmp_path_factory) -> tuple[Path, dict[str, Path], list[str]]:
    """Base, two adapters with data of their own, and what they adapt; Conv1D weights lie (in, out)."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    base = make_model(request.param, folder / "base")
    for seed, name in enumerate("ab"):
        model = AutoModelForCausalLM.from_pretrained(base)
        lora(model, folder / name, TARGETS[request.param], seed=seed, fan_in_fan_out=request.param == "gpt2")
        write_tokens(folder / f"{name}.jsonl", seed)
    return folder, {name: folder / f"{name}.jsonl" for name in "ab"}, TARGETS[request.param]


def recipe_of(inputs: Any, output: Path, **merge: Any) -> dict[str, Any]:
    folder, data, targets = inputs
    recipe = recipe_for(folder / "base", output, data, targets).model_dump(exclude_none=True)
    del recipe["init"]
    for name in data:
        recipe["adapters"][name]["path"] = str(folder / name)
    return {**recipe, "merges": [{"name": "m", "merge_method": "regmean", **merge}]}


def factor_of(folder: Path, site: str, conv1d: bool) -> ray_merge.Factor:
    tensors = load_file(folder / "adapter_model.safetensors")
    B, A = (next(t for k, t in tensors.items() if f".{site}.lora_{side}." in k) for side in "BA")
    return ray_merge.Factor(B=A.T, A=B.T, scale=2.0) if conv1d else ray_merge.Factor(B=B, A=A, scale=2.0)


def test_a_run_by_moments_gives_what_merge_factors_gives_for_moments_of_hooks(inputs, tmp_path):
    folder, _, targets = inputs
    recipe = recipe_of(
        inputs, tmp_path / "out", parameters={"weight": {"a": 1.0, "b": 0.5}, "off_diagonal": 0.8}
    )
    result = ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache")
    assert [merge.done for merge in result.merges] == [True]
    conv1d = "c_attn" in targets
    parsed = recipe_for(
        folder / "base", tmp_path, {"a": folder / "a.jsonl", "b": folder / "b.jsonl"}, targets
    )
    rows = {name: inputs_by_hooks(parsed, name) for name in "ab"}
    shards = sorted((tmp_path / "out" / "m").glob("*.safetensors"))
    merged = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    before = load_file(folder / "base" / "model.safetensors")
    assert sorted(rows["a"]) == sorted(rows["b"])
    for site in rows["a"]:
        moments = [
            ray_merge.Moments(gram=x.T @ x, mean=x.mean(0), count=len(x))
            for x in (rows[name][site] for name in "ab")
        ]
        wanted = ray_merge.merge_factors(
            "regmean",
            [factor_of(folder / name, site, conv1d) for name in "ab"],
            moments=moments,
            input_side="rows" if conv1d else "columns",
            weight=[1.0, 0.5],
            off_diagonal=0.8,
        ).dense()
        tensor = f"{site}.weight"
        assert torch.allclose(
            merged[tensor] - before[tensor], wanted, atol=2e-6 * float(wanted.abs().max()) + 1e-7
        )
    (verified,) = ray_merge.verify(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    assert verified.probed
    assert not verified.unprobed


def test_the_id_follows_the_data_and_a_second_run_does_nothing(inputs, tmp_path):
    recipe = recipe_of(inputs, tmp_path / "out")
    first = ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache").merges[0]
    again = ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache").merges[0]
    assert (again.id, again.done) == (first.id, False)
    write_tokens(tmp_path / "other.jsonl", 11)
    recipe["adapters"]["a"]["data"] = str(tmp_path / "other.jsonl")
    other = ray_merge.run(
        {**recipe, "output": str(tmp_path / "out2")}, engine="local", cache_dir=tmp_path / "cache"
    )
    assert other.merges[0].id != first.id


def test_moments_that_hold_more_serve_a_run_and_its_verification(inputs, tmp_path):
    _, _, targets = inputs
    recipe = recipe_of(inputs, tmp_path / "out", adapters=["a", "b"])
    recipe["init"] = {
        "method": "osrm", "target_modules": [*targets, "mlp.c_fc" if "c_attn" in targets else "k_proj"],
        "output": str(tmp_path / "init"),
    }  # fmt: skip
    # Another task of the recipe, which the merge does not use and nobody can load.
    recipe["adapters"]["c"] = {"path": str(tmp_path / "gone"), "data": recipe["adapters"]["a"]["data"]}
    without = {**recipe, "adapters": {name: recipe["adapters"][name] for name in "ab"}}
    ray_merge.calibrate(without, engine="local", cache_dir=tmp_path / "cache")
    before = moments_in(tmp_path / "out")
    ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache")
    assert moments_in(tmp_path / "out") == before
    resolved = yaml.safe_load((tmp_path / "out/m/ray_merge/recipe.yaml").read_text())
    assert (list(resolved["adapters"]), "init" in resolved) == (["a", "b"], False)
    (verified,) = ray_merge.verify(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    assert (verified.probed > 0, verified.unprobed) == (True, "")


def moments_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("moments/*"))


def test_a_merge_by_moments_of_a_task_without_data_is_refused_by_plan(inputs, tmp_path):
    recipe = recipe_of(inputs, tmp_path / "out")
    del recipe["adapters"]["b"]["data"]
    with pytest.raises(RecipeError, match=r"adapters\.b has no data, which merge 'm' by regmean needs"):
        ray_merge.plan(recipe)
    assert not (tmp_path / "out").exists()
