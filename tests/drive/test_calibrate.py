"""`calibrate`: what is computed, reused and refused; one process, tiny models."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_merge.errors import RayMergeError, Refusal, RunFailed
from ray_merge.moments import calibrate
from ray_merge.work.moments_file import MomentsFile
from stage_workers import inputs_by_hooks, make_model, recipe_for, write_pixels, write_tokens

LORA_TARGETS = ["query", "value"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def recipe(bert: Path, tmp_path: Path) -> dict[str, Any]:
    data = {name: write_tokens(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate("ab")}
    return recipe_for(bert, tmp_path / "out", data, LORA_TARGETS).model_dump(exclude_none=True)


def moments_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("moments/*.safetensors"))}


def run(recipe: dict[str, Any], tmp_path: Path, **more: Any) -> Any:
    return calibrate(recipe, engine="local", cache_dir=tmp_path / "cache", **more)


def test_bytes_do_not_depend_on_stages_or_threads_and_a_later_task_only_adds_objects(recipe, tmp_path):
    first = run({**recipe, "stages": 1}, tmp_path)
    assert (first.computed, first.units_run) == (2 * 4, 2)
    once = moments_files(tmp_path / "out")
    other = run({**recipe, "stages": 4, "output": str(tmp_path / "other")}, tmp_path, workers=4)
    assert (other.computed, other.units_run) == (2 * 4, 2 * 4)
    assert moments_files(tmp_path / "other") == once
    recipe["adapters"]["c"] = {"data": str(write_tokens(tmp_path / "c.jsonl", 7))}
    more = run({**recipe, "stages": 3}, tmp_path)
    assert (more.computed, more.reused, more.units_run) == (4, 8, 3)
    assert {name: moments_files(tmp_path / "out")[name] for name in once} == once


def test_what_is_missing_in_the_middle_is_computed_again_and_no_more(recipe, tmp_path):
    run({**recipe, "stages": 4}, tmp_path)
    whole = moments_files(tmp_path / "out")
    for name in list(whole)[1::3]:
        next((tmp_path / "out").rglob(name)).unlink()
    again = run({**recipe, "stages": 4}, tmp_path)
    assert again.computed == len(list(whole)[1::3])
    assert moments_files(tmp_path / "out") == whole


def test_sites_that_share_their_input_share_one_entry(recipe, tmp_path):
    result = run(recipe, tmp_path)
    file = MomentsFile(Path(result.index.store) / next(iter(result.index.objects["a"].values())).path)
    query, value = sorted(file.leaders)
    assert file.leaders[value] == file.leaders[query] == query
    assert torch.equal(file.moments(query).gram, file.moments(value).gram)
    file.close()


def test_a_sketch_takes_the_place_of_wide_grams_and_keeps_its_bound(recipe, tmp_path):
    recipe["calibration"] |= {"precision": "sketch", "sketch_rows": 8}
    result = run(recipe, tmp_path)
    rows = inputs_by_hooks(recipe_model(recipe), "a")
    for site, info in result.index.objects["a"].items():
        found = MomentsFile(Path(result.index.store) / info.path).moments(site)
        gap = rows[site].T @ rows[site] - found.sketch.T @ found.sketch
        values = torch.linalg.eigvalsh(gap)
        assert found.sketch.shape[0] <= 8
        assert -1e-6 * values[-1] <= values[0]
        assert 0 < values[-1] <= found.shrinkage * (1 + 1e-9)


def watching(recipe: dict[str, Any], *targets: str, **more: Any) -> dict[str, Any]:
    """The recipe with other modules to watch."""
    return {**recipe, "init": {**recipe["init"], "target_modules": list(targets)}, **more}


def statistics_at(result: Any, task: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """Site -> what is stored of it, whichever object holds it."""
    found = {}
    for site, info in result.index.objects[task].items():
        one = MomentsFile(Path(result.index.store) / info.path).moments(site)
        found[site] = (one.mean, one.gram if hasattr(one, "gram") else one.sketch)
    return found


@pytest.mark.parametrize("precision", ["full", "sketch"])
def test_other_modules_add_objects_and_a_site_has_the_same_bytes_whatever_else_is_watched(
    precision, recipe, tmp_path
):
    recipe["calibration"] |= {"precision": precision, "sketch_rows": 8}
    both = run(watching(recipe, "query", "value", output=str(tmp_path / "both")), tmp_path)
    first = run(watching(recipe, "query", stages=2), tmp_path)
    before = moments_files(tmp_path / "out")
    added = run(watching(recipe, "query", "value", stages=3), tmp_path)
    after = moments_files(tmp_path / "out")
    assert (first.computed, added.computed) == (8, 8)
    assert {name: after[name] for name in before} == before
    assert {f"{one}.safetensors" for one in added.ids.values()} == set(after) - set(before)
    for one in added.ids.values():  # of what was missing, and no more
        assert all(
            "value" in site
            for site in MomentsFile(Path(added.index.store) / f"moments/{one}.safetensors").leaders
        )
    for task in "ab":
        found, wanted = statistics_at(added, task), statistics_at(both, task)
        assert list(found) == list(wanted)
        for site in wanted:
            assert all(map(torch.equal, found[site], wanted[site])), site
    again = run(watching(recipe, "value", "query"), tmp_path)
    assert (again.computed, again.reused, again.units_run) == (0, 8, 0)
    # Sites of objects that hold more.
    less = run(watching(recipe, "value", output=str(tmp_path / "both")), tmp_path)
    assert (less.computed, less.ids) == (0, both.ids)


def test_rows_of_a_sketch_are_no_part_of_whole_grams(recipe, tmp_path):
    run(recipe, tmp_path)
    recipe["calibration"]["sketch_rows"] = 7
    assert run(recipe, tmp_path).computed == 0


def test_a_damaged_object_is_named_where_it_is_in_the_way_and_nowhere_else(recipe, tmp_path):
    first = run(watching(recipe, "query", "value"), tmp_path)
    (task, part), one = next(iter(first.ids.items()))
    path = Path(first.index.store) / f"moments/{one}.safetensors"
    whole = path.read_bytes()
    for left in (b"", whole[:100]):
        path.write_bytes(left)
        # Other sites of that part: the damaged object holds none.
        store = tmp_path / f"store-{len(left)}"
        shutil.copytree(first.index.store, store)
        other = run(watching(recipe, "query", store=str(store)), tmp_path)
        assert (other.computed, next(iter(other.ids))) == (1, (task, part))
    path.write_bytes(b"")
    with pytest.raises(RunFailed, match=f"{path} is damaged; remove it"):
        run(watching(recipe, "query", "value"), tmp_path)
    path.unlink()
    assert run(watching(recipe, "query", "value"), tmp_path).computed == 1
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-8])
    with pytest.raises(RunFailed, match=f"{one}.*remove it"):
        MomentsFile(path)


def recipe_model(recipe: dict[str, Any]) -> Any:
    from ray_merge.recipe import Recipe

    return Recipe.model_validate(recipe)


def peft_adapter(bert: Path, folder: Path) -> Path:
    """A trained-looking adapter of the tiny base, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(3)
    model = get_peft_model(
        AutoModel.from_pretrained(bert),
        LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS, use_dora=True),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2) if "magnitude" not in name else parameter.data.mul_(1.3)
    model.save_pretrained(folder)
    return folder


def test_with_adapter_features_the_inputs_are_those_of_the_model_with_its_own_adapter(bert, recipe, tmp_path):
    # DoRA: it is no product of factors, so only dense altered weights can be right.
    from peft import PeftModel
    from transformers import AutoModel

    folder = peft_adapter(bert, tmp_path / "lora")
    recipe["calibration"]["features"] = "adapter"
    recipe["adapters"] = {"a": {**recipe["adapters"]["a"], "path": str(folder)}}
    result = run({**recipe, "stages": 2}, tmp_path)
    merged = PeftModel.from_pretrained(AutoModel.from_pretrained(bert), folder).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    rows = inputs_by_hooks(recipe_model({**recipe, "base_model": str(tmp_path / "merged")}), "a")
    plain = inputs_by_hooks(recipe_model(recipe), "a")
    for site, info in result.index.objects["a"].items():
        moments = MomentsFile(Path(result.index.store) / info.path).moments(site)
        gram = rows[site].T @ rows[site]
        assert (moments.gram - gram).norm() <= 1e-5 * gram.norm(), site
    last = max(rows)
    assert (plain[last].T @ plain[last] - gram).norm() > 1e-2 * gram.norm()


def no_data(recipe: dict[str, Any], _: Path) -> None:
    recipe["adapters"] = {"a": {"path": "x"}, "b": {"path": "y"}}


def long_rows(recipe: dict[str, Any], folder: Path) -> None:
    rewrite(recipe, folder, json.dumps({"input_ids": [1] * 90}) + "\n")
    recipe["calibration"]["max_length"] = 90


def no_file(recipe: dict[str, Any], folder: Path) -> None:
    recipe["adapters"]["a"]["data"] = str(folder / "nowhere.jsonl")


def images(recipe: dict[str, Any], folder: Path) -> None:
    recipe["adapters"]["a"]["data"] = str(write_pixels(folder / "images.jsonl", 0))


REFUSED = {
    "no task has data": (no_data, "no adapter of the recipe has data"),
    "empty data": (lambda r, f: rewrite(r, f, ""), "adapters.a.data"),
    "missing column": (lambda r, f: rewrite(r, f, '{"sentence": "x"}\n'), "sentence"),
    "no tokenizer": (lambda r, f: rewrite(r, f, '{"text": "some words"}\n'), "tokenizer"),
    "ids out of range": (lambda r, f: rewrite(r, f, '{"input_ids": [1, 2, 4000]}\n'), "4000"),
    "longer than the model": (long_rows, "66"),
    "a file that is not there": (no_file, "nowhere.jsonl"),
    "target that names nothing": (lambda r, _: r["init"].update(target_modules=["q_proj"]), "query"),
    "more stages than blocks": (lambda r, _: r.update(stages=9), "4 blocks"),
    "own features without a path": (
        lambda r, _: r["calibration"].update(features="adapter"),
        "features: base",
    ),
    "images for a language model": (images, "pixel_values"),
}


def rewrite(recipe: dict[str, Any], folder: Path, text: str) -> None:
    (folder / "bad.jsonl").write_text(text)
    recipe["adapters"]["a"]["data"] = str(folder / "bad.jsonl")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_before_anything_is_written(case, recipe, tmp_path):
    change, words = REFUSED[case]
    change(recipe, tmp_path)
    with pytest.raises(RayMergeError) as caught:
        run(recipe, tmp_path)
    assert isinstance(caught.value, Refusal), caught.value
    assert words in str(caught.value)
    assert not moments_files(tmp_path)


def test_a_ceiling_that_no_stage_can_keep_is_refused(recipe, tmp_path):
    with pytest.raises(Refusal, match="--memory"):
        run(recipe, tmp_path, memory="100MB")


@pytest.mark.s3
def test_moments_in_an_s3_store_serve_another_machine(recipe, tmp_path, s3):
    url = f"{s3.url}/state-{uuid.uuid4().hex[:8]}"
    first = run({**recipe, "store": url}, tmp_path)
    again = run({**recipe, "store": url, "output": str(tmp_path / "elsewhere")}, tmp_path / "second")
    assert (first.computed, again.computed, again.reused) == (8, 0, 8)
