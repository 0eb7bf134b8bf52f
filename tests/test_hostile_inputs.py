"""Whole runs on hostile inputs: nothing is written outside of the output, no code of a model runs, nothing is read
without a limit. (What single files may hold is in tests/storage and tests/recipe; random damage in tests/fuzz.)"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import ray_merge
from ray_merge.recipe.source import MAX_RECIPE_BYTES
from ray_merge.storage import checkpoint
from zoo import digests, llama_adapters, tiny_llama


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base", layers=2)
    llama_adapters(folder / "base", folder / "adapters", 2)
    return folder


@pytest.fixture
def home(inputs, tmp_path) -> Path:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


def run(home: Path, **changes):
    document = {
        "base_model": str(home / "base"),
        "output": str(home / "out"),
        "adapters": {name: str(home / "adapters" / name) for name in ("a0", "a1")},
        "merges": [{"name": "m", "merge_method": "task_arithmetic", "export": "both"}],
        **changes,
    }
    return ray_merge.run(document, engine="local", cache_dir=home / "cache")


def refused(home: Path, words: str, **changes) -> None:
    with pytest.raises(ray_merge.Refusal, match=words):
        run(home, **changes)
    assert list((home / "elsewhere").rglob("*")) == []
    assert [path for path in (home / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("link", ["m", "m/ray_merge"])
def test_a_link_in_the_output_does_not_lead_a_merge_out_of_it(home, link):
    (home / "out" / link).parent.mkdir(exist_ok=True)
    (home / "out" / link).symlink_to(home / "elsewhere")
    refused(home, "leads out of")


@pytest.mark.parametrize("link", ["m/adapter", "m/ray_merge/receipts"])
def test_a_link_that_is_met_later_stops_the_run_and_nothing_is_written_behind_it(home, link):
    (home / "out" / link).parent.mkdir(parents=True)
    (home / "out" / link).symlink_to(home / "elsewhere")
    with pytest.raises(ray_merge.RunFailed, match="leads out of"):
        run(home)
    assert list((home / "elsewhere").rglob("*")) == []
    assert not (home / "out" / "m" / "ray_merge" / "MANIFEST.json").exists()


def test_an_output_that_is_itself_a_link_is_where_it_leads(home):
    (home / "link").symlink_to(home / "elsewhere")
    run(home, output=str(home / "link"))
    assert (home / "elsewhere" / "m" / "ray_merge" / "MANIFEST.json").exists()


@pytest.mark.parametrize("name", ["../m", "/m", "a/../../m", "..", ".", "a/b", "m\n", "m\0", "..\\m"])
def test_a_name_cannot_lead_out_of_the_output(home, name):
    refused(home, "name", merges=[{"name": name, "merge_method": "task_arithmetic"}])
    adapters = {name: str(home / "adapters" / "a0"), "a1": str(home / "adapters" / "a1")}
    refused(home, "name", adapters=adapters)


@pytest.mark.parametrize("value", ["../../../elsewhere/x", "a/b", "/etc/passwd"])
def test_a_value_of_a_sweep_cannot_lead_out_of_the_output(home, value):
    merge = {"name": "m", "merge_method": "ties", "sweep": {"space": [value]}}
    refused(home, "space", merges=[merge])


@pytest.mark.parametrize(
    "output", ["{date}/../../elsewhere", "{id}/../elsewhere", "../elsewhere/{date.__class__}"]
)
def test_what_stands_in_braces_is_filled_in_and_nothing_else(home, output):
    where = f"{home}/out/{output}"
    if "__class__" in output:
        refused(home, "only .* may stand in braces", output=where)
    else:  # whoever writes the recipe says where the output is, and nothing else decides it
        (result,) = run(home, output=where).merges
        assert Path(result.url) == home / "elsewhere" / "m" or Path(result.url).is_relative_to(home)


@pytest.mark.parametrize(
    "file", ["../evil.safetensors", "/elsewhere/x.safetensors", "..", "a/../../x.safetensors"]
)
def test_a_weight_map_cannot_lead_out_of_the_base_or_of_the_output(home, file):
    tensors = load_file(home / "base" / "model.safetensors")
    (home / "base" / "model.safetensors").unlink()
    save_file(tensors, home / "base" / "part.safetensors", metadata={"format": "pt"})
    save_file(tensors, home / "evil.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, file)}
    (home / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(home, "not a plain file name")


EVIL = """
import pathlib
pathlib.Path(MARK).write_text("was run")
from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel
from transformers import PreTrainedTokenizerFast as EvilTokenizer
"""


@pytest.fixture
def evil(home, monkeypatch) -> Path:
    """Code beside the model, and a library on the path, that leave a mark when they are imported."""
    code = EVIL.replace("MARK", repr(str(home / "mark")))
    for module in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (home / "base" / f"{module}.py").write_text(code)
    (home / "site").mkdir()
    (home / "site" / "evil_library.py").write_text(code)
    monkeypatch.syspath_prepend(str(home / "site"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(home / "modules"))
    auto = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModel": "modeling_evil.EvilModel",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
        "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
    }
    for name in ("config.json", "tokenizer_config.json"):
        path = home / "base" / name
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "auto_map": auto, "trust_remote_code": True})
        )
    yield home
    assert not (home / "mark").exists()
    assert "evil_library" not in sys.modules


def with_data(home: Path, **row) -> dict:
    (home / "data.jsonl").write_text((json.dumps(row) + "\n") * 4)
    adapters = {
        name: {"path": str(home / "adapters" / name), "data": str(home / "data.jsonl")}
        for name in ("a0", "a1")
    }
    return {"adapters": adapters, "merges": [{"name": "m", "merge_method": "regmean"}]}


def test_the_code_of_a_model_is_not_run_and_its_weights_are_merged(evil):
    run(evil)
    run(evil, output=str(evil / "other"), **with_data(evil, input_ids=[1, 2, 3, 4]))
    assert (evil / "other" / "m" / "ray_merge" / "MANIFEST.json").exists()


def test_the_code_of_a_tokenizer_is_refused(evil):
    refused(evil, "tokenizer", **with_data(evil, text="a b c"))


def test_a_library_that_an_adapter_names_is_not_imported(evil):
    path = evil / "adapters" / "a0" / "adapter_config.json"
    mapping = {"base_model_class": "EvilModel", "parent_library": "evil_library"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": mapping, "task_type": None}))
    run(evil)
    refused_or_done = with_data(evil, input_ids=[1, 2, 3, 4])
    with suppress(ray_merge.Refusal):
        run(evil, output=str(evil / "other"), **refused_or_done)


def test_a_pickle_is_not_opened_unless_asked_for(home):
    path = home / "adapters" / "a0" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    refused(home, "allow_pickle: true")


def test_a_recipe_by_url_that_is_far_too_long_is_not_read(tmp_path):
    with (tmp_path / "recipe.yaml").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file of 1 TiB: reading it would end this process
    with pytest.raises(ray_merge.Refusal, match=f"more than {MAX_RECIPE_BYTES}: not a recipe"):
        ray_merge.plan(f"file://{tmp_path}/recipe.yaml")


def test_a_base_of_far_more_tensors_than_any_model_is_refused(home, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 10)
    refused(home, "more than 10 tensors")


def test_the_inputs_are_as_they_were(home):
    before = digests(home / "base"), digests(home / "adapters")
    run(home)
    assert (digests(home / "base"), digests(home / "adapters")) == before


def test_a_recipe_of_a_hostile_yaml_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base_model: !!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(ray_merge.Refusal):
        ray_merge.plan(path)
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(path.read_text())
    assert not mark.exists()
