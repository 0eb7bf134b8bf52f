"""Exported adapters: what is stored is the merged update in PEFT's layout of each kind of layer."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import ray_merge
from tiny import HIDDEN, Q0, V1, factors, llama_tensors, write_adapter, write_base

P = "base_model.model."
LAYERS = {
    "lin": ((6, HIDDEN), {"lora_A.weight": (2, HIDDEN), "lora_B.weight": (6, 2)}),
    "turned": ((HIDDEN, 6), {"lora_A.weight": (2, HIDDEN), "lora_B.weight": (6, 2)}),
    "conv": ((5, 3, 2, 2), {"lora_A.weight": (2, 3, 2, 2), "lora_B.weight": (5, 2, 1, 1)}),
    "point": ((5, 3, 1), {"lora_A.weight": (2, 3, 1), "lora_B.weight": (5, 2, 1)}),
    "table": ((9, 4), {"lora_embedding_A": (2, 9), "lora_embedding_B": (4, 2)}),
}
"""Module -> shape of its weight, and of what PEFT saves for it: Linear, HF Conv1D, convolutions, embedding."""


def random(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def run(folder, merge, **recipe):
    given = {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "adapters": {name: str(folder / name) for name in "ab"},
        "merges": [{"name": "m", "merge_method": "task_arithmetic", "export": "both", **merge}],
        **recipe,
    }
    ray_merge.run(given, engine="local", cache_dir=folder / "cache")
    ray_merge.verify(str(folder / "out"), cache_dir=folder / "cache")
    rows = pq.read_table(folder / "out" / "m" / "ray_merge" / "sites.parquet").to_pylist()
    return folder / "out" / "m", [row for row in rows if row["export"] == "adapter"]


def checkpoint(folder):
    return {key: value for path in sorted(folder.glob("model-*")) for key, value in load_file(path).items()}


@pytest.mark.parametrize("module", LAYERS)
def test_each_kind_of_layer_has_pefts_names_and_shapes_and_the_checkpoints_update(tmp_path, module):
    shape, saved = LAYERS[module]
    write_base(tmp_path / "base", {f"{module}.weight": torch.zeros(shape)}, {"model_type": "of_no_library"})
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, random({f"{P}{module}.{key}": s for key, s in saved.items()}, seed))
    folder, (row,) = run(tmp_path, {"parameters": {"weight": {"a": 0.5, "b": -0.25}}})
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    rank_4 = {key: tuple(4 if size == 2 and axis == ("A" not in key) else size for axis, size in enumerate(s))
              for key, s in saved.items()}  # fmt: skip
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == {
        f"{P}{module}.{key}": s for key, s in rank_4.items()
    }
    A, B = (tensor.double() for _, tensor in sorted(stored.items()))
    product = torch.einsum("or,ri->oi", B.flatten(1), A.flatten(1))  # scale 1: alpha is the rank
    update = (product.T if module in ("turned", "table") else product).reshape(shape)
    merged = checkpoint(folder)[f"{module}.weight"].double()
    assert torch.allclose(merged, update, rtol=1e-5, atol=1e-5)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 4, [module])
    assert config["fan_in_fan_out"] is (module == "turned")
    assert (row["rank"], row["truncation_error"]) == (4, 0.0)


@pytest.fixture
def two(tmp_path):
    """Two adapters of two modules; both of rank 2, so that the exact merge has rank 4 at Q0 and rank 2 at V1."""
    write_base(tmp_path / "base", llama_tensors())
    q = {name: tensor.shape for name, tensor in factors(Q0).items()}
    both = q | {name: tensor.shape for name, tensor in factors(V1).items()}
    write_adapter(tmp_path / "a", random(both, 1))
    write_adapter(tmp_path / "b", random(q, 2))
    return tmp_path


def delta(folder, module):
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    A, B = (stored[f"{P}{module}.lora_{side}.weight"].double() for side in "AB")
    return B @ A


def exact(folder, module):
    return checkpoint(folder)[f"{module}.weight"].double() - llama_tensors()[f"{module}.weight"].double()


@pytest.mark.parametrize("rank", [1, 3])
def test_an_export_rank_cuts_every_site_to_the_best_update_of_that_rank(two, rank):
    folder, rows = run(two, {"export_rank": rank})
    for row in rows:
        whole = exact(folder, row["site"])
        U, s, Vt = torch.linalg.svd(whole)
        kept = min(rank, 4 if row["site"] == Q0 else 2)
        best = U[:, :kept] * s[:kept] @ Vt[:kept]
        assert row["rank"] == kept
        assert torch.allclose(delta(folder, row["site"]), best, rtol=1e-4, atol=1e-4)
        want = float((whole - best).norm() / whole.norm())
        assert math.isclose(row["truncation_error"], want, abs_tol=1e-5)


@pytest.mark.parametrize("tolerance", [0.05, 0.6])
def test_an_export_tolerance_takes_the_smallest_rank_within_it(two, tolerance):
    folder, rows = run(two, {"export_tolerance": tolerance})
    for row in rows:
        whole = exact(folder, row["site"])
        s = torch.linalg.svdvals(whole)
        errors = [float(s[k:].norm() / s.norm()) for k in range(len(s) + 1)]
        assert row["rank"] == max(1, next(k for k, error in enumerate(errors) if error <= tolerance + 1e-6))
        assert row["truncation_error"] <= tolerance
        off = float((delta(folder, row["site"]) - whole).norm() / whole.norm())
        assert math.isclose(off, row["truncation_error"], abs_tol=1e-5)


def test_an_update_of_zero_keeps_its_site_with_rank_1(two):
    folder, rows = run(two, {"parameters": {"lambda": 0}, "export_tolerance": 0.1})
    assert {row["site"]: row["rank"] for row in rows} == {Q0: 1, V1: 1}
    assert torch.equal(delta(folder, Q0), torch.zeros(HIDDEN, HIDDEN).double())


def test_uneven_ranks_stand_in_the_patterns(two):
    folder, _ = run(two, {})
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    ranks = {Q0: 4, V1: 2}
    assert {module: config["rank_pattern"].get(module, config["r"]) for module in ranks} == ranks
    assert config["alpha_pattern"] == config["rank_pattern"]
