"""Bad input: exit code 2, one clear sentence as the last line on stderr, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ray_merge.cli import main
from zoo import llama_adapters, tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base", layers=2)
    llama_adapters(folder / "base", folder / "adapters", 2)
    return folder


@pytest.fixture
def home(inputs, tmp_path) -> Path:
    """A private copy of the inputs with a recipe that works until a test breaks it."""
    shutil.copytree(inputs, tmp_path / "in")
    recipe = {
        "base_model": str(tmp_path / "in" / "base"),
        "output": str(tmp_path / "out"),
        "adapters": {name: str(tmp_path / "in" / "adapters" / name) for name in ("a0", "a1")},
        "merges": [{"name": "m", "merge_method": "task_arithmetic"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return tmp_path


def edit(home: Path, change) -> None:
    recipe = yaml.safe_load((home / "recipe.yaml").read_text())
    change(recipe)
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def weights(home: Path, change) -> None:
    path = home / "in" / "adapters" / "a0" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def config(home: Path, **keys) -> None:
    path = home / "in" / "adapters" / "a0" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def call(arguments: list[str], capfd) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0), capfd.readouterr().err.strip().rpartition("\n")[2]


def run(home: Path, capfd, *options: str) -> tuple[int, str]:
    recipe = str(home / "recipe.yaml")
    return call(["run", recipe, "--engine", "local", "--cache-dir", str(home / "cache"), *options], capfd)


def other_base(home: Path) -> None:
    shutil.rmtree(home / "in" / "base")
    tiny_bert(home / "in" / "base")


def wider_base(home: Path) -> None:
    shutil.rmtree(home / "in" / "base")
    tiny_llama(home / "in" / "base", layers=2, hidden=64)


def same_shapes_other_weights(home: Path) -> None:
    # The adapters were trained on the module's base, which still exists; the recipe now names another one.
    shutil.rmtree(home / "in" / "base")
    tiny_llama(home / "in" / "base", layers=2, seed=99)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        tensors[f"{FIRST.replace('q_proj', 'qq_proj')}.lora_{side}.weight"] = tensors.pop(
            f"{FIRST}.lora_{side}.weight"
        )


EMBEDDING = "base_model.model.model.embed_tokens"


def dora(home: Path) -> None:
    def magnitudes(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "lora_B" in name]:
            module = name.removesuffix(".lora_B.weight")
            tensors[f"{module}.lora_magnitude_vector"] = torch.ones(tensors[name].shape[0])

    weights(home, magnitudes)
    config(home, use_dora=True)
    edit(home, lambda recipe: recipe["merges"][0].update(merge_method="cat"))


def pickled(home: Path) -> None:
    path = home / "in" / "adapters" / "a0" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def base_config(home: Path, **keys) -> None:
    path = home / "in" / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def truncate(home: Path) -> None:
    path = home / "in" / "adapters" / "a0" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def truncate_base(home: Path) -> None:
    path = home / "in" / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{FIRST}.lora_B.weight"][3, 1] = float("nan")


def higher_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{FIRST}.lora_A.weight"] = torch.randn(7, 32)
    tensors[f"{FIRST}.lora_B.weight"] = torch.randn(32, 7)


def uneven_pair(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{FIRST}.lora_B.weight"] = torch.randn(32, 5)


def set_parameters(**parameters):
    return lambda recipe: recipe["merges"][0].update(
        merge_method="ties", parameters={"scope": "tensor", **parameters}
    )


def something_else(home: Path) -> None:
    (home / "out" / "m").mkdir(parents=True)
    (home / "out" / "m" / "thesis.docx").write_text("mine")


CASES = {
    "adapter for another architecture": (other_base, ["a0", "trained on another model"]),
    "adapter for a wider base": (wider_base, ["lora_B is (32, 2)", "has 64 outputs", "another base model"]),
    "adapter for a base with other weights": (same_shapes_other_weights, ["trained on", "weights differ"]),
    "adapter key that matches nothing": (
        lambda h: weights(h, rename),
        ["qq_proj", "matches nothing", "key_mapping"],
    ),
    "truncated adapter": (truncate, ["adapter_model.safetensors", "truncated"]),
    "truncated base": (truncate_base, ["model.safetensors", "truncated"]),
    "NaN in a factor": (lambda h: weights(h, nan), ["a0", "q_proj.lora_B", "NaN"]),
    "rank that the config denies": (lambda h: weights(h, higher_rank), ["rank 7", "says 2"]),
    "A and B of different rank": (lambda h: weights(h, uneven_pair), ["rank 2", "rank 5"]),
    "missing adapter": (lambda h: shutil.rmtree(h / "in/adapters/a1"), ["a1", "does not exist"]),
    "missing base": (lambda h: shutil.rmtree(h / "in/base"), ["base", "does not exist"]),
    "missing recipe": (lambda h: (h / "recipe.yaml").unlink(), ["recipe.yaml", "No such file"]),
    "DoRA without magnitudes": (lambda h: config(h, use_dora=True), ["use_dora", "a0", "magnitude"]),
    "DoRA in factor space": (dora, ["cat works on factors", "DoRA", "space: dense"]),
    "a bias that nobody announced": (
        lambda h: weights(h, lambda t: t.update({f"{FIRST}.bias": torch.ones(32)})),
        ["q_proj.bias", "dropped silently"],
    ),
    "tokens without indices": (
        lambda h: weights(
            h, lambda t: t.update({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(1, 32)})
        ),
        ["embed_tokens", "trainable_token_indices"],
    ),
    "half of a grown vocabulary": (
        lambda h: weights(h, lambda t: t.update({f"{EMBEDDING}.weight": torch.ones(80, 32)})),
        ["80 rows", "lm_head", "new rows are lost"],
    ),
    "a pickle": (pickled, ["a0", "adapter_model.bin", "allow_pickle: true"]),
    "a quantised base": (
        lambda h: base_config(h, quantization_config={"quant_method": "fp8"}),
        ["quantization_config", "base_numerics: dequantise"],
    ),
    "a quantised base of no known scheme": (
        lambda h: (
            base_config(h, quantization_config={"quant_method": "gptq"}),
            edit(h, lambda r: r.update(base_numerics="dequantise")),
        ),
        ["gptq"],
    ),
    "a key_mapping that is no rule": (
        lambda h: edit(h, lambda r: r.update(key_mapping={"(": "x"})),
        ["recipe.yaml:", "no rule for names"],
    ),
    "unknown setting": (lambda h: config(h, use_magic="yes"), ["use_magic", "unknown setting"]),
    "PiSSA": (lambda h: config(h, init_lora_weights="pissa"), ["pissa", "changed base"]),
    "a pattern without a module": (
        lambda h: config(h, alpha_pattern={"nosuch": 3}),
        ["nosuch", "matches none"],
    ),
    "two merges with one name": (
        lambda h: edit(h, lambda r: r["merges"].append({"name": "m", "merge_method": "cat"})),
        ["two merges", "'m'", "recipe.yaml:"],
    ),
    "output that holds something else": (something_else, ["thesis.docx", "something else"]),
    "unknown method": (
        lambda h: edit(h, lambda r: r["merges"][0].update(merge_method="tees")),
        ["tees", "did you mean 'ties'", "recipe.yaml:"],
    ),
    "density of 0": (lambda h: edit(h, set_parameters(density=0)), ["density", "(0, 1]"]),
    "density above 1": (lambda h: edit(h, set_parameters(density=1.5)), ["density", "1.5"]),
    "ties over the model with a density per site": (
        lambda h: edit(
            h,
            lambda r: r["merges"][0].update(
                merge_method="ties", parameters={"density": [{"filter": "q_proj", "value": 0.1}]}
            ),
        ),
        ["density differs between sites", "scope: tensor"],
    ),
    "unknown parameter": (lambda h: edit(h, set_parameters(densty=0.5)), ["densty", "density"]),
    "unknown key": (
        lambda h: edit(h, lambda r: r.update(outptu="x")),
        ["outptu", "'output'", "recipe.yaml:"],
    ),
    "unknown adapter": (
        lambda h: edit(h, lambda r: r["merges"][0].update(adapters=["a0", "a7"])),
        ["'a7'", "recipe.yaml:"],
    ),
    "dense merge as adapter": (
        lambda h: edit(h, lambda r: (set_parameters()(r), r["merges"][0].update(export="adapter"))),
        ["space: core"],
    ),
    "explosion": (
        lambda h: edit(h, lambda r: r["merges"][0].update(sweep={"lambda": list(range(2000))})),
        ["2000 merges", "max_merges"],
    ),
    "store without a bucket": (lambda h: edit(h, lambda r: r.update(output="s3://")), ["bucket"]),
    "unknown protocol": (lambda h: edit(h, lambda r: r.update(output="nosuch://x/y")), ["nosuch"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_anything_is_written(case, home, capfd):
    spoil, words = CASES[case]
    spoil(home)
    before = sorted(path for path in (home / "out").rglob("*"))
    code, sentence = run(home, capfd)
    assert code == 2, sentence
    for word in words:
        assert word in sentence
    assert sorted(path for path in (home / "out").rglob("*")) == before


def test_the_untouched_recipe_runs(home, capfd):
    assert run(home, capfd)[0] == 0
    assert (home / "out" / "m" / "ray_merge" / "MANIFEST.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run"], "RECIPE"),
        (["run", "x.yaml", "--engine", "spark"], "spark"),
        (["nosuch"], "nosuch"),
        (["run", "x.yaml", "--workers", "0"], "workers"),
        (["verify", "nowhere"], "no complete merge"),
        (["plan", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_usage_errors_exit_with_2_and_say_why(arguments, word, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, sentence = call(arguments, capfd)
    assert code == 2
    assert word in sentence
    assert list(tmp_path.iterdir()) == []


def test_only_must_match_a_merge(home, capfd):
    code, sentence = run(home, capfd, "--only", "nosuch*")
    assert code == 2
    assert "nosuch*" in sentence


def test_memory_must_be_a_size(home, capfd):
    code, sentence = run(home, capfd, "--memory", "lots")
    assert code == 2
    assert "--memory" in sentence


def test_changed_input_is_refused_with_both_ids_and_the_input(home, capfd):
    assert run(home, capfd)[0] == 0
    edit(home, lambda r: r["merges"][0].update(parameters={"lambda": 0.5}))
    code, sentence = run(home, capfd)
    assert code == 2
    assert "parameters.lambda: 1.0 there, 0.5 here" in sentence
    assert sentence.count("merge id") == 1
    assert "{id}" in sentence


def test_nan_in_the_base_stops_the_run_without_a_manifest(home, capfd):
    path = home / "in" / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    edit(
        home,
        lambda r: r.update(
            base_model_names=[
                json.loads((home / "in/adapters/a0/adapter_config.json").read_text())[
                    "base_model_name_or_path"
                ]
            ]
        ),
    )
    code, sentence = run(home, capfd)
    assert code == 1
    assert "not finite" in sentence
    assert not (home / "out" / "m" / "ray_merge" / "MANIFEST.json").exists()
