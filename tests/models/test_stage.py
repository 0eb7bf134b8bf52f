"""Changed weights, gradients, what is refused, and what a stage keeps, on models small enough for float64 autograd."""

from functools import cache
from pathlib import Path

import pytest
import torch
from stage_cases import Case, layers, plain_inputs, saved, staged_inputs
from torch import Tensor, nn
from torch.func import functional_call

from ray_merge.errors import CheckpointError
from ray_merge.models.skeleton import build_skeleton
from ray_merge.models.stage import Stage
from ray_merge.models.stage_calls import StageInput
from ray_merge.models.stage_parameters import WidenedTable
from ray_merge.models.stored_weights import StoredWeights
from zoo import relative_error


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    @cache
    def make(name: str, dtype: torch.dtype = torch.float32) -> Case:
        return saved(name, Path(tmp_path_factory.mktemp(name)), dtype=dtype)

    return make


class Update:
    """Adds phi[i] times a random matrix to the i-th weight."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, names: list[str] | None = None):
        generator = torch.Generator().manual_seed(3)
        chosen = names or [name for name, value in model.named_parameters() if value.ndim == 2]
        self.deltas = {
            name: 0.1 * torch.randn(model.get_parameter(name).shape, generator=generator, dtype=dtype)
            for name in chosen
        }
        self.phi = torch.linspace(0.5, 1.5, len(chosen), dtype=dtype, requires_grad=True)
        self.index = {name: index for index, name in enumerate(chosen)}

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        if name not in self.index:
            return weight
        return weight + self.phi[self.index[name]] * self.deltas[name]

    def merged(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: self(name, value.detach()) for name, value in model.named_parameters()}


# ---- forward


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_altered_weights_give_what_the_dense_merged_model_gives(name, case, tmp_path):
    update = Update(case(name).model)
    got, out = staged_inputs(case(name), case(name).stages(2), altered=update)
    with torch.no_grad():
        merged = type(case(name).model).from_pretrained(case(name).folder).eval()
        merged.load_state_dict(update.merged(case(name).model))
    want, plain = plain_inputs(
        Case(tmp_path, merged, case(name).store, case(name).checkpoint, case(name).given)
    )
    assert relative_error(out.logits, plain.logits) <= 1e-6
    assert max(relative_error(got[path][0], want[path][0]) for path in want) <= 1e-6


@pytest.mark.parametrize("name", ["gemma2", "qwen2-moe", "bert"])
def test_a_bfloat16_base_is_held_as_stored_and_computed_with_in_float32(name, case):
    case = case(name, torch.bfloat16)
    stages = [case.stage(index, 2) for index in range(2)]
    want, plain = plain_inputs(case)
    got, out = staged_inputs(case, [stage for stage, _ in stages])
    assert relative_error(out.logits, plain.logits) <= 1e-6
    assert max(relative_error(got[path][0], want[path][0]) for path in want) <= 1e-6
    for stage, weights in stages:
        assert 0 < stage.n_bytes == weights.n_read


def test_an_embedding_table_is_not_widened_for_a_few_rows(case):
    seen: dict[str, type] = {}

    def note(name: str, weight: Tensor) -> Tensor:
        seen[name] = type(weight)
        return weight

    case("bert", torch.bfloat16).stage(0, 2)[0].forward(case("bert").input(), altered=note)
    tables = {name for name, kind in seen.items() if kind is WidenedTable}
    assert tables == {
        f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    }


def test_logits_are_computed_only_on_request_and_the_head_is_read_then(case):
    stage, weights = case("llama").stage(1, 2)
    hidden = case("llama").stage(0, 2)[0].forward(case("llama").input()).hidden
    seen: list[str] = []
    out = stage.forward(case("llama").input(hidden), watch=lambda path, _: seen.append(path))
    assert out.logits is None
    assert "lm_head" not in seen
    assert not {"lm_head.weight", "model.norm.weight"} & set(weights.read_names)
    out = stage.forward(case("llama").input(hidden), to_end=True)
    assert relative_error(out.logits, plain_inputs(case("llama"))[1].logits) <= 1e-6
    assert weights.read_names[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_a_weight_that_the_model_looks_at_before_its_blocks_is_real_after_them(case):
    stage = case("llama").stage(1, 2)[0]
    hidden = case("llama").stage(0, 2)[0].forward(case("llama").input()).hidden
    looked_at: list[Tensor] = []
    stage._model.register_forward_pre_hook(lambda model, _: looked_at.append(model.lm_head.weight))
    out = stage.forward(case("llama").input(hidden), to_end=True)
    assert looked_at[0].isnan().all()
    assert relative_error(out.logits, plain_inputs(case("llama"))[1].logits) <= 1e-6


def test_to_end_means_nothing_to_other_stages(case):
    out = case("llama").stage(0, 2)[0].forward(case("llama").input(), to_end=True)
    assert out.logits is None
    assert out.hidden.shape == (3, 9, 32)


def test_calls_are_pure(case):
    first, last = case("bert").stages(2)
    given = case("bert").input()
    one = first.forward(given)
    altered = first.forward(given, altered=Update(case("bert").model))
    n_bytes = first.n_bytes
    assert not torch.equal(altered.hidden, one.hidden)
    assert torch.equal(first.forward(given).hidden, one.hidden)
    kept = one.hidden.clone()
    last.forward(case("bert").input(one.hidden), to_end=True)
    assert torch.equal(one.hidden, kept)
    assert first.n_bytes == n_bytes
    assert not one.hidden.requires_grad


def test_a_stage_made_and_run_in_inference_mode_can_go_backwards_later(case):
    with torch.inference_mode():
        stage = case("llama", torch.bfloat16).stage(0, 2)[0]
        want = stage.forward(case("llama").input()).hidden.clone()
    update = Update(case("llama").model)
    assert relative_error(stage.forward(case("llama").input()).hidden, want) == 0
    grads = stage.backward(case("llama").input(), torch.ones(3, 9, 32), altered=update, phi=[update.phi])
    assert grads.phi[0].norm() > 0


def test_a_widened_table_looks_rows_up_and_is_a_plain_tensor_otherwise():
    stored = torch.randn(50, 4).bfloat16()
    table = WidenedTable(stored, torch.float32)
    rows = torch.tensor([[3, 49], [0, 3]])
    assert table.dtype == torch.float32
    assert table.shape == (50, 4)
    assert torch.equal(nn.functional.embedding(rows, table), stored.float()[rows])
    assert torch.equal(table + 1, stored.float() + 1)
    assert torch.equal(nn.functional.linear(torch.ones(2, 4), table), stored.float().sum(1).expand(2, 50))
    assert type(table * table) is Tensor


# ---- a head that only an adapter has


def test_a_missing_head_is_refused_by_name_unless_an_adapter_brings_it(case):
    base = case("llama")
    skeleton = build_skeleton(base.checkpoint.config, base.shapes, name="LlamaForSequenceClassification")
    weights = StoredWeights(base.checkpoint, base.store, skeleton.slots, skeleton.unsupported)
    stage = Stage(skeleton, range(4), weights)
    head = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    got = stage.forward(
        base.input(), altered=lambda name, w: head if name == "score.weight" else w, to_end=True
    ).logits
    assert got.shape == (3, 2)
    with torch.no_grad():
        hidden = base.model.model(**base.given).last_hidden_state[torch.arange(3), [8, 4, 1]]
    assert relative_error(got, hidden @ head.T) <= 1e-5
    assert stage.forward(base.input()).hidden is not None
    with pytest.raises(CheckpointError, match=r"gives the model no score\.weight"):
        stage.forward(base.input(), to_end=True)


# ---- backward


def square(out) -> Tensor:
    return out.logits.square().sum()


def plain_backward(case: Case, update: Update, dtype: torch.dtype):
    """Loss, gradient of phi, and gradient of every linear map's output, by autograd through the whole model."""
    model = type(case.model).from_pretrained(case.folder).eval().to(dtype)
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str, args, out: Tensor) -> None:
        out.retain_grad()
        outputs[path] = (args[0].detach(), out)

    for path, module in layers(model).items():
        module.register_forward_hook(lambda _module, args, out, path=path: keep(path, args, out))
    given = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in case.given.items()
    }
    model.config.use_cache = False
    loss = square(functional_call(model, update.merged(model), (), given))
    loss.backward()
    phi = update.phi.grad.clone()
    update.phi.grad = None
    return loss.detach(), phi, {path: (x, out.grad) for path, (x, out) in outputs.items()}


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 3), ("bert", 3), ("gpt2", 2), ("vit", 2), ("llama", 1)]
)
def test_backward_is_autograd_through_the_whole_model(name, count, case):
    dtype = torch.float64
    model = case(name).model
    update = Update(model, dtype)
    want_loss, want_phi, want_outputs = plain_backward(case(name), update, dtype)

    stages = case(name).stages(count, dtype=dtype)
    inputs = [double(case(name).input())]
    for stage in stages[:-1]:
        inputs.append(double(case(name).input(stage.forward(inputs[-1], altered=update).hidden)))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    options = dict(
        altered=update,
        phi=[update.phi],
        on_weight_grad=lambda path, x, grad: seen.update({path: (x.clone(), grad.clone())}),
    )
    grads = stages[-1].backward(inputs[-1], loss=square, **options)
    loss, total = grads.loss, grads.phi[0].clone()
    for stage, given in list(zip(stages, inputs, strict=True))[-2::-1]:
        grads = stage.backward(given, grads.hidden, **options)
        total += grads.phi[0]

    assert grads.hidden is None
    assert relative_error(loss, want_loss) <= 1e-8
    assert relative_error(total, want_phi) <= 1e-8
    assert set(seen) == set(want_outputs)
    for path, (x, grad) in seen.items():
        assert relative_error(x, want_outputs[path][0]) <= 1e-8, path
        assert relative_error(grad, want_outputs[path][1]) <= 1e-8, path


def double(given: StageInput) -> StageInput:
    extras = {
        name: value.double() if value.is_floating_point() else value for name, value in given.extras.items()
    }
    return StageInput(hidden=given.hidden, attention_mask=given.attention_mask, extras=extras)


def test_gradients_of_what_nothing_depends_on_are_zero(case):
    stage = case("llama").stage(0, 2)[0]
    phi = torch.ones(4, requires_grad=True)
    grads = stage.backward(case("llama").input(), torch.ones(3, 9, 32), phi=[phi])
    assert torch.equal(grads.phi[0], torch.zeros(4))


def test_weight_gradients_of_a_frozen_first_stage_need_neither_phi_nor_hidden(case):
    stage = case("vit").stage(0, 2)[0]
    seen: list[str] = []
    stage.backward(
        case("vit").input(),
        torch.ones(2, 5, 32),
        on_weight_grad=lambda path, x, grad: seen.append((path, tuple(x.shape), tuple(grad.shape))),
    )
    assert next(path for path, *_ in seen) == [path for path in stage.watched if ".1." in path][-1]
    assert len(seen) == len([path for path in stage.watched if path != "classifier"])
    assert {shape for _, shape, _ in seen} == {(2, 5, 32), (2, 5, 48)}


def test_backward_keeps_the_activations_of_one_block_only(case):
    """Counts live tensors that a linear map of a block gave out while the backward goes on."""
    stage = case("llama").stage(0, 1)[0]
    calls: list[int] = []
    outer = stage.forward(case("llama").input(), watch=lambda path, _: calls.append(1))
    n_forward = len(calls)
    seen: list[str] = []
    for path in stage.watched:
        stage._model.get_submodule(path).register_forward_hook(
            lambda _module, _args, _out, path=path: seen.append(path)
        )
    stage.backward(case("llama").input(), torch.ones_like(outer.hidden), on_weight_grad=lambda *_: None)
    assert n_forward == len(stage.watched) - 1
    # Each block runs once forwards, and once more when the backward comes to it, last block first.
    again = [path.split(".")[2] for path in seen[n_forward:]]
    assert [block for at, block in enumerate(again) if at == 0 or again[at - 1] != block] == [
        "3",
        "2",
        "1",
        "0",
    ]


# ---- refusals


def test_wrong_calls_are_errors(case):
    first, last = case("llama").stages(2)
    given, grad = case("llama").input(), torch.ones(3, 9, 32)
    with pytest.raises(ValueError, match=r"range\(2, 4\) need the hidden state of the stage before"):
        last.forward(given)
    with pytest.raises(ValueError, match="from either grad_out or a loss"):
        first.backward(given)
    with pytest.raises(ValueError, match="from either grad_out or a loss"):
        last.backward(case("llama").input(grad), grad, loss=square)
    with pytest.raises(ValueError, match=r"range\(0, 2\) are not the last ones"):
        first.backward(given, loss=square)


@pytest.mark.parametrize("blocks", [range(3, 5), range(2, 2), range(0, 4, 2), range(-1, 2)])
def test_blocks_that_are_not_there_are_errors(blocks, case):
    base = case("llama")
    skeleton = build_skeleton(base.checkpoint.config, base.shapes)
    with pytest.raises(ValueError, match="blocks"):
        Stage(skeleton, blocks, StoredWeights(base.checkpoint, base.store, skeleton.slots))


def test_a_skeleton_is_for_one_stage(case):
    base = case("llama")
    skeleton = build_skeleton(base.checkpoint.config, base.shapes)
    weights = StoredWeights(base.checkpoint, base.store, skeleton.slots)
    Stage(skeleton, range(2), weights)
    with pytest.raises(RuntimeError, match="is a stage already"):
        Stage(skeleton, range(2, 4), weights)


def test_nan_from_the_stage_before_is_passed_on_and_not_called_a_wrong_cut(case):
    last = case("llama").stage(1, 2)[0]
    hidden = torch.full((3, 9, 32), torch.nan)
    assert last.forward(case("llama").input(hidden)).hidden.isnan().all()


def test_a_model_error_in_an_own_block_comes_out_as_it_is(case):
    stage = case("llama").stage(1, 2)[0]
    with pytest.raises(RuntimeError, match=r"size|shape"):
        stage.forward(case("llama").input(torch.ones(3, 9, 31)))
    assert stage.forward(case("llama").input(torch.ones(3, 9, 32))).hidden.shape == (3, 9, 32)
