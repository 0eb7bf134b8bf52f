import json

import pytest
import torch
from peft import LoraConfig

from ray_merge.drive.exported_config import exported_config, target_modules
from ray_merge.spec import SiteReport
from ray_merge.storage.adapter_config import read_settings
from tiny import Q0, V1, factors, llama_tensors, plan_of, write_adapter, write_base, write_recipe_files


def reports(**ranks):
    names = {"q": Q0, "v": V1}
    return {
        names[key]: SiteReport(
            site=names[key], tensor=f"{names[key]}.weight", rank=rank, update_norm=1.0, lost_share=0.0
        )
        for key, rank in ranks.items()
    }


def _first(recipe):
    plan = plan_of(recipe)
    return plan, plan.merges[0]


def config_of(tmp_path, ranks, **adapter):
    recipe = write_recipe_files(tmp_path)
    write_adapter(tmp_path / "a", factors(Q0), **adapter)
    recipe["merges"][0]["export"] = "adapter"
    plan = plan_of(recipe)
    return exported_config(plan, plan.merges[0], reports(**ranks))


def test_the_scale_is_one_everywhere_whatever_the_ranks(tmp_path):
    for ranks in ({"q": 4, "v": 4}, {"q": 4, "v": 2}, {"q": 1}):
        scaling = read_settings(config_of(tmp_path, ranks), "x").scaling
        for site, report in reports(**ranks).items():
            assert scaling.rank_of(site) == report.rank
            assert scaling.scale_of(site, report.rank) == 1.0


def test_settings_of_the_inputs_do_not_leak(tmp_path):
    config = config_of(
        tmp_path, {"q": 4}, use_rslora=True, alpha_pattern={"q_proj": 4}, lora_dropout=0.5, modules_to_save=[]
    )
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    assert (config["lora_dropout"], config["modules_to_save"], config["task_type"]) == (
        0.0,
        None,
        "CAUSAL_LM",
    )


def test_peft_reads_it_without_a_warning(tmp_path, recwarn):
    config = config_of(tmp_path, {"q": 4, "v": 2})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = LoraConfig.from_pretrained(tmp_path)
    assert loaded.r == loaded.lora_alpha
    assert loaded.rank_pattern == loaded.alpha_pattern == config["rank_pattern"]
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("org/one", "org/one"), "org/one"), (("", ""), None), (("/x/base", "/y/base"), None)],
)
def test_the_base_is_the_one_that_all_inputs_name_and_never_a_place_that_the_id_does_not_know(
    tmp_path, names, expected
):
    recipe = write_recipe_files(tmp_path)
    for adapter, module, name in zip("ab", (Q0, V1), names, strict=True):
        write_adapter(tmp_path / adapter, factors(module), base_model_name_or_path=name)
    plan = plan_of(recipe)
    found = exported_config(plan, plan.merges[0], reports(q=2))["base_model_name_or_path"]
    assert found == expected


def test_short_names_are_used_where_they_mean_these_sites_only(tmp_path):
    plan = plan_of(write_recipe_files(tmp_path))
    # Layer 1 has a q_proj too, which is not adapted.
    assert target_modules(plan, plan.merges[0], {Q0: Q0}) == [Q0]
    every = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    write_adapter(tmp_path / "a", factors(every[0]) | factors(every[1]))
    plan = plan_of(write_recipe_files(tmp_path) | {"adapters": {"a": str(tmp_path / "a")}})
    write_adapter(tmp_path / "a", factors(every[0]) | factors(every[1]))
    recipe = {"base_model": str(tmp_path / "base"), "output": "/o", "adapters": {"a": str(tmp_path / "a")},
              "merges": [{"name": "m", "merge_method": "cat"}]}  # fmt: skip
    assert target_modules(*_first(recipe), {site: site for site in every}) == ["q_proj"]


def test_the_name_of_a_layer_of_a_head_is_not_used_short(tmp_path):
    base = {"encoder.layer.0.output.dense.weight": torch.ones(8, 8)}
    write_base(tmp_path / "base", base, {"model_type": "roberta"})
    head = {"base_model.model.classifier.dense.weight": torch.ones(8, 8)}
    site = "encoder.layer.0.output.dense"
    write_adapter(tmp_path / "a", factors(site) | head, modules_to_save=["classifier"])
    recipe = {"base_model": str(tmp_path / "base"), "output": "/o", "adapters": {"a": str(tmp_path / "a")},
              "merges": [{"name": "m", "merge_method": "cat"}]}  # fmt: skip
    assert target_modules(*_first(recipe), {site: site}) == [site]


def test_names_that_differ_from_the_disk_are_written_whole_as_the_inputs_have_them(tmp_path):
    renamed = {"encoder.layer.0.query.weight": torch.ones(8, 8)}
    write_base(tmp_path / "base", renamed, {"model_type": "x"})
    module = "bert.encoder.layer.0.query"
    write_adapter(tmp_path / "a", factors(module))
    recipe = {"base_model": str(tmp_path / "base"), "output": "/o", "adapters": {"a": str(tmp_path / "a")},
              "merges": [{"name": "m", "merge_method": "cat", "export": "adapter"}]}  # fmt: skip
    plan, merge = _first(recipe)
    site = module.removeprefix("bert.")
    assert target_modules(plan, merge, {site: module}) == ["query"]
    assert target_modules(plan, merge, {site: "bert.encoder.layer.0.q"}) == ["bert.encoder.layer.0.q"]
    report = SiteReport(site=site, tensor=f"{site}.weight", rank=2, update_norm=1.0, lost_share=0.0)
    other = {**reports(), site: report}
    assert exported_config(plan, merge, other)["target_modules"] == ["query"]


def test_rank_patterns_name_runtime_modules(tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    recipe = write_recipe_files(tmp_path)
    write_base(tmp_path / "base", bare)
    recipe["merges"][0]["export"] = "adapter"
    plan = plan_of(recipe)
    made = {
        name.removeprefix("model."): SiteReport(
            site=name.removeprefix("model."), tensor="", rank=rank, update_norm=1.0, lost_share=0.0
        )
        for name, rank in ((Q0, 4), (V1, 2))
    }
    config = exported_config(plan, plan.merges[0], made)
    assert config["rank_pattern"] in ({Q0: 4}, {V1: 2})
    assert config["target_modules"] == sorted([Q0, V1])


@pytest.mark.parametrize(("transposed", "flag"), [(True, True), (False, False)])
def test_conv1d_layers_are_said_to_be_transposed(tmp_path, transposed, flag):
    shape = (8, 6) if transposed else (6, 8)
    write_base(tmp_path / "base", {"h.0.c_attn.weight": torch.ones(shape)}, {"model_type": "x"})
    write_adapter(tmp_path / "a", factors("h.0.c_attn", rows=6, columns=8))
    recipe = {"base_model": str(tmp_path / "base"), "output": "/o", "adapters": {"a": str(tmp_path / "a")},
              "merges": [{"name": "m", "merge_method": "cat", "export": "adapter"}]}  # fmt: skip
    plan, merge = _first(recipe)
    report = SiteReport(site="h.0.c_attn", tensor="", rank=2, update_norm=1.0, lost_share=0.0)
    assert exported_config(plan, merge, {"h.0.c_attn": report})["fan_in_fan_out"] is flag


def test_targets_come_in_one_order(tmp_path):
    assert llama_tensors().keys() >= {f"{Q0}.weight", f"{V1}.weight"}
    plan = plan_of(write_recipe_files(tmp_path))
    assert target_modules(plan, plan.merges[0], {V1: V1, Q0: Q0}) == sorted([V1, Q0])
