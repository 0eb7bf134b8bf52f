import json
import threading

import pytest
import torch
from stage_cases import saved
from torch import nn

from ray_merge.errors import CheckpointError
from ray_merge.models.conversion import Slot
from ray_merge.models.skeleton import _parameters_on_meta, build_skeleton


def skeleton_of(case):
    return build_skeleton(case.checkpoint.config, case.shapes)


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2"])
def test_parameters_are_on_meta_and_buffers_are_those_of_the_loaded_model(name, tmp_path):
    case = saved(name, tmp_path)
    skeleton = skeleton_of(case)
    assert all(value.is_meta and not value.requires_grad for value in skeleton.model.parameters())
    assert not skeleton.model.training
    want = dict(case.model.named_buffers())
    got = dict(skeleton.model.named_buffers())
    assert list(got) == list(want) != []
    assert all(torch.equal(got[path], want[path]) for path in want)


def test_a_tied_head_is_read_from_the_embedding_and_stays_tied(tmp_path):
    skeleton = skeleton_of(saved("llama-tied", tmp_path))
    assert skeleton.slots["lm_head.weight"] == skeleton.slots["model.embed_tokens.weight"]
    assert skeleton.slots["lm_head.weight"] == (Slot("model.embed_tokens.weight"),)
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight


def test_config_json_decides_neither_cache_nor_dtype_nor_attention(tmp_path):
    case = saved("llama", tmp_path)
    config = dict(case.checkpoint.config) | {
        "use_cache": True, "return_dict": False, "dtype": "bfloat16", "_attn_implementation": "flash_attention_2",
    }  # fmt: skip
    model = build_skeleton(config, case.shapes).model
    assert model.config.use_cache is False
    assert model.config.return_dict is True
    assert model.config._attn_implementation == "sdpa"
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_only_the_building_thread_registers_parameters_on_meta():
    made = {}

    def elsewhere() -> None:
        made["there"] = nn.Linear(2, 2)

    with _parameters_on_meta():
        made["here"] = nn.Linear(2, 2)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert made["here"].weight.is_meta
    assert not made["there"].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_random_numbers_of_the_caller_are_left_alone(tmp_path):
    case = saved("bert", tmp_path)
    torch.manual_seed(5)
    skeleton_of(case)
    got = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(got, torch.rand(3))


def test_unknown_model_types_are_refused():
    with pytest.raises(CheckpointError, match=r"no class for the base's model_type 'mine'.*needs no data"):
        build_skeleton({"model_type": "mine"}, {})


def test_a_config_that_describes_more_than_the_checkpoint_holds_is_refused(tmp_path):
    case = saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 100_000}
    with pytest.raises(CheckpointError, match=r"more than .* parameters"):
        build_skeleton(config, dict(list(case.shapes.items())[:4]))
