import json

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from ray_merge.errors import CheckpointError
from ray_merge.storage import checkpoint
from ray_merge.storage.checkpoint import MAX_SIDE_FILE_BYTES, read_checkpoint, read_json
from ray_merge.storage.store import open_store
from tiny import llama_tensors, write_base


def read(folder):
    return read_checkpoint(open_store(str(folder)))


def sharded(folder, weight_map=None, files=None):
    folder.mkdir()
    files = (
        {"m-1.safetensors": {"a": torch.zeros(2)}, "m-2.safetensors": {"b": torch.zeros(3)}}
        if files is None
        else files
    )
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    given = {"a": "m-1.safetensors", "b": "m-2.safetensors"} if weight_map is None else weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": given}))
    (folder / "config.json").write_text("{}")
    return folder


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_in_one_file(tmp_path):
    found = read(write_base(tmp_path / "base"))
    assert set(found.tensors) == set(llama_tensors())
    assert found.n_bytes == sum(t.numel() * 4 for t in llama_tensors().values())
    assert [info.path for info in found.weight_files] == ["model.safetensors"]
    assert [info.path for info in found.side_files] == ["tokenizer_config.json"]
    assert found.config["model_type"] == "llama"


def test_a_checkpoint_in_shards(tmp_path):
    found = read(sharded(tmp_path / "base"))
    assert {name: entry.file for name, entry in found.tensors.items()} == {
        "a": "m-1.safetensors",
        "b": "m-2.safetensors",
    }
    assert [info.path for info in found.weight_files] == ["m-1.safetensors", "m-2.safetensors"]


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path):
    folder = sharded(tmp_path / "base")
    save_file({"c": torch.zeros(1)}, folder / "model.safetensors")
    assert set(read(folder).tensors) == {"c"}


@pytest.mark.parametrize(
    "place", ["../evil.safetensors", "/etc/passwd", "sub/m.safetensors", "..", ".hidden", "a\\b", 3, None]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, place):
    assert "not a plain file name" in refusal(sharded(tmp_path / "base", {"a": place}))


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "m-1.safetensors", "b": "m-3.safetensors"}, "names m-3.safetensors, which does not exist"),
        ({"a": "m-2.safetensors", "b": "m-1.safetensors"}, "puts 'a' into m-2.safetensors, which lacks it"),
        (
            {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"},
            "puts 'c' into m-2.safetensors",
        ),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, weight_map, words):
    assert words in refusal(sharded(tmp_path / "base", weight_map))


def test_a_tensor_that_the_index_forgets_is_refused(tmp_path):
    files = {"m-1.safetensors": {"a": torch.zeros(2), "c": torch.zeros(1)}}
    assert "'c' is in m-1.safetensors but not in" in refusal(
        sharded(tmp_path / "base", {"a": "m-1.safetensors"}, files)
    )


def test_a_tensor_in_two_files_is_refused(tmp_path):
    files = {
        "m-1.safetensors": {"a": torch.zeros(2)},
        "m-2.safetensors": {"a": torch.zeros(2), "b": torch.zeros(1)},
    }
    assert "'a' is in m-1.safetensors and in m-2.safetensors" in refusal(
        sharded(tmp_path / "base", files=files)
    )


def test_a_missing_folder_and_one_without_weights_are_refused(tmp_path):
    assert "does not exist or is empty" in refusal(tmp_path / "none")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    assert "holds neither model.safetensors nor" in refusal(tmp_path / "base")


def test_a_pickled_checkpoint_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin is a pickle: save the model as safetensors first" in refusal(tmp_path)


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert "holds no tensor" in refusal(tmp_path)


def test_a_quantised_base_is_refused_unless_it_is_to_be_dequantised(tmp_path):
    # What its weights decode to: test_quantised.py.
    folder = write_base(tmp_path / "base", config={"quantization_config": {"quant_method": "gptq"}})
    message = refusal(folder)
    assert "has a quantization_config" in message
    assert "base_numerics: dequantise" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": \udcff', "not valid"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, text, words):
    folder = write_base(tmp_path / "base")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert words in refusal(folder)


def test_a_missing_config_is_refused(tmp_path):
    folder = write_base(tmp_path / "base")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        read_json(open_store(str(folder)), "config.json")
    assert "config.json does not exist" in refusal(folder)


def test_side_files_are_what_a_copy_of_the_model_needs_and_nothing_else(tmp_path):
    folder = write_base(tmp_path / "base")
    wanted = ["README.md", "1_Pooling/config.json", "generation_config.json", "tokenizer.model"]
    unwanted = [
        "pytorch_model.bin", "model.onnx", "tf_model.h5", "original/consolidated.00.pth", "model.gguf",
        "pytorch_model.bin.index.json", ".gitattributes", ".cache/x.json", "adapter_config.json",
        "adapter_model.safetensors", "ray_merge/recipe.yaml", "ray_merge/MANIFEST.json", "adapter/adapter_config.json",
        "heads/a.safetensors",
    ]  # fmt: skip
    for name in wanted + unwanted:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert [info.path for info in read(folder).side_files] == sorted([*wanted, "tokenizer_config.json"])


def test_a_side_file_as_large_as_weights_is_refused(tmp_path):
    folder = write_base(tmp_path / "base")
    with (folder / "data.arrow").open("wb") as file:
        file.truncate(MAX_SIDE_FILE_BYTES + 1)
    assert "data.arrow is 256000001 bytes long: too large for a side file" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", [], "model_type is [], expected a text"),
        ("model_type", {"a": 1}, "expected a text"),
        ("architectures", 5, "architectures is 5, expected a list"),
        ("architectures", [3], "architectures holds 3, expected names of classes"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes', expected true or false"),
        ("quantization_config", 3, "quantization_config is 3, expected a mapping"),
        ("text_config", [1], "text_config is [1], expected a mapping"),
        ("text_config", {"model_type": 3}, "text_config: model_type is 3, expected a text"),
        ("model_type", ["x"] * 10**6, "expected a text"),
        ("num_labels", 10**9, "num_labels is 1000000000, expected a number up to 100000"),
        ("vision_config", {"num_labels": 10**9}, "vision_config: num_labels is 1000000000"),
    ],
)
def test_a_config_with_values_of_other_types_is_refused(tmp_path, key, value, words):
    message = refusal(write_base(tmp_path / "base", config={"model_type": "llama", key: value}))
    assert words in message
    assert len(message) < 600


def test_a_config_deeper_or_longer_than_any_real_one_is_refused(tmp_path):
    folder = write_base(tmp_path / "base")
    (folder / "config.json").write_text('{"a":' * 200 + "1" + "}" * 200)
    assert "levels deep" in refusal(folder)
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**9)
    assert "at most 20000000 are read" in refusal(folder)


@pytest.mark.parametrize("name", ["a\\b.json", "a\nb", "\x1b[31mred", "\u202etxt", "\udcff.json"])
def test_a_side_file_whose_name_not_every_store_keeps_is_refused(tmp_path, name):
    folder = write_base(tmp_path / "base")
    (folder / name).write_text("x")
    message = refusal(folder)
    assert "a name that not every store can keep" in message
    assert message.isprintable()


def test_a_folder_that_is_no_models_is_not_copied_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SIDE_FILES", 20)
    folder = write_base(tmp_path / "base")
    for index in range(20):
        (folder / f"{index}.txt").write_text("x")
    assert "holds 21 files beside its weights, more than 20" in refusal(folder)


def test_a_side_file_that_lies_elsewhere_is_not_published(tmp_path):
    folder = write_base(tmp_path / "base")
    (tmp_path / "secret").write_text("x")
    (folder / "vocab.txt").symlink_to("../secret")
    said = refusal(folder)
    assert "vocab.txt is a link to '" in said
    assert "/secret', outside of its folder" in said
    (folder / "vocab.txt").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.json").write_text("{}")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    assert "folder/x.json is a link to" in refusal(folder)
    (folder / "folder").unlink()
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to("../config.json")
    assert "config.json is a link to" in refusal(folder)


def test_links_inside_of_the_folder_and_of_the_hubs_cache_are_followed(tmp_path):
    folder = write_base(tmp_path / "base")
    (folder / "vocab.txt").symlink_to("tokenizer_config.json")
    (tmp_path / "link").symlink_to(folder)
    assert [info.path for info in read(tmp_path / "link").side_files] == [
        "tokenizer_config.json",
        "vocab.txt",
    ]
    (folder / "vocab.txt").unlink()
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    assert [info.path for info in read(snapshot).side_files] == ["tokenizer_config.json"]


def test_weights_may_be_links_to_anywhere(tmp_path):
    folder = write_base(tmp_path / "base")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to("../weights")
    assert set(read(folder).tensors) == set(llama_tensors())


@pytest.mark.parametrize("place", ["x" * 256, "a\nb", "\x1b[31m", ""])
def test_an_index_names_files_as_file_systems_have_them(tmp_path, place):
    words = "does not exist" if not place else "not a plain file name"
    assert words in refusal(sharded(tmp_path / "base", {"a": place}))


def test_files_of_an_object_store_are_no_links(tmp_path):
    memory = fsspec.filesystem("memory")
    folder = write_base(tmp_path / "base")
    try:
        for path in folder.iterdir():
            memory.pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
        found = read_checkpoint(open_store(f"memory://{tmp_path.name}"))
        assert [info.path for info in found.side_files] == ["tokenizer_config.json"]
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)
