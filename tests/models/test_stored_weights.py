import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_cases import saved

from quantised_files import FP8, float8, ramp
from ray_merge.errors import CheckpointError, RunFailed
from ray_merge.models.conversion import Slot
from ray_merge.models.skeleton import build_skeleton
from ray_merge.models.stored_weights import StoredWeights
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import open_store


@pytest.mark.parametrize("name", ["qwen2-moe", "bert", "llama-tied"])
def test_every_parameter_is_what_transformers_loads(name, tmp_path):
    case = saved(name, tmp_path)
    skeleton = build_skeleton(case.checkpoint.config, case.shapes)
    weights = StoredWeights(case.checkpoint, case.store, skeleton.slots)
    want = dict(case.model.named_parameters(remove_duplicate=False))
    assert set(skeleton.slots) == set(want)
    for parameter, value in want.items():
        assert torch.equal(weights.read(parameter), value), parameter
    tied = {id(value): value for value in want.values()}
    assert weights.n_bytes(want) == sum(value.numel() * 4 for value in tied.values())
    assert weights.read_names == list(want)


def weights_of(folder, tensors, slots, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    store = open_store(str(folder))
    return StoredWeights(read_checkpoint(store, dequantise=bool(config)), store, slots)


def test_parts_come_to_their_places_whatever_their_axis_and_dtype(tmp_path):
    a, b = torch.arange(6.0).view(2, 3), 10 + torch.arange(9.0).view(3, 3)
    tensors = {"a": a.bfloat16(), "b": b, "c": b.T.contiguous(), "d": a.T.contiguous(), "n": torch.arange(3)}
    slots = {
        "rows": (Slot("a", None, (0, 2), 0), Slot("b", None, (2, 5), 0)),
        "columns": (Slot("d", None, (0, 2), 1), Slot("c", None, (2, 5), 1)),
        "experts": (Slot("b", 0), Slot("c", 1)),
        "both": (
            Slot("d", 0, (0, 2), 1), Slot("c", 0, (2, 5), 1), Slot("d", 1, (0, 2), 1), Slot("b", 1, (2, 5), 1),
        ),
        "bf16": (Slot("a"),),
        "integers": (Slot("n"),),
    }  # fmt: skip
    weights = weights_of(tmp_path, tensors, slots)
    assert torch.equal(weights.read("rows"), torch.cat([a, b]))
    assert torch.equal(weights.read("columns"), torch.cat([a.T, b.T], dim=1))
    assert torch.equal(weights.read("experts"), torch.stack([b, b.T]))
    assert torch.equal(weights.read("both"), torch.stack([torch.cat([a.T, b.T], 1), torch.cat([a.T, b], 1)]))
    assert weights.read("bf16").dtype == torch.bfloat16
    assert torch.equal(weights.read("integers"), torch.arange(3))


def test_a_tensor_longer_than_a_chunk_is_read_whole_and_counted(tmp_path):
    long = torch.randn(3 * 2**19 + 7)
    weights = weights_of(tmp_path, {"w": long}, {"w": (Slot("w"),)})
    assert torch.equal(weights.read("w"), long)
    assert weights.n_read == 4 * long.numel()


def test_quantised_weights_are_decoded_in_the_dtype_that_config_names(tmp_path):
    values, scales = float8(40, 48), ramp(2, 3)
    tensors = {"m.weight": values, "m.weight_scale_inv": scales, "n.weight": torch.ones(2)}
    slots = {"m.weight": (Slot("m.weight"),), "n.weight": (Slot("n.weight"),)}
    weights = weights_of(tmp_path, tensors, slots, quantization_config=FP8, dtype="float32")
    by_entry = scales.repeat_interleave(32, 0)[:40].repeat_interleave(16, 1)
    assert torch.equal(weights.read("m.weight"), values.float() * by_entry)
    weights = weights_of(tmp_path, tensors, slots, quantization_config=FP8)
    assert torch.equal(weights.read("m.weight"), (values.float() * by_entry).bfloat16())
    assert weights.n_bytes(["m.weight"]) == 2 * 40 * 48


def test_what_the_checkpoint_lacks_is_refused_by_name(tmp_path):
    weights = weights_of(tmp_path, {"w": torch.ones(2)}, {"w": (Slot("w"),)})
    with pytest.raises(
        CheckpointError, match=r"gives the model no classifier.weight \(no disk tensor is loaded into it\)"
    ):
        weights.read("classifier.weight")


def test_a_file_that_changed_since_its_headers_were_read_is_refused(tmp_path):
    weights = weights_of(tmp_path, {"w": torch.ones(2)}, {"w": (Slot("w"),)})
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"x": torch.zeros(9)}, path)
    with pytest.raises(RunFailed, match="changed in mid-run"):
        weights.read("w")
