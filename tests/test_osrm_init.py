"""`ray-merge init`: adapters of tiny models, loaded by PEFT and measured against plain hooks on the whole model."""

from __future__ import annotations

import json
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

import ray_merge
from ray_merge.cli import _exit_code
from ray_merge.errors import OutputConflict, RecipeError, Refusal, RunFailed

HIDDEN, VOCABULARY, R = 16, 24, 3

SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=16)
LLAMA = LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=16)
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=16)

FAMILIES: dict[str, tuple[Any, Any, str | None, list[str]]] = {
    "bert": (
        partial(BertModel, BERT),
        BertForSequenceClassification,
        "classification",
        ["query", "key", "output.dense"],
    ),
    "llama": (
        partial(LlamaForCausalLM, LLAMA),
        LlamaForCausalLM,
        "generation",
        ["q_proj", "v_proj", "down_proj"],
    ),
    "gpt2": (partial(GPT2LMHeadModel, GPT2), GPT2LMHeadModel, "generation", ["c_attn", "mlp.c_proj"]),
}
"""Makes the model that is the base, the class that is fine-tuned, the recipe's word for it, target_modules."""


@cache
def base_of(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[family][0]().eval()


def rows(task: str, count: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(task) + ord(task[0]))
    low = 4 * (ord(task[0]) % 3)
    lengths = [5 + index % 6 for index in range(count)]
    return [torch.randint(low, low + 12, (length,), generator=generator).tolist() for length in lengths]


def recipe_of(folder: Path, family: str, **init: Any) -> dict[str, Any]:
    """A base, data of three tasks, and the recipe of an init over them."""
    _, _, kind, targets = FAMILIES[family]
    base_of(family).save_pretrained(folder / "base")
    adapters = {}
    for task in ("a", "b", "c"):
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows(task)))
        adapters[task] = {"data": str(data), **({"task": kind} if kind else {})}
    return {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "adapters": adapters,
        "calibration": {"batch_size": 5},
        "init": {
            "method": "osrm",
            "r": R,
            "lora_alpha": 6,
            "target_modules": targets,
            "output": str(folder / "init"),
            **init,
        },
    }


def init(recipe: dict[str, Any]) -> Any:
    return ray_merge.init_adapters(recipe, engine="local", workers=2, cache_dir=f"{recipe['output']}-cache")


def features(model: Any, data: list[list[int]], modules: list[str]) -> dict[str, Tensor]:
    """(N, I) float64 inputs of each module, by transformers' own forward and plain hooks, one row at a time."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    paths = dict(model.named_modules())

    def hook(name: str) -> Any:
        return lambda _module, args: seen[name].append(args[0].detach().double().flatten(0, -2))

    hooks = [paths[name].register_forward_pre_hook(hook(name)) for name in modules]
    with torch.no_grad():
        for row in data:
            model(torch.tensor([row]))
    for one in hooks:
        one.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def matrices(folder: Path, which: str) -> dict[str, Tensor]:
    """Module -> its saved lora_A or lora_B."""
    ending = f".lora_{which}.weight"
    stored = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(ending): tensor
        for name, tensor in stored.items()
        if name.endswith(ending)
    }


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, init(recipe_of(folder, request.param))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    init(recipe_of(folder, "bert"))
    return folder


def fresh(family: str) -> Any:
    """A model of the class that is fine-tuned, with the base's weights."""
    base, model_class = base_of(family), FAMILIES[family][1]
    model = model_class(base.config)
    inner = model.bert if family == "bert" else model
    inner.load_state_dict(base.state_dict(), strict=False)
    return model.eval()


def test_loads_in_peft_with_these_values_and_trains(made):
    family, folder, _ = made
    for task in ("a", "c"):
        rows_of, columns_of = (matrices(folder / "init" / task, which) for which in "AB")
        model = PeftModel.from_pretrained(fresh(family), folder / "init" / task, is_trainable=True)
        parameters = dict(model.named_parameters())
        loaded = {name for name in parameters if ".lora_A." in name}
        assert loaded == {f"base_model.model.{name}.lora_A.default.weight" for name in rows_of}
        for name, A_RI in rows_of.items():
            for which, value in (("A", A_RI), ("B", columns_of[name])):
                parameter = parameters[f"base_model.model.{name}.lora_{which}.default.weight"]
                assert torch.equal(parameter, value)
                assert parameter.requires_grad
            assert not columns_of[name].any()
        model(torch.tensor([rows(task)[0]])).logits.square().sum().backward()
        gradients = [parameters[f"base_model.model.{name}.lora_B.default.weight"].grad for name in rows_of]
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_rows_are_the_least_that_the_other_tasks_reach(made):
    family, folder, _ = made
    model, generator = fresh(family), torch.Generator().manual_seed(1)
    tasks = ("a", "b", "c")
    found = {task: matrices(folder / "init" / task, "A") for task in tasks}
    inputs = {task: features(model, rows(task), list(found["a"])) for task in tasks}
    assert len(found["a"]) >= 4
    for task in tasks:
        for module, A_RI in found[task].items():
            gram_II = sum(
                inputs[other][module].T @ inputs[other][module] / len(inputs[other][module]) / 2
                for other in tasks
                if other != task
            )

            def reached(rows_RI: Tensor, gram_II: Tensor = gram_II) -> float:
                return float((rows_RI @ gram_II @ rows_RI.T).trace())

            values = torch.linalg.eigvalsh(gram_II)
            A = A_RI.double()
            assert (A @ A.T - torch.eye(R)).abs().max() < 1e-6
            # A is stored as float32: each row may lean eps into the largest eigenvector.
            assert reached(A) == pytest.approx(
                float(values[:R].sum()), rel=1e-4, abs=1e-10 * float(values[-1])
            )
            for _ in range(100):
                X_IR = torch.randn(A.shape[1], R, generator=generator, dtype=torch.float64)
                assert reached(A) < reached(torch.linalg.qr(X_IR)[0].T)


def test_every_site_is_reported_with_its_share_of_random_rows(made):
    family, folder, result = made
    model, generator = fresh(family), torch.Generator().manual_seed(2)
    adapter = result.adapters[0]
    A_of = matrices(folder / "init" / "a", "A")
    module, site = next(iter(A_of)), next(iter(adapter.sites))
    assert module.endswith(site.removeprefix("model."))
    X = [features(model, rows(task), [module])[module] for task in ("b", "c")]

    def energy(rows_RI: Tensor) -> float:
        return sum(float((x @ rows_RI.double().T).square().sum()) / len(x) for x in X)

    width = A_of[module].shape[1]
    draws = [torch.randn(width, R, generator=generator, dtype=torch.float64) for _ in range(400)]
    mean = sum(energy(torch.linalg.qr(draw)[0].T) for draw in draws) / len(draws)
    assert adapter.sites[site].reach == pytest.approx(energy(A_of[module]) / mean, rel=0.1)


def test_the_cards_code_trains_and_saves_the_head_too(bert, tmp_path):
    folder = bert / "init" / "a"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] is None
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    text = code[1].replace("this folder", str(folder))
    scope: dict[str, Any] = {}
    model = fresh("bert")
    exec(re.sub(r"model = \.\.\..*", "model = given", text), scope | {"given": model}, scope)
    trained = scope["model"]
    names = {name for name, value in trained.named_parameters() if value.requires_grad}
    assert any("classifier.modules_to_save" in name for name in names)
    for name, A_RI in matrices(folder, "A").items():
        assert torch.equal(trained.get_parameter(f"base_model.model.{name}.lora_A.default.weight"), A_RI)
    trained.save_pretrained(tmp_path / "trained")
    assert "base_model.model.classifier.weight" in load_file(
        tmp_path / "trained" / "adapter_model.safetensors"
    )


def test_names_are_those_of_the_class_of_the_task(tmp_path):
    recipe = recipe_of(tmp_path, "bert")
    del recipe["adapters"]["b"]["task"]
    init(recipe)
    assert all(name.startswith("bert.encoder.") for name in matrices(tmp_path / "init" / "a", "A"))
    names = matrices(tmp_path / "init" / "b", "A")
    assert all(name.startswith("encoder.") for name in names)
    model = PeftModel.from_pretrained(BertModel(BERT), tmp_path / "init" / "b", is_trainable=True)
    for name, A_RI in names.items():
        assert torch.equal(model.get_parameter(f"base_model.model.{name}.lora_A.default.weight"), A_RI)


def test_a_target_that_also_names_a_module_of_the_head_is_written_as_whole_names(tmp_path):
    """RobertaForSequenceClassification has a `classifier.dense` that is new, and lacks RobertaModel's pooler."""
    recipe = recipe_of(tmp_path, "bert", target_modules=["dense"])
    config = RobertaConfig(**SIZES, intermediate_size=24, max_position_embeddings=20, pad_token_id=1)
    RobertaModel(config).save_pretrained(tmp_path / "base")
    recipe["adapters"]["b"]["task"] = "FEATURE_EXTRACTION"
    init(recipe)
    modules = matrices(tmp_path / "init" / "a", "A")
    document = json.loads((tmp_path / "init" / "a" / "adapter_config.json").read_text())
    assert document["target_modules"] == sorted(modules)
    model = PeftModel.from_pretrained(RobertaForSequenceClassification(config), tmp_path / "init" / "a")
    adapted = {name for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == {f"base_model.model.{name}.lora_A.default.weight" for name in modules}
    assert json.loads((tmp_path / "init" / "b" / "adapter_config.json").read_text())["target_modules"] == [
        "dense"
    ]
    assert "pooler.dense" in matrices(tmp_path / "init" / "b", "A")


def listing(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_second_run_does_nothing(bert):
    before = listing(bert / "init"), listing(bert / "out")
    result = init(recipe_of(bert, "bert"))
    assert (result.units_run, result.moments) == (0, None)
    assert [adapter.done for adapter in result.adapters] == [False] * 3
    assert (listing(bert / "init"), listing(bert / "out")) == before


def test_a_run_that_was_stopped_is_finished_with_the_same_bytes(tmp_path):
    recipe = recipe_of(tmp_path, "bert")
    ids = {adapter.task: adapter.id for adapter in init(recipe).adapters}
    before = {name: data for name, (data, _) in listing(tmp_path / "init").items()}
    (tmp_path / "init" / "a" / "adapter_config.json").unlink()
    (tmp_path / "init" / "b" / "adapter_config.json").unlink()
    (tmp_path / "init" / "b" / "adapter_model.safetensors").unlink()
    (tmp_path / "out" / ".ray_merge" / "osrm" / ids["b"] / "00001.safetensors").unlink()
    result = init(recipe)
    assert [adapter.done for adapter in result.adapters] == [True, True, False]
    assert result.units_run == 2  # the part that is gone, and b's file; a only lacks its config
    assert result.moments.computed == 0
    assert {name: data for name, (data, _) in listing(tmp_path / "init").items()} == before
    assert not (tmp_path / "out" / ".ray_merge" / "attempts").exists()


def test_factors_of_something_else_under_their_name_end_the_run(tmp_path):
    recipe = recipe_of(tmp_path, "bert")
    ids = {adapter.task: adapter.id for adapter in init(recipe).adapters}
    (tmp_path / "init" / "b" / "adapter_model.safetensors").unlink()
    part = tmp_path / "out" / ".ray_merge" / "osrm" / ids["b"] / "00001.safetensors"
    part.write_bytes((tmp_path / "init" / "a" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(RunFailed, match=r"00001.safetensors is not what init wrote there; remove it"):
        init(recipe)


def test_what_else_is_watched_changes_no_byte(tmp_path):
    """Sites of an adapter in the recipe are watched too and then share their inputs' moments with those of init."""
    recipe = recipe_of(tmp_path, "bert", target_modules=["value"])
    recipe["calibration"], recipe["init"]["others"] = {"samples": 1}, ["a", "b"]
    first = init(recipe)
    assert all(one.null_space > R for one in first.adapters[0].sites.values())  # there is a choice to be made
    model = get_peft_model(BertModel(BERT), LoraConfig(r=1, target_modules=["query", "key"]))
    model.peft_config["default"].base_model_name_or_path = recipe["base_model"]
    model.save_pretrained(tmp_path / "trained")
    recipe["adapters"]["c"]["path"] = str(tmp_path / "trained")
    assert init(recipe).units_run == 0
    recipe["init"]["output"] = str(tmp_path / "again")
    recipe["store"] = str(tmp_path / "store")
    again = init(recipe)
    assert again.moments.computed > 0
    assert [adapter.id for adapter in again.adapters] == [adapter.id for adapter in first.adapters]
    before, after = (listing(tmp_path / name) for name in ("init", "again"))
    assert {name: data for name, (data, _) in before.items()} == {
        name: data for name, (data, _) in after.items()
    }


@pytest.mark.parametrize("spoilt", ["adapter_model.safetensors", "adapter_config.json"])
def test_other_content_is_refused_before_anything_is_written(tmp_path, spoilt):
    recipe = recipe_of(tmp_path, "bert")
    folder = tmp_path / "init" / "b"
    folder.mkdir(parents=True)
    if spoilt.endswith("json"):
        (folder / spoilt).write_text('{"r": 4}')
    else:
        save_file({"x": torch.ones(1)}, folder / spoilt)
    with pytest.raises(OutputConflict, match=r"choose another init\.output"):
        init(recipe)
    assert list(listing(tmp_path / "init")) == [f"b/{spoilt}"]
    assert not (tmp_path / "out").exists()


def test_another_rank_in_the_same_place_is_a_conflict_that_says_so(bert):
    recipe = recipe_of(bert, "bert", r=2)
    path = bert / "recipe.json"
    path.write_text(json.dumps(recipe))
    with pytest.raises(OutputConflict, match=r"r: 3 there, 2 here"):
        init(recipe)
    assert _exit_code(["init", str(path), "--engine", "local", "--cache-dir", str(bert / "out-cache")]) == 2


@pytest.mark.parametrize(
    ("key", "given", "says"),
    [
        ("init", {"mode": "means"}, r'init\.mode: "covariance" there, "means" here'),
        ("calibration", {"samples": 4}, r"others\[0\]\.calibration\.samples: 128 there, 4 here"),
    ],
)
def test_other_factors_in_the_same_place_are_a_conflict_that_names_the_changed_input(bert, key, given, says):
    recipe = recipe_of(bert, "bert")
    before = listing(bert / "init")
    recipe[key].update(given)
    with pytest.raises(OutputConflict, match=says):
        init(recipe)
    assert listing(bert / "init") == before


def change(recipe: dict[str, Any], what: str) -> dict[str, Any]:
    """A recipe with one thing wrong."""
    if what == "no init":
        del recipe["init"]
    elif what == "alone":
        recipe["adapters"] = {"a": recipe["adapters"]["a"]}
    elif what == "no data":
        del recipe["adapters"]["c"]["data"]
    elif what == "project":
        recipe["init"]["project"] = True
    elif what == "inside":
        recipe["init"]["output"] = f"{recipe['base_model']}/init"
    else:
        recipe["init"].update(
            {
                "rank": {"r": HIDDEN + 1},
                "target": {"target_modules": ["q_proj"]},
                "others": {"others": ["a"]},
                "braces": {"output": "{date}"},
            }[what]
        )
    return recipe


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no init", "the recipe has no init"),
        ("alone", "a has no other one"),
        ("no data", "adapters.c has no data, which init needs"),
        ("project", "adapter a has no path, so there is nothing to project"),
        ("inside", "lies inside the base model"),
        ("rank", "17 orthonormal rows do not fit the 16 inputs of encoder.layer.0.attention"),
        ("target", "'q_proj' names no linear layer of BertModel"),
        ("others", "a has no other one"),
        ("braces", "braces mean nothing here"),
    ],
)
def test_bad_recipes_are_refused_and_nothing_is_written(tmp_path, what, says):
    recipe = change(recipe_of(tmp_path, "bert"), what)
    with pytest.raises(RecipeError, match=says):
        init(recipe)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "init").exists()


def test_a_ceiling_that_cannot_be_kept_is_refused(tmp_path):
    recipe = recipe_of(tmp_path, "bert")
    with pytest.raises(Refusal, match="--memory"):
        ray_merge.init_adapters(recipe, engine="local", memory="1MB", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_few_samples_leave_a_null_space_and_the_card_says_so(tmp_path):
    recipe = recipe_of(tmp_path, "bert")
    recipe["calibration"] = {"samples": 1}
    recipe["init"]["others"] = ["a", "b"]
    result = init(recipe)
    adapter = result.adapters[0]  # clear of b alone, which has fewer tokens than there are inputs
    assert all(one.null == R < one.null_space for one in adapter.sites.values())
    assert all(one.reach == 0 for one in adapter.sites.values())
    assert "Rank-deficient: at 8 of 8 site(s)" in (tmp_path / "init" / "a" / "README.md").read_text()
    free = [one for one in matrices(tmp_path / "init" / "a", "A").values() if one.shape[1] == HIDDEN]
    others = [one for one in matrices(tmp_path / "init" / "b", "A").values() if one.shape[1] == HIDDEN]
    overlap = max(float((x @ y.T).norm()) for x, y in zip(free, others, strict=True))
    assert overlap < 0.999 * R**0.5  # tasks do not start from one and the same A


def test_means_of_the_others_are_not_reached_at_all_and_rows_have_pefts_norm(tmp_path):
    result = init(recipe_of(tmp_path, "bert", mode="means", row_scale="peft"))
    assert "mode: covariance would tell them apart" in " ".join(result.remarks["a"])
    found = matrices(tmp_path / "init" / "a", "A")
    inputs = [features(fresh("bert"), rows(task), list(found)) for task in ("b", "c")]
    for name, A_RI in found.items():
        assert torch.allclose(A_RI.norm(dim=1), torch.full((R,), 3**-0.5), atol=1e-6)
        for one in inputs:
            mean_I = one[name].mean(0)
            assert (A_RI.double() @ mean_I).norm() < 1e-5 * mean_I.norm()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_trained_adapters_are_projected_and_the_loss_is_stated(tmp_path, family):
    recipe = recipe_of(tmp_path, family, project=True, row_scale="peft", r=HIDDEN // 2)
    kind = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    deltas = {}
    for task in recipe["adapters"]:
        train(recipe, family, task, tmp_path, lora_alpha=3, task_type=kind)
        deltas[task] = dense(tmp_path / task, 1.5)
    result = init(recipe)
    for adapter in result.adapters:
        folder = tmp_path / "init" / adapter.task
        PeftModel.from_pretrained(fresh(family), folder)
        after, A_of = dense(folder, 6 / (HIDDEN // 2)), matrices(folder, "A")
        lost = []
        for name, dW in deltas[adapter.task].items():
            Q_RI = A_of[name].double() * 3**0.5
            assert torch.allclose(after[name], dW @ Q_RI.T @ Q_RI, atol=1e-5)
            lost.append(float((dW - after[name]).norm() / dW.norm()))
        assert sorted(one.lost for one in adapter.sites.values()) == pytest.approx(sorted(lost), rel=1e-4)
        assert f"{max(lost):.1%} at the worst" in (folder / "README.md").read_text()
        heads = [
            load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / adapter.task)
        ]
        kept = [name for name in heads[1] if ".lora_" not in name]
        assert len(kept) == (2 if family == "bert" else 0)
        assert all(torch.equal(heads[0][name], heads[1][name]) for name in kept)


def train(recipe: dict[str, Any], family: str, task: str, folder: Path, **options: Any) -> None:
    """Give a task of the recipe an adapter with the recipe's target modules."""
    config = LoraConfig(r=2, target_modules=recipe["init"]["target_modules"], **options)
    model = get_peft_model(fresh(family), config)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    model.peft_config["default"].base_model_name_or_path = recipe["base_model"]
    model.save_pretrained(folder / task)
    recipe["adapters"][task]["path"] = str(folder / task)


def test_what_a_projected_adapters_tensors_are_taken_for_is_part_of_its_id(tmp_path):
    recipe = recipe_of(tmp_path, "llama", project=True, target_modules=["q_proj", "o_proj"], r=8)
    for task in recipe["adapters"]:
        train(recipe, "llama", task, tmp_path, task_type="CAUSAL_LM")
    before = init(recipe)
    swap = {r"q_proj": "none", "o_proj": "q_proj", "none": "o_proj"}  # of one shape
    recipe["adapters"]["b"]["key_mapping"] = swap
    with pytest.raises(OutputConflict, match=r"init/b/.* \(projected\.fitted: "):
        init(recipe)
    recipe["init"]["output"] = str(tmp_path / "again")
    again = init(recipe)
    same = [one.id == other.id for one, other in zip(before.adapters, again.adapters, strict=True)]
    assert same == [True, False, True]


def test_a_dora_adapter_cannot_be_projected_and_is_told_so(tmp_path):
    recipe = recipe_of(tmp_path, "bert", project=True)
    for task in recipe["adapters"]:
        train(recipe, "bert", task, tmp_path, task_type="SEQ_CLS", use_dora=task == "b")
    with pytest.raises(
        RecipeError, match=r"adapter b has .*, and it is DoRA there, .*; leave the adapter out$"
    ):
        init(recipe)
    recipe["init"]["target_modules"] = ["key"]
    with pytest.raises(
        RecipeError, match=r"adapter a has .*target_modules does not name it; name it there, or"
    ):
        init(recipe)
    assert not (tmp_path / "init").exists()


def dense(folder: Path, scale: float) -> dict[str, Tensor]:
    """Module -> (out, in) float64 update of a saved adapter."""
    rows_of, columns_of = matrices(folder, "A"), matrices(folder, "B")
    return {name: scale * columns_of[name].double() @ A_RI.double() for name, A_RI in rows_of.items()}
