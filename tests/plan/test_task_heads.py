"""What each task of an entropy method predicts, from headers, and what is refused because it predicts no classes."""

import itertools

import pytest
import torch
import transformers
from safetensors.torch import save_file

from ray_merge.errors import AdapterError, RecipeError
from ray_merge.moments import fit_all
from ray_merge.plan.moments import TaskData
from ray_merge.plan.task_heads import TaskHead, plan_heads
from ray_merge.plan.text_head import HeadFile
from ray_merge.recipe import load_recipe
from ray_merge.spec import Merge
from tiny import factors, write_adapter

WIDTH, VISION, PROJECTED = 8, 12, 6
SMALL = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT_QUERY = "bert.encoder.layer.0.attention.self.query"
LLAMA_QUERY = "model.layers.0.self_attn.q_proj"
IMAGE_QUERY, TEXT_QUERY = (f"{tower}_model.encoder.layers.0.self_attn.q_proj" for tower in ("vision", "text"))


def clip_config():
    vision = {**SMALL, "hidden_size": VISION, "image_size": 8, "patch_size": 4, "projection_dim": PROJECTED}
    return transformers.CLIPConfig(
        text_config={**SMALL, **TOKENS, "projection_dim": PROJECTED},
        vision_config=vision,
        projection_dim=PROJECTED,
    )


MODELS = {
    "bare": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, **TOKENS)),
    "headed": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, **TOKENS, num_labels=4)
    ),
    "several": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, **TOKENS, num_labels=4, problem_type="multi_label_classification")
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **TOKENS)),
    "headless": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SMALL, **TOKENS)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    ),
    "clip": lambda: transformers.CLIPModel(clip_config()),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Name -> a folder that holds the checkpoint `base` and is made on first use."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            MODELS[name]().save_pretrained(made[name] / "base")
        return made[name]

    return of


numbers = itertools.count()


def adapter(folder, module=BERT_QUERY, classes=None, columns=WIDTH, **config):
    """An adapter of one module, with a head of so many classes where one is asked for."""
    tensors = factors(module, rows=columns, columns=columns)
    if classes is not None:
        tensors["base_model.model.classifier.weight"] = torch.ones(classes, WIDTH)
        tensors["base_model.model.classifier.bias"] = torch.ones(classes)
        config["modules_to_save"] = ["classifier"]
    return write_adapter(folder / f"adapter-{next(numbers)}", tensors, **{"task_type": "SEQ_CLS", **config})


def heads(folder, tokens=0, include=False, **adapters):
    """What is planned for adapters given as a folder, or as a folder and more keys of the recipe."""
    pairs = {name: one if isinstance(one, tuple) else (one, {}) for name, one in adapters.items()}
    recipe, _ = load_recipe(
        {
            "base_model": str(folder / "base"),
            "output": str(folder / "out"),
            "adapters": {
                name: {"path": str(path), "data": "rows.jsonl", **more}
                for name, (path, more) in pairs.items()
            },
        }
    )
    fitted = fit_all(recipe, folder / "cache")
    tasks = [TaskData(name, one.data, fitted.adapters[name]) for name, one in recipe.adapters.items()]
    merge = Merge(name="m", method="tara_b", adapters=tuple(adapters), parameters={})
    return plan_heads(recipe, fitted.base, tasks, merge, tokens=tokens, include=include)


def refusal(folder, error=RecipeError, **options):
    with pytest.raises(error) as caught:
        heads(folder, **options)
    message = str(caught.value)
    assert message.startswith("merge 'm' by tara_b") or message.startswith("adapters.")
    return message


def texts(folder, *shapes, dtype=torch.float32, name="texts"):
    path = folder / f"{name}-{next(numbers)}.safetensors"
    save_file({f"t{index}": torch.ones(shape, dtype=dtype) for index, shape in enumerate(shapes)}, path)
    return str(path)


# ---- heads of classes


def test_each_task_has_its_own_head_and_one_without_takes_the_head_of_the_base(bases):
    folder = bases("headed")
    name, found = heads(folder, own=adapter(folder, classes=7), shared=adapter(folder))
    assert name == "BertForSequenceClassification"
    assert found == {
        "own": TaskHead(kind="classification", n_outputs=7, model_class=name),
        "shared": TaskHead(kind="classification", n_outputs=4, model_class=name),
    }


def test_a_head_that_is_nowhere_is_refused(bases):
    folder = bases("bare")
    message = refusal(folder, a=adapter(folder, classes=3), b=adapter(folder))
    assert "adapters.b: neither" in message
    assert "nor the base holds classifier.weight" in message
    assert "modules_to_save" in message
    assert "merge_method: nsc" in message


@pytest.mark.parametrize(
    ("base", "how", "said", "words"),
    [
        ("bare", {"classes": 1}, None, "adapters.b is a regression, which has no entropy of classes"),
        ("bare", {"classes": 3}, "regression", "adapters.b is a regression, which has no entropy of classes"),
        (
            "bare",
            {"classes": 3, "task_type": "TOKEN_CLS"},
            None,
            "BertForTokenClassification, which predicts no",
        ),
        ("bare", {"classes": 3}, "QUESTION_ANS", "BertForQuestionAnswering, which predicts no classes"),
        ("several", {}, None, "adapters.b has a multi-label head, which has no single entropy"),
        ("llama", {"module": LLAMA_QUERY, "task_type": "CAUSAL_LM"}, None, "adapters.b generates text"),
        (
            "t5",
            {"module": "encoder.block.0.layer.0.SelfAttention.q", "task_type": "SEQ_2_SEQ_LM"},
            None,
            "T5ForConditionalGeneration, which predicts no classes of an example (SEQ_2_SEQ_LM)",
        ),
    ],
    ids=["one output", "said to be", "tokens", "answers", "labels", "generation", "sequences"],
)
def test_what_has_no_entropy_of_classes_is_sent_to_nsc(bases, base, how, said, words):
    folder = bases(base)
    message = refusal(folder, b=(adapter(folder, **how), {"task": said} if said else {}))
    assert words in message
    assert "use merge_method: nsc, which looks at activations and needs no labels and no head" in message


def test_tasks_without_entropy_may_be_passed_over_but_not_all_of_them(bases):
    folder = bases("bare")
    score = adapter(folder, classes=1)
    _, found = heads(folder, include=True, a=adapter(folder, classes=3), score=score)
    assert list(found) == ["a"]
    assert "none of its tasks has an entropy" in refusal(folder, include=True, score=score)


# ---- tokens


@pytest.mark.parametrize("said", [{}, {"task": "classification"}, {"task": "CAUSAL_LM"}], ids=str)
def test_a_causal_model_predicts_tokens_where_it_is_told_how_many(bases, said):
    folder = bases("llama")
    one = adapter(folder, LLAMA_QUERY, task_type="CAUSAL_LM"), said
    assert heads(folder, tokens=1, a=one) == (
        "LlamaForCausalLM",
        {"a": TaskHead(kind="causal", n_outputs=0, model_class="LlamaForCausalLM")},
    )


def test_said_to_be_generation_it_is_refused_with_tokens_too(bases):
    folder = bases("llama")
    one = adapter(folder, LLAMA_QUERY, task_type="CAUSAL_LM"), {"task": "generation"}
    assert "generates text" in refusal(folder, tokens=2, a=one)


def test_a_causal_model_without_its_head_is_refused(bases):
    folder = bases("headless")
    one = adapter(folder, LLAMA_QUERY, task_type="CAUSAL_LM")
    assert "nor the base holds lm_head.weight of LlamaForCausalLM" in refusal(folder, tokens=1, a=one)


# ---- heads of texts


def test_a_text_head_of_an_encoder_is_compared_with_what_its_pooler_gives(bases):
    folder = bases("bare")
    path = texts(folder, (3, WIDTH), (5,), dtype=torch.bfloat16)
    one = adapter(folder, BERT_QUERY.removeprefix("bert."), task_type="FEATURE_EXTRACTION")
    name, found = heads(folder, a=(one, {"head": {"path": path, "logit_scale": 20}}))
    assert name == "BertModel"
    file = found["a"].file
    assert isinstance(file, HeadFile)
    assert (found["a"].kind, found["a"].n_outputs, file.logit_scale) == ("text", 3, 20.0)
    assert (file.entry.name, file.entry.shape, file.entry.dtype) == ("t0", (3, WIDTH), "BF16")
    assert f"{file.url}/{file.info.path}".endswith(path)


def test_an_adapter_of_a_classifier_with_a_text_head_runs_without_its_classifier(bases):
    folder = bases("headed")
    name, _ = heads(folder, a=(adapter(folder), {"head": texts(folder, (3, WIDTH))}))
    assert name == "BertModel"


@pytest.mark.parametrize(
    ("module", "columns", "trained_in", "width", "model_class"),
    [
        (IMAGE_QUERY, VISION, None, PROJECTED, "CLIPVisionModelWithProjection"),
        (IMAGE_QUERY, VISION, None, VISION, "CLIPVisionModel"),
        (
            IMAGE_QUERY.partition(".")[2],
            VISION,
            "CLIPVisionModel",
            PROJECTED,
            "CLIPVisionModelWithProjection",
        ),
        (TEXT_QUERY, WIDTH, None, PROJECTED, "CLIPTextModelWithProjection"),
    ],
)
def test_of_two_towers_the_adapters_own_runs_to_where_it_is_as_wide_as_the_texts(
    bases, module, columns, trained_in, width, model_class
):
    folder = bases("clip")
    auto = {"auto_mapping": {"base_model_class": trained_in}} if trained_in else {}
    one = adapter(folder, module, columns=columns, task_type=None, **auto)
    name, found = heads(folder, a=(one, {"head": texts(folder, (2, width))}))
    assert name == found["a"].model_class == model_class


def test_texts_of_another_width_are_refused_with_both(bases):
    folder = bases("clip")
    one = adapter(folder, IMAGE_QUERY, columns=VISION, task_type=None)
    message = refusal(folder, a=(one, {"head": texts(folder, (2, 7))}))
    assert f"have 7 numbers, but CLIPVisionModelWithProjection gives {PROJECTED}" in message


def test_an_adapter_of_both_towers_has_no_one_embedding(bases):
    folder = bases("clip")
    tensors = factors(IMAGE_QUERY, rows=VISION, columns=VISION) | factors(TEXT_QUERY)
    one = write_adapter(folder / "both", tensors, task_type=None)
    message = refusal(folder, a=(one, {"head": texts(folder, (2, PROJECTED))}))
    assert "CLIPModel gives no embedding of an example" in message


def test_an_encoder_that_gives_no_embedding_is_refused(bases):
    folder = bases("llama")
    one = adapter(folder, LLAMA_QUERY, task_type="CAUSAL_LM"), {"head": texts(folder, (2, WIDTH))}
    message = refusal(folder, a=one)
    assert "LlamaForCausalLM gives no embedding of an example" in message
    assert "nsc" in message


def test_a_file_that_is_no_text_head_is_refused(bases):
    folder = bases("bare")
    one = adapter(folder, BERT_QUERY.removeprefix("bert."), task_type="FEATURE_EXTRACTION")
    for path, words in (
        (str(folder / "nothing.safetensors"), "there is no "),
        (texts(folder, (3, WIDTH), (2, WIDTH)), "t0 (3, 8), t1 (2, 8); expected one"),
        (texts(folder, (1, WIDTH)), "two classes or more"),
        (texts(folder, (3, WIDTH), dtype=torch.int64), "the matrices none"),
    ):
        assert words in refusal(folder, AdapterError, a=(one, {"head": path}))


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, torch.float32), (-torch.inf, torch.bfloat16)])
def test_a_text_head_with_nan_or_inf_is_refused_with_file_and_tensor(bases, value, dtype):
    folder = bases("bare")
    one = adapter(folder, BERT_QUERY.removeprefix("bert."), task_type="FEATURE_EXTRACTION")
    path, matrix = folder / f"broken-{next(numbers)}.safetensors", torch.ones(3, WIDTH, dtype=dtype)
    matrix[2, -1] = value
    save_file({"texts": matrix}, path)
    message = refusal(folder, AdapterError, a=(one, {"head": str(path)}))
    assert f"adapters.a.head: {path}: texts holds NaN or Inf" in message


def test_tasks_of_different_classes_are_refused_with_both(bases):
    folder = bases("headed")
    text = adapter(folder, BERT_QUERY.removeprefix("bert."), task_type="FEATURE_EXTRACTION")
    message = refusal(folder, a=adapter(folder), b=(text, {"head": texts(folder, (3, WIDTH))}))
    assert "a is a BertForSequenceClassification and b a BertModel" in message
    assert "nsc" in message


def test_a_regression_with_a_text_head_is_a_regression(bases):
    folder = bases("headed")
    more = {"head": texts(folder, (3, WIDTH)), "task": "regression"}
    assert "is a regression" in refusal(folder, a=(adapter(folder), more))
