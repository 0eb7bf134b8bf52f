import pytest

from ray_merge.errors import RecipeError
from ray_merge.recipe.read import read_recipe

RECIPE = {
    "base_model": "base",
    "output": "out/{date}",
    "adapters": {"a": "a"},
    "merges": [{"name": "m", "merge_method": "ties"}],
}


@pytest.fixture
def job_folder(tmp_path, monkeypatch):
    """Where the entrypoint of `ray job submit --working-dir` runs."""
    folder = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_what_is_given_takes_the_place_of_the_recipes_output():
    assert read_recipe(RECIPE, "elsewhere")[0].output == "elsewhere"
    assert read_recipe(RECIPE)[0].output == "out/{date}"


@pytest.mark.parametrize("output", [None, "there", "./there", "."])
def test_a_result_in_a_folder_that_the_cluster_throws_away_is_refused(job_folder, output):
    with pytest.raises(
        RecipeError, match=rf"^output: .* job, {job_folder}.*give a URL .* or an absolute path"
    ):
        read_recipe(RECIPE, output)


def test_so_is_a_store_there(job_folder):
    with pytest.raises(
        RecipeError, match=r"^store: state would lie in the working directory of this Ray job"
    ):
        read_recipe({**RECIPE, "output": "s3://bucket/out", "store": "state"})


def test_other_places_are_open_to_a_job_and_its_inputs_may_travel_with_it(job_folder, tmp_path):
    for output in ("s3://bucket/out", str(tmp_path / "out"), "../../../../out"):
        assert read_recipe(RECIPE, output)[0].base_model == "base"
