"""EMR from a recipe to a model with one of its adapters; what a stopped run leaves; what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import ray_merge
from ray_merge.errors import AdapterError
from ray_merge.storage.commit import MANIFEST
from zoo import digests, llama_adapters, relative_error, tiny_llama

NAMES = ("a0", "a1", "a2")
WEIGHT = {"a0": 1.0, "a1": 0.5, "a2": 2.0}
CASES = {
    "dense": {},
    "weighted": {"weight": WEIGHT, "lambda": 0.5},
    "tensor": {"scope": "tensor"},
    "authors": {"compat": "authors"},
    "core": {"space": "core"},
    "knots": {"space": "knots", "scope": "tensor"},
}


def recipe(folder: Path, output: Path, **keys):
    return {
        "base_model": str(folder / "base"),
        "output": str(output),
        "adapters": {name: str(folder / "adapters" / name) for name in NAMES},
        "merges": [
            {"name": name, "merge_method": "emr", "parameters": parameters}
            for name, parameters in CASES.items()
        ],
        **keys,
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emr")
    tiny_llama(folder / "base", layers=2)
    llama_adapters(folder / "base", folder / "adapters", 3)
    return folder


@pytest.fixture(scope="module")
def published(inputs) -> Path:
    ray_merge.run(recipe(inputs, inputs / "out"), engine="local", workers=1, cache_dir=inputs / "cache")
    return inputs / "out"


def adapter_deltas(inputs: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weight -> adapter -> s B A in float64, from the adapters' own files."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in NAMES:
        folder = inputs / "adapters" / name
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, A in tensors.items():
            if "lora_A" in key:
                B = tensors[key.replace("lora_A", "lora_B")]
                weight = key.removeprefix("base_model.model.").replace("lora_A.", "")
                delta = config["lora_alpha"] / config["r"] * B.double() @ A.double()
                found.setdefault(weight, {})[name] = delta
    return found


def elect(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """tau_u of (T, P, Q)."""
    own = values * weights[:, None, None]
    gamma = own.sum(0).sign()
    return gamma * ((own * gamma > 0) * own.abs()).amax(0)


def expected(inputs: Path, case: str) -> tuple[dict, dict]:
    """The unified update by weight, and each adapter's part by adapter and weight; dense spaces only."""
    weights = torch.tensor(
        [CASES[case].get("weight", dict.fromkeys(NAMES, 1.0))[name] for name in NAMES]
    ).double()
    unified, kept, sums = {}, {}, {}
    for weight, by_name in adapter_deltas(inputs).items():
        zero = torch.zeros_like(next(iter(by_name.values())))
        values = torch.stack([by_name.get(name, zero) for name in NAMES])
        unified[weight] = elect(values, weights)
        share = 1 / values[0].numel() if case == "authors" else 1.0
        for name, tau in zip(NAMES, values, strict=True):
            kept[name, weight] = unified[weight] * (tau * unified[weight] > 0)
            sums[name, weight] = torch.stack([tau.abs().sum(), kept[name, weight].abs().sum()]) * share
    parts = {}
    for (name, weight), part in kept.items():
        whole = sum(value for (other, _), value in sums.items() if other == name)
        one, left = sums[name, weight] if case == "tensor" else whole
        parts.setdefault(name, {})[weight] = part * (one / left if left else 1.0)
    return unified, parts


def base_model(inputs: Path, **options):
    return AutoModelForCausalLM.from_pretrained(inputs / "base", **options)


def moved(inputs: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """What was added to each parameter that is not the base's own."""
    base = base_model(inputs).state_dict()
    found = {name: tensor.double() - base[name].double() for name, tensor in model.state_dict().items()}
    return {name: update for name, update in found.items() if update.any()}


@pytest.mark.parametrize("case", ["dense", "weighted", "tensor", "authors"])
def test_every_adapter_is_given_back_as_the_formula_says(inputs, published, case):
    _, parts = expected(inputs, case)
    for name in NAMES:
        found = moved(inputs, ray_merge.load_emr(base_model(inputs), published / case, name))
        touched = {weight for weight, part in parts[name].items() if part.any()}
        assert found.keys() == touched
        for weight in touched:
            assert relative_error(found[weight], parts[name][weight]) < 1e-5


@pytest.mark.parametrize("case", ["core", "knots"])
def test_in_core_and_knots_space_they_are_what_merge_factors_gives(inputs, published, case):
    weight = "model.layers.0.self_attn.q_proj.weight"  # all three touch it
    factors = []
    for name in NAMES:
        folder = inputs / "adapters" / name
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        A, B = (
            tensors[f"base_model.model.{weight.replace('weight', f'lora_{side}.weight')}"] for side in "AB"
        )
        factors.append(ray_merge.Factor(B, A, config["lora_alpha"] / config["r"]))
    merged = ray_merge.merge_factors("emr", factors, space=case)
    rescalers = json.loads((published / case / "emr/rescalers.json").read_text())["rescalers"]
    for index, name in enumerate(NAMES):
        found = moved(inputs, ray_merge.load_emr(base_model(inputs), published / case, name))[weight]
        rescaler = rescalers[name] if case == "core" else rescalers[name][weight.removesuffix(".weight")]
        want = merged.per_adapter[index].dense() / merged.rescalers[index] * rescaler
        assert relative_error(found, want) < 1e-5
        assert case == "core" or rescaler == pytest.approx(merged.rescalers[index], rel=1e-6)


@pytest.mark.parametrize(("case", "lambda_"), [("dense", 1.0), ("weighted", 0.5)])
def test_the_checkpoint_is_base_plus_lambda_times_the_unified_update(inputs, published, case, lambda_):
    unified, _ = expected(inputs, case)
    found = moved(inputs, AutoModelForCausalLM.from_pretrained(published / case))
    assert found.keys() == unified.keys()
    for weight, update in found.items():
        assert relative_error(update, lambda_ * unified[weight]) < 1e-5


def test_the_model_is_loaded_in_any_dtype(inputs, published):
    _, parts = expected(inputs, "dense")
    model = ray_merge.load_emr(base_model(inputs, dtype=torch.bfloat16), published / "dense", "a1")
    base = base_model(inputs).state_dict()
    for weight, part in parts["a1"].items():
        found = model.state_dict()[weight]
        assert found.dtype == torch.bfloat16
        # The base itself was rounded when it was loaded, the sum once more.
        bound = 2 * 2**-8 * (base[weight].abs() + part.abs())
        assert bool(((found.double() - base[weight].double() - part).abs() <= bound).all())


def test_what_was_published_passes_and_the_manifest_names_every_file(inputs, published):
    results = ray_merge.verify(str(published), cache_dir=inputs / "cache")
    assert len(results) == len(CASES)
    assert all(result.probed and result.worst <= 1 for result in results)
    for case in CASES:
        named = {e["name"] for e in json.loads((published / case / MANIFEST).read_text())["files"]}
        assert named == set(digests(published / case)) - {MANIFEST}
        assert sum(name.startswith("emr/") for name in named) == 3


def test_a_changed_mask_is_noticed(inputs, published, tmp_path):
    shutil.copytree(published / "dense", tmp_path / "dense")
    (path,) = list((tmp_path / "dense" / "emr").glob("*1-of-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ray_merge.RunFailed, match=r"emr/model-00001-of-\d+.safetensors is not what was published"
    ):
        ray_merge.verify(str(tmp_path), probe=False)


def test_the_card_says_how_an_adapter_is_loaded(published):
    text = (published / "dense" / "README.md").read_text()
    assert 'ray_merge.load_emr(model, "this folder", "a0")  # or a1, a2' in text
    assert "This checkpoint is the base plus lambda times the unified update" in text


def test_objects_that_are_lost_are_made_again_with_the_same_bytes(inputs, published, tmp_path):
    shutil.copytree(published, tmp_path / "out")
    folder = tmp_path / "out" / "dense"
    (folder / MANIFEST).unlink()
    (folder / "emr/rescalers.json").unlink()
    first, second = sorted((folder / "emr").glob("*.safetensors"))
    first.unlink()
    (folder / f"ray_merge/receipts/emr--{second.name}.json").unlink()
    result = ray_merge.run(
        recipe(inputs, tmp_path / "out"), engine="local", workers=1, cache_dir=tmp_path / "cache"
    )
    assert result.units_run == 2
    assert result.read_bytes == 0  # no shard had to be made for them
    assert digests(tmp_path / "out") == digests(published)


def test_bytes_do_not_depend_on_the_number_of_workers(inputs, published, tmp_path):
    ray_merge.run(recipe(inputs, tmp_path), engine="local", workers=3, cache_dir=inputs / "cache")
    assert digests(tmp_path) == digests(published)


def test_two_drivers_at_once_publish_one_result(inputs, published, tmp_path):
    errors = []

    def drive(index: int) -> None:
        try:
            ray_merge.run(
                recipe(inputs, tmp_path / "out"),
                engine="local",
                workers=1,
                cache_dir=tmp_path / f"cache{index}",
            )
        except BaseException as error:  # noqa: BLE001 (reported by the assertion)
            errors.append(error)

    threads = [threading.Thread(target=drive, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert digests(tmp_path / "out") == digests(published)


@pytest.mark.parametrize(
    ("folder", "adapter", "message"),
    [
        ("dense", "a9", "was made of a0, a1, a2; there is no adapter 'a9'"),
        (".", "a0", "is no complete merge; give the folder of one merge with merge_method: emr"),
    ],
)
def test_what_is_not_there_is_refused(inputs, published, folder, adapter, message):
    model = base_model(inputs)
    with pytest.raises(AdapterError, match=message):
        ray_merge.load_emr(model, published / folder, adapter)
    assert not moved(inputs, model)


def test_the_result_of_another_method_is_refused(inputs, tmp_path):
    ray_merge.run(
        recipe(inputs, tmp_path, merges=[{"name": "m", "merge_method": "task_arithmetic"}]),
        engine="local",
        workers=1,
        cache_dir=inputs / "cache",
    )
    with pytest.raises(AdapterError, match="is no result of emr"):
        ray_merge.load_emr(base_model(inputs), tmp_path / "m", "a0")


def test_a_second_adapter_and_the_merged_checkpoint_are_refused(inputs, published):
    model = ray_merge.load_emr(base_model(inputs), published / "dense", "a0")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        AdapterError, match=r"this model is a0 of .*dense already, .* load the base model again"
    ):
        ray_merge.load_emr(model, published / "dense", "a1")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(AdapterError, match="which has the unified update in it; load the base model"):
        ray_merge.load_emr(
            AutoModelForCausalLM.from_pretrained(published / "dense"), published / "dense", "a0"
        )


def test_a_model_with_other_shapes_names_or_dtypes_is_refused_and_stays_as_it_is(inputs, published, tmp_path):
    wide = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "wide", layers=2, hidden=64))
    with pytest.raises(AdapterError, match=r"is \(32, 64\) there, the model has \(64, 128\)"):
        ray_merge.load_emr(wide, published / "dense", "a0")
    short = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "short", layers=1))
    before = {name: tensor.clone() for name, tensor in short.state_dict().items()}
    with pytest.raises(AdapterError, match=r"the model \(LlamaForCausalLM\) has no model.layers.1"):
        ray_merge.load_emr(short, published / "dense", "a0")
    assert all(torch.equal(tensor, before[name]) for name, tensor in short.state_dict().items())
    empty = base_model(inputs).to("meta")
    with pytest.raises(AdapterError, match="of the model is on the meta device"):
        ray_merge.load_emr(empty, published / "dense", "a0")
    narrow = base_model(inputs).to(torch.float8_e4m3fn)
    with pytest.raises(
        AdapterError, match=r"is stored as torch.float8_e4m3fn; load the base model in float32"
    ):
        ray_merge.load_emr(narrow, published / "dense", "a0")


def test_a_weight_that_the_model_ties_to_another_is_refused(inputs, published):
    model = base_model(inputs)
    one, other = (layer.self_attn for layer in model.model.layers)
    other.q_proj.weight = one.q_proj.weight
    with pytest.raises(AdapterError, match=r"ties model.layers.0.self_attn.q_proj.weight to model.layers.1"):
        ray_merge.load_emr(model, published / "dense", "a0")
    assert moved(inputs, model).keys() == {"model.layers.1.self_attn.q_proj.weight"}


@pytest.mark.parametrize("longer", [True, False], ids=["model has a prefix", "files have a prefix"])
def test_the_models_own_prefix_may_be_on_one_side_only(tmp_path, longer):
    disk, name = ("dense.weight", "bert.dense.weight") if longer else ("bert.dense.weight", "dense.weight")
    (tmp_path / "base").mkdir()
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(shape, generator=generator) for shape in [(6, 5), (2, 5), (6, 2)])
    save_file({disk: W}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "of_no_library"}')
    (tmp_path / "a").mkdir()
    module = disk.removesuffix(".weight")
    pair = {f"base_model.model.{module}.lora_{side}.weight": t for side, t in (("A", A), ("B", B))}
    save_file(pair, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    given = {"base_model": str(tmp_path / "base"), "output": str(tmp_path / "out"),
             "adapters": {"a": str(tmp_path / "a")}, "merges": [{"name": "m", "merge_method": "emr"}]}  # fmt: skip
    ray_merge.run(given, engine="local", workers=1, cache_dir=tmp_path / "cache")

    class Model(nn.Module):
        base_model_prefix = "bert"

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(W.clone())

        def state_dict(self, *_, **__):
            return {name: self.weight.detach()}

    model = ray_merge.load_emr(Model(), tmp_path / "out" / "m", "a")
    assert torch.allclose(model.weight, W + B @ A, atol=1e-5)
