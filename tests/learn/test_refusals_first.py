"""What can be refused is refused before any group of merges learns or writes."""

import json
import uuid

import pytest
import torch
from safetensors.torch import load_file, save_file

import ray_merge
from fault_proxy import Reply, fault_proxy, nth
from lessons import lesson, make_school
from ray_merge.errors import RecipeError, Refusal, StoreDenied

PLAIN = {"steps": 1, "batch_size": 4}


@pytest.fixture
def school(tmp_path):
    return make_school(tmp_path)


def run(recipe, tmp_path, **more):
    return ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache", **more)


def _spoil(folder, name):
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"input_ids": [1, 4000]}) + "\n")


@pytest.mark.parametrize("other", [{"merge_method": "tara_a"}, {"merge_method": "regmean"}])
def test_bad_data_of_a_later_group(school, tmp_path, other):
    _spoil(school, "five")
    recipe = lesson(school, tmp_path / "out", "tara_a", ("two", "three", "five"), dtype="float32")
    first = {**recipe["merges"][0], **other, "adapters": ["two", "three"]}
    if other["merge_method"] == "tara_a":
        first["parameters"] = PLAIN
    last = {"merge_method": "tara_a", "adapters": ["two", "five"], "name": "n"}
    recipe["merges"] = [first, {**last, "parameters": {**PLAIN, "precision": "bfloat16"}}]
    with pytest.raises(Refusal, match="five") as caught:
        run(recipe, tmp_path)
    assert "4000" in str(caught.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_sites_that_no_prediction_depends_on_are_named_once(school, tmp_path):
    names = ("two", "three")
    for name in names:
        path = school / name / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file(
            {
                key: one * 0 if "layer.2" in key and "query.lora_B" in key else one
                for key, one in tensors.items()
            },
            path,
        )
    events = []
    recipe = lesson(school, tmp_path / "out", "adamerging", names, parameters={**PLAIN, "steps": 2})
    run(recipe, tmp_path, progress=events.append)
    (warning,) = [event.text for event in events if event.kind == "warning"]
    assert "at 1 of " in warning
    assert "the first is encoder.layer.2.attention.self.query:" in warning


def test_a_head_is_part_of_what_predicts_and_of_nothing_else(school, tmp_path):
    ids = []
    for number in range(2):
        head = school / f"head{number}.safetensors"
        save_file({"rows": torch.full((2, 16), float(number + 1))}, head)
        recipe = lesson(school, tmp_path / f"out{number}", "nsc", ("two", "three"), parameters={"steps": 0})
        recipe["adapters"]["two"]["head"] = str(head)
        ids.append(run(recipe, tmp_path).merges[0].id)
    assert ids[0] == ids[1]
    recipe["adapters"]["two"]["head"] = str(tmp_path / "gone.safetensors")
    assert run(recipe, tmp_path).merges[0].id == ids[0]
    recipe["adapters"]["two"]["head"] = ""
    with pytest.raises(RecipeError, match=r"adapters\.two\.head"):
        run(recipe, tmp_path)


@pytest.mark.s3
def test_an_output_that_takes_nothing(s3, school, tmp_path, monkeypatch):
    with fault_proxy(s3.endpoint, nth(Reply(403, "AccessDenied"), "PUT", "put-once")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        output = f"{s3.url}/unfit-{uuid.uuid4().hex[:8]}"
        recipe = lesson(school, output, "tara_a", ("two", "three"), parameters=PLAIN)
        recipe["output"] = output
        with pytest.raises(StoreDenied, match="put-once"):
            run(recipe, tmp_path)
        assert proxy.count("PUT") == proxy.count("PUT", "put-once") == 1
