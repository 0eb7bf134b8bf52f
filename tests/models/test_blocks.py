import random

import pytest

from ray_merge.models.blocks import block_prefixes, cut_shards, natural_key, split_blocks
from tiny import entry

GB = 10**9


def layers(prefix, count, *modules, n_bytes=100):
    return [entry(f"{prefix}{i}.{module}.weight", n_bytes) for i in range(count) for module in modules]


LLAMA = [entry("model.embed_tokens.weight", 800), *layers("model.layers.", 32, "self_attn.q_proj", "mlp.up_proj"),
         entry("model.norm.weight"), entry("lm_head.weight", 800)]  # fmt: skip
BERT = [entry("embeddings.word_embeddings.weight", 400), *layers("encoder.layer.", 12, "attention.self.query"),
        entry("pooler.dense.weight")]  # fmt: skip
GPT2 = [
    entry("wte.weight", 400),
    entry("wpe.weight"),
    *layers("h.", 12, "attn.c_attn", "mlp.c_fc"),
    entry("ln_f.weight"),
]
GPT2_LM = [entry(f"transformer.{e.name}", e.n_bytes) for e in GPT2]
T5 = [entry("shared.weight", 400), *layers("encoder.block.", 12, "layer.0.SelfAttention.q", "layer.1.Dense.wi"),
      *layers("decoder.block.", 12, "layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"),
      entry("encoder.final_layer_norm.weight")]  # fmt: skip
VIT = [entry("vit.embeddings.patch_embeddings.projection.weight"), *layers("vit.encoder.layer.", 12, "output.dense"),
       entry("classifier.weight")]  # fmt: skip
CLIP = [*layers("text_model.encoder.layers.", 12, "self_attn.q_proj"),
        *layers("vision_model.encoder.layers.", 24, "self_attn.q_proj"), entry("logit_scale")]  # fmt: skip
MIXTRAL = layers(
    "model.layers.", 4, *(f"block_sparse_moe.experts.{e}.w{w}" for e in range(8) for w in (1, 2, 3))
)
QWEN3_MOE = layers(
    "model.layers.", 24, "self_attn.q_proj", *(f"mlp.experts.{e}.gate_proj" for e in range(128))
)
PALIGEMMA = [*layers("vision_tower.vision_model.encoder.layers.", 27, "q_proj", n_bytes=20),
             *layers("language_model.model.layers.", 18, "q_proj", n_bytes=400),
             entry("multi_modal_projector.linear.weight")]  # fmt: skip

MODELS = {
    "llama": (LLAMA, 32), "bert": (BERT, 12), "gpt2": (GPT2, 12), "gpt2-lm": (GPT2_LM, 12), "t5": (T5, 24),
    "vit": (VIT, 12), "clip": (CLIP, 36), "mixtral": (MIXTRAL, 4), "qwen3-moe": (QWEN3_MOE, 24),
    "paligemma": (PALIGEMMA, 45),
}  # fmt: skip


def block_of(name, prefixes):
    for prefix in prefixes:
        number = name.removeprefix(prefix).split(".")[0]
        if name.startswith(prefix) and number.isdigit():
            return f"{prefix}{number}"
    return None


@pytest.mark.parametrize("model", MODELS)
def test_blocks_are_the_layers_of_every_stack(model):
    tensors, count = MODELS[model]
    front, blocks, back = split_blocks(tensors)
    assert len(blocks) == count
    found = [e.name for part in (*front, *blocks, *back) for e in part.tensors]
    assert sorted(found) == sorted(e.name for e in tensors)


def test_the_lists_of_a_model_are_found_in_order():
    assert block_prefixes([e.name for e in T5]) == ["decoder.block.", "encoder.block."]
    assert block_prefixes([e.name for e in MIXTRAL]) == ["model.layers."]
    assert block_prefixes([e.name for e in GPT2]) == ["h."]


@pytest.mark.parametrize(
    "names", [[], ["lm_head.weight"], ["classifier.0.weight", "classifier.2.weight"], ["x.1.w", "x.2.w"]]
)
def test_numbers_that_do_not_count_from_zero_without_gaps_are_no_blocks(names):
    assert block_prefixes(names) == []


@pytest.mark.parametrize("max_bytes", [GB, 1000, 250, 1])
@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_is_in_one_shard_and_every_block_is_whole(model, max_bytes):
    tensors, count = MODELS[model]
    shards = cut_shards(tensors, max_bytes)
    assert all(shards)
    assert sorted(e.name for shard in shards for e in shard) == sorted(e.name for e in tensors)
    prefixes = block_prefixes([e.name for e in tensors])
    homes = {}
    for index, shard in enumerate(shards):
        for e in shard:
            block = block_of(e.name, prefixes)
            if block:
                homes.setdefault(block, set()).add(index)
    assert len(homes) == count
    assert all(len(home) == 1 for home in homes.values())
    for prefix in prefixes:  # consecutive layers lie in consecutive shards
        mine = sorted((b for b in homes if b.rpartition(".")[0] + "." == prefix), key=natural_key)
        order = [min(homes[block]) for block in mine]
        assert order == sorted(order)


@pytest.mark.parametrize("model", MODELS)
def test_there_are_at_least_16_shards_where_there_are_16_blocks(model):
    tensors, count = MODELS[model]
    assert len(cut_shards(tensors, GB)) >= min(16, count)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 24, 31, 32, 33, 80])
def test_exactly_16_shards_of_about_equal_size_where_the_limit_allows_it(count):
    shards = cut_shards(layers("model.layers.", count, "q"), GB)
    assert len(shards) == min(16, count)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_no_shard_is_larger_than_the_limit_unless_one_block_is():
    for limit in (100, 150, 399, 400, 1000):
        for shard in cut_shards(LLAMA, limit):
            assert sum(e.n_bytes for e in shard) <= max(limit, 800)
            assert (
                sum(e.n_bytes for e in shard) <= limit
                or len({block_of(e.name, ["model.layers."]) for e in shard}) == 1
            )


def test_a_small_tower_does_not_take_the_shards_of_a_large_one():
    shards = cut_shards(PALIGEMMA, GB)
    total = sum(e.n_bytes for e in PALIGEMMA)
    assert max(sum(e.n_bytes for e in shard) for shard in shards) <= 2.5 * total / 16


def test_embeddings_come_first_and_heads_last():
    for tensors, first, last in (
        (LLAMA, "model.embed_tokens.weight", "model.norm.weight"),
        (GPT2, "wte.weight", "wpe.weight"),
    ):
        shards = cut_shards(tensors, GB)
        assert shards[0][0].name == first
        assert shards[-1][-1].name == last


def test_a_model_without_blocks_is_cut_by_size_alone():
    shards = cut_shards([entry(f"fc{i}.weight", 100) for i in range(5)], 250)
    assert [[e.name for e in shard] for shard in shards] == [
        ["fc0.weight", "fc1.weight"], ["fc2.weight", "fc3.weight"], ["fc4.weight"],
    ]  # fmt: skip


def test_no_tensors_give_no_shards():
    assert cut_shards([], GB) == []


@pytest.mark.parametrize("model", MODELS)
def test_the_order_in_which_tensors_are_listed_does_not_matter(model):
    tensors, _ = MODELS[model]
    mixed = list(tensors)
    random.Random(0).shuffle(mixed)
    assert cut_shards(mixed, 1000) == cut_shards(tensors, 1000)


def test_layer_2_sorts_before_layer_10():
    assert sorted(["l.10.a", "l.2.b", "l.2.a", "l"], key=natural_key) == ["l", "l.2.a", "l.2.b", "l.10.a"]


def test_digits_that_are_no_numbers_are_text():
    names = ["\u00b2", "1\u00b22.weight", "layers.\u0663.x", "9" * 1000]
    assert sorted(
        e.name for shard in cut_shards([entry(name) for name in names], GB) for e in shard
    ) == sorted(names)
