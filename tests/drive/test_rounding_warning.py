"""More than 5 % of an update lost to rounding is said at the end of a run, with the way out."""

import json

import pyarrow.parquet as pq
import pytest
import torch

import ray_merge
from tiny import Q0, V1, factors, llama_tensors, write_adapter, write_base


def small(module: str, size: float):
    """Random factors whose delta is about `size` times the base weight."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator) * size**0.5
        for name, tensor in factors(module).items()
    }


@pytest.fixture
def given(tmp_path):
    write_base(tmp_path / "base", llama_tensors(dtype=torch.bfloat16))
    write_adapter(tmp_path / "a", {**small(Q0, 1e-3), **small(V1, 1.0)})
    return {
        "base_model": str(tmp_path / "base"),
        "output": str(tmp_path / "out"),
        "adapters": {"a": str(tmp_path / "a")},
        "merges": [{"name": "m", "merge_method": "task_arithmetic", "export": "both"}],
    }


def test_a_lossy_merge_warns_with_the_worst_site_and_the_way_out(given, tmp_path):
    result = ray_merge.run(given, engine="local", cache_dir=tmp_path / "cache")
    (warning,) = [text for text in result.warnings if "rounding" in text]
    rows = pq.read_table(tmp_path / "out/m/ray_merge/sites.parquet").to_pylist()
    lost = {row["site"]: row["lost_share"] for row in rows if row["export"] == "checkpoint"}
    site = Q0
    assert lost[site] > 0.05 > lost[V1]
    for word in ("'m'", f"{lost[site]:.1%} at {site}", "1 of", "out_dtype: float32", "export: adapter"):
        assert word in warning


def test_float32_keeps_the_update_and_says_nothing(given, tmp_path):
    result = ray_merge.run({**given, "out_dtype": "float32"}, engine="local", cache_dir=tmp_path / "cache")
    assert [text for text in result.warnings if "rounding" in text] == []


def test_the_table_has_what_each_site_cost_and_receipts_have_its_seconds(given, tmp_path):
    ray_merge.run(given, engine="local", cache_dir=tmp_path / "cache")
    rows = pq.read_table(tmp_path / "out/m/ray_merge/sites.parquet").to_pylist()
    (row,) = [row for row in rows if row["site"] == Q0 and row["export"] == "checkpoint"]
    assert (row["layout"], row["rank"], row["bytes"]) == ("linear", 2, 8 * 8 * 2)
    assert "seconds" not in row
    receipts = [
        json.loads(path.read_text()) for path in (tmp_path / "out/m/ray_merge/receipts").rglob("*.json")
    ]
    seconds = [site["seconds"] for receipt in receipts for site in receipt["sites"]]
    assert len(seconds) == 4
    assert all(0 < value < 60 for value in seconds)
