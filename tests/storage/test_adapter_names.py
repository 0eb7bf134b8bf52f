import pytest

from ray_merge.storage.adapter_names import Name, read_name, unwrap

P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("end", "role"),
    [
        ("lora_A.weight", "A"),
        ("lora_B.weight", "B"),
        ("lora_B.bias", "B.bias"),
        ("lora_embedding_A", "embedding_A"),
        ("lora_embedding_B", "embedding_B"),
        ("lora_magnitude_vector", "magnitude"),
        ("lora_magnitude_vector.weight", "magnitude"),
        ("token_adapter.trainable_tokens_delta", "tokens"),
    ],
)
def test_every_part_of_an_update_is_known_by_the_end_of_its_name(end, role):
    assert read_name(f"{P}{Q}.{end}") == Name(role, Q)


@pytest.mark.parametrize(
    ("end", "role"),
    [
        ("lora_A.default.weight", "A"),
        ("lora_B.default.weight", "B"),
        ("lora_B.default.bias", "B.bias"),
        ("lora_embedding_A.default", "embedding_A"),
        ("lora_embedding_B.default", "embedding_B"),
        ("lora_magnitude_vector.default.weight", "magnitude"),
        ("token_adapter.trainable_tokens_delta.default", "tokens"),
    ],
)
def test_the_adapter_name_of_an_in_memory_dump_is_taken_off(end, role):
    assert read_name(f"{P}{Q}.{end}") == Name(role, Q)


@pytest.mark.parametrize(
    "wrapped",
    [
        f"{P}{Q}",
        Q,
        f"{P}_orig_mod.{Q}",
        f"_orig_mod.{P}{Q}",
        f"{P}model._orig_mod.layers.0.self_attn._orig_mod.q_proj",
        f"_fsdp_wrapped_module.{P}_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.self_attn.q_proj",
    ],
)
def test_what_compilers_and_sharders_put_around_modules_is_taken_off(wrapped):
    assert unwrap(wrapped) == Q
    assert read_name(f"{wrapped}.lora_A.weight") == Name("A", Q)


@pytest.mark.parametrize("name", ["my_orig_mod.x", "a_fsdp_wrapped_module.x", "base_model.model_x"])
def test_a_module_whose_name_ends_like_a_wrapper_keeps_it(name):
    assert unwrap(name) == name


def test_wrappers_at_the_end_of_a_module_are_counted_and_those_inside_are_not():
    experts = "model.layers.0.mlp.experts"
    assert read_name(f"{P}{experts}.lora_A.weight") == Name("A", experts, 0)
    assert read_name(f"{P}{experts}.base_layer.lora_A.weight") == Name("A", experts, 1)
    assert read_name(f"{P}{experts}.base_layer.base_layer.lora_A.weight") == Name("A", experts, 2)
    # nn.MultiheadAttention: the wrapped layer's own child is adapted as well.
    assert read_name(f"{P}attn.base_layer.out_proj.lora_A.weight") == Name("A", "attn.out_proj", 0)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("score.weight", Name("saved", "score.weight")),
        (f"{Q}.bias", Name("saved", f"{Q}.bias")),
        (f"{Q}.base_layer.bias", Name("saved", f"{Q}.bias", wrapped=True)),
        ("lm_head.base_layer.weight", Name("saved", "lm_head.weight", wrapped=True)),
        ("score.modules_to_save.default.weight", Name("saved", "score.weight")),
        ("score.modules_to_save.dense.weight", Name("saved", "score.dense.weight")),
        ("embed.in_proj_weight", Name("saved", "embed.in_proj_weight")),
    ],
)
def test_any_other_parameter_is_saved_whole_under_its_runtime_name(key, name):
    assert read_name(f"{P}{key}") == name


def test_the_bases_own_copy_of_a_saved_module_is_ignored_with_the_reason():
    name = read_name(f"{P}score.original_module.weight")
    assert (name.role, name.module) == ("ignored", "score.original_module.weight")
    assert "modules_to_save replaced" in name.why


def test_tensors_of_training_alone_are_ignored_only_where_they_are_expected():
    key = f"{P}{Q}.lora_monteclora_sampler.default.lora_A_std"
    name = read_name(key, ["lora_monteclora_sampler"])
    assert (name.role, bool(name.why)) == ("ignored", True)
    assert "a LoRA variant" in read_name(key)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("lora_diag", "a KaSA diagonal"),
        ("lora_diag.default", "a KaSA diagonal"),
        ("lora_E", "an AdaLoRA diagonal"),
        ("lora_C.weight", "a LoRA variant that this version does not know"),
        ("lora_A.weight_scale", "a LoRA variant that this version does not know"),
        ("lora_A.second.weight", "a LoRA variant that this version does not know"),
        ("lora_embedding_A.weight", "a LoRA variant that this version does not know"),
        ("token_adapter.base", "a token adapter's state that this version does not know"),
        ("ranknum", "AdaLoRA's bookkeeping"),
    ],
)
def test_what_no_rule_takes_is_told_in_words(end, words):
    assert read_name(f"{P}{Q}.{end}") == f"is {words}"


@pytest.mark.parametrize("key", ["lora_A.weight", "lora_embedding_A", f"{P}lora_B.weight"])
def test_a_factor_without_a_module_is_no_factor(key):
    found = read_name(key)
    assert isinstance(found, str) or found.role == "saved"
