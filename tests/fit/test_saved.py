import pytest
import torch
from fit_cases import LLAMA, T5, UNKNOWN, P, fit, random, refusal

from ray_merge.errors import AdapterError
from ray_merge.spec import SavedEntry
from tiny import HIDDEN, Q0, factors, llama_tensors, tables

BIAS = f"{Q0}.bias"
BASE = llama_tensors() | {BIAS: torch.zeros(HIDDEN), "model.norm.bias": torch.zeros(HIDDEN)}
TABLE = "model.embed_tokens.weight"


def saved(**tensors):
    return {f"{P}{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}


def fitted(folder, tensors, base=None, config=None, **settings):
    return fit(folder, BASE if base is None else base, config or LLAMA, factors(Q0) | tensors, settings)[1]


def refused(folder, tensors, base=None, config=None, **settings):
    return refusal(AdapterError, fitted, folder, tensors, base, config, **settings)


@pytest.mark.parametrize("name", [BIAS, f"{Q0}.base_layer.bias"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_trained_bias_is_a_site_whose_delta_is_saved_minus_base(tmp_path, bias, name):
    made, adapter = fit(
        tmp_path, BASE, LLAMA, factors(Q0) | {f"{P}{name}": torch.ones(HIDDEN)}, {"bias": bias}
    )
    assert list(adapter.factors) == [BIAS, Q0]
    update = adapter.factors[BIAS]
    assert isinstance(update, SavedEntry)
    assert (update.saved.matrix, update.rank) == ((HIDDEN, 1), 1)
    site = made.sites[BIAS]
    assert (site.tensor, site.shape, site.layout) == (BIAS, (HIDDEN, 1), "raw")
    assert adapter.modules[BIAS] == BIAS


def test_a_bias_of_more_axes_keeps_its_last_one(tmp_path):
    base = BASE | {"experts.bias": torch.zeros(2, 3, 5)}
    adapter = fitted(tmp_path, {f"{P}experts.bias": torch.ones(2, 3, 5)}, base, UNKNOWN, bias="all")
    assert adapter.factors["experts.bias"].saved.matrix == (6, 5)


def test_a_bias_that_the_config_does_not_announce_is_refused(tmp_path):
    message = refused(tmp_path, {f"{P}{BIAS}": torch.ones(HIDDEN)})
    assert f"{BIAS} is a saved parameter of the base that adapter_config.json does not announce" in message


def test_a_bias_of_another_length_is_refused(tmp_path):
    message = refused(tmp_path, {f"{P}{BIAS}": torch.ones(HIDDEN + 1)}, bias="all")
    assert f"{BIAS} is (9,), but {BIAS} is (8,)" in message
    assert "trained on another base model" in message


def test_a_weight_that_nobody_announced_is_refused(tmp_path):
    message = refused(tmp_path, {f"{P}model.norm.weight": torch.ones(HIDDEN)}, bias="all")
    assert "neither modules_to_save nor bias" in message


def test_a_tensor_that_the_base_lacks_and_nobody_announced_is_refused(tmp_path):
    for name, settings in (("my_classifier.weight", {}), ("score.bias", {"bias": "all"})):
        message = refused(tmp_path, {f"{P}{name}": torch.ones(2, HIDDEN)}, **settings)
        assert f"tensor {name!r} is neither a factor nor a saved head" in message


@pytest.mark.parametrize("names", [["score"], ["classifier", "score"]])
def test_a_saved_module_that_the_base_lacks_is_a_head(tmp_path, names):
    head = saved(score__dense__weight=torch.ones(8, 8), score__dense__bias=torch.ones(8))
    adapter = fitted(tmp_path, head, modules_to_save=names)
    assert [entry.name for entry in adapter.heads] == ["score.dense.bias", "score.dense.weight"]
    assert adapter.replaced == {}


def test_modules_to_save_name_ends_of_paths_as_in_peft(tmp_path):
    # PEFT takes every module whose path ends in the name, whole components or not.
    adapter = fitted(tmp_path, saved(my_classifier__weight=torch.ones(2, 8)), modules_to_save=["classifier"])
    assert [entry.name for entry in adapter.heads] == ["my_classifier.weight"]


def test_a_bias_of_a_new_head_follows_its_head(tmp_path):
    head = saved(score__weight=torch.ones(3, 8), score__modules_to_save__bias=torch.ones(3))
    assert [e.name for e in fitted(tmp_path, head, modules_to_save=["score"], bias="all").heads] == [
        "score.bias",
        "score.weight",
    ]


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_saved_module_takes_the_place_of_the_bases(tmp_path, name):
    tensor = torch.ones(BASE[name].shape)
    adapter = fitted(tmp_path, {f"{P}{name}": tensor}, modules_to_save=[name.split(".")[-2]])
    assert list(adapter.replaced) == [name]
    assert adapter.replaced[name].name == f"{P}{name}"
    assert (adapter.heads, adapter.tables) == ((), frozenset())


def test_a_saved_module_is_recognised_through_the_base_model_prefix(tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    adapter = fitted(
        tmp_path, {f"{P}model.norm.weight": torch.ones(8)}, bare, UNKNOWN, modules_to_save=["norm"]
    )
    assert list(adapter.replaced) == ["norm.weight"]
    assert adapter.heads == ()


def test_a_saved_module_of_another_shape_is_refused(tmp_path):
    message = refused(tmp_path, {f"{P}model.norm.weight": torch.ones(9)}, modules_to_save=["norm"])
    assert "model.norm.weight is (9,), but model.norm.weight is (8,)" in message


@pytest.mark.parametrize(("labels", "replaced"), [(3, ["score.weight"]), (5, [])])
def test_a_head_that_the_base_has_too_is_kept_apart_as_well(tmp_path, labels, replaced):
    base = BASE | {"score.weight": torch.zeros(3, 8)}
    head = saved(score__weight=torch.ones(labels, 8))
    adapter = fitted(tmp_path, head, base, modules_to_save=["score"], task_type="SEQ_CLS")
    assert [entry.name for entry in adapter.heads] == ["score.weight"]
    assert list(adapter.replaced) == replaced


@pytest.mark.parametrize("name", [TABLE, "lm_head.weight", "model.embed_tokens.base_layer.weight"])
def test_a_table_that_peft_saved_by_itself_takes_the_bases_place(tmp_path, name):
    adapter = fitted(tmp_path, {f"{P}{name}": torch.ones(16, HIDDEN)})
    disk = name.replace(".base_layer", "")
    assert adapter.replaced[disk].shape == (16, HIDDEN)
    assert adapter.tables == {disk}


def test_tables_may_have_other_rows_as_long_as_both_do(tmp_path):
    adapter = fitted(tmp_path, tables(20))
    assert {name: entry.shape[0] for name, entry in adapter.replaced.items()} == {
        TABLE: 20,
        "lm_head.weight": 20,
    }
    for name in adapter.replaced:
        message = refused(tmp_path, {f"{P}{name}": torch.ones(20, HIDDEN)})
        assert f"{name} was resized to 20 rows, but" in message
        assert "its new rows are lost" in message


def test_factors_of_a_resized_table_have_its_rows_and_a_site_of_their_own(tmp_path):
    tensors = tables(20) | random(
        {
            f"{P}model.embed_tokens.lora_embedding_A": (2, 20),
            f"{P}model.embed_tokens.lora_embedding_B": (8, 2),
        }
    )
    made, _ = fit(tmp_path, BASE, LLAMA, tensors)
    (site,) = made.sites.values()
    assert (site.name, site.tensor, site.shape) == ("model.embed_tokens[20 rows]", TABLE, (20, HIDDEN))


def test_a_table_of_another_width_is_refused(tmp_path):
    assert "is (16, 9), but" in refused(tmp_path, {f"{P}{TABLE}": torch.ones(16, 9)})


def test_t5s_attention_bias_is_a_trained_bias_though_it_is_an_embedding(tmp_path):
    attention = "encoder.block.0.layer.0.SelfAttention"
    name = f"{attention}.relative_attention_bias"
    base = {f"{attention}.q.weight": torch.zeros(8, 8), f"{name}.weight": torch.zeros(4, 2)}
    tensors = factors(f"{attention}.q") | {f"{P}{name}.weight": torch.ones(4, 2)}
    _, adapter = fit(tmp_path, base, T5, tensors, {"bias": "all"})
    assert isinstance(adapter.factors[name], SavedEntry)
    assert adapter.replaced == {}


ROWS = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    "indices", [[5, 1], {"embed_tokens": [5, 1]}, {"model.embed_tokens": [5, 1], "lm_head": [2]}]
)
def test_trained_tokens_are_rows_of_their_table_in_the_configs_order(tmp_path, indices):
    adapter = fitted(tmp_path, {ROWS: torch.ones(2, HIDDEN)}, trainable_token_indices=indices)
    assert adapter.tokens[TABLE].indices == (5, 1)
    assert adapter.tokens[TABLE].entry.shape == (2, HIDDEN)


def test_trained_tokens_may_be_new_rows_of_a_table_that_was_resized(tmp_path):
    adapter = fitted(tmp_path, {ROWS: torch.ones(2, HIDDEN)} | tables(20), trainable_token_indices=[18, 19])
    assert adapter.tokens[TABLE].indices == (18, 19)
    assert sorted(adapter.replaced) == ["lm_head.weight", TABLE]


@pytest.mark.parametrize(
    ("shape", "indices", "words"),
    [
        ((2, 8), None, "has no trainable_token_indices for it"),
        ((2, 8), {"lm_head": [1, 2], "other": [3]}, "has no trainable_token_indices for it"),
        ((3, 8), [1, 2], "expected 2 different rows of 8"),
        ((2, 9), [1, 2], "expected 2 different rows of 8"),
        ((2, 8), [1, 1], "expected 2 different rows of 8"),
        ((2, 8), [1, 16], "has row 16, but model.embed_tokens.weight has 16 rows"),
    ],
)
def test_rows_and_indices_must_agree(tmp_path, shape, indices, words):
    assert words in refused(tmp_path, {ROWS: torch.ones(shape)}, trainable_token_indices=indices)


def test_tokens_that_the_config_promises_must_be_there(tmp_path):
    assert "the adapter holds no row of them" in refused(tmp_path, {}, trainable_token_indices=[1])


def test_tokens_of_a_table_with_factors_are_refused(tmp_path):
    tensors = {ROWS: torch.ones(1, HIDDEN)} | random(
        {
            f"{P}model.embed_tokens.lora_embedding_A": (2, 16),
            f"{P}model.embed_tokens.lora_embedding_B": (8, 2),
        }
    )
    assert "has trained tokens and LoRA at once" in refused(tmp_path, tensors, trainable_token_indices=[1])


@pytest.mark.parametrize("stored", [torch.int64, torch.float8_e4m3fn])
def test_a_saved_module_of_another_kind_of_numbers_than_the_bases_is_refused(tmp_path, stored):
    base = BASE | {"model.norm.weight": torch.ones(HIDDEN, dtype=stored)}
    head = {f"{P}model.norm.weight": torch.ones(HIDDEN)}
    assert "model.norm.weight" in refused(tmp_path, head, base, modules_to_save=["norm"])


def test_tokens_of_a_table_that_is_not_stored_as_floats_are_refused(tmp_path):
    base = BASE | {TABLE: torch.ones(16, HIDDEN, dtype=torch.int8)}
    message = refused(tmp_path, {ROWS: torch.ones(1, HIDDEN)}, base, trainable_token_indices=[1])
    assert f"base weight {TABLE} is stored as I8, not as floats" in message


def test_a_count_of_a_saved_module_is_kept_in_whole_numbers_and_elsewhere_refused(tmp_path):
    base = BASE | {"model.bn.num_batches_tracked": torch.tensor(3), "model.bn.weight": torch.ones(4)}
    saved = {f"{P}model.bn.num_batches_tracked": torch.tensor(7), f"{P}model.bn.weight": torch.zeros(4)}
    adapter = fitted(tmp_path, saved, base, modules_to_save=["bn"])
    assert adapter.replaced["model.bn.num_batches_tracked"].dtype == "I64"
    count = {f"{P}model.bn.num_batches_tracked": torch.tensor(7)}
    assert "is of dtype I64; expected floats" in refused(tmp_path, count, base, bias="all")


def test_a_parameter_that_is_neither_weight_nor_bias_is_no_table(tmp_path):
    base = BASE | {"embed_tokens.in_proj": torch.ones(4, 4)}
    assert "does not announce" in refused(tmp_path, {f"{P}embed_tokens.in_proj": torch.ones(4, 4)}, base)


def test_two_saved_tensors_of_one_place_are_refused(tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    twice = {f"{P}{name}.weight": torch.ones(HIDDEN) for name in ("norm", "model.norm")}
    message = refused(tmp_path, twice, bare, UNKNOWN, modules_to_save=["norm"])
    assert "two saved tensors take the place of norm.weight" in message


def test_two_modules_that_train_tokens_of_one_table_are_refused(tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    rows = {ROWS: torch.ones(1, HIDDEN), ROWS.replace("model.embed", "embed"): torch.ones(1, HIDDEN)}
    message = refused(tmp_path, rows, bare, UNKNOWN, trainable_token_indices=[1])
    assert "two modules train tokens of embed_tokens.weight" in message


@pytest.mark.parametrize("name", ["model.layers.7.mlp.gate_proj.weight", "model.final_layernorm.weight"])
def test_a_saved_layer_of_another_base_is_no_head(tmp_path, name):
    settings = {"modules_to_save": ["gate_proj", "final_layernorm"]}
    message = refused(tmp_path, {f"{P}{name}": torch.ones(4, HIDDEN)}, **settings)
    assert name in message
    assert "nothing of an adapter is dropped silently" in message


def test_trained_tokens_of_a_vector_are_refused(tmp_path):
    rows = {f"{P}model.norm.token_adapter.trainable_tokens_delta": torch.ones(1, HIDDEN)}
    assert "is no table" in refused(tmp_path, rows, trainable_token_indices={"norm": [1]})


def test_heads_that_would_fill_the_driver_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_merge.fit.saved.MAX_HEAD_BYTES", 100)
    message = refused(
        tmp_path, {f"{P}classifier.weight": torch.ones(4, HIDDEN)}, modules_to_save=["classifier"]
    )
    assert "128 bytes, more than 100" in message


@pytest.mark.parametrize("rows", [16, 20])
def test_a_table_that_a_classifier_saved_is_no_head(tmp_path, rows):
    names = ["score", "embed_tokens", "lm_head"]
    both = saved(**{f"{name.replace('.', '__')}": torch.ones(rows, 8) for name in (TABLE, "lm_head.weight")})
    whole = both | saved(score__weight=torch.ones(3, 8))
    adapter = fitted(tmp_path, whole, modules_to_save=names, task_type="SEQ_CLS")
    assert [entry.name for entry in adapter.heads] == ["score.weight"]
    assert sorted(adapter.replaced) == ["lm_head.weight", TABLE]
    wide = {f"{P}{TABLE}": torch.ones(16, 4)}
    message = refused(tmp_path, wide, modules_to_save=names, task_type="SEQ_CLS")
    assert f"{TABLE} is (16, 4), but {TABLE} is (16, 8)" in message
