import json
import re

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


def test_every_module_is_found_with_its_tensors_by_role(tmp_path):
    tensors = factors(Q0) | factors(V1, rank=4)
    found = read(write_adapter(tmp_path, tensors, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 2}))
    assert [(module.name, module.depth) for module in found.modules] == [(Q0, 0), (V1, 0)]
    assert found.modules[1].tensors["A"].shape == (4, 8)
    assert found.modules[1].tensors["B"].shape == (8, 4)
    assert found.settings.scaling.rank_of(V1) == 4
    assert found.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found.file_version
    assert (found.file, found.pickled) == ("adapter_model.safetensors", False)
    assert (found.saved, found.tokens, found.ignored, found.same) == ((), {}, {}, ())


def test_every_role_of_a_module_is_kept(tmp_path):
    embedding = "model.embed_tokens"
    tensors = factors(Q0) | {
        f"{P}{Q0}.lora_magnitude_vector": torch.ones(8),
        f"{P}{Q0}.lora_B.bias": torch.ones(8),
        f"{P}{embedding}.lora_embedding_A": torch.ones(2, 16),
        f"{P}{embedding}.lora_embedding_B": torch.ones(8, 2),
        f"{P}{embedding}.lora_magnitude_vector": torch.ones(8),
    }
    found = read(write_adapter(tmp_path, tensors, use_dora=True, lora_bias=True))
    roles = {module.name: sorted(module.tensors) for module in found.modules}
    assert roles == {
        Q0: ["A", "B", "B.bias", "magnitude"],
        embedding: ["embedding_A", "embedding_B", "magnitude"],
    }


def test_factors_around_other_factors_are_a_module_of_their_own(tmp_path):
    experts = "model.layers.0.mlp.experts"
    tensors = factors(experts) | factors(f"{experts}.base_layer", rank=4)
    found = read(write_adapter(tmp_path, tensors))
    assert [(module.name, module.depth) for module in found.modules] == [(experts, 0), (experts, 1)]
    assert found.modules[1].tensors["A"].shape == (4, 8)


@pytest.mark.parametrize("saved", [["classifier"], ["classifier", "score"]])
def test_saved_heads_are_kept_under_runtime_names(tmp_path, saved):
    heads = {f"{P}classifier.dense.weight": torch.ones(8, 8), f"{P}classifier.dense.bias": torch.ones(8)}
    found = read(write_adapter(tmp_path, factors(Q0) | heads, modules_to_save=saved))
    assert [tensor.name for tensor in found.saved] == ["classifier.dense.bias", "classifier.dense.weight"]
    assert not any(tensor.wrapped for tensor in found.saved)
    assert [module.name for module in found.modules] == [Q0]


def test_whole_parameters_are_kept_whatever_the_config_says_and_whatever_they_were_wrapped_in(tmp_path):
    # What they may be is decided by fit/saved.py, which knows the base.
    saved = {
        f"{P}{Q0}.base_layer.bias": torch.ones(8),
        f"{P}model.norm.modules_to_save.weight": torch.ones(8),
    }
    found = read(write_adapter(tmp_path, factors(Q0) | saved))
    assert [(tensor.name, tensor.wrapped) for tensor in found.saved] == [
        (f"{Q0}.bias", True),
        ("model.norm.weight", False),
    ]


def test_a_parameter_saved_under_two_names_must_have_equal_values(tmp_path):
    # PEFT with bias: all saves the bias of a module of modules_to_save twice.
    twice = {f"{P}score.bias": torch.ones(3), f"{P}score.modules_to_save.default.bias": torch.ones(3)}
    found = read(write_adapter(tmp_path, factors(Q0) | twice))
    assert [tensor.name for tensor in found.saved] == ["score.bias"]
    (same,) = found.same
    assert {same.one.entry.name, same.other.entry.name} == twice.keys()
    assert same.one.matrix == same.other.matrix == (3, 1)
    assert "two values of one parameter" in same.why


@pytest.mark.parametrize("other", [torch.ones(4), torch.ones(3, dtype=torch.int64)])
def test_two_values_of_one_parameter_that_cannot_be_equal_are_refused(tmp_path, other):
    twice = {f"{P}score.bias": other, f"{P}score.modules_to_save.default.bias": torch.ones(3)}
    assert "are two values of one parameter, of different shapes" in refusal(
        write_adapter(tmp_path, factors(Q0) | twice)
    )


def test_what_belongs_to_training_alone_is_listed_with_the_reason(tmp_path):
    sampler = f"{P}{Q0}.lora_monteclora_sampler.default.lora_A_std"
    original = f"{P}score.original_module.weight"
    odd = {sampler: torch.ones(2), original: torch.ones(3, 8)}
    found = read(write_adapter(tmp_path, factors(Q0) | odd, monteclora_config={"n": 4}))
    assert found.ignored.keys() == odd.keys()
    assert "training only" in found.ignored[sampler]
    assert "modules_to_save replaced" in found.ignored[original]


def test_trained_tokens_are_kept_by_the_path_of_their_embedding(tmp_path):
    rows = {f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(3, 8)}
    found = read(write_adapter(tmp_path, rows, trainable_token_indices=[1, 2, 5]))
    assert found.tokens["model.embed_tokens"].shape == (3, 8)
    assert found.settings.tokens == {"": (1, 2, 5)}
    twice = rows | {f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta.default": torch.ones(3, 8)}
    assert "the trained tokens of model.embed_tokens stand twice" in refusal(write_adapter(tmp_path, twice))


def test_names_of_an_in_memory_dump_are_those_of_a_saved_adapter(tmp_path):
    dumped = {
        f"base_model.model._orig_mod.{Q0}.lora_A.default.weight": torch.ones(2, 8),
        f"base_model.model._orig_mod.{Q0}.lora_B.default.weight": torch.ones(8, 2),
    }
    found = read(write_adapter(tmp_path, dumped))
    assert [(module.name, sorted(module.tensors)) for module in found.modules] == [(Q0, ["A", "B"])]


def test_two_tensors_of_one_role_are_refused(tmp_path):
    tensors = factors(Q0) | {f"{P}{Q0}.lora_A.default.weight": torch.ones(2, 8)}
    assert f"{Q0} has two tensors for its A" in refusal(write_adapter(tmp_path, tensors))


@pytest.mark.parametrize(("side", "other"), [("A", "B"), ("B", "A")])
def test_a_missing_side_is_refused(tmp_path, side, other):
    tensors = {name: t for name, t in factors(Q0).items() if f"lora_{side}" not in name}
    assert f"{Q0} has lora_{other} but no lora_{side}" in refusal(write_adapter(tmp_path, tensors))


def test_empty_tensors_point_at_the_sharded_training_that_made_them(tmp_path):
    tensors = factors(Q0) | {f"{P}{Q0}.lora_A.weight": torch.ones(0)}
    message = refusal(write_adapter(tmp_path, tensors))
    assert "empty shape (0,)" in message
    assert "ZeRO-3" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_factors_that_are_no_floats_are_refused(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in factors(Q0).items()}
    assert "expected one of F32, F16, BF16, F64" in refusal(write_adapter(tmp_path, tensors))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{Q0}.lora_diag", "a KaSA diagonal"),
        (f"{Q0}.lora_E", "an AdaLoRA diagonal"),
        (f"{Q0}.lora_C.weight", "a LoRA variant that this version does not know"),
        (f"{Q0}.ranknum", "AdaLoRA's bookkeeping"),
        (
            f"{Q0}.lora_monteclora_sampler.default.lora_A_std",
            "a LoRA variant that this version does not know",
        ),
        ("model.embed_tokens.token_adapter.other", "a token adapter's state"),
    ],
)
def test_a_tensor_that_no_rule_takes_is_refused_by_what_it_is(tmp_path, name, words):
    message = refusal(write_adapter(tmp_path, factors(Q0) | {f"{P}{name}": torch.ones(2, 2)}))
    assert words in message
    assert name in message


@pytest.mark.parametrize(
    ("name", "shape", "settings", "words"),
    [
        ("lora_magnitude_vector", (8,), {}, "has a lora_magnitude_vector, but .* use_dora: false"),
        (None, (), {"use_dora": True}, "lacks a lora_magnitude_vector, but .* use_dora: true"),
        ("lora_B.bias", (8,), {}, "has a bias on B, but .* does not say lora_bias: true"),
        (None, (), {"lora_bias": True}, "lacks the bias on B that .* promises"),
        ("lora_embedding_A", (2, 16), {}, "has lora_embedding_A but no lora_embedding_B"),
    ],
)
def test_tensors_and_config_must_agree_on_the_variant(tmp_path, name, shape, settings, words):
    extra = {} if name is None else {f"{P}{Q0}.{name}": torch.ones(shape)}
    assert re.search(
        f"{re.escape(Q0)} {words}", refusal(write_adapter(tmp_path, factors(Q0) | extra, **settings))
    )


def test_a_module_is_either_a_layer_or_an_embedding(tmp_path):
    both = {f"{P}{Q0}.lora_embedding_A": torch.ones(2, 8), f"{P}{Q0}.lora_embedding_B": torch.ones(8, 2)}
    assert "factors of a linear layer and of an embedding" in refusal(
        write_adapter(tmp_path, factors(Q0) | both)
    )


def test_a_magnitude_alone_is_no_update(tmp_path):
    message = refusal(
        write_adapter(tmp_path, {f"{P}{Q0}.lora_magnitude_vector": torch.ones(8)}, use_dora=True)
    )
    assert f"{Q0} has magnitude but no factors" in message


def test_an_adapter_without_a_tensor_of_use_is_refused(tmp_path):
    nothing = {f"{P}score.original_module.weight": torch.ones(2, 8)}
    assert "holds no LoRA factor" in refusal(write_adapter(tmp_path, nothing))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    assert "is a file; give the folder that holds adapter_config.json" in refusal(path)


@pytest.mark.parametrize(
    ("card", "settings", "found"),
    [
        ("trained with [Unsloth](https://unsloth.ai)", {"target_parameters": ["experts.down_proj"]}, True),
        ("trained with PEFT", {"target_parameters": ["experts.down_proj"]}, False),
        ("trained with Unsloth", {}, False),
        (None, {"base_model_name_or_path": "unsloth/gpt-oss-20b"}, True),
    ],
)
def test_a_word_of_unsloth_is_noticed_where_it_could_matter(tmp_path, card, settings, found):
    write_adapter(tmp_path, **settings)
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read(tmp_path).unsloth is found


def test_tokenizer_files_are_noted_where_the_vocabulary_may_have_changed(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "training_args.bin"):
        (tmp_path / name).write_text("{}")
    assert read(write_adapter(tmp_path)).side_files == ()
    write_adapter(tmp_path, factors(Q0) | {f"{P}model.embed_tokens.weight": torch.ones(20, 8)})
    assert [info.path for info in read(tmp_path).side_files] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "adapter_config.json"])
def test_a_file_that_would_be_published_and_lies_elsewhere_is_refused(tmp_path, name):
    folder = write_adapter(tmp_path / "a", factors(Q0) | {f"{P}model.embed_tokens.weight": torch.ones(20, 8)})
    (tmp_path / "secret").write_text((folder / "adapter_config.json").read_text())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret")
    said = refusal(folder, CheckpointError)
    assert f"{name} is a link to '" in said
    assert "/secret', outside of its folder" in said


def test_the_adapter_that_training_started_from_is_read_too(tmp_path):
    stores = [open_store(str(write_adapter(tmp_path / name))) for name in ("trained", "initial")]
    found = read_adapter("a", stores[0], initial=stores[1])
    assert (found.initial.url, found.initial.name) == (str(tmp_path / "initial"), "a (initial)")
    (tmp_path / "initial" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"initial/adapter_model\.safetensors does not exist"):
        read_adapter("a", stores[0], initial=stores[1])


def test_a_pickled_adapter_is_refused_unless_its_tensors_may_be_converted(tmp_path):
    write_adapter(tmp_path / "a")
    converted = tmp_path / "converted.safetensors"
    converted.write_bytes((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    message = refusal(tmp_path / "a", CheckpointError)
    assert "holds a pickle, adapter_model.bin" in message
    assert "allow_pickle: true" in message
    found = read_adapter("a", open_store(str(tmp_path / "a")), unpickle=lambda store, info: converted)
    assert (found.file, found.pickled) == ("adapter_model.bin", True)
    assert {entry.file for entry in found.modules[0].tensors.values()} == {"adapter_model.bin"}


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
