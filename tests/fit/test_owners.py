import pytest
import torch
from fit_cases import LLAMA, P, inputs, pair, random

from ray_merge.errors import RecipeError
from ray_merge.fit import check_owners, fit_adapters
from ray_merge.fit.owners import has_magnitude, is_head
from ray_merge.spec import Merge
from tiny import HIDDEN, Q0, V1, factors, llama_tensors, tables

TABLE = "model.embed_tokens.weight"
BASE = llama_tensors() | {"score.weight": torch.zeros(3, HIDDEN), "model.norm.bias": torch.zeros(HIDDEN)}


def fitted(folder, a, b):
    """Two adapters, each a pair of tensors beside plain factors and settings."""
    given = {"a": (factors(Q0) | a[0], a[1]), "b": (factors(V1) | b[0], b[1])}
    return fit_adapters(*inputs(folder, BASE, LLAMA, given))


def check(folder, a, b, *chosen):
    made = fitted(folder, a, b)
    merge = Merge(name="m", method="cat", adapters=chosen or ("a", "b"), parameters={})
    check_owners(merge, made.adapters, made.sites)


def refused(folder, a, b):
    with pytest.raises(RecipeError) as caught:
        check(folder, a, b)
    message = str(caught.value)
    assert message.startswith("merge 'm': adapter")
    assert "merge them apart, or leave one out with adapters: [...]" in message
    for name in "ab":
        check(folder, a, b, name)  # each alone is fine
    return message


def table(rows=16):
    return (tables(rows), {})


def whole(module, *shape, **settings):
    return (
        {f"{P}{module}.weight": torch.ones(shape)},
        {"modules_to_save": [module.rpartition(".")[2]], **settings},
    )


def tokens(*rows):
    key = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
    return ({key: torch.ones(len(rows), HIDDEN)}, {"trainable_token_indices": list(rows)})


def embedding(rows=16, resized=False):
    tensors = random(
        {
            f"{P}model.embed_tokens.lora_embedding_A": (2, rows),
            f"{P}model.embed_tokens.lora_embedding_B": (8, 2),
        }
    )
    return ((table(rows)[0] if resized else {}) | tensors, {})


PLAIN = ({}, {})


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (PLAIN, PLAIN),
        (whole("model.norm", HIDDEN), PLAIN),
        (whole("model.norm", HIDDEN), whole("lm_head", 16, HIDDEN)),
        (table(), table()),
        (table(20), table(20)),
        (tokens(1, 2), tokens(3)),
        (embedding(), embedding()),
        (embedding(20, resized=True), embedding(20, resized=True)),
        (embedding(20, resized=True), table(20)),
        (
            whole("score", 3, HIDDEN, task_type="SEQ_CLS"),
            whole("score", 3, HIDDEN, task_type="SEQ_CLS"),
        ),
    ],
)
def test_what_can_be_combined_is(tmp_path, a, b):
    check(tmp_path, a, b)
    check(tmp_path, b, a)


def test_two_saved_values_of_one_parameter_are_refused(tmp_path):
    message = refused(tmp_path, whole("model.norm", HIDDEN), whole("model.norm", HIDDEN))
    assert "adapters a and b both saved a value of its own for model.norm.weight" in message


def test_a_table_that_peft_saved_and_one_that_was_trained_are_two_values(tmp_path):
    message = refused(tmp_path, whole("model.embed_tokens", 16, HIDDEN), table())
    assert f"both saved a value of its own for {TABLE}" in message


def test_two_sizes_of_the_vocabulary_are_refused(tmp_path):
    message = refused(tmp_path, table(20), table(24))
    assert "adapters a and b resized the vocabulary in different ways for " in message


def test_a_token_that_two_adapters_train_is_refused(tmp_path):
    message = refused(tmp_path, tokens(1, 5), tokens(5, 2))
    assert f"adapters a and b both train token 5 of {TABLE}" in message


@pytest.mark.parametrize("other", [embedding(), table(), whole("model.embed_tokens", 16, HIDDEN)])
@pytest.mark.parametrize("turned", [False, True])
def test_tokens_of_a_table_that_another_adapter_changes_are_refused(tmp_path, other, turned):
    pairs = (other, tokens(1)) if turned else (tokens(1), other)
    one, two = ("b", "a") if turned else ("a", "b")
    message = refused(tmp_path, *pairs)
    assert f"adapter {one} trains tokens of {TABLE}, which adapter {two} changes too" in message


@pytest.mark.parametrize("turned", [False, True])
def test_factors_of_vocabularies_of_two_sizes_are_refused(tmp_path, turned):
    pairs = (embedding(), embedding(20, resized=True))
    message = refused(tmp_path, *(pairs[::-1] if turned else pairs))
    assert "rows" in message
    assert TABLE in message


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("owner", "other"),
    [
        (whole("model.embed_tokens", 16, HIDDEN), embedding()),
        (table(20), embedding()),
        (whole("lm_head", 16, HIDDEN), (pair("lm_head", 2, 16, HIDDEN), {})),
    ],
)
def test_factors_of_what_another_adapter_replaces_are_refused(tmp_path, owner, other, turned):
    names = ("b", "a") if turned else ("a", "b")
    message = refused(tmp_path, *((other, owner) if turned else (owner, other)))
    assert f"adapter {names[0]} replaces" in message
    assert f"adapter {names[1]}" in message


@pytest.mark.parametrize("turned", [False, True])
def test_a_trained_bias_of_a_module_that_another_adapter_replaces_is_refused(tmp_path, turned):
    owner, other = whole("model.norm", HIDDEN), ({f"{P}model.norm.bias": torch.ones(HIDDEN)}, {"bias": "all"})
    owner[0][f"{P}model.norm.bias"] = torch.ones(HIDDEN)
    message = refused(tmp_path, *((other, owner) if turned else (owner, other)))
    assert "replaces model.norm.bias" in message


def test_heads_are_told_from_other_saved_modules(tmp_path):
    made = fitted(tmp_path, whole("score", 3, HIDDEN, task_type="SEQ_CLS"), whole("model.norm", HIDDEN))
    assert is_head("score.weight", made.adapters["a"])
    assert not is_head("model.norm.weight", made.adapters["b"])
    assert not is_head("lm_head.weight", made.adapters["a"])


def test_a_dora_magnitude_is_found_at_its_site(tmp_path):
    magnitude = ({f"{P}{V1}.lora_magnitude_vector": torch.ones(HIDDEN)}, {"use_dora": True})
    made = fitted(tmp_path, PLAIN, magnitude)
    assert has_magnitude([made.adapters["a"]]) == ""
    assert has_magnitude(list(made.adapters.values())) == V1


@pytest.mark.parametrize("rows", [16, 20])
def test_tables_of_two_classifiers_are_no_heads_that_stay_apart(tmp_path, rows):
    one, other = ({**tables(count)} for count in (16, rows))
    settings = {"modules_to_save": ["embed_tokens", "lm_head"], "task_type": "SEQ_CLS"}
    message = refused(tmp_path, (one, settings), (other, settings))
    assert "both saved a value of its own for" in message
