from dataclasses import replace

import pytest

from ray_merge.errors import AdapterError
from ray_merge.fit import check_bases
from tiny import Q0, V1, factors, plan_of, write_adapter, write_recipe_files


@pytest.fixture
def recipe(tmp_path):
    return write_recipe_files(tmp_path)


def named(tmp_path, **names):
    for index, (adapter, name) in enumerate(names.items()):
        write_adapter(tmp_path / adapter, factors((Q0, V1)[index]), base_model_name_or_path=name)


def test_adapters_of_two_hub_models_are_refused_unless_they_are_declared_equal(recipe, tmp_path):
    named(tmp_path, a="org/one", b="org/two")
    with pytest.raises(AdapterError, match="adapter a was trained on org/one, adapter b on org/two"):
        plan_of(recipe)
    assert plan_of({**recipe, "base_model_names": ["Org/One", "org/two"]}).warnings == ()


def test_an_unproven_base_is_a_warning(recipe, tmp_path):
    named(tmp_path, a="org/one", b="org/one")
    (warning,) = plan_of(recipe).warnings
    assert "org/one" in warning
    assert "base_model_names" in warning
    named(tmp_path, a="org/base", b="/elsewhere/base")
    assert plan_of(recipe).warnings == ()


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("org/model", "fine"),
        ("Org/Model", "fine"),
        ("org/other", "refused"),
        ("/mnt/other", "warned"),
        ("/mnt/model", "fine"),
    ],
)
def test_a_hub_base_is_compared_with_what_the_adapter_says(recipe, name, verdict):
    plan = plan_of(recipe)
    adapters = {
        key: replace(adapter, config={"base_model_name_or_path": name})
        for key, adapter in plan.adapters.items()
    }
    hub = plan.recipe.model_copy(update={"base_model": "hf://org/model@main"})
    if verdict == "refused":
        with pytest.raises(AdapterError, match="trained on org/other, the recipe's base is org/model"):
            check_bases(hub, adapters)
    else:
        assert bool(check_bases(hub, adapters)) == (verdict == "warned")
