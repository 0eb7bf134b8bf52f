import pytest
import torch
from fit_cases import GPT2, LLAMA, T5, TIED_LLAMA, UNKNOWN, P, fit, inputs, pair, random, refusal

from quantised_files import FP8, float8, ramp
from ray_merge.errors import AdapterError, CheckpointError
from ray_merge.fit import fit_adapters
from tiny import HIDDEN, Q0, factors, llama_tensors

TABLE = "model.embed_tokens.weight"
TIED = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
HEAD = pair("lm_head", 2, outputs=16, inputs=HIDDEN)
EMBEDDING = {
    f"{P}model.embed_tokens.lora_embedding_A": HEAD[f"{P}lm_head.lora_B.weight"].T.contiguous(),
    f"{P}model.embed_tokens.lora_embedding_B": HEAD[f"{P}lm_head.lora_A.weight"].T.contiguous(),
}
"""LoRA on the tied head, and the same update as LoRA on the embedding (ensure_weight_tying)."""
ROWS = {f"{P}{name}.token_adapter.trainable_tokens_delta" for name in ("model.embed_tokens", "lm_head")}


@pytest.mark.parametrize(
    "tensors", [HEAD, EMBEDDING, {**HEAD, **EMBEDDING}], ids=["head", "embedding", "both"]
)
def test_lora_on_one_of_two_tied_weights_is_refused(tmp_path, tensors):
    message = refusal(AdapterError, fit, tmp_path, TIED, TIED_LLAMA, tensors)
    assert "is tied to" in message
    assert "tied: untie" in message


@pytest.mark.parametrize(
    "tensors", [HEAD, EMBEDDING, {**HEAD, **EMBEDDING}], ids=["head", "embedding", "both"]
)
def test_after_untying_head_and_embedding_are_two_sites(tmp_path, tensors):
    fitted, adapter = fit(tmp_path, TIED, TIED_LLAMA, tensors, tied="untie")
    names = {"lm_head": "lm_head" in str(tensors), "model.embed_tokens": "embedding" in str(tensors)}
    assert set(adapter.factors) == {name for name, there in names.items() if there}
    head = fitted.base.tensors["lm_head.weight"]
    assert (head.start, head.end) == (fitted.base.tensors[TABLE].start, fitted.base.tensors[TABLE].end)
    assert fitted.base.config["tie_word_embeddings"] is False
    assert dict(fitted.base.untied) == {"lm_head.weight": TABLE}


def test_a_base_that_is_not_tied_is_left_alone(tmp_path):
    fitted, _ = fit(tmp_path, llama_tensors(), LLAMA, HEAD | EMBEDDING, tied="untie")
    assert not fitted.base.untied
    assert fitted.base.tensors.keys() == llama_tensors().keys()
    fitted, _ = fit(tmp_path, llama_tensors(), LLAMA, HEAD | EMBEDDING)
    assert list(fitted.sites) == ["lm_head", "model.embed_tokens"]


def test_training_that_kept_both_equal_is_applied_once_and_checked(tmp_path):
    _, adapter = fit(tmp_path, TIED, TIED_LLAMA, HEAD | EMBEDDING, {"ensure_weight_tying": True})
    assert list(adapter.factors) == ["model.embed_tokens"]
    assert adapter.ignored.keys() == HEAD.keys()
    pairs = {(same.one.entry.name, same.other.entry.name) for same in adapter.same}
    assert pairs == {
        (f"{P}lm_head.lora_A.weight", f"{P}model.embed_tokens.lora_embedding_B"),
        (f"{P}lm_head.lora_B.weight", f"{P}model.embed_tokens.lora_embedding_A"),
    }
    for same in adapter.same:
        assert same.one.matrix == same.other.matrix
        assert "is not the transpose of" in same.why


def test_a_head_alone_that_claims_to_be_tied_is_refused(tmp_path):
    message = refusal(AdapterError, fit, tmp_path, TIED, TIED_LLAMA, HEAD, {"ensure_weight_tying": True})
    assert "lm_head is tied to model.embed_tokens" in message


@pytest.mark.parametrize("tied", [True, False])
def test_an_unknown_class_is_taken_at_its_configs_word(tmp_path, tied):
    config = {**UNKNOWN, "tie_word_embeddings": tied}
    if tied:
        message = refusal(AdapterError, fit, tmp_path, TIED, config, EMBEDDING)
        assert "model.embed_tokens is tied to the head" in message
    else:
        assert list(fit(tmp_path, TIED, config, EMBEDDING)[0].sites) == ["model.embed_tokens"]


def test_a_saved_copy_of_a_tied_head_must_equal_the_saved_embedding(tmp_path):
    copies = {f"{P}{TABLE}": torch.ones(20, HIDDEN), f"{P}lm_head.weight": torch.ones(20, HIDDEN)}
    _, adapter = fit(tmp_path, TIED, TIED_LLAMA, factors(Q0) | copies)
    assert list(adapter.replaced) == [TABLE]
    assert list(adapter.ignored) == [f"{P}lm_head.weight"]
    (same,) = adapter.same
    assert {same.one.entry.name, same.other.entry.name} == copies.keys()
    alone = factors(Q0) | {f"{P}lm_head.weight": torch.ones(16, HIDDEN)}
    message = refusal(AdapterError, fit, tmp_path, TIED, TIED_LLAMA, alone, {"modules_to_save": ["lm_head"]})
    assert "lm_head.weight was saved, but" in message
    assert "tied: untie" in message


def test_a_saved_embedding_of_a_tied_base_is_refused_unless_training_kept_both_equal(tmp_path):
    tensors = factors(Q0) | {f"{P}{TABLE}": torch.ones(16, HIDDEN)}
    settings = {"modules_to_save": ["embed_tokens"]}
    message = refusal(AdapterError, fit, tmp_path, TIED, TIED_LLAMA, tensors, settings)
    assert "is tied to lm_head" in message
    flagged = {**settings, "ensure_weight_tying": True}
    message = refusal(AdapterError, fit, tmp_path, TIED, TIED_LLAMA, tensors, flagged)
    assert "is tied to lm_head" in message, "PEFT writes the flag even where it ties nothing"
    both = tensors | {f"{P}lm_head.weight": torch.ones(16, HIDDEN)}
    _, adapter = fit(tmp_path, TIED, TIED_LLAMA, both, flagged)
    assert list(adapter.replaced) == [TABLE]
    assert len(adapter.same) == 1


@pytest.mark.parametrize("unknown", [False, True], ids=["known", "unknown"])
def test_a_saved_head_of_a_tied_base_is_never_lost_in_the_heads(tmp_path, unknown):
    config = {**UNKNOWN, "tie_word_embeddings": True} if unknown else TIED_LLAMA
    tensors = factors(Q0) | {f"{P}lm_head.weight": torch.ones(16, HIDDEN)}
    message = refusal(AdapterError, fit, tmp_path, TIED, config, tensors, {"modules_to_save": ["lm_head"]})
    assert "lm_head" in message


def test_after_untying_a_resized_table_and_its_tokens_are_the_heads_too(tmp_path):
    tensors = factors(Q0) | {f"{P}{TABLE}": torch.ones(20, HIDDEN)}
    tensors[f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.ones(1, HIDDEN)
    _, adapter = fit(tmp_path, TIED, TIED_LLAMA, tensors, {"trainable_token_indices": [18]}, tied="untie")
    assert adapter.replaced["lm_head.weight"] == adapter.replaced[TABLE]
    assert adapter.tokens["lm_head.weight"] == adapter.tokens[TABLE]
    assert adapter.tables == {TABLE, "lm_head.weight"}


def test_after_untying_what_was_saved_for_the_head_stands(tmp_path):
    copies = {f"{P}{TABLE}": torch.ones(20, HIDDEN), f"{P}lm_head.weight": torch.zeros(20, HIDDEN)}
    _, adapter = fit(tmp_path, TIED, TIED_LLAMA, factors(Q0) | copies, tied="untie")
    assert adapter.replaced["lm_head.weight"].name == f"{P}lm_head.weight"
    assert adapter.replaced[TABLE].name == f"{P}{TABLE}"


def test_trained_tokens_of_a_tied_table_are_written_once(tmp_path):
    rows = {key: torch.ones(2, HIDDEN) for key in sorted(ROWS)}
    settings = {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}}
    _, adapter = fit(tmp_path, TIED, TIED_LLAMA, factors(Q0) | rows, settings)
    assert list(adapter.tokens) == [TABLE]
    assert len(adapter.same) == 1
    other = {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 3]}}
    message = refusal(AdapterError, fit, tmp_path, TIED, TIED_LLAMA, factors(Q0) | rows, other)
    assert "tied: untie" in message


def test_a_tied_encoder_decoder_cannot_be_untied(tmp_path):
    q = "encoder.block.0.layer.0.SelfAttention.q"
    base = random({"shared.weight": (16, 8), f"{q}.weight": (8, 8)})
    given = inputs(tmp_path, base, T5, {"a": (factors(q), {})}, tied="untie")
    message = refusal(CheckpointError, fit_adapters, *given)
    assert "remove tied: untie" in message


@pytest.mark.parametrize("extra", ["another shape", "DoRA"])
def test_a_tied_head_that_cannot_equal_the_embedding_is_refused(tmp_path, extra):
    tensors, settings = {**HEAD, **EMBEDDING}, {"ensure_weight_tying": True}
    if extra == "DoRA":
        settings["use_dora"] = True
        tensors |= {f"{P}lm_head.lora_magnitude_vector": torch.ones(16),
                    f"{P}model.embed_tokens.lora_magnitude_vector": torch.ones(HIDDEN)}  # fmt: skip
    else:
        tensors |= pair("lm_head", 3, outputs=16, inputs=HIDDEN)
    message = refusal(AdapterError, fit, tmp_path, TIED, TIED_LLAMA, tensors, settings)
    assert "is tied to" in message


def test_tokens_of_a_table_whose_tied_copy_lies_on_disk_are_refused(tmp_path):
    rows = {f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, HIDDEN)}
    settings = {"trainable_token_indices": [3]}
    copied = TIED | {"lm_head.weight": TIED[TABLE].clone()}
    message = refusal(AdapterError, fit, tmp_path, copied, TIED_LLAMA, factors(Q0) | rows, settings)
    assert "trained tokens) is tied to lm_head" in message
    assert list(fit(tmp_path, TIED, TIED_LLAMA, factors(Q0) | rows, settings)[1].tokens) == [TABLE]


def test_the_untied_head_of_a_vision_language_model_is_called_as_its_table_is(tmp_path):
    config = {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "tie_word_embeddings": True,
        "text_config": {**TIED_LLAMA},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 12,
                          "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
                          "projection_dim": 8},
    }  # fmt: skip
    base = {f"language_model.{name}": tensor for name, tensor in TIED.items()}
    fitted, _ = fit(tmp_path, base, config, factors(f"language_model.{Q0}"), tied="untie")
    assert dict(fitted.base.untied) == {"language_model.lm_head.weight": f"language_model.{TABLE}"}
    assert fitted.base.config["tie_word_embeddings"] is False
    assert fitted.base.config["text_config"]["tie_word_embeddings"] is False


def test_the_flag_of_ensure_weight_tying_proves_nothing(tmp_path):
    """PEFT writes it for a GPT-2 too, whose `wte` it does not tie to anything."""
    tensors = {
        f"{P}transformer.wte.lora_embedding_A": torch.ones(2, 16),
        f"{P}transformer.wte.lora_embedding_B": torch.ones(8, 2),
    }
    base = random({"transformer.wte.weight": (16, 8), "transformer.wpe.weight": (8, 8)})
    message = refusal(AdapterError, fit, tmp_path, base, GPT2, tensors, {"ensure_weight_tying": True})
    assert "transformer.wte is tied to lm_head" in message


def test_untying_keeps_the_quantised_form_of_the_table(tmp_path):
    table = {TABLE: float8(16, HIDDEN), f"{TABLE}_scale_inv": ramp(1, 1)}
    others = {name: tensor for name, tensor in TIED.items() if name != TABLE}
    config = {**TIED_LLAMA, "quantization_config": {**FP8, "weight_block_size": [16, 8]}}
    made, _ = fit(tmp_path, others | table, config, HEAD, tied="untie", base_numerics="dequantise")
    assert made.base.quantised["lm_head.weight"] == made.base.quantised[TABLE]
