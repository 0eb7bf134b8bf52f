"""What cannot be merged exactly is refused by name: exit code 2, the reason and the way out, nothing written.

One case per line of the table of `adapter_config.json` fields (peers-and-formats.md, 3c), plus the layouts and
tensors of 3d and 3e. Adapters are saved by PEFT wherever PEFT can make them. Words are checked loosely: the key that
is at fault, and the one or two words without which the sentence would not help.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import variants as v
import yaml
from safetensors.torch import load_file, save_file
from variants import CONFIG, PICKLE, WEIGHTS, Variant

from models import MODELS
from ray_merge.cli import main

QV = ["q_proj", "v_proj"]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One refusal.

    Args:
        words: what the last line on stderr must hold, without regard to case; a tuple of words means any of them.
        model: name in MODELS.
        options: of the adapter's LoraConfig, or makes them.
        variant: the rest of how the adapter is made.
        others: options of further adapters.
        peft: makes another PEFT config than LoraConfig.
        config: keys laid over the saved config; None takes a key out.
        spoil: rewrites the adapter's folder.
        base: rewrites the base's folder.
        recipe: keys laid over the recipe.
        keys: keys laid over the first adapter's entry.
        merge: keys laid over the merge.
    """

    words: tuple[str | tuple[str, ...], ...]
    model: str = "llama"
    options: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = field(
        default_factory=lambda: {"target_modules": QV}
    )
    variant: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[Mapping[str, Any], ...] = ()
    peft: Callable[[], Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    spoil: Callable[[Path], None] | None = None
    base: Callable[[Path], None] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)


def lora(*targets: str, **options: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), **options}


def configs(name: str, /, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import peft

        return getattr(peft, name)(**options)

    return make


def sub_config(name: str, **options: Any) -> Any:
    import peft.tuners.lora.config as config

    return getattr(config, name)(**options)


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def put(name: str, *shape: int) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({name: torch.ones(shape)}))


def drop(part: str) -> Callable[[Path], None]:
    return tensors(lambda found: [found.pop(name) for name in list(found) if part in name])


def card(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "README.md").write_text(text)


def pickle_that_runs(folder: Path) -> None:
    """A file that would make `folder/ran` when unpickled without care."""

    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (folder / "ran",)

    (folder / WEIGHTS).unlink()
    torch.save({f"{Q0}.lora_A.weight": Runs()}, folder / PICKLE)


def base_config(**keys: Any) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return rewrite


def fp8_base(folder: Path) -> None:
    """A linear layer in float8 with its scale beside it, as DeepSeek and Qwen publish them."""
    found = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    found[name] = found[name].to(torch.float8_e4m3fn)
    found[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    base_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})(folder)


def other_table(folder: Path) -> None:
    """The embedding under the adapter is not the base's, as after a training that resized it back."""
    found = load_file(folder / WEIGHTS)
    found["base_model.model.model.embed_tokens.base_layer.weight"] += 1.0
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


BOTH = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
UNTIE = {"tied": "untie"}
WAY_OUT = ("initial", "path_initial_model_for_weight_conversion", "convert")

CASES = {
    # peft_type
    "LoHa": Case(peft=configs("LoHaConfig", target_modules=QV), words=("peft_type", "loha")),
    "AdaLoRA": Case(
        peft=configs("AdaLoraConfig", target_modules=QV, total_step=10, init_r=4, target_r=2),
        words=("peft_type", "adalora"),
    ),
    "IA3": Case(
        peft=configs("IA3Config", target_modules=QV, feedforward_modules=[]), words=("peft_type", "ia3")
    ),
    "trainable tokens by itself": Case(
        peft=configs("TrainableTokensConfig", token_indices=[3]), words=("peft_type", "trainable_tokens")
    ),
    # initialisations that changed the base
    **{
        f"{init} without its initial adapter": Case(
            options=lora(*QV, init_lora_weights=init), words=("init_lora_weights", init, WAY_OUT)
        )
        for init in ("pissa", "pissa_niter_4", "olora")
    },
    "corda without its initial adapter": Case(
        options=lambda: lora(*QV, init_lora_weights="corda", corda_config=sub_config("CordaConfig")),
        variant={"prepare": v.corda_statistics},
        words=("corda", WAY_OUT),
    ),
    "lora_ga without its initial adapter": Case(
        options=lambda: lora(*QV, init_lora_weights="lora_ga", lora_ga_config=sub_config("LoraGAConfig")),
        variant={"prepare": v.lora_ga_gradients},
        words=("lora_ga", WAY_OUT),
    ),
    "loftq": Case(
        config={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        words=("loftq",),
    ),
    "loftq with an initial adapter": Case(
        config={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        keys={"initial": "{first}"},
        words=("loftq",),
    ),
    "an initial adapter of an adapter that needs none": Case(
        keys={"initial": "{first}"}, words=("initial", "init_lora_weights")
    ),
    "an initial adapter that does not exist": Case(
        options=lora(*QV, init_lora_weights="pissa"),
        keys={"initial": "{nowhere}"},
        words=("nowhere", "exist"),
    ),
    "an initial adapter of another rank": Case(
        options=lora(*QV, init_lora_weights="pissa"),
        others=(lora(*QV, r=3, init_lora_weights="pissa"),),
        recipe={"merges": [{"name": "m", "merge_method": "task_arithmetic", "adapters": ["a0"]}]},
        keys={"initial": "{second}"},
        words=("initial", ("rank", "shape")),
    ),
    # variants without an exact merge
    "replicated layers": Case(
        options=lora(*QV, layer_replication=[(0, 2), (0, 2)]), words=("layer_replication",)
    ),
    "QA-LoRA": Case(config={"use_qalora": True}, words=("use_qalora",)),
    "aLoRA": Case(
        options=lora(*QV, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        words=("alora_invocation_tokens",),
    ),
    "Arrow": Case(config={"arrow_config": {"top_k": 2}}, words=("arrow_config",)),
    "KaSA": Case(options=lambda: lora(*QV, kasa_config=sub_config("KasaConfig")), words=("kasa",)),
    "KaSA by its tensors": Case(spoil=put(f"{Q0}.lora_diag", 4), words=("lora_diag",)),
    "Megatron": Case(config={"megatron_config": {"tensor_model_parallel_size": 2}}, words=("megatron",)),
    "a setting that nobody knows": Case(config={"use_magic": "yes"}, words=("use_magic", "unknown")),
    # tied embeddings
    "LoRA on a tied head": Case(
        model="llama_tied", options=lora("q_proj", "lm_head"), words=("lm_head", "tied", "untie")
    ),
    "LoRA on a tied head, refused on purpose": Case(
        model="llama_tied",
        options=lora("q_proj", "lm_head"),
        recipe={"tied": "refuse"},
        words=("lm_head", "tied", "untie"),
    ),
    "LoRA on a tied embedding": Case(
        model="llama_tied", options=lora("q_proj", "embed_tokens"), words=("embed_tokens", "tied", "untie")
    ),
    "a tied head that was saved whole": Case(
        model="llama_tied", options=lora(*QV, modules_to_save=["lm_head"]), words=("lm_head", "tied", "untie")
    ),
    "token rows of one side of a tie": Case(
        model="llama_tied",
        options=lora(*QV, trainable_token_indices={"embed_tokens": [3], "lm_head": [5]}),
        words=("tied", "untie"),
    ),
    "tied factors with magnitudes that are not": Case(
        model="llama_tied",
        options=lora("embed_tokens", use_dora=True, ensure_weight_tying=True),
        words=("tied", "untie"),
    ),
    "tied: something else": Case(recipe={"tied": "perhaps"}, words=("tied", "untie")),
    # layers
    "a grouped convolution": Case(model="hand_made", options=lora("grouped"), words=("grouped", "group")),
    "lora_bias on a layer without a bias": Case(
        options=lora(*QV, lora_bias=True), words=("lora_bias", "bias", "q_proj")
    ),
    "fan_in_fan_out on linear layers": Case(config={"fan_in_fan_out": True}, words=("fan_in_fan_out",)),
    # owners
    "two adapters saved one module": Case(
        options=lora(*QV, modules_to_save=["lm_head"]),
        others=(lora("k_proj", modules_to_save=["lm_head"]),),
        words=("lm_head", "a0", "a1"),
    ),
    "two adapters trained one token": Case(
        options=lora(*QV, trainable_token_indices=[3, 10]),
        others=(lora(*QV, trainable_token_indices=[10, 11]),),
        words=("token", "10", "a0", "a1"),
    ),
    "LoRA on a module that another adapter saved": Case(
        options=lora(*QV, modules_to_save=["lm_head"]),
        others=(lora("k_proj", "lm_head"),),
        words=("lm_head", "a0", "a1"),
    ),
    "two adapters on different embeddings": Case(
        options=lora("embed_tokens", "lm_head"),
        others=(lora("embed_tokens", "q_proj"),),
        spoil=other_table,
        words=("embed_tokens", ("a0", "a1")),
    ),
    "two adapters of different vocabularies": Case(
        variant={"resize": 70}, others=({**lora(*QV), "resize": 72},), words=("vocabular", "a0", "a1")
    ),
    "a resized adapter beside one that was not": Case(
        variant={"resize": 70}, others=(lora("embed_tokens", "q_proj"),), words=("vocabular", "a0", "a1")
    ),
    "a resized head that PEFT did not save": Case(
        # PEFT saves both tables of a resized model unless one of them is a target: then the other is lost.
        options=lora("q_proj", "embed_tokens"),
        variant={"resize": 70},
        words=("lm_head", "70", "64"),
    ),
    "a resized embedding that PEFT did not save": Case(
        options=lora("q_proj", "lm_head"), variant={"resize": 70}, words=("embed_tokens", "70", "64")
    ),
    # files
    "a pickle": Case(variant={"pickle": True}, words=("adapter_model.bin", "pickle", "allow_pickle")),
    "a pickle that runs code": Case(
        spoil=pickle_that_runs, keys={"allow_pickle": True}, words=("adapter_model.bin",)
    ),
    # experts
    "square experts without a PEFT version": Case(
        model="qwen3_moe_square",
        options=BOTH,
        config={"peft_version": None},
        words=("gate_up_proj", "peft_version"),
    ),
    "square experts of gpt-oss without a PEFT version": Case(
        model="gpt_oss_square",
        options=BOTH,
        config={"peft_version": None},
        words=("down_proj", "peft_version"),
    ),
    "experts whose card names Unsloth": Case(
        model="qwen3_moe",
        options=BOTH,
        spoil=card("---\nlibrary_name: peft\ntags:\n- lora\n- unsloth\n---\n"),
        words=("unsloth", "lora_b_layout"),
    ),
    "a packing of experts that nobody knows": Case(
        model="qwen3_moe", options=BOTH, config={"lora_B_layout": "diagonal"}, words=("lora_b_layout", "diagonal")
    ),
    "experts of another shape": Case(
        model="qwen3_moe",
        options=BOTH,
        spoil=tensors(
            lambda found: found.update(
                {name: torch.ones(16, 7) for name in found if name.endswith("experts.lora_A.weight")}
            )
        ),
        words=("experts", ("shape", "7")),
    ),
    "experts that the config does not name": Case(
        model="qwen3_moe", options=BOTH, config={"target_parameters": None}, words=("experts",)
    ),
    # quantised bases
    "a bitsandbytes base": Case(
        base=base_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        words=("quanti", "base_numerics", "dequantise"),
    ),
    "a base in float8": Case(base=fp8_base, words=("quanti", "base_numerics", "dequantise")),
    "a quantised base, rejected on purpose": Case(
        base=base_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        recipe={"base_numerics": "reject"},
        words=("quanti", "dequantise"),
    ),
    "base_numerics: something else": Case(
        recipe={"base_numerics": "whatever"}, words=("base_numerics", "dequantise")
    ),
    # tensors that the config does not explain, and the other way round
    "a tensor of an unknown kind": Case(spoil=put(f"{Q0}.lora_C.weight", 4, 4), words=("lora_C",)),
    "a factor for a layer that the base lacks": Case(
        spoil=tensors(
            lambda found: found.update(
                {f"{Q0}_2.lora_{s}.weight": found[f"{Q0}.lora_{s}.weight"].clone() for s in "AB"}
            )
        ),
        words=("q_proj_2", "match"),
    ),
    "A without B": Case(spoil=drop("layers.0.self_attn.q_proj.lora_B"), words=("q_proj", "lora_B")),
    "magnitudes without use_dora": Case(
        spoil=put(f"{Q0}.lora_magnitude_vector", 32), words=("lora_magnitude_vector", "use_dora")
    ),
    "use_dora without magnitudes": Case(config={"use_dora": True}, words=("use_dora", "magnitude")),
    "a magnitude of another length": Case(
        options=lora(*QV, use_dora=True),
        spoil=put(f"{Q0}.lora_magnitude_vector", 31),
        words=("lora_magnitude_vector", "31", "32"),
    ),
    "a bias that the config does not train": Case(
        model="llama_biased", spoil=put(f"{Q0}.base_layer.bias", 32), words=("q_proj", "bias")
    ),
    "token rows that the config does not name": Case(
        spoil=put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32),
        words=("embed_tokens", "trainable_token_indices"),
    ),
    "more token rows than indices": Case(
        options=lora(*QV, trainable_token_indices=[3, 10]),
        config={"trainable_token_indices": [3]},
        words=("trainable_token", "2", "1"),
    ),
    "a token that the vocabulary lacks": Case(
        options=lora(*QV, trainable_token_indices=[3, 10]),
        config={"trainable_token_indices": [3, 64]},
        words=("token", "64"),
    ),
    "a module that the config does not save": Case(
        spoil=put("base_model.model.model.norm.weight", 32), words=("model.norm", "modules_to_save")
    ),
    "a saved module of another shape": Case(
        options=lora(*QV, modules_to_save=["lm_head"]),
        spoil=put("base_model.model.lm_head.weight", 64, 31),
        words=("lm_head", "31", "32"),
    ),
    "block-diagonal factors without their setting": Case(
        options=lambda: lora(
            "q_proj", use_bdlora=sub_config("BdLoraConfig", target_modules_bd_b=["q_proj"], nblocks=2)
        ),
        config={"use_bdlora": None},
        words=("q_proj", "rank"),
    ),
    "NaN in a magnitude": Case(
        options=lora(*QV, use_dora=True),
        spoil=tensors(lambda found: found[f"{Q0}.lora_magnitude_vector"].fill_(float("nan"))),
        words=("lora_magnitude_vector", "nan"),
    ),
    # methods that need factors
    **{
        f"DoRA by {label}": Case(
            options=lora(*QV, use_dora=True),
            merge={"merge_method": label.split()[0], "parameters": parameters},
            words=("dora", ("dense", "factor")),
        )
        for label, parameters in {
            "ties in core space": {"space": "core", "scope": "tensor"},
            "ties in knots space": {"space": "knots", "scope": "tensor"},
            "knots_ties": {"scope": "tensor"},
            "svd": {"rank": 2},
        }.items()
    },
    "DoRA exported as an adapter": Case(
        options=lora(*QV, use_dora=True), merge={"export": "adapter"}, words=("dora", ("export", "checkpoint"))
    ),
    # names
    "a key_mapping that is no expression": Case(
        recipe={"key_mapping": {"(": "x"}}, words=("key_mapping", "(")
    ),
    "a key_mapping that joins two modules": Case(
        keys={"key_mapping": {r"layers\.1\.": "layers.0."}}, words=("layers.0", ("two", "both", "same", "twice"))
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base by its model's name, saved once."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    home = tmp_path_factory.mktemp("bases")

    def base(model: str) -> Path:
        if not (home / model).exists():
            MODELS[model].save(home / model)
        return home / model

    return base


def make_adapter(case: Case, base: Path, folder: Path) -> None:
    if case.peft is not None:
        from peft import get_peft_model

        with v.quiet():
            get_peft_model(MODELS[case.model].base(base), case.peft()).save_pretrained(folder)
    else:
        options = case.options() if callable(case.options) else case.options
        v.train(MODELS[case.model], base, folder, Variant(options=options, **case.variant), seed=1)
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **case.config}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def write_recipe(case: Case, base: Path, home: Path) -> Path:
    """The case's adapters and its recipe, in `home`."""
    folders = [home / f"a{index}" for index in range(1 + len(case.others))]
    make_adapter(case, base, folders[0])
    for index, given in enumerate(case.others, 1):
        options = dict(given)
        variant = Variant(resize=options.pop("resize", None), options={"r": 3, **options})
        v.train(MODELS[case.model], base, folders[index], variant, seed=1 + index)
    if case.spoil is not None:
        case.spoil(folders[0])
    names = {"{first}": str(folders[0]), "{second}": str(folders[-1]), "{nowhere}": str(home / "nowhere")}
    keys = {key: names.get(str(value), value) for key, value in case.keys.items()}
    adapters: dict[str, Any] = {folder.name: str(folder) for folder in folders}
    if keys:
        adapters["a0"] = {"path": str(folders[0]), **keys}
    recipe = {
        "base_model": str(base),
        "output": str(home / "out"),
        "adapters": adapters,
        "merges": [{"name": "m", "merge_method": "task_arithmetic", **case.merge}],
        **case.recipe,
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return home / "recipe.yaml"


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name_and_nothing_is_written(name, bases, tmp_path, capfd):
    case = CASES[name]
    base = bases(case.model)
    if case.base is not None:  # an adapter knows the folder of its base, so the base is spoiled where it lies
        base = Path(shutil.copytree(base, tmp_path / "base"))
    recipe = write_recipe(case, base, tmp_path)
    if case.base is not None:
        case.base(base)
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe), "--engine", "local", "--cache-dir", str(tmp_path / "cache")])
    sentence = capfd.readouterr().err.strip().rpartition("\n")[2]
    assert stopped.value.code == 2, sentence
    for word in case.words:
        choices = (word,) if isinstance(word, str) else word
        assert any(choice.lower() in sentence.lower() for choice in choices), (word, sentence)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*"))
    assert not list(tmp_path.rglob("ran"))


def test_the_cases_start_from_a_recipe_that_runs(bases, tmp_path):
    recipe = write_recipe(Case(words=()), bases("llama"), tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe), "--engine", "local", "--cache-dir", str(tmp_path / "cache")])
    assert not stopped.value.code
    assert (tmp_path / "out" / "m" / "ray_merge" / "MANIFEST.json").is_file()
