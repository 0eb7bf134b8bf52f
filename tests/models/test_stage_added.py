"""Side paths beside linear layers, losses on their inputs, autocast and embeddings, against plain autograd."""

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from stage_cases import FAMILIES, IMAGE, Case, layers, saved
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.pytorch_utils import Conv1D

from ray_merge.models.stage import Stage
from ray_merge.models.stage_calls import StageGrads, StageInput
from zoo import relative_error

RANK = 3
FOUR = ["bert", "llama", "gpt2", "vit"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    @cache
    def make(name: str) -> Case:
        return saved(name, Path(tmp_path_factory.mktemp(name)))

    return make


class SidePaths:
    """B diag(phi) A beside every linear layer, and a loss on the inputs of every second one."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(5)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for path, module in layers(model).items():
            out, inner = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            B_OR = torch.randn(out, RANK, generator=generator, dtype=dtype) / RANK
            A_RI = torch.randn(RANK, inner, generator=generator, dtype=dtype) / inner**0.5
            self.factors[path] = B_OR, A_RI
        self.phi = {
            path: torch.linspace(0.2, 0.9, RANK, dtype=dtype).requires_grad_() for path in self.factors
        }
        self.measured = list(self.factors)[::2]

    def added(self, path: str, x: Tensor) -> Tensor:
        B_OR, A_RI = self.factors[path]
        return (x @ A_RI.T * self.phi[path]) @ B_OR.T

    def on_input(self, path: str, x: Tensor) -> Tensor | None:
        """The gradient of `local`, by hand."""
        return 2 * x.tanh() * (1 - x.tanh().square()) if path in self.measured else None


def local(x: Tensor) -> Tensor:
    return x.tanh().square().sum()


def entropy(out) -> Tensor:
    log_p = out.logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def double(given: StageInput) -> StageInput:
    extras = {
        name: value.double() if value.is_floating_point() else value for name, value in given.extras.items()
    }
    return StageInput(hidden=given.hidden, attention_mask=given.attention_mask, extras=extras)


def plain_grads(case: Case, side: SidePaths, *, head: bool, inputs: bool) -> list[Tensor]:
    """By autograd through the whole model, with hooks of the plain kind; a loss on inputs never meets the head."""
    model = type(case.model).from_pretrained(case.folder).eval().double().requires_grad_(False)
    model.config.use_cache = False
    losses: list[Tensor] = []
    for path, module in layers(model).items():
        module.register_forward_hook(lambda _module, args, out, path=path: out + side.added(path, args[0]))
        if inputs and path in side.measured and (head or is_inside(path)):
            module.register_forward_pre_hook(lambda _module, args: losses.append(local(args[0])))
    out = model(**double(case.input()).extras, **_mask(case))
    loss = sum(losses, entropy(out) if head else torch.zeros(()).double())
    found = torch.autograd.grad(loss, list(side.phi.values()), allow_unused=True)
    return [torch.zeros(RANK).double() if grad is None else grad for grad in found]


def _mask(case: Case) -> dict[str, Tensor]:
    return {name: value for name, value in case.given.items() if name == "attention_mask"}


def is_inside(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def staged_grads(
    case: Case, stages: list[Stage], side: SidePaths, *, head: bool, inputs: bool, **options
) -> list[Tensor]:
    """The same through stages chained by hand: hidden states forwards, gradients backwards, phi summed."""
    given = [double(case.input())]
    for stage in stages[:-1]:
        given.append(double(case.input(stage.forward(given[-1], added=side.added).hidden)))
    leaves = list(side.phi.values())
    total = [torch.zeros_like(one) for one in leaves]
    grads = StageGrads()
    for stage, one in list(zip(stages, given, strict=True))[::-1]:
        grads = stage.backward(
            one,
            grads.hidden,
            loss=entropy if head and stage.is_last else None,
            added=side.added,
            on_input=side.on_input if inputs else None,
            phi=leaves,
            **options,
        )
        total = [a + b for a, b in zip(total, grads.phi, strict=True)]
    assert grads.hidden is None
    return total


# ---- gradients


@pytest.mark.parametrize(
    ("name", "head", "inputs"),
    [*((name, True, True) for name in FOUR), ("bert", True, False), ("llama", False, True)],
)
def test_phi_gradients_through_three_stages_are_those_of_autograd(name, head, inputs, case):
    side = SidePaths(case(name).model)
    want = plain_grads(case(name), side, head=head, inputs=inputs)
    got = staged_grads(case(name), case(name).stages(3, dtype=torch.float64), side, head=head, inputs=inputs)
    for path, one, other in zip(side.phi, got, want, strict=True):
        assert relative_error(one, other) <= 1e-10 if other.any() else not one.any(), path
    reached = {path for path, one in zip(side.phi, want, strict=True) if one.any()}
    first_block = next(path for path in side.phi if is_inside(path))
    assert first_block in reached, "the loss is to depend on phi of the first stage"


def test_kept_activations_and_a_second_call_give_the_same_bits(case):
    side = SidePaths(case("bert").model, torch.float32)
    stages = case("bert").stages(2)
    single = StageInput(
        attention_mask=case("bert").given["attention_mask"], extras=case("bert").input().extras
    )
    before = stages[0].forward(single, added=side.added).hidden
    options = dict(added=side.added, on_input=side.on_input, phi=list(side.phi.values()))
    calls = [
        stages[1].backward(case("bert").input(before), loss=entropy, recompute=recompute, **options)
        for recompute in (True, True, False)
    ]
    for other in calls[1:]:
        assert torch.equal(other.hidden, calls[0].hidden)
        assert all(torch.equal(a, b) for a, b in zip(other.phi, calls[0].phi, strict=True))
    assert any(one.any() for one in calls[0].phi)
    assert torch.equal(stages[0].forward(single, added=side.added).hidden, before)
    assert not torch.equal(stages[0].forward(single).hidden, before)


def test_the_base_asks_for_no_gradient(case):
    side, wants = SidePaths(case("llama").model, torch.float32), []

    def note(_name: str, weight: Tensor) -> Tensor:
        wants.append(weight.requires_grad)
        return weight

    stage = case("llama").stage(0, 2)[0]
    stage.backward(
        case("llama").input(),
        torch.ones(3, 9, 32),
        altered=note,
        added=side.added,
        phi=list(side.phi.values()),
    )
    assert wants
    assert not any(wants)


# ---- what is called when


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("index", [0, 1])
def test_inputs_are_seen_once_each_also_where_nothing_else_wants_a_gradient(index, recompute, case):
    hidden = case("llama").stage(0, 2)[0].forward(case("llama").input()).hidden if index else None
    stage, given = case("llama").stage(index, 2)[0], case("llama").input(hidden)
    want: dict[str, Tensor] = {}
    stage.forward(given, watch=lambda path, x: want.update({path: x.clone()}))
    seen: list[tuple[str, Tensor]] = []
    stage.backward(given, on_input=lambda path, x: seen.append((path, x.clone())), recompute=recompute)
    assert Counter(path for path, _ in seen) == Counter(list(want))
    assert len(want) == 14
    assert all(torch.equal(x, want[path]) and not x.requires_grad for path, x in seen)


def test_only_one_block_is_alive_when_blocks_are_recomputed(case):
    side, stage = SidePaths(case("llama").model, torch.float32), case("llama").stage(0, 1)[0]
    made: list[StorageWeakRef] = []
    for path in stage.watched:
        if path.endswith("gate_proj"):
            stage._model.get_submodule(path).register_forward_hook(
                lambda _module, _args, out: made.append(StorageWeakRef(out.untyped_storage()))
            )

    def most_alive(recompute: bool) -> int:
        made.clear()
        alive: list[int] = []
        stage.backward(
            case("llama").input(),
            loss=entropy,
            added=side.added,
            phi=list(side.phi.values()),
            on_input=lambda *_: alive.append(sum(not one.expired() for one in made)),
            recompute=recompute,
        )
        return max(alive)

    assert most_alive(True) == 1
    assert most_alive(False) == 4


def test_a_layer_that_is_used_without_a_call_shows_by_its_weight(tmp_path, monkeypatch):
    """Its parent multiplies by the weight itself, so nothing can be added beside it; `altered` still sees it."""
    config = transformers.SiglipVisionConfig(**IMAGE)
    monkeypatch.setitem(FAMILIES, "siglip", ("SiglipVisionModel", lambda: config))
    case = saved("siglip", tmp_path)
    case.given.clear()
    case.given["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    stage = case.stage(0, 1)[0]
    called: list[str] = []
    used: list[str] = []

    def alter(name: str, weight: Tensor) -> Tensor:
        used.append(name.removesuffix(".weight"))
        return weight

    stage.forward(case.input(), altered=alter, added=lambda path, _: called.append(path), to_end=True)
    missed = [path for path in stage.watched if path in used and path not in called]
    assert [path.rpartition("head.")[2] for path in missed] == ["attention.out_proj"]
    assert len(called) == len(stage.watched) - 1


def test_what_is_added_takes_the_dtype_of_the_output(case):
    stage = case("vit").stage(0, 1)[0]
    one = stage.forward(case("vit").input(), added=lambda _, x: x.double().sum(-1, keepdim=True), to_end=True)
    none = stage.forward(case("vit").input(), added=lambda *_: None, to_end=True)
    assert one.logits.dtype == torch.float32
    assert not torch.equal(one.logits, none.logits)
    assert torch.equal(none.logits, stage.forward(case("vit").input(), to_end=True).logits)


# ---- autocast, embeddings


def test_autocast_leaves_phi_and_its_gradients_in_float32(case):
    side = SidePaths(case("llama").model, torch.float32)

    def one(autocast: torch.dtype | None) -> tuple[Tensor, StageGrads]:
        stage = case("llama").stage(0, 1, autocast=autocast)[0]
        out = stage.forward(case("llama").input(), added=side.added, to_end=True).logits
        return out, stage.backward(
            case("llama").input(), added=side.added, loss=entropy, phi=list(side.phi.values())
        )

    (want_out, want), (got_out, got) = one(None), one(torch.bfloat16)
    assert not torch.equal(got_out.float(), want_out)
    assert relative_error(got_out.float(), want_out) <= 1e-1
    assert {grad.dtype for grad in got.phi} == {torch.float32}
    assert relative_error(torch.stack(got.phi), torch.stack(want.phi)) <= 1e-1


def test_embeddings_come_from_a_forward_to_the_end(case):
    first, last = case("clip-vision").stages(2)
    hidden = first.forward(case("clip-vision").input(), to_end=True)
    assert hidden.embeds is None
    out = last.forward(case("clip-vision").input(hidden.hidden), to_end=True)
    assert out.logits is None
    with torch.no_grad():
        assert (
            relative_error(out.embeds, case("clip-vision").model(**case("clip-vision").given).pooler_output)
            <= 1e-6
        )
    assert last.forward(case("clip-vision").input(hidden.hidden)).embeds is None
