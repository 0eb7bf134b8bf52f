"""Published checkpoints against plain arithmetic in float64, for every way in which an adapter can change a tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ray_merge
from ray_merge.work import sources
from tiny import HIDDEN, Q0, V1, factors, llama_tensors, tables, write_adapter, write_base

P = "base_model.model."
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIAS = f"{Q0}.bias"
EXPERTS = "model.layers.0.mlp.experts.down_proj"
BASE = llama_tensors() | {
    BIAS: torch.full((HIDDEN,), 0.5),
    "h.c_attn.weight": torch.full((HIDDEN, 6), 0.25),  # HF Conv1D: (in, out)
    "conv.weight": torch.full((5, 3, 2, 2), 0.125),
    EXPERTS: torch.arange(3 * 4 * HIDDEN).reshape(3, 4, HIDDEN).float(),
    "model.ids": torch.arange(3),
}


@pytest.fixture(params=[16, sources.CHUNK_BYTES], ids=["row by row", "whole"])
def chunks(request, monkeypatch):
    """How much is read at once; results must not depend on it."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", request.param)


def run(folder: Path, adapters, merges, base=None, config=None, **recipe) -> list[dict[str, torch.Tensor]]:
    """The tensors of every merge, which `verify` has found to be base plus update."""
    write_base(
        folder / "base",
        BASE if base is None else base,
        config or {"model_type": "of_no_library", "vocab_size": 16},
    )
    for name, (tensors, settings) in adapters.items():
        write_adapter(folder / name, tensors, **settings)
    given = {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "adapters": {name: str(folder / name) for name in adapters},
        "merges": [
            {"name": f"m{i}", "merge_method": "task_arithmetic", **merge} for i, merge in enumerate(merges)
        ],
        **recipe,
    }
    ray_merge.run(given, engine="local", cache_dir=folder / "cache")
    ray_merge.verify(str(folder / "out"), cache_dir=folder / "cache")
    return [_tensors(folder / "out" / f"m{i}") for i in range(len(merges))]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("model-*")) for key, value in load_file(path).items()}


def random_like(tensors, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def product(tensors, module):
    return 2 * (
        tensors[f"{P}{module}.lora_B.weight"].double() @ tensors[f"{P}{module}.lora_A.weight"].double()
    )


def check(found, expected):
    """The named tensors are as expected to float32 rounding, all others the base's own bytes."""
    for name, tensor in found.items():
        if name in expected:
            assert torch.allclose(tensor.double(), expected[name].double(), rtol=1e-6, atol=1e-6), name
        else:
            assert torch.equal(tensor, BASE[name]), name
    assert found.keys() == BASE.keys()


def test_linear_and_conv1d_and_convolution(tmp_path, chunks):
    shapes = {
        f"{P}conv.lora_A.weight": torch.empty(2, 3, 2, 2),
        f"{P}conv.lora_B.weight": torch.empty(5, 2, 1, 1),
    }
    tensors = random_like(factors(Q0) | factors("h.c_attn", rows=6) | shapes)
    (found,) = run(tmp_path, {"a": (tensors, {})}, [{"parameters": {"lambda": 0.5}}])
    A, B = (tensors[f"{P}conv.lora_{side}.weight"].double() for side in "AB")
    conv = 2 * torch.einsum("orxy,rihw->oihw", B, A)
    expected = {
        f"{Q0}.weight": BASE[f"{Q0}.weight"] + 0.5 * product(tensors, Q0),
        "h.c_attn.weight": BASE["h.c_attn.weight"] + 0.5 * product(tensors, "h.c_attn").T,
        "conv.weight": BASE["conv.weight"] + 0.5 * conv,
    }
    check(found, expected)


def test_trained_biases_of_several_adapters_are_merged_as_deltas(tmp_path, chunks):
    saved = {name: torch.randn(HIDDEN) for name in "ab"}
    adapters = {name: (factors(V1) | {f"{P}{BIAS}": saved[name]}, {"bias": "all"}) for name in "ab"}
    (found,) = run(tmp_path, adapters, [{"parameters": {"weight": {"a": 0.7, "b": -0.4}}}])
    bias = BASE[BIAS].double()
    expected = {
        BIAS: bias + 0.7 * (saved["a"].double() - bias) - 0.4 * (saved["b"].double() - bias),
        f"{V1}.weight": BASE[f"{V1}.weight"].double() + 0.3 * product(factors(V1), V1),
    }
    check(found, expected)


def test_dora_and_its_bias_on_b(tmp_path, chunks):
    magnitude = torch.arange(1.0, HIDDEN + 1)
    extra = {f"{P}{Q0}.lora_magnitude_vector": magnitude, f"{P}{Q0}.lora_B.bias": torch.ones(HIDDEN)}
    tensors = random_like(factors(Q0)) | extra
    (found,) = run(tmp_path, {"a": (tensors, {"use_dora": True, "lora_bias": True})}, [{}])
    V = BASE[f"{Q0}.weight"].double() + product(tensors, Q0)
    expected = {
        f"{Q0}.weight": magnitude.double()[:, None] * V / V.norm(dim=1, keepdim=True),
        BIAS: BASE[BIAS] + 2,
    }
    check(found, expected)


def test_experts_are_slabs_of_one_tensor_and_the_untouched_rows_stay(tmp_path, chunks):
    tensors = random_like({f"{P}{EXPERTS.rpartition('.')[0]}.lora_A.weight": torch.empty(3 * 2, 4),
                           f"{P}{EXPERTS.rpartition('.')[0]}.lora_B.weight": torch.empty(HIDDEN, 2 * 3)})  # fmt: skip
    settings = {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.19.1"}
    (found,) = run(tmp_path, {"a": (tensors, settings)}, [{"parameters": {"lambda": 3}}])
    A, B = (tensor.double() for _, tensor in sorted(tensors.items()))
    delta = 2 * torch.einsum("bke,eka->eab", B.reshape(HIDDEN, 2, 3), A.reshape(3, 2, 4))
    check(found, {EXPERTS: BASE[EXPERTS] + 3 * delta})


def test_tokens_are_written_over_the_result_of_the_other_merges(tmp_path, chunks):
    key = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = torch.randn(3, HIDDEN)
    adapters = {
        "a": (factors(Q0) | {key: rows}, {"trainable_token_indices": [15, 0, 7]}),
        "b": (factors(V1), {}),
    }
    both, plain = run(tmp_path, adapters, [{}, {"adapters": ["b"]}])
    table = BASE[TABLE].clone()
    table[[15, 0, 7]] = rows
    v = BASE[f"{V1}.weight"] + product(factors(V1), V1)
    check(
        both,
        {TABLE: table, f"{Q0}.weight": BASE[f"{Q0}.weight"] + product(factors(Q0), Q0), f"{V1}.weight": v},
    )
    check(plain, {f"{V1}.weight": v})
    assert torch.equal(both[TABLE], table)


def test_a_saved_module_begins_from_its_own_values_in_its_merges_alone(tmp_path, chunks):
    norm = torch.randn(HIDDEN).half()
    saved = factors(Q0) | {f"{P}model.norm.weight": norm}
    adapters = {"a": (saved, {"modules_to_save": ["norm"]}), "b": (factors(Q0), {})}
    one, other = run(tmp_path, adapters, [{"adapters": ["a"]}, {"adapters": ["b"]}])
    q = BASE[f"{Q0}.weight"] + product(factors(Q0), Q0)
    check(one, {f"{Q0}.weight": q, "model.norm.weight": norm.float()})
    assert one["model.norm.weight"].dtype == torch.float32
    check(other, {f"{Q0}.weight": q})


def test_a_grown_table_with_factors_and_the_bases_own_in_one_group(tmp_path, chunks):
    lora = {"lora_embedding_A": (2, 20), "lora_embedding_B": (HIDDEN, 2)}
    grown = random_like({f"{P}model.embed_tokens.{name}": torch.empty(shape) for name, shape in lora.items()})
    own = random_like(tables(20), seed=1)
    plain = random_like({f"{P}model.embed_tokens.lora_embedding_A": torch.empty(2, 16),
                         f"{P}model.embed_tokens.lora_embedding_B": torch.empty(HIDDEN, 2)}, seed=2)  # fmt: skip
    adapters = {"a": (grown | own, {}), "b": (plain, {})}
    one, other = run(tmp_path, adapters, [{"adapters": ["a"]}, {"adapters": ["b"]}])

    def delta(tensors):
        A, B = (tensor.double() for name, tensor in sorted(tensors.items()) if "lora_embedding" in name)
        return 2 * (B @ A).T

    check(one, {TABLE: own[f"{P}{TABLE}"] + delta(grown), HEAD: own[f"{P}{HEAD}"]})
    check(other, {TABLE: BASE[TABLE] + delta(plain)})
    assert (one[TABLE].shape, other[TABLE].shape) == ((20, HIDDEN), (16, HIDDEN))


def test_an_untied_head_is_a_weight_of_its_own(tmp_path, chunks):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    tensors = random_like(factors("lm_head", rows=16))
    tied = {name: tensor for name, tensor in llama_tensors().items() if name != HEAD}
    (found,) = run(tmp_path, {"a": (tensors, {})}, [{}], tied, config, tied="untie")
    assert found.keys() == tied.keys() | {HEAD}
    assert torch.equal(found[TABLE], tied[TABLE])
    assert torch.allclose(
        found[HEAD].double(), tied[TABLE] + product(tensors, "lm_head"), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("what", ["tokens", "a saved module", "a trained bias"])
def test_trained_values_that_do_not_fit_the_stored_dtype_stop_the_run(tmp_path, what):
    large = {
        "tokens": ({f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.full((1, HIDDEN), 1e6)},
                   {"trainable_token_indices": [3]}),
        "a saved module": ({f"{P}model.norm.weight": torch.full((HIDDEN,), 1e6)}, {"modules_to_save": ["norm"]}),
        "a trained bias": ({f"{P}{BIAS}": torch.full((HIDDEN,), 1e6)}, {"bias": "all"}),
    }  # fmt: skip
    tensors, settings = large[what]
    whose = "not finite" if what == "a trained bias" else "of adapter a holds values that do not fit F16"
    with pytest.raises(ray_merge.RunFailed, match=whose):
        run(tmp_path, {"a": (factors(V1) | tensors, settings)}, [{}], out_dtype="float16")
    assert not (tmp_path / "out" / "m0" / "ray_merge" / "MANIFEST.json").exists()


def test_embedding_tables_that_peft_saved_beside_two_adapters_must_be_equal(tmp_path):
    adapters = {name: (factors(V1) | random_like(tables(20), seed), {}) for seed, name in enumerate("ab")}
    with pytest.raises(ray_merge.Refusal, match="adapters a and b were saved with different"):
        run(tmp_path, adapters, [{}])
    assert not (tmp_path / "out").exists()
    run(tmp_path, {"a": adapters["a"], "b": adapters["a"]}, [{}])


def test_an_adapter_of_tokens_alone_changes_them_alone(tmp_path, chunks):
    rows = {f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, HIDDEN)}
    (found,) = run(tmp_path, {"a": (rows, {"trainable_token_indices": [3]})}, [{}])
    table = BASE[TABLE].clone()
    table[3] = 1
    check(found, {TABLE: table})


def test_an_adapter_of_a_head_alone_leaves_the_base_as_it_is(tmp_path):
    head = {f"{P}score.weight": torch.ones(3, HIDDEN)}
    (found,) = run(tmp_path, {"a": (head, {"modules_to_save": ["score"]})}, [{}])
    check(found, {})
    assert torch.equal(
        load_file(tmp_path / "out" / "m0" / "heads" / "a.safetensors")["score.weight"],
        head[f"{P}score.weight"],
    )


def test_a_convolution_is_whole_rows_for_one_adapter_and_slabs_for_another(tmp_path):
    generator = torch.Generator().manual_seed(4)
    base = {"conv.weight": torch.randn(4, 6, 3, generator=generator)}
    A, B = torch.randn(2, 6, 3, generator=generator), torch.randn(4, 2, 1, generator=generator)
    whole = {"base_model.model.conv.lora_A.weight": A, "base_model.model.conv.lora_B.weight": B}
    a, b = torch.randn(4 * 2, 3, generator=generator), torch.randn(6, 2 * 4, generator=generator)
    slabs = {"base_model.model.conv.lora_A.weight": a, "base_model.model.conv.lora_B.weight": b}
    adapters = {
        "rows": (whole, {}),
        "slabs": (slabs, {"target_parameters": ["conv.weight"], "peft_version": "0.21.2"}),
    }
    merges = [{"adapters": ["rows"]}, {"adapters": ["slabs"]}]
    one, two = run(tmp_path, adapters, merges, base=base)
    begun = base["conv.weight"].double()
    first = begun + 2 * (B.double().reshape(4, 2) @ A.double().reshape(2, 18)).reshape(4, 6, 3)
    second = torch.stack([
        begun[e] + 2 * b[:, e::4].double() @ a[2 * e : 2 * e + 2].double() for e in range(4)
    ])  # fmt: skip
    assert torch.allclose(one["conv.weight"].double(), first, rtol=1e-5, atol=1e-5)
    assert torch.allclose(two["conv.weight"].double(), second, rtol=1e-5, atol=1e-5)
