import json

import pytest
import torch

from ray_merge.errors import AdapterError, CheckpointError
from ray_merge.storage.adapter import read_adapter
from ray_merge.storage.store import open_store
from tiny import Q0, V1, factors, write_adapter

P = "base_model.model."


def read(folder):
    return read_adapter("a", open_store(str(folder)))


def refusal(folder, kind=AdapterError):
    with pytest.raises(kind) as caught:
        read(folder)
    return str(caught.value)


def test_every_factor_is_found_with_its_rank_and_scale(tmp_path):
    tensors = factors(Q0) | factors(V1, rank=4)
    found = read(write_adapter(tmp_path, tensors, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 2}))
    assert list(found.factors) == [Q0, V1]
    assert (found.factors[Q0].rank, found.factors[Q0].scale) == (2, 2.0)
    assert (found.factors[V1].rank, found.factors[V1].scale) == (4, 0.5)
    assert found.factors[V1].A.shape == (4, 8)
    assert found.factors[V1].B.shape == (8, 4)
    assert found.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found.file_version
    assert found.heads == ()


def test_rslora_is_scaled_by_the_root_of_each_rank(tmp_path):
    tensors = factors(Q0) | factors(V1, rank=4)
    found = read(write_adapter(tmp_path, tensors, use_rslora=True, rank_pattern={"v_proj": 4}))
    assert found.factors[V1].scale == 4 / 2


@pytest.mark.parametrize("saved", [["classifier"], ["classifier", "score"]])
def test_saved_heads_are_kept_under_runtime_names(tmp_path, saved):
    heads = {f"{P}classifier.dense.weight": torch.ones(8, 8), f"{P}classifier.dense.bias": torch.ones(8)}
    found = read(write_adapter(tmp_path, factors(Q0) | heads, modules_to_save=saved))
    assert sorted(entry.name for entry in found.heads) == ["classifier.dense.bias", "classifier.dense.weight"]
    assert list(found.factors) == [Q0]


def test_a_list_of_saved_modules_names_whole_components(tmp_path):
    heads = {f"{P}my_classifier.weight": torch.ones(2, 8)}
    assert "my_classifier.weight' is neither a factor nor a saved head" in refusal(
        write_adapter(tmp_path, factors(Q0) | heads, modules_to_save=["classifier"])
    )


@pytest.mark.parametrize(("side", "other"), [("A", "B"), ("B", "A")])
def test_a_missing_side_is_refused(tmp_path, side, other):
    tensors = {name: t for name, t in factors(Q0).items() if f"lora_{side}" not in name}
    assert f"{Q0} has lora_{other} but no lora_{side}" in refusal(write_adapter(tmp_path, tensors))


def test_sides_of_different_rank_are_refused(tmp_path):
    tensors = factors(Q0) | {f"{P}{Q0}.lora_B.weight": torch.ones(8, 3)}
    assert "lora_A (2, 8) has rank 2 but lora_B (8, 3) has rank 3" in refusal(
        write_adapter(tmp_path, tensors)
    )


def test_a_rank_that_the_config_does_not_claim_is_refused(tmp_path):
    message = refusal(write_adapter(tmp_path, factors(Q0, rank=4)))
    assert "the factors have rank 4 but adapter_config.json says 2" in message
    assert str(tmp_path) in message


def test_empty_tensors_point_at_the_sharded_training_that_made_them(tmp_path):
    tensors = factors(Q0) | {f"{P}{Q0}.lora_A.weight": torch.ones(0)}
    message = refusal(write_adapter(tmp_path, tensors))
    assert "empty shape (0,)" in message
    assert "ZeRO-3" in message


def test_convolutions_are_refused(tmp_path):
    tensors = factors(Q0) | {f"{P}{Q0}.lora_A.weight": torch.ones(2, 8, 3, 3)}
    assert "4 dimensions (2, 8, 3, 3): LoRA on a convolution" in refusal(write_adapter(tmp_path, tensors))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_factors_that_are_no_floats_are_refused(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in factors(Q0).items()}
    assert "expected one of F32, F16, BF16, F64" in refusal(write_adapter(tmp_path, tensors))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.embed_tokens.lora_embedding_A", "LoRA on an embedding"),
        (f"{Q0}.lora_magnitude_vector", "a DoRA magnitude"),
        (f"{Q0}.lora_magnitude_vector.weight", "a DoRA magnitude"),
        (f"{Q0}.lora_diag", "a KaSA diagonal"),
        (f"{Q0}.lora_E", "an AdaLoRA diagonal"),
        (f"{Q0}.lora_B.bias", "a bias on B"),
        (f"{Q0}.base_layer.weight", "a changed base layer"),
        ("mlp.experts.base_layer.lora_A.weight", "a changed base layer"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable tokens"),
        (f"{Q0}.lora_A.default.weight", "neither a factor nor a saved head"),
        ("model.embed_tokens.weight", "neither a factor nor a saved head"),
        (f"{Q0}.bias", "neither a factor nor a saved head"),
    ],
)
def test_a_tensor_that_is_no_factor_is_refused_by_what_it_is(tmp_path, name, words):
    message = refusal(write_adapter(tmp_path, factors(Q0) | {f"{P}{name}": torch.ones(2, 2)}))
    assert words in message
    assert name in message


def test_a_changed_base_layer_is_no_head_even_if_it_is_listed(tmp_path):
    tensors = factors(Q0) | {f"{P}lm_head.base_layer.weight": torch.ones(2, 2)}
    message = refusal(write_adapter(tmp_path, tensors, modules_to_save=["lm_head"]))
    assert "a changed base layer" in message


def test_names_that_peft_does_not_write_are_refused(tmp_path):
    assert "does not begin with 'base_model.model.'" in refusal(
        write_adapter(tmp_path, {"lora_unet_x.lora_A.weight": torch.ones(2, 8)})
    )


def test_an_adapter_without_factors_is_refused(tmp_path):
    assert "holds no LoRA factor" in refusal(
        write_adapter(tmp_path, {f"{P}classifier.weight": torch.ones(2, 8)}, modules_to_save=["classifier"])
    )


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_adapted_module_is_refused(tmp_path, field):
    assert f"{field} 'k_proj' matches none of the 1 adapted modules" in refusal(
        write_adapter(tmp_path, **{field: {"k_proj": 2}})
    )


def test_a_pickled_adapter_is_refused(tmp_path):
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "holds a pickle, adapter_model.bin" in refusal(tmp_path, CheckpointError)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    write_adapter(tmp_path)
    (tmp_path / name).unlink()
    assert f"{tmp_path}/{name} does not exist" in refusal(tmp_path, CheckpointError)


def test_a_truncated_adapter_is_refused(tmp_path):
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated or damaged" in refusal(tmp_path, CheckpointError)


def test_a_config_that_is_no_object_is_refused(tmp_path):
    (write_adapter(tmp_path) / "adapter_config.json").write_text(json.dumps([1]))
    assert "not a JSON object" in refusal(tmp_path, CheckpointError)


def test_a_file_replaced_while_it_was_read_has_the_older_version(tmp_path):
    # The version is taken before the header: whoever compares it later sees that the file has changed.
    store = open_store(str(write_adapter(tmp_path)))
    before = store.info("adapter_model.safetensors").version

    class Replacing:
        url, local_root = store.url, store.local_root
        info = staticmethod(store.info)

        @staticmethod
        def read(path, start=0, end=None):
            data = store.read(path, start, end)
            if path == "adapter_model.safetensors":
                (tmp_path / path).unlink()
                write_adapter(tmp_path, factors(V1))
            return data

    assert read_adapter("a", Replacing()).file_version == before
