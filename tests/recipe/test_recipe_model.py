import os
from pathlib import Path

import numpy as np
import pytest

from ray_merge.errors import RecipeError
from ray_merge.recipe import load_recipe, parse_size, require_merges

RECIPE = """\
base_model: /models/base
output: /out
adapters:
  a: /adapters/a
  b:
    path: /adapters/b
    data: /data/b.parquet
merges:
  - name: m
    merge_method: task_arithmetic
"""


def load(text):
    return load_recipe("r.yaml", text)[0]


def refusal(text):
    with pytest.raises(RecipeError) as caught:
        load(text)
    return str(caught.value)


def test_both_forms_of_an_adapter_and_of_its_data_are_read():
    recipe = load(RECIPE)
    assert recipe.adapters["a"].path == "/adapters/a"
    assert recipe.adapters["b"].path == "/adapters/b"
    assert recipe.adapters["b"].data.path == "/data/b.parquet"
    assert list(recipe.adapters) == ["a", "b"]


def test_the_defaults_are_those_of_the_documentation():
    recipe = load(RECIPE)
    assert (recipe.dtype, recipe.out_dtype, recipe.max_shard_size) == ("float32", None, 10**9)
    merge = recipe.merges[0]
    assert (merge.export, merge.seed, merge.parameters, merge.adapters) == ("checkpoint", 0, {}, None)
    assert (merge.export_rank, merge.export_tolerance) == (None, None)
    assert (recipe.tied, recipe.base_numerics, recipe.key_mapping) == ("refuse", "reject", {})
    adapter = recipe.adapters["a"]
    assert (adapter.initial, adapter.allow_pickle, adapter.key_mapping, adapter.moe_lora_b_layout) == (
        None, False, {}, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "empty", ["parameters:", "parameters: null", "parameters: {}", "sweep:", "adapters:"]
)
def test_an_optional_key_with_nothing_behind_it_counts_as_not_given(empty):
    assert load(f"{RECIPE}    {empty}\n") == load(RECIPE)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("output:", "outptu:", 2, "unknown key 'outptu'; did you mean 'output'?"),
        ("    path:", "    pth:", 6, "unknown key 'pth'; did you mean 'path'?"),
        ("    data: /data/b.parquet", "    data: {path: /d, txt: [x]}", 7, "'txt'; did you mean 'text'?"),
        ("  b:\n    path: /adapters/b", "  data:\n    pth: /adapters/b", 6, "'pth'; did you mean 'path'?"),
        ("    merge_method:", "    merge_metod:", 10, "'merge_metod'; did you mean 'merge_method'?"),
        ("task_arithmetic\n", "ties\n    combinations: {chose: 2}\n", 11, "'chose'; did you mean 'choose'?"),
        ("task_arithmetic\n", "ties\ncalibration: {sample: 2}\n", 11, "'sample'; did you mean 'samples'?"),
        ("task_arithmetic\n", "ties\n    export: checkpiont\n", 11, "merges[0].export: input should be"),
        ("task_arithmetic\n", "ties\n    parameters: [1]\n", 11, "merges[0].parameters: input should be a mapping"),
        ("task_arithmetic\n", "ties\n    combinations: {choose: []}\n", 11, "at least 1 item"),
        ("task_arithmetic\n", "ties\n    combinations: {choose: true}\n", 11, "choose: "),
        ("task_arithmetic\n", "ties\n    combinations: {choose: [true]}\n", 11, "choose"),
        ("task_arithmetic\n", "ties\n    seed: -1\n", 11, "merges[0].seed"),
        ("task_arithmetic\n", "ties\ndtype: bfloat16\n", 11, "dtype: input should be 'float32' or 'float64'"),
        ("task_arithmetic\n", "ties\nmax_shard_size: 5 parsecs\n", 11, "'5 parsecs' is no size"),
        ("task_arithmetic\n", "cat\n    export_rank: 0\n", 11, "merges[0].export_rank"),
        ("task_arithmetic\n", "cat\n    export_tolerance: 1\n", 11, "merges[0].export_tolerance"),
        ("task_arithmetic\n", "cat\n    export_tolerance: -0.1\n", 11, "merges[0].export_tolerance"),
        ("task_arithmetic\n", "cat\ntied: untied\n", 11, "tied: input should be 'refuse' or 'untie'"),
        ("task_arithmetic\n", "cat\nbase_numerics: dequantize\n", 11, "base_numerics: input should be"),
        ("task_arithmetic\n", "cat\nkey_mapping: {'(': x}\n", 11, "'(': 'x' is no rule for names"),
        ("task_arithmetic\n", "cat\nkey_mapping: {'a(b)': '\\2'}\n", 11, "is no rule for names"),
        ("task_arithmetic\n", "cat\nkey_mapping: [a]\n", 11, "key_mapping: input should be a mapping"),
        ("task_arithmetic\n", "cat\ncalibration: {features: both}\n", 11, "input should be 'base' or 'adapter'"),
        ("task_arithmetic\n", "cat\ncalibration: {precision: half}\n", 11, "input should be 'full' or 'sketch'"),
        ("task_arithmetic\n", "cat\ncalibration: {sketch_rows: 1}\n", 11, "sketch_rows: input should be greater"),
        ("task_arithmetic\n", "cat\ncalibration: {seed: -1}\n", 11, "calibration.seed"),
        ("task_arithmetic\n", "cat\nstages: 0\n", 11, "stages: input should be greater than or equal to 1, got 0"),
        ("task_arithmetic\n", "cat\nstage: 2\n", 11, "unknown key 'stage'; did you mean 'stages'?"),
        ("task_arithmetic\n", "cat\ndiagnostic: true\n", 11, "'diagnostic'; did you mean 'diagnostics'?"),
        ("    data: /data/b.parquet", "    data: {path: /d, text: []}", 7, "adapters.b.data.text"),
        ("    data: /data/b.parquet", "    data: {path: /d, text: [a, b, c]}", 7, "at most 2 items"),
        ("    data: /data/b.parquet", "    moe_lora_b_layout: other", 7, "adapters.b.moe_lora_b_layout"),
        ("    data: /data/b.parquet", "    allow_pickle: perhaps", 7, "adapters.b.allow_pickle"),
        ("    data: /data/b.parquet", "    intial: /x", 7, "'intial'; did you mean 'initial'?"),
        ("  a: /adapters/a", "  a:", 4, "adapters.a: input should be a mapping, got None"),
        ("  a: /adapters/a", "  a__b: /adapters/a", 4, "'a__b' is no usable name"),
        ("name: m", "name: a/b", 9, "'a/b' is no usable name"),
        ("base_model: /models/base", "base_model: 3", 1, "base_model: input should be a valid string, got 3"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(old, new, line, words):
    assert RECIPE.count(old) == 1
    message = refusal(RECIPE.replace(old, new))
    assert message.startswith(f"r.yaml:{line}:")
    assert words in message


def test_a_missing_key_is_named_and_the_other_problems_are_counted():
    message = refusal("dtype: float32\nadapters: {}\n")
    assert "base_model is missing" in message
    assert "(and 1 more)" in message


@pytest.mark.parametrize("text", ["", "- a\n", "hello\n"])
def test_what_is_no_mapping_is_no_recipe(text):
    assert "a recipe is a mapping with base_model" in refusal(text)


@pytest.mark.parametrize(
    ("merges", "place"), [("", "r.yaml:1"), ("merges:\n", "r.yaml:8"), ("merges: []\n", "r.yaml:8")]
)
def test_a_recipe_without_merges_is_read_for_its_moments_and_refused_where_they_are_needed(merges, place):
    recipe, source = load_recipe("r.yaml", RECIPE.split("merges:")[0] + merges)
    assert recipe.merges == []
    with pytest.raises(RecipeError) as caught:
        require_merges(recipe, source)
    assert str(caught.value) == f"{place}: merges is empty: nothing to do"
    require_merges(*load_recipe("r.yaml", RECIPE))


def test_a_long_wrong_value_is_not_repeated_in_full():
    assert len(refusal(RECIPE.replace("name: m", f"name: m\n    export: {'x' * 5000}"))) < 400


@pytest.mark.parametrize("name", ["a", "A-1.b_c", "no", "x" * 64, "-rf", "2024", "a..b", "a_"])
def test_usable_names(name):
    assert load(RECIPE.replace("name: m", f"name: {name}")).merges[0].name == name


@pytest.mark.parametrize("name", ["ray_merge", "base", "single", "means", "notes", "cut_rows"])
def test_names_that_evaluation_json_uses_are_refused_for_merges_alone(name):
    message = refusal(RECIPE.replace("name: m", f"name: {name}\n    sweep: {{lambda: [0.2]}}"))
    assert f"r.yaml:9: merges[0].name: a merge cannot be named {name!r}: " in message
    assert "evaluation.json" in message
    assert name in load(RECIPE.replace("  a: /adapters/a", f"  {name}: /adapters/a")).adapters


@pytest.mark.parametrize(
    "name",
    ["''", "x" * 65, "a__b", "a b", "a/b", "..", ".", "...", ".ray_merge", ".tmp-x", "\u00e9", '"a\\n"', "true",
     "1.50", "null", "[a]"],
)  # fmt: skip
def test_names_that_could_not_be_folders_or_would_change_their_text_are_refused(name):
    for old in ("name: m", "  a: /adapters/a"):
        new = f"name: {name}" if old == "name: m" else f"  {name}: /adapters/a"
        text = RECIPE.replace(old, new)
        if old != "name: m" and name in ("true", "1.50", "null"):
            assert name in load(text).adapters  # a key is always text
        else:
            assert refusal(text).startswith("r.yaml")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5GiB", 5 * 2**30), ("5B", 5), ("512MiB", 2**29), (" 1.5 GB ", 1_500_000_000), (7, 7),
     ("7", 7), ("1tb", 10**12), ("9007199254740993B", 9007199254740993), ("0.1KB", 100)],
)  # fmt: skip
def test_sizes_are_exact(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5 XB", "-1", "1e9", 0, "0.1B", True, None, 1.5, "9" * 400 + "GB", "1,5GB", "\u0665GB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read recipe .*none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_a_binary_file_given_by_mistake_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00" * 1000)
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load_recipe(path)


def test_a_recipe_from_python_is_what_the_same_yaml_is():
    sweep = list(np.linspace(0.2, 0.4, 2))
    recipe, source = load_recipe(
        {
            "base_model": Path("/models/base"),
            "output": "/out",
            "adapters": {"a": "/adapters/a", "b": {"path": "/adapters/b", "data": "/data/b.parquet"}},
            "merges": ({"name": "m", "merge_method": "task_arithmetic", "sweep": {"lambda": sweep}},),
        }
    )
    assert recipe == load(RECIPE + "    sweep: {lambda: [0.2, 0.4]}\n")
    assert [type(v) for v in recipe.merges[0].sweep["lambda"]] == [float, float]
    assert source.where(("merges", 0)) == "recipe"


def test_a_recipe_from_python_that_holds_itself_is_refused():
    recipe = {}
    recipe["adapters"] = recipe
    with pytest.raises(RecipeError, match="not plain data"):
        load_recipe(recipe)


def test_a_pipe_or_folder_is_no_recipe_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(RecipeError, match=f"cannot read recipe {path}: it is no file"):
            load_recipe(path)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\ud800"])
def test_a_path_that_no_file_can_have_is_refused(path):
    with pytest.raises(RecipeError, match="cannot read recipe"):
        load_recipe(path)


def test_a_recipe_nested_too_deeply_is_refused_in_the_same_words_wherever_it_is_read():
    assert refusal("{a: " * 2000) == "r.yaml: not valid YAML (nested too deeply)"


def test_a_key_of_a_megabyte_is_neither_searched_for_nor_shown():
    assert len(refusal(f"{'x' * 10**6}: 3\n{RECIPE}")) < 400


def test_half_of_a_surrogate_pair_is_refused_in_a_mapping_and_in_yaml():
    with pytest.raises(RecipeError, match="holds U\\+D800, half of a surrogate pair"):
        load_recipe({"base_model": "/models/\ud800", "output": "/out", "adapters": {}, "merges": []})
    assert "holds U+D800" in refusal(RECIPE.replace("/out", '"/out\\ud800"'))


INIT = """\
base_model: /models/base
output: /out
adapters:
  a: {data: /data/a.parquet}
  b: {data: {path: /data/b.jsonl, text: [question, answer], limit: 9}}
  c: {data: {path: /data/c.jsonl, text: body}}
init:
  method: osrm
  target_modules: [q_proj, v_proj]
  output: /initial
"""


def test_tasks_without_adapters_can_be_calibrated_and_given_initial_adapters():
    recipe = load(INIT)
    assert [task.path for task in recipe.adapters.values()] == [None, None, None]
    assert [task.data.text for task in recipe.adapters.values()] == [None, ["question", "answer"], ["body"]]
    assert recipe.adapters["b"].data.limit == 9
    nulls = INIT.replace("body}", "body, limit: null}").replace("osrm", "osrm\n  others: null")
    assert load(nulls) == recipe
    assert load(INIT.replace("text: body", "text: null")).adapters["c"].data.text is None
    assert recipe.merges == []


def test_the_defaults_of_calibration_and_init_are_those_of_the_documentation():
    recipe = load(f"{INIT}calibration: {{}}\n")
    assert recipe.calibration.model_dump() == {
        "samples": 128, "max_length": 256, "batch_size": 16, "seed": 0, "features": "base", "precision": "full",
        "sketch_rows": 256,
    }  # fmt: skip
    assert recipe.init.model_dump() == {
        "method": "osrm", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "mode": "covariance",
        "row_scale": "orthonormal", "others": None, "output": "/initial", "project": False,
    }  # fmt: skip
    assert (recipe.stages, recipe.diagnostics, load(RECIPE).init, load(RECIPE).calibration) == (
        None, False, None, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("method: osrm", "method: orsm", 8, "init.method: input should be 'osrm', got 'orsm'"),
        ("[q_proj, v_proj]", "[]", 9, "init.target_modules: list should have at least 1 item"),
        ("[q_proj, v_proj]", "['']", 9, "init.target_modules"),
        ("  target_modules: [q_proj, v_proj]\n", "", 7, "init.target_modules is missing"),
        ("  output: /initial\n", "", 7, "init.output is missing"),
        ("  output:", "  outptu:", 10, "unknown key 'outptu'; did you mean 'output'?"),
        ("method: osrm", "method: osrm\n  r: 0", 9, "init.r: input should be greater"),
        ("method: osrm", "method: osrm\n  mode: mean", 9, "'covariance' or 'means', got 'mean'"),
        ("method: osrm", "method: osrm\n  row_scale: unit", 9, "'orthonormal' or 'peft', got 'unit'"),
        ("method: osrm", "method: osrm\n  others: [a, d]", 9, "init.others: unknown adapter 'd'; known: a, b, c"),
        ("method: osrm", "method: osrm\n  others: [a, b, a]", 9, "init.others: adapter 'a' stands twice"),
        ("method: osrm", "method: osrm\n  others: []", 9, "init.others: list should have at least 1 item"),
    ],
)  # fmt: skip
def test_a_mistake_in_init_is_named_with_its_line(old, new, line, words):
    assert INIT.count(old) == 1
    message = refusal(INIT.replace(old, new))
    assert message.startswith(f"r.yaml:{line}:")
    assert words in message
