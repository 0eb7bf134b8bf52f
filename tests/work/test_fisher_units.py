"""Fisher diagonals through stages against autograd on the whole PEFT model in float64, one example at a time."""

import copy
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import NormalDist

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ray_merge
from ray_merge.drive.fisher import ensure_fisher, fisher_kind, norms
from ray_merge.drive.identify import merge_inputs, read_inputs_identity
from ray_merge.drive.moments import Work, object_stems
from ray_merge.drive.outputs import store_url
from ray_merge.drive.resolved import resolved_recipe
from ray_merge.errors import RecipeError, Refusal, RunFailed
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.models.losses import drawn_labels, expected_passes, expected_score, label_score, next_tokens
from ray_merge.moments import Engines, fit_all
from ray_merge.plan import make_plan, read_inputs
from ray_merge.plan.fisher import Likelihood, plan_fisher
from ray_merge.plan.moments import STAGE_RUNTIME_BYTES, TaskData, tasks_with_data
from ray_merge.recipe import expand, load_recipe
from ray_merge.recipe.model import Evaluation
from ray_merge.spec import Factor
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores
from ray_merge.work.fisher_units import drawing, with_rows
from ray_merge.work.moments_file import MomentsFile
from ray_merge.work.squares import Squares
from zoo import relative_error

ROWS = 7
TOLERANCE = 1e-4


def lora_adapter(model, folder: Path, targets, *, seed: int, **options) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, **options))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.copy_(0.3 * torch.randn(value.shape))
    wrapped.save_pretrained(folder)
    return folder


def write_rows(path: Path, label, vocabulary: int, seed: int) -> Path:
    draw = Random(seed)
    rows = [
        {"input_ids": [draw.randrange(1, vocabulary) for _ in range(2 + index % 5)], "label": label(index)}
        for index in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT without head, a classifier of 3 classes and a regression on it, and their rows."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    folder = tmp_path_factory.mktemp("fisher_bert")
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    BertModel(BertConfig(num_hidden_layers=3, **size)).save_pretrained(folder / "base")
    for name, n_labels, targets in (("three", 3, ["query", "dense"]), ("one", 1, ["query", "value"])):
        model = BertForSequenceClassification.from_pretrained(folder / "base", num_labels=n_labels)
        # `dense` takes the pooler's too, which is a site outside of the blocks.
        lora_adapter(
            model, folder / name, targets, seed=n_labels, task_type="SEQ_CLS", exclude_modules=["classifier"]
        )
    write_rows(folder / "three.jsonl", lambda i: (2 * i) % 3, 40, 1)
    write_rows(folder / "one.jsonl", lambda i: 0.25 * i - 1, 40, 2)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama whose config names no padding token, with a causal adapter and one with a classifier."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("fisher_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    lora_adapter(model, folder / "text", ["q_proj", "down_proj"], seed=1, task_type="CAUSAL_LM")
    model = LlamaForSequenceClassification.from_pretrained(folder / "base", num_labels=4)
    lora_adapter(model, folder / "four", ["q_proj", "v_proj"], seed=2, task_type="SEQ_CLS")
    write_rows(folder / "text.jsonl", lambda _: 0, 40, 3)
    write_rows(folder / "four.jsonl", lambda i: i % 4, 40, 4)
    return folder


def recipe_of(folder: Path, output: Path, names, stages: int = 1, **more):
    adapters = {
        name: {
            "path": str(folder / name),
            "data": str(folder / f"{name}.jsonl"),
            "eval": {"path": str(folder / f"{name}.jsonl"), "metric": "accuracy"},
        }
        for name in names
    }
    return {
        "base_model": str(folder / "base"),
        "output": str(output),
        "stages": stages,
        "adapters": adapters,
        "calibration": {"samples": 100, "max_length": 64, "batch_size": 3, "seed": 5},
        **more,
    }


def computed(recipe, labels: str, cache: Path):
    parsed, _ = load_recipe(recipe)
    fitted = fit_all(parsed, cache)
    engines = Engines(engine="local", workers=2, cache=cache)
    found = tasks_with_data(parsed, list(parsed.adapters), "fisher")
    tasks = [TaskData(task.name, task.data, fitted.adapters[task.name]) for task in found]
    work = Work(
        store=store_url(parsed),
        adapters=fitted.adapters,
        sites=fitted.sites,
        cache=cache,
        device="cpu",
        make_pool=engines.make_pool,
    )
    return ensure_fisher(
        plan_fisher(parsed, fitted.base, tasks, fitted.sites, labels, workers=2), work
    ), fitted


def diagonals(result, task: str) -> dict[str, torch.Tensor]:
    found = {}
    for site, info in result.index.objects[task].items():
        with safe_open(Path(result.index.store) / info.path, "pt") as file:
            found[site] = file.get_tensor(f"{site}.fisher")
    return found


def peft_model(folder: Path, name: str, kind: str, **options):
    import transformers
    from peft import PeftModel

    base = getattr(transformers, kind).from_pretrained(folder / "base", **options)
    return PeftModel.from_pretrained(base, folder / name).double().eval().merge_and_unload()


def reference(folder: Path, name: str, model, sites: dict[str, str], roots) -> dict[str, torch.Tensor]:
    """Mean over rows of the summed squares of the gradients of `roots(row, logits, ids, label)`."""
    for value in model.parameters():
        value.requires_grad_(False)
    weights = [model.get_submodule(path).weight.requires_grad_() for path in sites.values()]
    sums = [torch.zeros_like(weight) for weight in weights]
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        label = row.pop("label")
        given = {key: torch.tensor([values]) for key, values in row.items()}
        logits = model(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()}).logits[0]
        for root in roots(number, logits, given.get("input_ids", [None])[0], label):
            for total, gradient in zip(
                sums, torch.autograd.grad(root, weights, retain_graph=True), strict=True
            ):
                total += gradient**2
    return {site: total / len(rows) for site, total in zip(sites, sums, strict=True)}


def pick(logits, share: float) -> int:
    sums = torch.softmax(logits.detach(), -1).cumsum(-1)
    return int((sums <= share).sum())


def classifier_roots(labels: str, task: str):
    def roots(number, logits, _ids, label):
        log_p = torch.log_softmax(logits, -1)
        if labels == "expected":
            return [one.detach().exp().sqrt() * one for one in log_p]
        drawn = pick(logits, drawing(5, task)(number).random())
        return [log_p[label if labels == "empirical" else drawn]]

    return roots


def regression_roots(labels: str, task: str):
    def roots(number, logits, _ids, label):
        if labels == "expected":
            return [logits[0]]
        if labels == "empirical":
            return [-0.5 * (logits[0] - label) ** 2]
        share = (int(drawing(5, task)(number).random() * 2**52) + 0.5) / 2**52
        return [NormalDist().inv_cdf(share) * logits[0]]

    return roots


def causal_roots(labels: str, task: str):
    def roots(number, logits, ids, _label):
        draw = drawing(5, task)(number)
        following = [
            int(ids[place + 1]) if labels == "empirical" else pick(logits[place], draw.random())
            for place in range(len(ids) - 1)
        ]
        log_p = torch.log_softmax(logits, -1)
        return [sum(log_p[place, token] for place, token in enumerate(following))]

    return roots


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for site, values in found.items():
        assert values.dtype == torch.float32
        assert float(wanted[site].max()) > 0
        assert relative_error(values, wanted[site]) < TOLERANCE, site


@pytest.mark.parametrize(
    ("labels", "stages"), [("expected", 1), ("expected", 3), ("sampled", 3), ("empirical", 3)]
)
def test_encoder_classification_and_regression(bert, tmp_path, labels, stages):
    recipe = recipe_of(bert, tmp_path / "out", ["three", "one"], stages)
    recipe["calibration"]["batch_size"] = 3 if stages == 3 else 4
    result, _ = computed(recipe, labels, tmp_path / "cache")
    assert result.stages == stages
    assert "pooler.dense" in result.index.objects["one"]
    for name, n_labels, roots in (("three", 3, classifier_roots), ("one", 1, regression_roots)):
        model = peft_model(bert, name, "BertForSequenceClassification", num_labels=n_labels)
        sites = {site: f"bert.{site}" for site in result.index.objects[name]}
        wanted = reference(bert, name, model, sites, roots(labels, name))
        assert_same(diagonals(result, name), wanted)


@pytest.mark.parametrize(("labels", "stages"), [("sampled", 1), ("sampled", 3), ("empirical", 3)])
def test_decoder_text_and_classification_in_two_pools(llama, tmp_path, labels, stages):
    recipe = recipe_of(llama, tmp_path / "out", ["text", "four"], stages)
    result, _ = computed(recipe, labels, tmp_path / "cache")
    model = peft_model(llama, "text", "LlamaForCausalLM")
    sites = {site: site for site in result.index.objects["text"]}
    assert_same(
        diagonals(result, "text"), reference(llama, "text", model, sites, causal_roots(labels, "text"))
    )
    model = peft_model(llama, "four", "LlamaForSequenceClassification", num_labels=4)
    wanted = reference(llama, "four", model, sites, classifier_roots(labels, "four"))
    assert_same(diagonals(result, "four"), wanted)


def test_transposed_weights(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    lora_adapter(model, tmp_path / "g", ["c_attn"], seed=1, task_type="CAUSAL_LM", fan_in_fan_out=True)
    write_rows(tmp_path / "g.jsonl", lambda _: 0, 30, 1)
    result, _ = computed(recipe_of(tmp_path, tmp_path / "out", ["g"], 2), "empirical", tmp_path / "cache")
    found = diagonals(result, "g")
    assert {tuple(values.shape) for values in found.values()} == {(16, 48)}
    model = peft_model(tmp_path, "g", "GPT2LMHeadModel")
    sites = {site: f"transformer.{site.removeprefix('transformer.')}" for site in found}
    assert_same(found, reference(tmp_path, "g", model, sites, causal_roots("empirical", "g")))


def test_a_layer_that_is_shared_by_all_blocks(tmp_path):
    from transformers import AlbertConfig, AlbertForSequenceClassification, AlbertModel

    torch.manual_seed(0)
    size = {"vocab_size": 30, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 24}
    config = AlbertConfig(num_hidden_layers=3, num_attention_heads=2, **size)
    AlbertModel(config).save_pretrained(tmp_path / "base")
    model = AlbertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    lora_adapter(model, tmp_path / "two", ["query", "ffn"], seed=1, task_type="SEQ_CLS")
    write_rows(tmp_path / "two.jsonl", lambda i: i % 2, 30, 1)
    result, _ = computed(recipe_of(tmp_path, tmp_path / "out", ["two"]), "expected", tmp_path / "cache")
    found = diagonals(result, "two")
    model = peft_model(tmp_path, "two", "AlbertForSequenceClassification", num_labels=2)
    sites = {site: f"albert.{site}" for site in found}
    assert_same(found, reference(tmp_path, "two", model, sites, classifier_roots("expected", "two")))


def test_images(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=4, patch_size=2,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    model = ViTForImageClassification.from_pretrained(tmp_path / "base")
    lora_adapter(model, tmp_path / "v", ["q_proj", "fc2"], seed=1, modules_to_save=["classifier"])
    pixels = torch.randn(5, 1, 4, 4).tolist()
    rows = [{"pixel_values": image, "label": index % 3} for index, image in enumerate(pixels)]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(tmp_path, tmp_path / "out", ["v"], 2)
    result, fitted = computed(recipe, "expected", tmp_path / "cache")
    found = diagonals(result, "v")
    model = peft_model(tmp_path, "v", "ViTForImageClassification")
    wanted = reference(
        tmp_path, "v", model, dict(fitted.adapters["v"].modules), classifier_roots("expected", "v")
    )
    assert_same(found, wanted)


def test_a_run_merges_by_them_and_reuses_them(bert, tmp_path):
    merges = [
        {"name": "m", "merge_method": "fisher", "parameters": {"normalize": False, "labels": "sampled"}}
    ]
    recipe = recipe_of(bert, tmp_path / "out", ["three", "one"], 2, merges=merges)
    ray_merge.run(recipe, engine="local", workers=2, cache_dir=tmp_path / "cache")
    result, fitted = computed(recipe, "sampled", tmp_path / "cache")
    assert (result.computed, result.units_run, result.checks) == (0, 0, ())

    site = "encoder.layer.1.attention.self.query"
    found = {name: diagonals(result, name) for name in ("three", "one")}
    factors = []
    for name in ("three", "one"):
        with safe_open(bert / name / "adapter_model.safetensors", "pt") as file:
            A, B = (file.get_tensor(f"base_model.model.bert.{site}.lora_{x}.weight") for x in "AB")
        factors.append(Factor(B, A, 2.0))
    update = merge_factors(
        "fisher", factors, moments=[found[name][site] for name in found], normalize=False
    ).dense()
    with safe_open(bert / "base/model.safetensors", "pt") as file:
        base = file.get_tensor(f"{site}.weight")
    merged = {}
    for path in (tmp_path / "out/m").glob("model-*.safetensors"):
        with safe_open(path, "pt") as file:
            merged |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert relative_error(merged[f"{site}.weight"] - base, update) < 1e-4

    for name, some in found.items():
        own = [
            values.double().square().sum()
            for one, values in some.items()
            if one in fitted.adapters[name].factors
        ]
        assert len(own) == {"three": 13, "one": 6}[name]
        assert math.isclose(result.index.norms[name], float(sum(own)) ** 0.5, rel_tol=1e-6)
        info = result.index.objects[name][site]
        assert MomentsFile(Path(result.index.store) / info.path).norms[site] > 0


def test_only_what_is_missing_is_made_again_with_the_same_bytes(bert, tmp_path):
    recipe = recipe_of(bert, tmp_path / "out", ["three", "one"], 3)
    result, _ = computed(recipe, "sampled", tmp_path / "cache")
    lost = next(
        info.path for site, info in result.index.objects["one"].items() if site.startswith("encoder.layer.1.")
    )
    path = Path(result.index.store) / lost
    before = path.read_bytes()
    path.unlink()
    again, _ = computed({**recipe, "stages": 2}, "sampled", tmp_path / "cache")
    assert (again.computed, again.reused) == (1, result.computed - 1)
    assert [check.task for check in again.checks] == ["one"]
    assert path.read_bytes() == before


def test_ids_depend_on_labels_their_column_and_the_seed(bert, tmp_path):
    recipe = recipe_of(bert, tmp_path / "out", ["three"])
    found = [
        list(ids_of(recipe, labels, tmp_path).values()) for labels in ("expected", "sampled", "empirical")
    ]
    recipe["adapters"]["three"]["eval"]["label"] = "other"
    found.append(list(ids_of(recipe, "empirical", tmp_path).values()))
    recipe["calibration"]["seed"] = 6
    found.append(list(ids_of(recipe, "sampled", tmp_path).values()))
    assert len({one for some in found for one in some}) == sum(map(len, found)) == 5 * 4
    recipe["calibration"]["precision"] = "sketch"
    assert list(ids_of(recipe, "sampled", tmp_path).values()) == found[-1]


def test_ids_depend_on_what_the_adapter_does_with_its_tensors(bert, tmp_path):
    recipe = recipe_of(bert, tmp_path / "out", ["three"])
    before = ids_of(recipe, "sampled", tmp_path)
    recipe["adapters"]["three"]["key_mapping"] = {
        r"layer\.0\.": "layer.7.", r"layer\.1\.": "layer.0.", r"layer\.7\.": "layer.1."
    }  # fmt: skip
    after = ids_of(recipe, "sampled", tmp_path)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


def merge_document(recipe, method: str, **parameters):
    parsed, source = load_recipe(
        {**recipe, "merges": [{"name": "m", "merge_method": method, "parameters": parameters}]}
    )
    merges = expand(parsed, source)
    plan = make_plan(parsed, merges, *read_inputs(parsed, merges))
    digests = DigestCache(Path(recipe["output"]) / "digests")
    document = merge_inputs(plan, merges[0], read_inputs_identity(plan, digests, Stores()))
    return document, plan


def test_the_id_of_a_merge_by_fisher_covers_what_decides_it_and_no_more(llama, tmp_path, monkeypatch):
    recipe = recipe_of(llama, tmp_path / "out", ["text"])  # its adapter has no head
    before, _ = merge_document(recipe, "fisher", labels="sampled")
    recipe["calibration"] |= {"features": "adapter", "precision": "sketch", "sketch_rows": 9}
    assert merge_document(recipe, "fisher", labels="sampled")[0] == before
    diagnosed, _ = merge_document({**recipe, "diagnostics": True}, "fisher", labels="sampled")
    assert diagnosed["calibration"]["features"] == "adapter"
    sketched, _ = merge_document(recipe, "regmean")
    assert sketched["calibration"]["sketch_rows"] == 9
    recipe["calibration"]["precision"] = "full"
    assert "sketch_rows" not in merge_document(recipe, "regmean")[0]["calibration"]
    recipe["adapters"]["text"]["task"] = "generation"
    assert merge_document(recipe, "fisher", labels="sampled")[0] != before
    assert "task" not in merge_document(recipe, "regmean")[0]["adapters"][0]

    monkeypatch.chdir(llama)
    recipe["adapters"]["text"]["eval"]["path"] = "text.jsonl"
    empirical, plan = merge_document(recipe, "fisher", labels="empirical")
    assert empirical["data"]["text"]["labels"]["column"] == "label"
    written = yaml.safe_load(resolved_recipe(plan, plan.merges[0], "0" * 64))
    assert written["adapters"]["text"]["eval"]["path"] == str(llama / "text.jsonl")
    recipe["adapters"]["text"]["eval"]["path"] = "nowhere.jsonl"
    with pytest.raises(RecipeError, match=r"adapters\.text\.eval: nowhere\.jsonl"):
        merge_document(recipe, "fisher", labels="empirical")


def test_a_task_without_any_fisher_information_is_named(bert, tmp_path):
    shutil.copytree(bert / "three", tmp_path / "flat")
    shutil.copytree(bert / "base", tmp_path / "base")
    shutil.copy(bert / "three.jsonl", tmp_path / "flat.jsonl")
    weights = load_file(tmp_path / "flat/adapter_model.safetensors")
    heads = {name: torch.zeros_like(value) for name, value in weights.items() if "classifier" in name}
    assert heads
    save_file({**weights, **heads}, tmp_path / "flat/adapter_model.safetensors")
    recipe = recipe_of(tmp_path, tmp_path / "out", ["flat"])
    with pytest.raises(RunFailed, match="of flat is zero at every site"):
        computed(recipe, "expected", tmp_path / "cache")


def test_norms_are_read_from_whole_objects_of_the_tasks_own_sites(bert, tmp_path):
    recipe = recipe_of(bert, tmp_path / "out", ["one"])
    result, fitted = computed(recipe, "sampled", tmp_path / "cache")
    # All of its own sites may be such as have no Fisher information (without_moments: average).
    elsewhere = replace(fitted.adapters["one"], factors={})
    assert norms(result.index, {"one": elsewhere}, Stores()) == {"one": 0.0}
    info = next(iter(result.index.objects["one"].values()))
    path = Path(result.index.store) / info.path
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RunFailed, match=f"{info.path} is damaged .*remove it"):
        computed(recipe, "sampled", tmp_path / "cache")


def test_the_data_of_every_class_are_looked_at_before_any_class_writes(llama, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text('{"input_ids": [3]}\n{"input_ids": [5]}\n')
    recipe = recipe_of(llama, tmp_path / "out", ["four", "text"])
    whole = copy.deepcopy(recipe)
    recipe["adapters"]["text"]["data"] = str(short)
    refuse(recipe, "sampled", tmp_path, "adapters.text.data", "two tokens")
    done, _ = computed(whole, "sampled", tmp_path / "cache")
    assert [check.task for check in done.checks] == ["four", "text"]
    # Now nothing is missing of the first class, so it starts no pool.
    with pytest.raises(RecipeError, match="two tokens"):
        computed(recipe, "sampled", tmp_path / "cache")


def ids_of(recipe, labels: str, tmp_path: Path):
    plan = fisher_plan(recipe, labels, tmp_path)
    return object_stems(
        plan.stages, fisher_kind(plan.likelihoods), DigestCache(tmp_path / "digests"), Stores()
    )[0]


def fisher_plan(recipe, labels: str, tmp_path: Path, memory_bytes: int | None = None):
    parsed, _ = load_recipe(recipe)
    fitted = fit_all(parsed, tmp_path / "cache")
    tasks = [TaskData(name, one.data, fitted.adapters[name]) for name, one in parsed.adapters.items()]
    (plan,) = plan_fisher(parsed, fitted.base, tasks, fitted.sites, labels, memory_bytes=memory_bytes)
    return plan


def refuse(recipe, labels: str, tmp_path: Path, *words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        computed(recipe, labels, tmp_path / "cache")
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out/.ray_merge/moments").exists()


def test_what_cannot_be_computed_is_refused_before_anything_is_written(bert, llama, tmp_path):
    text = recipe_of(llama, tmp_path / "out", ["text"])
    refuse(text, "expected", tmp_path, "adapters.text", "sampled")
    recipe = recipe_of(bert, tmp_path / "out", ["three"])
    other = write_rows(tmp_path / "other.jsonl", lambda i: i % 3, 40, 9)
    recipe["adapters"]["three"]["eval"]["path"] = str(other)
    refuse(recipe, "empirical", tmp_path, "adapters.three", str(other), "same path")
    recipe["adapters"]["three"]["data"] = str(write_rows(other, lambda i: 3 * (i == 4), 40, 9))
    refuse(recipe, "empirical", tmp_path, "other.jsonl", "'label' holds 3", "from 0 to 2")
    del recipe["adapters"]["three"]["eval"]
    refuse(recipe, "empirical", tmp_path, "adapters.three", "no eval")
    recipe["adapters"]["three"]["task"] = "TOKEN_CLS"
    refuse(recipe, "sampled", tmp_path, "BertForTokenClassification", "regmean")


def test_an_adapter_without_its_head_and_too_many_classes_are_refused(bert, tmp_path):
    from transformers import BertForSequenceClassification, BertModel

    for name in ("base", "three.jsonl"):
        (tmp_path / name).symlink_to(bert / name)
    model = BertModel.from_pretrained(bert / "base")
    lora_adapter(model, tmp_path / "three", ["query"], seed=1)
    recipe = recipe_of(tmp_path, tmp_path / "out", ["three"])
    recipe["adapters"]["three"]["task"] = "classification"
    refuse(recipe, "sampled", tmp_path, "adapters.three", "classifier.weight", "modules_to_save")
    model = BertForSequenceClassification.from_pretrained(bert / "base", num_labels=101)
    (tmp_path / "many.jsonl").symlink_to(bert / "three.jsonl")
    lora_adapter(model, tmp_path / "many", ["query"], seed=1, task_type="SEQ_CLS")
    recipe = recipe_of(tmp_path, tmp_path / "out", ["many"])
    refuse(recipe, "expected", tmp_path, "101", "at most 100", "sampled")


def test_a_ceiling_is_kept_by_more_stages(bert, tmp_path):
    recipe = {**recipe_of(bert, tmp_path / "out", ["one"]), "stages": None}
    whole = fisher_plan(recipe, "sampled", tmp_path).stages
    assert len(whole.stages) == 1
    cut = fisher_plan(recipe, "sampled", tmp_path, whole.peak_bytes - 1).stages
    assert len(cut.stages) > 1
    assert cut.peak_bytes < whole.peak_bytes
    with pytest.raises(Refusal, match="--memory"):
        fisher_plan(recipe, "sampled", tmp_path, STAGE_RUNTIME_BYTES + 1)


def test_labels_that_are_text_are_read_by_the_names_in_the_base(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"label": one}) + "\n" for one in ("no", 1, 1.0, True, "no")))
    evaluation = Evaluation(path=str(path), metric="accuracy")
    likelihood = Likelihood(head="classification", labels="empirical", n_outputs=2, evaluation=evaluation)
    batches = [{"input_ids": torch.ones(n, 3).numpy()} for n in (2, 3)]

    def labels(names):
        found = with_rows(batches, [4, 3, 2, 1, 0], likelihood, "t", names, Stores())
        assert [one["rows"].tolist() for one in found] == [[4, 3], [2, 1, 0]]
        return [label for one in found for label in one["labels"].tolist()]

    assert labels({"no": 0}) == [0, 1, 1, 1, 0]
    with pytest.raises(RecipeError, match="'no', but the task's head needs a class from 0 to 1"):
        labels({"yes": 0})


def test_no_token_follows_the_last_one_or_padding():
    ids, mask = (
        torch.tensor([[5, 6, 7], [8, 9, 0], [4, 0, 0]]),
        torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
    )
    assert next_tokens(ids, mask).tolist() == [[6, 7, -1], [9, -1, -1], [-1, -1, -1]]
    logits = torch.randn(1, 3, 10, requires_grad=True)
    label_score("causal", logits, next_tokens(ids[2:], mask[2:])).backward()
    assert not logits.grad.any()


def test_expected_squares_of_sure_models_are_finite_and_exact():
    logits = torch.tensor([[1000.0, 0, 0, -3], [0, 0, 1000.0, 0], [0, 20.0, 0, 3]], requires_grad=True)
    total = torch.zeros_like(logits)
    for index in range(expected_passes("classification", 4)):
        (gradient,) = torch.autograd.grad(expected_score("classification", logits, index), logits)
        total += gradient**2
    p = torch.softmax(logits.detach().double(), -1)
    rest = torch.stack([p[:, [j for j in range(4) if j != i]].sum(-1) for i in range(4)], -1)
    assert torch.allclose(total.double(), p * rest, rtol=1e-5, atol=0)


class TestSquares:
    X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    D = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))

    def squares(self, calls=1, outside=()):
        made = Squares({"m": "s"}, frozenset(outside), frozenset(), {"m": calls})
        made.begin(2, 3)
        return made

    def test_a_module_that_runs_twice_adds_before_it_squares(self):
        squares = self.squares(calls=2)
        squares("m", self.X, self.D)
        squares("m", 2 * self.X, self.D)
        squares.end()
        gradients = torch.einsum("blo,bli->boi", self.D, 3 * self.X)
        assert relative_error(squares.means({"s": "m"}, 2)["s"], gradients.square().mean(0)) < 1e-6

    def test_flat_rows_are_those_of_examples_in_turn(self):
        whole, flat = self.squares(), self.squares()
        whole("m", self.X, self.D)
        flat("m", self.X.reshape(6, 4), self.D.reshape(6, 5))
        assert torch.equal(whole.means({"s": "m"}, 2)["s"], flat.means({"s": "m"}, 2)["s"])

    @pytest.mark.parametrize("rows", [4, 2])
    def test_rows_of_no_known_example_are_refused(self, rows):
        with pytest.raises(RunFailed, match="batch_size: 1"):
            self.squares()("m", torch.ones(rows, 4), torch.ones(rows, 5))
        if rows == 2:
            self.squares(outside=["s"])("m", torch.ones(rows, 4), torch.ones(rows, 5))

    def test_a_site_without_gradient_and_one_that_overflows_fail(self):
        squares = self.squares()
        with pytest.raises(RunFailed, match="s got no gradient"):
            squares.means({"s": "m"}, 2)
        squares("m", self.X, self.D * math.inf)
        with pytest.raises(RunFailed, match="Inf or NaN"):
            squares.means({"s": "m"}, 2)


def test_drawn_labels_follow_the_models_probabilities():
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(4000, 3)
    drawn = drawn_labels("classification", logits, None, None, [Random(i) for i in range(4000)])
    counts = Counter(drawn.tolist())
    for index, p in enumerate(torch.softmax(logits[0], -1).tolist()):
        assert abs(counts[index] / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000)
    residuals = drawn_labels("regression", logits[:, :1], None, None, [Random(i) for i in range(4000)])
    assert abs(float(residuals.mean())) < 5 / math.sqrt(4000)
    assert abs(float(residuals.var()) - 1) < 5 * math.sqrt(2 / 4000)
