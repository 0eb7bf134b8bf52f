"""What a plan says of moments, and the models that cannot be cut: headers, and one input, come before any object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ray_merge
from ray_merge.errors import NotCuttable, RecipeError
from ray_merge.moments import calibrate
from ray_merge.plan.moments import plan_moments, tasks_with_data
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import open_store
from ray_merge.work.moments_file import MomentsFile
from stage_workers import inputs_by_hooks, make_model, recipe_for, write_tokens
from zoo import lora


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("gpt2", tmp_path_factory.mktemp("gpt2"))


def plan_of(base: Path, tmp_path: Path, targets: list[str], **more: Any) -> Any:
    memory = more.pop("memory_bytes", None)
    recipe = recipe_for(base, tmp_path, {"a": write_tokens(tmp_path / "a.jsonl", 0)}, targets, **more)
    checkpoint = read_checkpoint(open_store(recipe.base_model))
    tasks = tasks_with_data(recipe, ["a"], "the test")
    return plan_moments(recipe, checkpoint, tasks, {}, targets, memory_bytes=memory)


def test_sums_are_counted_by_inputs_whichever_way_the_weight_lies(gpt2, tmp_path):
    # c_proj of the MLP is stored (128, 32) and takes 128 inputs; c_fc is stored (32, 128) and takes 32.
    few = plan_of(gpt2, tmp_path, ["mlp.c_fc"], stages=1).peak_bytes
    assert plan_of(gpt2, tmp_path, ["mlp.c_proj"], stages=1).peak_bytes - few == 4 * 8 * (128**2 - 32**2)
    sketched = {"precision": "sketch", "sketch_rows": 4}
    small = plan_of(gpt2, tmp_path, ["mlp.c_proj"], stages=1, calibration=sketched).peak_bytes
    assert small - few == 4 * 8 * (2 * 4 * 128 - 32**2)


def test_without_a_ceiling_stages_have_equal_work_and_with_one_equal_bytes(gpt2, tmp_path):
    even = plan_of(gpt2, tmp_path, ["c_attn"], stages=2)
    assert even.stages == ((0, 2), (2, 4))
    tight = plan_of(gpt2, tmp_path, ["c_attn"], memory_bytes=even.peak_bytes - 1)
    assert len(tight.stages) > 2
    assert tight.peak_bytes < even.peak_bytes


def test_a_plan_of_a_merge_by_moments_says_what_they_take_and_refuses_what_cannot_be_cut(gpt2, tmp_path):
    from transformers import AutoModelForCausalLM

    lora(AutoModelForCausalLM.from_pretrained(gpt2), tmp_path / "a", ["c_attn"], seed=1, fan_in_fan_out=True)
    recipe = {
        "base_model": str(gpt2),
        "output": str(tmp_path / "out"),
        "adapters": {"a": {"path": str(tmp_path / "a"), "data": str(write_tokens(tmp_path / "a.jsonl", 0))}},
        "merges": [{"name": "m", "merge_method": "regmean"}],
        "stages": 3,
    }
    (facts,) = ray_merge.plan(recipe).moments
    assert (facts.kind, facts.tasks, facts.parts, facts.stages) == ("gram", 1, 4, 3)
    with pytest.raises(RecipeError, match="stages: 9, but GPT2LMHeadModel has 4 blocks"):
        ray_merge.plan({**recipe, "stages": 9})
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its blocks share a table of relative positions, which stands outside of them."""
    from transformers import DebertaV2Config, DebertaV2Model

    folder = tmp_path_factory.mktemp("deberta")
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16,
    )  # fmt: skip
    DebertaV2Model(config).save_pretrained(folder)
    return folder


def test_a_model_that_cannot_be_cut_runs_as_one_stage_or_is_refused_where_more_were_asked_for(
    deberta, tmp_path
):
    recipe = recipe_for(
        deberta, tmp_path / "out", {"a": write_tokens(tmp_path / "a.jsonl", 0)}, ["query_proj", "dense"]
    )
    asked = replace_stages(recipe, 2)
    with pytest.raises(NotCuttable, match="stages: 1"):
        calibrate(asked, engine="local", workers=2, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    given = recipe.model_dump(exclude_none=True)
    result = calibrate(given, engine="local", workers=2, cache_dir=tmp_path / "cache")
    assert (result.stages, result.computed) == (1, 2)
    rows = inputs_by_hooks(recipe, "a")
    for site, info in result.index.objects["a"].items():
        moments = MomentsFile(Path(result.index.store) / info.path).moments(site)
        gram = rows[site].T @ rows[site]
        assert (moments.gram - gram).norm() <= 1e-6 * gram.norm(), site


def replace_stages(recipe: Any, stages: int) -> dict[str, Any]:
    return {**recipe.model_dump(exclude_none=True), "stages": stages}
