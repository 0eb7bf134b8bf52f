import re

import pytest

from ray_merge.errors import CheckpointError
from tiny import plan_of, write_recipe_files


def test_an_adapter_that_is_not_there_is_named_with_a_way_out(tmp_path):
    recipe = write_recipe_files(tmp_path)
    recipe["adapters"]["b"] = str(tmp_path / "nowhere")
    config = re.escape(f"{tmp_path}/nowhere/adapter_config.json")
    with pytest.raises(
        CheckpointError, match=rf"^adapter b: {config} does not exist; give the folder that PEFT saved$"
    ):
        plan_of(recipe)


def test_a_file_in_place_of_a_folder_and_an_adapter_in_place_of_a_base_are_told_as_such(tmp_path):
    recipe = write_recipe_files(tmp_path)
    weights = tmp_path / "b/adapter_model.safetensors"
    with pytest.raises(
        CheckpointError, match=rf"^adapter b: {weights} is a file; give the folder that PEFT saved$"
    ):
        plan_of({**recipe, "adapters": {"a": recipe["adapters"]["a"], "b": str(weights)}})
    with pytest.raises(
        CheckpointError, match=rf"^base_model: {weights} is a file; give the folder of the model$"
    ):
        plan_of({**recipe, "base_model": str(weights)})
    with pytest.raises(
        CheckpointError, match=r"^base_model: .*/b/config.json does not exist: that is an adapter; give"
    ):
        plan_of({**recipe, "base_model": str(tmp_path / "b")})
