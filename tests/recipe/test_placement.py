import pytest

from ray_merge.errors import RecipeError
from ray_merge.recipe import Placement, load_recipe

RECIPE = {
    "base_model": "b",
    "output": "o",
    "adapters": {"a": "a"},
    "merges": [{"name": "m", "merge_method": "linear"}],
}


def placed(value):
    return load_recipe({**RECIPE, "placement": value})[0].placement


def test_the_short_form_names_the_mode():
    assert placed("one_per_node") == Placement(mode="one_per_node")
    assert placed({"labels": {"ray.io/accelerator-type": "H100"}}).mode == "spread"
    assert load_recipe(RECIPE)[0].placement == Placement()


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("packed", "one_per_node"),
        ({"mod": "spread"}, "mode"),
        ({"labels": {"tier": "!big"}}, "placement.labels"),
        ({"labels": {"tier": "in(big, small)"}}, "placement.labels"),
        ({"labels": {"ti er": "big"}}, "placement.labels"),
        ({"labels": {"tier": 3}}, "placement.labels"),
        (["spread"], "placement"),
    ],
)
def test_what_no_node_could_be_asked_for_is_refused(value, part):
    with pytest.raises(RecipeError, match=part.replace(".", r"\.")):
        placed(value)
