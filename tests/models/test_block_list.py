import itertools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_cases import FAMILIES, saved
from torch import nn

from ray_merge.models.block_list import BlockList, cut_stages, fewest_stages, find_blocks, part_bytes
from ray_merge.models.conversion import Slot
from ray_merge.models.skeleton import build_skeleton

V5 = int(transformers.__version__.split(".")[0]) >= 5


def on_meta(name: str) -> nn.Module:
    class_name, config = FAMILIES[name]
    with torch.device("meta"):
        return getattr(transformers, class_name)(config())


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "model.layers"),
        ("qwen2-moe", "model.layers"),
        ("gpt2", "transformer.h"),
        ("bert", "bert.encoder.layer"),
        ("vit", "vit.layers" if V5 else "vit.encoder.layer"),
        ("llava", "model.language_model.layers"),
    ],
)
def test_the_list_of_blocks_is_found_without_knowing_the_architecture(name, path):
    assert find_blocks(on_meta(name)) == BlockList(path, 4)


def test_encoder_decoders_and_models_of_one_repeated_block_have_no_list():
    assert find_blocks(on_meta("t5")) is None
    assert find_blocks(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))) is None
    assert find_blocks(nn.Linear(2, 2)) is None


class Hybrid(nn.Module):
    """Layers of two classes, with lists of their own inside, and a larger list of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2), nn.TransformerEncoderLayer(8, 1)])
        self.layers[0].experts = nn.ModuleList([nn.Linear(64, 64) for _ in range(9)])
        self.pyramid = nn.ModuleList([nn.ModuleList([nn.Linear(99, 99)]), nn.ModuleList([nn.Linear(99, 99)])])
        self.mixed = nn.ModuleList([nn.Linear(300, 300), nn.MultiheadAttention(8, 2)])


def test_lists_inside_of_blocks_lists_of_lists_and_lists_of_unlike_modules_are_none():
    assert find_blocks(Hybrid()) == BlockList("layers", 2)


def test_block_of_counts_only_numbers_of_its_own_list():
    blocks = BlockList("model.layers", 12)
    assert blocks.block_of("model.layers.10.mlp.experts.3.weight") == 10
    assert blocks.block_of("model.layers.2") == 2
    assert blocks.block_of("model.layers") is None
    assert blocks.block_of("model.layersnorm.1.weight") is None
    assert blocks.block_of("vision.model.layers.1.weight") is None


def test_the_first_and_the_last_block_bring_what_stands_before_and_behind_them():
    slots = {
        "embed.weight": (Slot("e"),),
        "layers.0.w": (Slot("a", 0), Slot("b", 1)),
        "layers.1.w": (Slot("c"),),
        "layers.2.w": (Slot("d"),),
        "layers.2.tied": (Slot("d"),),
        "norm.weight": (Slot("n"),),
        "head.weight": (Slot("e"),),
    }
    n_bytes = {"e": 1000, "a": 10, "b": 20, "c": 5, "d": 6, "n": 1, "unused": 7}
    assert part_bytes(slots, n_bytes, BlockList("layers", 3)) == ([1030, 5, 1007], 0)
    assert part_bytes(slots, n_bytes, None) == ([], 1042)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "qwen2", "vit"])
def test_the_stages_of_a_model_hold_the_bytes_that_are_planned(name, tmp_path):
    case = saved(name, tmp_path)
    skeleton = build_skeleton(case.checkpoint.config, case.shapes)
    sizes, rest = part_bytes(
        skeleton.slots,
        {name: entry.n_bytes for name, entry in case.checkpoint.tensors.items()},
        skeleton.blocks,
    )
    held, hidden = [], None
    for stage in case.stages(4):
        hidden = stage.forward(case.input(hidden), to_end=True).hidden
        held.append(stage.n_bytes)
    assert (held, rest) == (sizes, 0)


def test_stages_beside_a_large_one_are_equal():
    assert cut_stages([90, *[10] * 9], 0, 4) == [range(1), range(1, 4), range(4, 7), range(7, 10)]


def best_ceiling(sizes: list[int], count: int) -> int:
    """By trying all ways to cut."""
    return min(
        max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cuts, len(sizes))))
        for cuts in itertools.combinations(range(1, len(sizes)), count - 1)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 60), st.integers(1, 9))
def test_cuts_are_consecutive_and_their_largest_is_the_smallest_there_is(block_bytes, rest, count):
    cuts = cut_stages(block_bytes, rest, count)
    assert [block for cut in cuts for block in cut] == list(range(len(block_bytes)))
    assert len(cuts) == min(count, len(block_bytes))
    if len(cuts) > 1:
        sizes = [block_bytes[0] + rest, *block_bytes[1:]]
        sizes[-1] += rest
        assert max(sum(sizes[block] for block in cut) for cut in cuts) == best_ceiling(sizes, len(cuts))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 60), st.integers(1, 200))
def test_fewest_stages_keep_the_ceiling_where_any_cut_does(block_bytes, rest, ceiling):
    def largest(count: int) -> int:
        if count == 1:
            return sum(block_bytes) + rest
        sizes = [block_bytes[0] + rest, *block_bytes[1:]]
        sizes[-1] += rest
        return max(sum(sizes[block] for block in cut) for cut in cut_stages(block_bytes, rest, count))

    fits = [count for count in range(1, len(block_bytes) + 1) if largest(count) <= ceiling]
    if fits:
        assert fewest_stages(block_bytes, rest, ceiling) == fits[0]
    else:
        assert fewest_stages(block_bytes, rest, ceiling) <= len(block_bytes)


def test_a_model_without_blocks_is_one_stage():
    assert cut_stages([], 100, 4) == [range(0)]
    assert fewest_stages([], 100, 1) == 1
