"""What emr writes beside its shards, and what the loader makes of it, for every way in which weights are stored."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import ray_merge
from ray_merge.algebra.bits import unpack_rows
from ray_merge.plan.emr import emr_bytes
from ray_merge.storage.commit import MANIFEST
from tiny import HIDDEN, Q0, V1, factors, llama_tensors, plan_of, write_adapter, write_base

P = "base_model.model."
BIAS = f"{Q0}.bias"
EXPERTS = "model.layers.0.mlp.experts.down_proj"
CONV1D = "h.c_attn.weight"
BASE = llama_tensors() | {
    BIAS: torch.full((HIDDEN,), 0.5),
    CONV1D: torch.linspace(-1, 1, HIDDEN * 6).reshape(HIDDEN, 6),  # HF Conv1D: (in, out)
    EXPERTS: torch.linspace(-1, 1, 3 * 4 * HIDDEN).reshape(3, 4, HIDDEN),
}
PLAIN = {"model_type": "of_no_library", "vocab_size": 16}


class Stored(nn.Module):
    """A model whose state dict has the names of a checkpoint."""

    def __init__(self, tensors, dtype=None):
        super().__init__()
        self.tensors = {
            name: nn.Parameter(tensor.to(dtype or tensor.dtype, copy=True))
            for name, tensor in tensors.items()
        }

    def state_dict(self, *_, **__):
        return {name: tensor.detach() for name, tensor in self.tensors.items()}


def random_like(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def recipe_of(folder: Path, adapters, base=None, parameters=None, **recipe):
    write_base(folder / "base", BASE if base is None else base, PLAIN)
    for name, (tensors, settings) in adapters.items():
        write_adapter(folder / name, tensors, **settings)
    return {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "adapters": {name: str(folder / name) for name in adapters},
        "merges": [{"name": "m", "merge_method": "emr", "parameters": parameters or {}}],
        **recipe,
    }


def run(folder: Path, adapters, **options) -> Path:
    recipe = recipe_of(folder, adapters, **options)
    ray_merge.run(recipe, engine="local", workers=1, cache_dir=folder / "cache")
    ray_merge.verify(str(folder / "out"), cache_dir=folder / "cache")
    return folder / "out" / "m"


def loaded(out: Path, adapter: str, base=None, dtype=None) -> dict[str, torch.Tensor]:
    model = Stored(BASE if base is None else base, dtype)
    assert ray_merge.load_emr(model, out, adapter) is model
    return model.state_dict()


def given_back(values: torch.Tensor, index: int) -> torch.Tensor:
    """rescale_i mask_i tau_u of (T, ...) deltas in float64, before it is rescaled."""
    gamma = values.sum(0).sign()
    unified = gamma * ((values * gamma > 0) * values.abs()).amax(0)
    return unified * (values[index] * gamma > 0)


def check(found, deltas, index, tolerance, base=BASE):
    """`found` is base plus what the formula gives adapter `index`; deltas by tensor, (T, *shape), float64."""
    kept = {name: given_back(values, index) for name, values in deltas.items()}
    own = sum(float(values[index].abs().sum()) for values in deltas.values())
    rescaler = own / sum(float(values.abs().sum()) for values in kept.values())
    for name, tensor in found.items():
        update = rescaler * kept.get(name, torch.zeros(tensor.shape))
        off = (tensor.double() - (base[name].double() + update)).abs()
        assert bool((off <= tolerance * (base[name].double().abs() + update.abs() + 1e-2)).all()), name
    assert any(values.any() for values in kept.values())


def product(tensors, module):
    return 2 * tensors[f"{P}{module}.lora_B.weight"].double() @ tensors[f"{P}{module}.lora_A.weight"].double()


def test_linear_layers_conv1d_experts_and_biases_are_given_back(tmp_path):
    place = EXPERTS.rpartition(".")[0]
    expert = {
        f"{P}{place}.lora_A.weight": torch.empty(6, 4),
        f"{P}{place}.lora_B.weight": torch.empty(HIDDEN, 6),
    }
    settings = {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.19.1", "bias": "all"}
    shape = factors(Q0) | factors("h.c_attn", rows=6) | expert | {f"{P}{BIAS}": torch.empty(HIDDEN)}
    own = {"a": random_like(shape, 1), "b": random_like(shape, 2), "c": random_like(factors(Q0), 3)}
    out = run(tmp_path, {name: (tensors, settings if name != "c" else {}) for name, tensors in own.items()})

    def stack(of, missing):
        return torch.stack([*map(of, (own["a"], own["b"])), missing])

    def experts(tensors):
        A, B = (tensors[f"{P}{place}.lora_{side}.weight"].double() for side in "AB")
        return 2 * torch.einsum("bke,eka->eab", B.reshape(HIDDEN, 2, 3), A.reshape(3, 2, 4))

    deltas = {
        f"{Q0}.weight": stack(lambda tensors: product(tensors, Q0), product(own["c"], Q0)),
        CONV1D: stack(lambda tensors: product(tensors, "h.c_attn").T, torch.zeros(HIDDEN, 6)),
        EXPERTS: stack(experts, torch.zeros(3, 4, HIDDEN)),
        BIAS: stack(
            lambda tensors: tensors[f"{P}{BIAS}"].double() - BASE[BIAS].double(), torch.zeros(HIDDEN)
        ),
    }
    for index, name in enumerate("abc"):
        check(loaded(out, name), deltas, index, tolerance=1e-4)


def test_dora_is_given_back_as_the_dense_delta_that_it_is(tmp_path):
    magnitude = torch.arange(1.0, HIDDEN + 1)
    own = {
        "a": random_like(factors(Q0), 1) | {f"{P}{Q0}.lora_magnitude_vector": magnitude},
        "b": random_like(factors(Q0), 2),
    }
    out = run(tmp_path, {"a": (own["a"], {"use_dora": True}), "b": (own["b"], {})})
    W = BASE[f"{Q0}.weight"].double()
    V = W + product(own["a"], Q0)
    dora = magnitude.double()[:, None] * V / V.norm(dim=1, keepdim=True) - W
    deltas = {f"{Q0}.weight": torch.stack([dora, product(own["b"], Q0)])}
    for index, name in enumerate("ab"):
        check(loaded(out, name), deltas, index, tolerance=1e-4)


TWO = {"a": random_like(factors(Q0) | factors(V1), 1), "b": random_like(factors(Q0), 2)}
DELTAS = {
    f"{Q0}.weight": torch.stack([product(TWO["a"], Q0), product(TWO["b"], Q0)]),
    f"{V1}.weight": torch.stack([product(TWO["a"], V1), torch.zeros(HIDDEN, HIDDEN)]),
}


def plain_adapters():
    return {name: (tensors, {}) for name, tensors in TWO.items()}


def test_a_file_holds_the_unified_update_and_one_mask_for_each_adapter_that_touches_a_site(tmp_path):
    out = run(tmp_path, plain_adapters())
    found = {
        key: value
        for path in sorted((out / "emr").glob("*.safetensors"))
        for key, value in load_file(path).items()
    }
    assert found.keys() == {f"{site}.{word}" for site in (Q0, V1) for word in ("unified", "masks")}
    assert found[f"{Q0}.masks"].shape == (HIDDEN, 2, 1)
    assert found[f"{V1}.masks"].shape == (HIDDEN, 1, 1)
    both = DELTAS[f"{Q0}.weight"]
    for index in range(2):
        mask = unpack_rows(found[f"{Q0}.masks"][:, index], HIDDEN)
        assert torch.equal(mask, given_back(both, index) != 0)
    assert torch.allclose(found[f"{Q0}.unified"].double(), both.sum(0).sign() * found[f"{Q0}.unified"].abs())


@pytest.mark.parametrize("space", ["dense", "core", "knots"])
@pytest.mark.parametrize("out_dtype", [None, "bfloat16", "float64"])
def test_sizes_are_planned_and_dtypes_follow_the_checkpoint(tmp_path, space, out_dtype):
    recipe = recipe_of(tmp_path, plain_adapters(), parameters={"space": space}, out_dtype=out_dtype)
    plan = plan_of(recipe)
    events = []
    result = ray_merge.run(
        recipe, engine="local", workers=1, cache_dir=tmp_path / "cache", progress=events.append
    )
    out = tmp_path / "out" / "m"
    planned = emr_bytes(plan, plan.merges[0])
    assert sorted(path.name for path in (out / "emr").glob("*.safetensors")) == [
        plan.shards[index].name for index in planned
    ]
    for index, n_bytes in planned.items():
        path = out / "emr" / plan.shards[index].name
        assert path.stat().st_size == n_bytes
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
                dtype = file.get_tensor(name).dtype
                wanted = {None: torch.float32, "float64": torch.float64}.get(out_dtype)
                thin = wanted or torch.float32
                values = thin if space != "dense" else wanted or torch.bfloat16
                assert dtype == (torch.uint8 if name.endswith(".masks") else values)
    assert result.units_run == plan.n_units == len(plan.shards) + len(planned)
    (last,) = [event for event in events if event.kind == "merge"]
    assert last.n_bytes[0] == last.n_bytes[1] == plan.write_bytes


def test_every_tensor_of_a_file_is_aligned_to_its_dtype(tmp_path):
    own = {name: random_like(factors("odd", rows=3, columns=5) | factors("wide", rows=3, columns=5), seed)
           for seed, name in enumerate("ab")}  # fmt: skip
    base = {"odd.weight": torch.randn(3, 5).bfloat16(), "wide.weight": torch.randn(3, 5)}
    out = run(tmp_path, {name: (tensors, {}) for name, tensors in own.items()}, base=base)
    (path,) = (out / "emr").glob("*.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    size = {"F32": 4, "BF16": 2, "U8": 1}
    tensors = [item for name, item in header.items() if name != "__metadata__"]
    assert {item["dtype"] for item in tensors} == set(size)
    assert all((8 + length + item["data_offsets"][0]) % size[item["dtype"]] == 0 for item in tensors)


def test_a_bfloat16_base_is_added_to_in_float32_and_rounded_once(tmp_path):
    base = {name: tensor.bfloat16() for name, tensor in BASE.items()}
    out = run(tmp_path, plain_adapters(), base=base)
    for index, name in enumerate("ab"):
        # The unified update is stored in bfloat16 (to 2^-8), the parameter is rounded to it once more.
        check(loaded(out, name, base), DELTAS, index, tolerance=2.01 * 2**-8, base=base)
        # Given a base in float32, only the first of the two is left.
        found = loaded(out, name, base, torch.float32)
        kept = given_back(DELTAS[f"{Q0}.weight"], index)
        moved = (found[f"{Q0}.weight"] - base[f"{Q0}.weight"].float())[kept != 0].double()
        ratios = moved / kept[kept != 0]
        assert float((ratios / ratios.median() - 1).abs().max()) < 2.01 * 2**-8


def test_a_parameter_that_is_not_contiguous_is_changed_too(tmp_path):
    out = run(tmp_path, plain_adapters())
    model = Stored(BASE)
    turned = model.tensors[f"{Q0}.weight"]
    turned.data = turned.data.T.contiguous().T
    assert not turned.is_contiguous()
    found = ray_merge.load_emr(model, out, "a").state_dict()
    assert torch.equal(found[f"{Q0}.weight"], loaded(out, "a")[f"{Q0}.weight"])


@pytest.mark.parametrize("space", ["dense", "core", "knots"])
def test_zero_adapters_add_nothing(tmp_path, space):
    zero = {
        name: (random_like(factors(Q0), 1) | {f"{P}{Q0}.lora_B.weight": torch.zeros(HIDDEN, 2)}, {})
        for name in "ab"
    }
    out = run(tmp_path, zero, parameters={"space": space})
    for name in "ab":
        assert all(torch.equal(tensor, BASE[key]) for key, tensor in loaded(out, name).items())
    assert json.loads((out / "emr/rescalers.json").read_text())["rescalers"] == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("extra", "settings", "named"),
    [
        ({f"{P}model.norm.weight": torch.ones(HIDDEN)}, {"modules_to_save": ["norm"]}, "model.norm.weight"),
        ({f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, HIDDEN)},
         {"trainable_token_indices": [3]}, "model.embed_tokens.weight"),
    ],
)  # fmt: skip
def test_what_an_adapter_saved_as_a_whole_is_refused(tmp_path, extra, settings, named):
    recipe = recipe_of(tmp_path, {"a": (factors(Q0) | extra, settings), "b": (factors(V1), {})})
    with pytest.raises(
        ray_merge.Refusal, match=f"emr gives every adapter back .* adapter a saved its own {named}"
    ):
        plan_of(recipe)


def test_an_adapter_is_exported_only_where_the_unified_update_has_factors(tmp_path):
    recipe = recipe_of(tmp_path, plain_adapters())
    recipe["merges"][0]["export"] = "adapter"
    with pytest.raises(ray_merge.Refusal, match="emr in dense space has no exact low-rank form"):
        plan_of(recipe)
    recipe["merges"][0]["parameters"] = {"space": "core"}
    ray_merge.run(recipe, engine="local", workers=1, cache_dir=tmp_path / "cache")
    ray_merge.verify(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    out = tmp_path / "out" / "m"
    assert not list(out.glob("model-*"))
    exported = load_file(out / "adapter" / "adapter_model.safetensors")
    update = exported[f"{P}{Q0}.lora_B.weight"] @ exported[f"{P}{Q0}.lora_A.weight"]
    parts = [loaded(out, name)[f"{Q0}.weight"] - BASE[f"{Q0}.weight"] for name in "ab"]
    assert all(part.any() for part in parts)
    assert update.any()
    assert "This adapter adds lambda times the unified update" in (out / "README.md").read_text()


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_rescalers_count_entries_or_with_compat_authors_weights(tmp_path, scope):
    found = {}
    for compat in ("paper", "authors"):
        parameters = {"scope": scope, "compat": compat}
        base = BASE | {f"{V1}.weight": torch.zeros(4, HIDDEN)}
        own = {name: random_like(factors(Q0) | factors(V1, rows=4), seed) for seed, name in enumerate("ab")}
        out = run(tmp_path / compat, {n: (t, {}) for n, t in own.items()}, base=base, parameters=parameters)
        found[compat] = json.loads((out / "emr/rescalers.json").read_text())["rescalers"]
    both = {site: torch.stack([product(own[n], site) for n in "ab"]) for site in (Q0, V1)}
    for index, name in enumerate("ab"):
        sums = {
            site: [float(values[index].abs().sum()), float(given_back(values, index).abs().sum())]
            for site, values in both.items()
        }
        if scope == "tensor":
            want = {site: pytest.approx(one / kept, rel=1e-6) for site, (one, kept) in sums.items()}
            assert found["paper"][name] == found["authors"][name] == want
            continue
        flat = sum(one for one, _ in sums.values()) / sum(kept for _, kept in sums.values())
        by_weight = (sums[Q0][0] + 2 * sums[V1][0]) / (sums[Q0][1] + 2 * sums[V1][1])
        assert (found["paper"][name], found["authors"][name]) == (
            pytest.approx(flat),
            pytest.approx(by_weight),
        )
        assert abs(flat - by_weight) > 1e-4


def test_the_manifest_names_every_file_by_its_bytes(tmp_path):
    out = run(tmp_path, plain_adapters())
    named = {e["name"]: e for e in json.loads((out / MANIFEST).read_text())["files"]}
    there = [path for path in (out / "emr").iterdir()]
    assert len(there) == 3
    for path in there:
        data = path.read_bytes()
        entry = named[f"emr/{path.name}"]
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_base_that_is_itself_a_result_passes_nothing_of_it_on(tmp_path):
    first = run(tmp_path, plain_adapters())
    recipe = recipe_of(tmp_path / "second", plain_adapters()) | {"base_model": str(first)}
    assert not [info.path for info in plan_of(recipe).base.side_files if info.path.startswith("emr/")]
