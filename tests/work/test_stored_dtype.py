"""Rounding to the stored dtype: what it takes is reported, and what does not fit is never published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import ray_merge
from zoo import llama_adapters, tiny_llama


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base", layers=1)
    llama_adapters(folder / "base", folder, 2)
    return folder


def export(inputs: Path, output: Path, **keys) -> Path:
    recipe = {
        "base_model": str(inputs / "base"),
        "output": str(output),
        "adapters": {"a0": str(inputs / "a0"), "a1": str(inputs / "a1")},
        "merges": [{"name": "m", "merge_method": "task_arithmetic", "export": "adapter"}],
        **keys,
    }
    ray_merge.run(recipe, engine="local", cache_dir=output.parent / "cache")
    return output / "m"


def products(folder: Path) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    sites = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    return {
        site.removeprefix("base_model.model."): stored[f"{site}.lora_B.weight"].double()
        @ stored[f"{site}.lora_A.weight"].double()
        for site in sites
    }


def test_the_share_that_rounding_took_is_reported_per_site(inputs, tmp_path):
    exact = products(export(inputs, tmp_path / "exact"))
    folder = export(inputs, tmp_path / "rounded", out_dtype="bfloat16")
    rounded = products(folder)
    rows = pq.read_table(folder / "ray_merge" / "sites.parquet").to_pylist()
    assert {row["site"] for row in rows} == set(exact) == set(rounded)
    for row in rows:
        lost = float((rounded[row["site"]] - exact[row["site"]]).norm() / exact[row["site"]].norm())
        assert lost > 1e-4
        assert row["lost_share"] == pytest.approx(lost, rel=1e-3)


def test_factors_that_do_not_fit_the_stored_dtype_stop_the_run(inputs, tmp_path):
    # Small in the product, so that the checkpoint would be fine, and beyond float16 in one factor.
    grown = tmp_path / "grown"
    grown.mkdir()
    factors = load_file(inputs / "a0" / "adapter_model.safetensors")
    scaled = {name: tensor * (1e6 if "lora_B" in name else 1e-6) for name, tensor in factors.items()}
    save_file(scaled, grown / "adapter_model.safetensors", metadata={"format": "pt"})
    (grown / "adapter_config.json").write_bytes((inputs / "a0" / "adapter_config.json").read_bytes())
    with pytest.raises(ray_merge.RunFailed, match=r"do not fit torch\.float16; use out_dtype: float32"):
        export(inputs, tmp_path / "out", out_dtype="float16", adapters={"a0": str(grown)})
    assert not list((tmp_path / "out").rglob("adapter_model.safetensors"))


@pytest.mark.parametrize("device", ["mps", "cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(inputs, tmp_path, device):
    recipe = {
        "base_model": str(inputs / "base"),
        "output": str(tmp_path / "out"),
        "adapters": {"a0": str(inputs / "a0")},
        "merges": [{"name": "m", "merge_method": "cat"}],
    }
    with pytest.raises(ray_merge.Refusal, match=f"device '?{device}"):
        ray_merge.run(recipe, engine="local", device=device, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_an_untouched_tensor_that_does_not_fit_the_stored_dtype_stops_the_run(inputs, tmp_path):
    shutil.copytree(inputs / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    tensors["model.embed_tokens.weight"][0, 0] = float("inf")  # as infinite as before: passed on
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    recipe = {
        "base_model": str(tmp_path / "base"),
        "base_model_names": [str(inputs / "base")],
        "output": str(tmp_path / "out"),
        "adapters": {"a0": str(inputs / "a0")},
        "merges": [{"name": "m", "merge_method": "cat"}],
    }
    with pytest.raises(
        ray_merge.RunFailed, match=r"model\.norm\.weight of the base holds values that do not fit"
    ):
        ray_merge.run(recipe | {"out_dtype": "float16"}, engine="local", cache_dir=tmp_path / "cache")
    wide = recipe | {"out_dtype": "bfloat16", "output": str(tmp_path / "wide")}
    assert ray_merge.run(wide, engine="local", cache_dir=tmp_path / "cache").merges[0].done


def test_an_output_below_a_file_is_refused(inputs, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ray_merge.Refusal, match="Not a directory"):
        export(inputs, tmp_path / "file")
