from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ray_merge.errors import AdapterError
from ray_merge.heads import load_head


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 3)


def saved(path, metadata=None, **tensors):
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def test_a_head_is_put_in_place_and_nothing_else_changes(tmp_path):
    model = Model()
    encoder = model.encoder.weight.clone()
    weight, bias = torch.full((3, 4), 0.5), torch.arange(3.0)
    path = saved(tmp_path / "h.safetensors", classifier__weight=weight, classifier__bias=bias)
    assert load_head(model, path) is model
    assert torch.equal(model.classifier.weight, weight)
    assert torch.equal(model.classifier.bias, bias)
    assert torch.equal(model.encoder.weight, encoder)
    assert model.classifier.weight.requires_grad


def test_a_head_is_stored_in_the_dtype_of_the_model(tmp_path):
    model = Model().to(torch.bfloat16)
    load_head(model, str(saved(tmp_path / "h.safetensors", classifier__weight=torch.full((3, 4), 0.5))))
    assert model.classifier.weight.dtype == torch.bfloat16
    assert torch.equal(model.classifier.weight, torch.full((3, 4), 0.5, dtype=torch.bfloat16))


def test_a_head_of_another_model_is_refused_and_changes_nothing(tmp_path):
    model = Model()
    before = model.classifier.weight.clone()
    path = saved(
        tmp_path / "h.safetensors", classifier__weight=torch.ones(3, 4), score__weight=torch.ones(3, 4)
    )
    with pytest.raises(AdapterError, match=r"the model \(Model\) has no score.weight"):
        load_head(model, path)
    assert torch.equal(model.classifier.weight, before)


def test_a_head_with_other_labels_says_how_to_load_the_model(tmp_path):
    path = saved(tmp_path / "h.safetensors", classifier__weight=torch.ones(5, 4))
    with pytest.raises(AdapterError, match=r"\(5, 4\), the model has \(3, 4\); load it with num_labels=5"):
        load_head(Model(), path)


@pytest.mark.parametrize(("labels", "advice"), [("3", "trained on another model"), ("5", "num_labels=5")])
def test_a_hidden_layer_of_another_width_is_no_number_of_labels(tmp_path, labels, advice):
    model = Model()
    model.config = SimpleNamespace(num_labels=3)
    path = saved(tmp_path / "h.safetensors", {"num_labels": labels}, classifier__weight=torch.ones(8, 4))
    with pytest.raises(AdapterError, match=rf"\(8, 4\), the model has \(3, 4\); .*{advice}$"):
        load_head(model, path)
