import torch
import yaml

from ray_merge.drive.card import WARN_LOST_SHARE, model_card
from ray_merge.spec import SiteReport
from tiny import Q0, factors, plan_of, write_adapter, write_recipe_files


def report(site, lost):
    return SiteReport(site=site, tensor=f"{site}.weight", rank=2, update_norm=1.0, lost_share=lost)


def card(recipe, reports=()):
    plan = plan_of(recipe)
    merge = plan.merges[0]
    files = {"adapter_model.safetensors": "sha256:" + "d" * 64}
    inputs = {"adapters": [{"name": name, "files": files} for name in merge.adapters]}
    return model_card(plan, merge, "c" * 64, inputs, {"checkpoint": list(reports)}).decode()


def test_the_front_matter_is_yaml_that_the_hub_reads(tmp_path):
    text = card(write_recipe_files(tmp_path))
    _, front, _ = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "base",
        "library_name": "transformers",
        "tags": ["merge", "lora", "ray-merge"],
    }


def test_the_hub_name_that_every_adapter_gives_the_base_is_used(tmp_path):
    recipe = write_recipe_files(tmp_path)
    for name in recipe["adapters"]:
        write_adapter(tmp_path / name, factors(Q0), base_model_name_or_path="org/model-7b")
    assert yaml.safe_load(card(recipe).split("---\n")[1])["base_model"] == "org/model-7b"


def test_the_adapters_of_other_merges_do_not_change_the_card(tmp_path):
    recipe = write_recipe_files(tmp_path)
    write_adapter(tmp_path / "a", factors(Q0), base_model_name_or_path="org/model-7b")
    alone = {"name": "alone", "merge_method": "cat", "adapters": ["a"]}
    both = {"name": "both", "merge_method": "cat"}
    assert card(recipe | {"merges": [alone, both]}) == card(recipe | {"merges": [alone]})


def test_no_place_of_an_input_is_named(tmp_path):
    assert str(tmp_path) not in card(write_recipe_files(tmp_path))


def test_an_adapter_is_for_peft(tmp_path):
    recipe = write_recipe_files(tmp_path)
    recipe["merges"][0]["export"] = "adapter"
    assert "library_name: peft" in card(recipe)


def test_method_parameters_adapters_and_id_are_named(tmp_path):
    text = card(write_recipe_files(tmp_path))
    for part in ("# m\n", "`task_arithmetic`", "arXiv 2212.04089", "| lambda | `1.0` |", "| normalize | `False` |",
                 "| stored as | `as the base` |", "| a | `sha256:dddddddddddddddd` | 1 | 2 |", "c" * 64):  # fmt: skip
        assert part in text


def test_ranks_that_differ_are_shown_as_a_span(tmp_path):
    recipe = write_recipe_files(tmp_path)
    other = "model.layers.0.self_attn.v_proj"
    write_adapter(tmp_path / "a", factors(Q0) | factors(other, rank=4), rank_pattern={"v_proj": 4})
    assert "| 2 | 2 to 4 |" in card(recipe)


def test_a_filter_with_a_bar_does_not_break_the_table(tmp_path):
    recipe = write_recipe_files(tmp_path)
    recipe["merges"][0]["parameters"] = {"lambda": [{"filter": "q_proj|v_proj", "value": 2}]}
    (row,) = [line for line in card(recipe).splitlines() if line.startswith("| lambda ")]
    assert row.replace("\\|", "").count("|") == 3


def test_a_large_rounding_loss_is_said_with_what_to_do(tmp_path):
    recipe = write_recipe_files(tmp_path)
    small = card(recipe, [report("x", 0.01), report("y", WARN_LOST_SHARE)])
    assert "at most 5.00% of an update (at `y`)." in small
    assert "out_dtype: float32" not in small
    assert "Use `out_dtype: float32` or `export: adapter`" in card(
        recipe, [report("x", 0.16), report("y", 0.0)]
    )


def test_no_rounding_is_mentioned_where_nothing_was_rounded(tmp_path):
    assert "Rounding" not in card(write_recipe_files(tmp_path))


def test_the_card_is_the_same_each_time(tmp_path):
    recipe = write_recipe_files(tmp_path)
    assert card(recipe, [report("x", 0.01)]) == card(recipe, [report("x", 0.01)])


def test_an_adapter_of_saved_modules_alone_has_no_rank(tmp_path):
    recipe = write_recipe_files(tmp_path)
    head = {"base_model.model.score.weight": torch.ones(3, 8)}
    write_adapter(tmp_path / "a", head, modules_to_save=["score"])
    assert "| a | `sha256:dddddddddddddddd` | 0 |  | `heads/a.safetensors` |" in card(recipe)
