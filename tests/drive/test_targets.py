import re

import pytest

import ray_merge
from ray_merge.drive.outputs import Target
from ray_merge.drive.targets import complete_before, incomplete, is_complete
from ray_merge.errors import OutputConflict, Refusal
from ray_merge.storage.commit import MANIFEST, RECIPE, id_line, pretty_json
from ray_merge.storage.store import Stores, open_store
from tiny import write_recipe_files

ID, OTHER = "a" * 64, "b" * 64


def complete(root, merge_id=ID):
    open_store(str(root)).put_if_absent(RECIPE, id_line(merge_id).encode(), {})
    open_store(str(root)).put_if_absent(MANIFEST, pretty_json({"id": merge_id, "inputs": {}}), {})


def before(tmp_path, template="{date}", date="2026-03-01", **options):
    found = complete_before(str(tmp_path / template), "scale/lambda=0.2", ID, date, Stores(), **options)
    return None if found is None else found[1]


def test_the_latest_earlier_night_is_found_over_months(tmp_path):
    for day in ("2025-12-31", "2026-01-31"):
        complete(tmp_path / day / "scale/lambda=0.2")
    assert before(tmp_path) == str(tmp_path / "2026-01-31/scale/lambda=0.2")


@pytest.mark.parametrize("template", ["nightly-{date}", "{id}/{date}", "{date}/{id}"])
def test_the_date_may_stand_anywhere(tmp_path, template):
    folder = template.replace("{date}", "2026-02-28").replace("{id}", ID[:12])
    complete(tmp_path / folder / "scale/lambda=0.2")
    assert before(tmp_path, template) == str(tmp_path / folder / "scale/lambda=0.2")


def test_another_id_the_same_night_and_later_ones_do_not_count(tmp_path):
    complete(tmp_path / "2026-02-27/scale/lambda=0.2", OTHER)
    for day in ("2026-03-01", "2026-03-02"):
        complete(tmp_path / day / "scale/lambda=0.2")
    assert before(tmp_path) is None


def test_without_a_date_in_the_output_there_are_no_earlier_nights(tmp_path):
    complete(tmp_path / "out/scale/lambda=0.2")
    assert before(tmp_path, "out") is None


def test_a_damaged_manifest_of_an_earlier_night_is_passed_over(tmp_path):
    broken = tmp_path / "2026-02-28/scale/lambda=0.2" / MANIFEST
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    complete(tmp_path / "2026-02-27/scale/lambda=0.2")
    assert before(tmp_path) == str(tmp_path / "2026-02-27/scale/lambda=0.2")
    with pytest.raises(OutputConflict, match="not valid JSON"):
        is_complete(str(broken.parents[1]), ID, Stores())


def test_a_year_is_looked_through(tmp_path):
    complete(tmp_path / "2025-02-28/scale/lambda=0.2")
    assert before(tmp_path) == str(tmp_path / "2025-02-28/scale/lambda=0.2")


def test_a_day_that_is_known_is_looked_at_first_and_believed_only_when_it_is_true(tmp_path):
    complete(tmp_path / "2020-01-01/scale/lambda=0.2")
    assert before(tmp_path) is None
    assert before(tmp_path, known="2020-01-01") == str(tmp_path / "2020-01-01/scale/lambda=0.2")
    complete(tmp_path / "2026-01-01/scale/lambda=0.2")
    assert before(tmp_path, known="2020-01-02") == str(tmp_path / "2026-01-01/scale/lambda=0.2")


def test_a_manifest_is_looked_for_again_not_remembered(tmp_path):
    target = Target(
        root=str(tmp_path), url=str(tmp_path / "m"), merge_id=ID, inputs={}, complete=False, receipts={}
    )
    assert incomplete([target], Stores()) == [target]
    complete(tmp_path / "m")
    assert incomplete([target], Stores()) == []


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("{base}/out", "lies inside the base model"),
        ("out/{day}", "only {date} and {id} may stand in braces"),
        ("s3://key:word@bucket/out", "credentials do not belong into a URL"),
        ("", "is no URL and no path"),
    ],
)
def test_a_plan_refuses_an_output_whose_words_are_wrong(tmp_path, output, why):
    recipe = write_recipe_files(tmp_path)
    with pytest.raises(Refusal, match=re.escape(why)):
        ray_merge.plan(recipe, output=output.replace("{base}", recipe["base_model"]))
    assert ray_merge.plan(recipe, output="s3://nobody-asks-this-bucket/{date}").merges
