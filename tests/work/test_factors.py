"""Adapters on a node: what preflight looks at, and the factors of a site, against plain arithmetic in float64."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_merge.algebra.grid import chunk_spans
from ray_merge.errors import AdapterError, NotFinite
from ray_merge.storage.store import Stores
from ray_merge.work.factors import AdapterFiles, token_rows
from tiny import (
    HIDDEN,
    Q0,
    V1,
    factors,
    llama_tensors,
    plan_of,
    write_adapter,
    write_base,
    write_recipe_files,
)

P = "base_model.model."
TABLE = "model.embed_tokens.weight"


@pytest.fixture
def recipe(tmp_path):
    return write_recipe_files(tmp_path)


@contextmanager
def opened(recipe, dtype=torch.float64):
    plan = plan_of(recipe)
    cache = Path(plan.base.url).parent / "cache"
    with AdapterFiles(cache, plan.adapters, Stores(), device="cpu", dtype=dtype) as files:
        yield plan, files


def random_like(tensors, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def no_base():
    raise AssertionError("nothing here depends on the base weight")


def test_factors_come_in_the_order_asked_for_and_an_untouched_site_has_rank_0(recipe, tmp_path):
    tensors = random_like(factors(Q0))
    write_adapter(tmp_path / "a", tensors)
    with opened(recipe) as (plan, files):
        site = files.site(("b", "a"), plan.sites[Q0], no_base)
        assert site.ranks == (0, 2)
        B, A = (tensors[f"{P}{Q0}.lora_{side}.weight"].double() for side in "BA")
        assert torch.equal(site.B[1], B)
        assert torch.equal(site.pairs[1][1], 2.0 * A)
        assert (site.shape, site.dtype) == ((HIDDEN, HIDDEN), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_decoded_to_the_arithmetic_dtype(recipe, tmp_path, dtype):
    write_adapter(tmp_path / "a", {name: t.bfloat16() for name, t in factors(Q0).items()})
    with opened(recipe, dtype) as (plan, files):
        assert files.site(("a",), plan.sites[Q0], no_base).dtype == dtype


def test_a_trained_bias_is_saved_minus_base(recipe, tmp_path):
    name, bias = f"{Q0}.bias", torch.arange(8.0)
    write_base(tmp_path / "base", llama_tensors() | {name: torch.ones(HIDDEN)})
    write_adapter(tmp_path / "a", factors(Q0) | {f"{P}{name}": bias}, bias="all")
    with opened(recipe) as (plan, files):
        site = files.site(("a", "b"), plan.sites[name], lambda: torch.ones(HIDDEN, 1))
        assert torch.equal(site.B[0] @ site.pairs[0][1], (bias - 1).double()[:, None])
        assert site.ranks == (1, 0)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4,)])
def test_a_saved_parameter_is_a_product_with_an_identity_on_its_smaller_side(recipe, tmp_path, shape):
    saved, base = torch.randn(shape), torch.randn(shape)
    write_base(tmp_path / "base", llama_tensors() | {"x.bias": base})
    write_adapter(tmp_path / "a", factors(Q0) | {f"{P}x.bias": saved}, bias="all")
    with opened(recipe) as (plan, files):
        matrix = plan.sites["x.bias"].shape
        site = files.site(("a",), plan.sites["x.bias"], lambda: base.reshape(matrix))
        assert site.ranks == (min(matrix),)
        want = (saved.double() - base.double()).reshape(matrix)
        assert torch.equal(site.B[0] @ site.A[0], want)


def test_a_bias_on_b_is_taken_with_its_scale(recipe, tmp_path):
    name, bias = f"{Q0}.bias", torch.arange(8.0)
    write_base(tmp_path / "base", llama_tensors() | {name: torch.ones(HIDDEN)})
    write_adapter(tmp_path / "a", factors(Q0) | {f"{P}{Q0}.lora_B.bias": bias}, lora_bias=True)
    with opened(recipe) as (plan, files):
        site = files.site(("a",), plan.sites[name], no_base)
        assert torch.equal(site.B[0] @ site.pairs[0][1], 2 * bias.double()[:, None])


def test_dora_is_taken_against_the_base_weight_that_is_given(recipe, tmp_path):
    magnitude = torch.arange(1.0, 9.0)
    tensors = random_like(factors(Q0)) | {f"{P}{Q0}.lora_magnitude_vector": magnitude}
    write_adapter(tmp_path / "a", tensors, use_dora=True)
    W = llama_tensors()[f"{Q0}.weight"]
    with opened(recipe) as (plan, files):
        site = files.site(("a",), plan.sites[Q0], lambda: W)
        delta = site.sum([1.0])
        got = torch.cat([delta.rows(*span) for span in chunk_spans(delta.shape)])
    B, A = (tensors[f"{P}{Q0}.lora_{side}.weight"].double() for side in "BA")
    V = W.double() + 2 * (B @ A)
    want = magnitude.double()[:, None] * V / V.norm(dim=1, keepdim=True) - W.double()
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def with_initial(recipe, tmp_path, before):
    write_adapter(tmp_path / "initial", before, init_lora_weights="pissa")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "pissa"}))
    recipe["adapters"]["a"] = {"path": recipe["adapters"]["a"], "initial": str(tmp_path / "initial")}
    return recipe


def test_the_initial_factors_are_taken_away(recipe, tmp_path):
    trained, before = random_like(factors(Q0), 1), random_like(factors(Q0), 2)
    write_adapter(tmp_path / "a", trained)
    with opened(with_initial(recipe, tmp_path, before)) as (plan, files):
        site = files.site(("a",), plan.sites[Q0], no_base)
        products = [t[f"{P}{Q0}.lora_B.weight"].double() @ t[f"{P}{Q0}.lora_A.weight"].double()
                    for t in (trained, before)]  # fmt: skip
        got = site.B[0] @ site.pairs[0][1]
        assert torch.allclose(got, 2 * products[0] - 2 * products[1], rtol=1e-12, atol=1e-12)
        assert site.ranks == (4,)


def spoil(path, name, value=float("nan")):
    tensors = load_file(path)
    tensors[name].view(-1)[0] = value
    save_file(tensors, path)


def test_a_finite_adapter_passes_with_its_digest_and_count(recipe):
    with opened(recipe) as (plan, files):
        check = files.check("a")
    assert (check.adapter, check.tensors, check.tables) == ("a", 2, {})
    assert check.n_bytes == plan.adapters["a"].file_bytes
    assert len(check.sha256) == 64


CASES = {
    "a factor": (factors(Q0), {}, f"{P}{Q0}.lora_A.weight"),
    "a magnitude": (
        factors(Q0) | {f"{P}{Q0}.lora_magnitude_vector": torch.ones(8)},
        {"use_dora": True},
        f"{P}{Q0}.lora_magnitude_vector",
    ),
    "a trained bias": (factors(Q0) | {f"{P}x.bias": torch.ones(3)}, {"bias": "all"}, f"{P}x.bias"),
    "a head": (
        factors(Q0) | {f"{P}score.weight": torch.ones(3, 8)},
        {"modules_to_save": ["score"]},
        "score.weight",
    ),
    "a saved module": (
        factors(Q0) | {f"{P}model.norm.weight": torch.ones(8)},
        {"modules_to_save": ["norm"]},
        f"{P}model.norm.weight",
    ),
    "a table": (factors(Q0) | {f"{P}{TABLE}": torch.ones(16, 8)}, {}, f"{P}{TABLE}"),
    "tokens": (
        factors(Q0) | {f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 8)},
        {"trainable_token_indices": [3]},
        f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta",
    ),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES)
def test_every_number_that_enters_a_merge_must_be_finite(recipe, tmp_path, case, value):
    tensors, config, name = CASES[case]
    write_base(tmp_path / "base", llama_tensors() | {"x.bias": torch.zeros(3)})
    path = write_adapter(tmp_path / "a", tensors, **config) / "adapter_model.safetensors"
    with opened(recipe) as (_, files):
        files.check("a")
    spoil(path, name if name in tensors else f"{P}{name}", value)
    with opened(recipe) as (_, files), pytest.raises(NotFinite, match="holds 1 NaN or Inf") as caught:
        files.check("a")
    assert name in str(caught.value)


def test_the_initial_adapter_is_looked_at_too(recipe, tmp_path):
    with_initial(recipe, tmp_path, factors(Q0))
    spoil(tmp_path / "initial" / "adapter_model.safetensors", f"{P}{Q0}.lora_A.weight")
    with (
        opened(recipe) as (_, files),
        pytest.raises(NotFinite, match=r"a \(initial\).*initial/adapter_model"),
    ):
        files.check("a")


def test_what_does_not_enter_a_merge_may_hold_anything(recipe, tmp_path):
    tensors = factors(Q0) | {f"{P}score.original_module.weight": torch.full((3, 8), float("nan"))}
    write_adapter(tmp_path / "a", tensors)
    with opened(recipe) as (_, files):
        assert files.check("a").tensors == 2


@pytest.mark.parametrize(("other", "equal"), [(torch.ones(3), True), (torch.tensor([1.0, 1.0, 1.5]), False)])
def test_tensors_that_must_be_equal_are_compared(recipe, tmp_path, other, equal):
    twice = {f"{P}score.bias": torch.ones(3).half(), f"{P}score.modules_to_save.default.bias": other}
    write_adapter(tmp_path / "a", factors(Q0) | twice, modules_to_save=["score"])
    with opened(recipe) as (_, files):
        if equal:
            assert files.check("a").tensors == 4
        else:
            with pytest.raises(
                AdapterError, match=r"two values of one parameter \(they differ by up to 0\.5\)"
            ):
                files.check("a")


def test_a_table_that_peft_saved_by_itself_is_known_by_its_values_whatever_its_dtype(recipe, tmp_path):
    tables = {"a": torch.ones(16, 8), "b": torch.ones(16, 8).half(), "c": torch.zeros(16, 8)}
    for name, table in tables.items():
        write_adapter(tmp_path / name, factors(Q0) | {f"{P}{TABLE}": table})
        recipe["adapters"][name] = str(tmp_path / name)
    recipe["merges"] = [{"name": name, "merge_method": "cat", "adapters": [name]} for name in tables]
    with opened(recipe) as (_, files):
        found = {name: dict(files.check(name).tables) for name in tables}
    assert list(found["a"]) == [TABLE]
    assert found["a"] == found["b"] != found["c"]


def test_rows_of_tokens_come_from_every_adapter_that_trained_some(recipe, tmp_path):
    key = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = {"a": torch.full((2, 8), 1.0), "b": torch.full((1, 8), 2.0)}
    for (name, values), indices in zip(rows.items(), ([4, 2], [0]), strict=True):
        write_adapter(tmp_path / name, factors(V1) | {key: values}, trainable_token_indices=indices)
    with opened(recipe) as (plan, files):
        found = list(token_rows(plan.adapters, ("b", "a"), TABLE))
        assert [(name, indices) for name, _, indices in found] == [("b", (0,)), ("a", (4, 2))]
        assert all(torch.equal(files.saved(name).read(entry), rows[name]) for name, entry, _ in found)
        assert list(token_rows(plan.adapters, ("a", "b"), "lm_head.weight")) == []


def test_saved_counts_are_not_looked_at_and_tied_factors_are_compared_across(recipe, tmp_path):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    base = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    write_base(tmp_path / "base", base | {"bn.num_batches_tracked": torch.tensor(3)}, config)
    head = random_like(factors("lm_head", rows=16))
    A, B = (head[f"{P}lm_head.lora_{side}.weight"] for side in "AB")
    tensors = head | {
        f"{P}model.embed_tokens.lora_embedding_A": B.T.contiguous(),
        f"{P}model.embed_tokens.lora_embedding_B": A.T.contiguous(),
        f"{P}bn.num_batches_tracked": torch.tensor(7),
    }
    settings = {"ensure_weight_tying": True, "modules_to_save": ["bn"]}
    write_adapter(tmp_path / "a", tensors, **settings)
    with opened(recipe) as (_, files):
        assert files.check("a").tensors == 5
    write_adapter(tmp_path / "a", tensors | {f"{P}lm_head.lora_A.weight": A + 0.25}, **settings)
    with (
        opened(recipe) as (_, files),
        pytest.raises(AdapterError, match=r"lora_A is not the transpose.*by up to 0\.25"),
    ):
        files.check("a")
