"""Stages of many families against the whole model with plain hooks, in one process, same padded batch."""

from functools import cache
from pathlib import Path

import pytest
from stage_cases import FAMILIES, Case, layers, minilm_case, plain_inputs, saved, staged_inputs

from ray_merge.errors import CheckpointError
from zoo import minilm, relative_error

CUT = [
    "llama", "llama-tied", "qwen2", "gemma2", "mistral", "qwen2-moe", "gpt2", "bert", "roberta", "vit", "clip-vision",
    "llava",
]  # fmt: skip
WHOLE = ["t5", "t5-encoder", "deberta", "mpnet", "albert-groups", "clip"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    @cache
    def make(name: str) -> Case:
        if name == "minilm":
            return minilm_case(minilm())
        return saved(name, Path(tmp_path_factory.mktemp(name)))

    return make


def check_equal(case: Case, stages) -> None:
    want, plain = plain_inputs(case)
    got, out = staged_inputs(case, stages)
    assert len(want) > 8
    for path, tensors in want.items():
        assert [x.shape for x in got[path]] == [x.shape for x in tensors], path
        for one, other in zip(got[path], tensors, strict=True):
            assert relative_error(one, other) <= 1e-6, path
    assert set(got) == set(want)
    logits = getattr(plain, "logits", None)
    assert (out.logits is None) == (logits is None)
    if logits is not None:
        assert relative_error(out.logits, logits) <= 1e-6


@pytest.mark.parametrize("name", [*CUT, "minilm"])
def test_three_stages_see_what_hooks_on_the_whole_model_see_and_read_their_own_tensors_only(name, case):
    stages, weights = zip(*(case(name).stage(index, 3) for index in range(3)), strict=True)
    blocks = case(name).blocks()
    built = [len(one.read_names) for one in weights]
    check_equal(case(name), stages)
    for stage, one, count in zip(stages, weights, built, strict=True):
        owners = [blocks.block_of(read) for read in one.read_names]
        assert set(owners) - {None} == set(stage.blocks)
        assert None not in owners[:count], "what is outside of the blocks is read when it is used"
        assert set(owners[count:]) == ({None} if stage.is_first or stage.is_last else set())
        assert len(set(one.read_names)) == len(one.read_names)


@pytest.mark.parametrize("name", WHOLE)
def test_models_that_run_as_one_stage_see_the_same(name, case):
    check_equal(case(name), case(name).stages(1))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deberta", "takes more from block to block than one hidden state"),
        ("t5-encoder", "takes more from block to block than one hidden state"),
        ("mpnet", "use what it computed before its first block"),
        ("albert-groups", "it runs block 0 where block 1 was due"),
    ],
)
def test_models_that_hand_more_than_a_hidden_state_to_later_blocks_are_refused_in_two_stages(name, why, case):
    with pytest.raises(CheckpointError, match=f"{why}.*`stages: 1`"):
        staged_inputs(case(name), case(name).stages(2))


def test_every_family_is_tried():
    assert sorted([*CUT, *WHOLE]) == sorted(FAMILIES)


def test_watched_are_the_linear_maps_of_a_stage(case):
    first, last = case("llama").stages(2)
    paths = list(layers(case("llama").model))
    assert first.watched == (*(path for path in paths if ".0." in path or ".1." in path), "lm_head")
    assert last.watched == (*(path for path in paths if ".2." in path or ".3." in path), "lm_head")
    asked = ["model.layers.3.mlp.up_proj", "model.layers.1.self_attn.k_proj"]
    assert case("llama").stage(0, 2, watched=asked)[0].watched == (asked[1],)
    with pytest.raises(ValueError, match=r"no module model\.layers\.9"):
        case("llama").stage(0, 2, watched=["model.layers.9"])
