"""Runs in one process: what is published, what a second run does, what a stopped run leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

import ray_merge
from ray_merge.storage.commit import MANIFEST
from zoo import digests, llama_adapters, tiny_llama

SWEEP = [0.2, 0.4]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base")
    llama_adapters(folder / "base", folder / "adapters", 3)
    return folder


def recipe(inputs: Path, output: Path | str, **keys):
    return {
        "base_model": str(inputs / "base"),
        "output": str(output),
        "adapters": {f"a{i}": str(inputs / "adapters" / f"a{i}") for i in range(3)},
        "merges": [
            {"name": "scale", "merge_method": "task_arithmetic", "sweep": {"lambda": SWEEP}},
            {
                "name": "pairs",
                "merge_method": "dare_ties",
                "parameters": {"density": 0.5},
                "combinations": {"choose": 2},
            },
            {
                "name": "knots",
                "merge_method": "knots_ties",
                "parameters": {"scope": "tensor"},
                "export": "both",
            },
        ],
        **keys,
    }


NAMES = ["scale/lambda=0.2", "scale/lambda=0.4", "pairs/a0__a1", "pairs/a0__a2", "pairs/a1__a2", "knots"]


def merge(inputs, output, cache, **keys):
    return ray_merge.run(recipe(inputs, output, **keys), engine="local", cache_dir=cache)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    result = merge(inputs, folder / "out", folder / "cache")
    assert [m.name for m in result.merges] == NAMES
    assert all(m.done for m in result.merges)
    return folder / "out"


def test_manifest_names_every_file_by_content(undisturbed):
    for name in NAMES:
        manifest = json.loads((undisturbed / name / MANIFEST).read_text())
        for entry in manifest["files"]:
            data = (undisturbed / name / entry["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        listed = {entry["name"] for entry in manifest["files"]}
        there = set(digests(undisturbed / name)) - {MANIFEST}
        assert there == listed


def test_nothing_but_merges_is_left(undisturbed):
    assert sorted(path.name for path in undisturbed.iterdir()) == [".ray_merge", "knots", "pairs", "scale"]
    # The folder itself stays: another driver may be about to put its scratch there.
    assert [*(undisturbed / ".ray_merge" / "attempts").iterdir()] == []


def test_untouched_tensors_have_the_bytes_of_the_base(inputs, undisturbed):
    index = json.loads((undisturbed / "knots" / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(inputs / "base" / "model.safetensors", "pt") as base:
        assert sorted(base.keys()) == sorted(index)
        for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):
            with safe_open(undisturbed / "knots" / index[name], "pt") as merged:
                assert merged.get_tensor(name).equal(base.get_tensor(name))


def test_sites_table_reports_every_touched_site(undisturbed):
    rows = pq.read_table(undisturbed / "knots" / "ray_merge" / "sites.parquet").to_pylist()
    checkpoint = [row for row in rows if row["export"] == "checkpoint"]
    assert len(checkpoint) == len([row for row in rows if row["export"] == "adapter"]) == 4 * 5
    assert all(row["update_norm"] > 0 and row["rank"] > 0 for row in rows)
    assert all(row["lost_share"] < 1e-5 for row in checkpoint)


def test_bfloat16_output_reports_what_rounding_took(inputs, tmp_path):
    merge(inputs, tmp_path / "out", tmp_path / "cache", out_dtype="bfloat16")
    folder = tmp_path / "out" / "scale" / "lambda=0.2"
    rows = pq.read_table(folder / "ray_merge" / "sites.parquet").to_pylist()
    assert all(1e-4 < row["lost_share"] < 0.5 for row in rows)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    total = 0
    for file in set(index["weight_map"].values()):
        with safe_open(folder / file, "pt") as merged:
            for name in merged.keys():  # noqa: SIM118 (safe_open has no __iter__)
                tensor = merged.get_tensor(name)
                assert str(tensor.dtype) == "torch.bfloat16"
                total += tensor.nbytes
    assert index["metadata"]["total_size"] == total


def test_second_run_does_nothing_and_starts_no_pool(inputs, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_merge.engines.LocalPool", lambda *_: pytest.fail("a pool was started"))
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    result = merge(inputs, undisturbed, tmp_path / "cache")
    assert result.units_run == 0
    assert not any(m.done for m in result.merges)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_bytes_do_not_depend_on_where_output_and_cache_are(inputs, undisturbed, tmp_path):
    merge(inputs, tmp_path / "elsewhere", tmp_path / "cache")
    assert digests(tmp_path / "elsewhere") == digests(undisturbed)


def test_bytes_do_not_depend_on_the_grouping_of_merges(inputs, undisturbed, tmp_path):
    peak = max(ray_merge.plan(recipe(inputs, tmp_path), only=[name]).peak_bytes for name in NAMES)
    for name in NAMES:
        ray_merge.run(
            recipe(inputs, tmp_path / "out"),
            engine="local",
            cache_dir=tmp_path / "cache",
            only=[name],
            memory=peak,
        )
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_a_run_that_lost_objects_runs_only_their_units(inputs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    folder = tmp_path / "out" / "scale" / "lambda=0.2"
    (folder / MANIFEST).unlink()
    (folder / "config.json").unlink()
    (folder / "ray_merge/receipts/model-00002-of-00004.safetensors.json").unlink()
    (folder / "model-00003-of-00004.safetensors").unlink()
    # recipe.yaml names the output, which the copy has changed; ids do not depend on it
    result = merge(inputs, tmp_path / "out", tmp_path / "cache")
    assert [m.name for m in result.merges if m.done] == ["scale/lambda=0.2"]
    assert result.units_run == 2
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_a_foreign_shard_in_the_way_stops_the_run(inputs, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "knots", tmp_path / "out" / "knots")
    folder = tmp_path / "out" / "knots"
    (folder / MANIFEST).unlink()
    (folder / "ray_merge/receipts/model-00001-of-00004.safetensors.json").unlink()
    shard = folder / "model-00001-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ray_merge.RunFailed, match=r"model-00001-of-00004\.safetensors is there already"):
        merge(inputs, tmp_path / "out", tmp_path / "cache")
    assert not (folder / MANIFEST).exists()
    assert bytes(data) == shard.read_bytes()


def test_two_drivers_at_once_publish_one_result(inputs, undisturbed, tmp_path):
    errors = []

    def drive(index: int) -> None:
        try:
            merge(inputs, tmp_path / "out", tmp_path / f"cache{index}")
        except BaseException as error:  # noqa: BLE001 (reported by the assertion)
            errors.append(error)

    threads = [threading.Thread(target=drive, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_merges_that_say_the_same_in_two_ways_are_all_completed(inputs, tmp_path):
    same = [
        {"name": "plain", "merge_method": "task_arithmetic", "export": "both"},
        {
            "name": "written",
            "merge_method": "task_arithmetic",
            "parameters": {"lambda": 1},
            "export": "both",
        },
    ]
    result = merge(inputs, tmp_path / "out", tmp_path / "cache", merges=same)
    assert len({m.id for m in result.merges}) == 1
    manifests = [json.loads((tmp_path / "out" / m.name / MANIFEST).read_text()) for m in result.merges]
    assert [manifest["name"] for manifest in manifests] == ["plain", "written"]
    assert len(ray_merge.verify(str(tmp_path / "out"))) == 2


def test_an_output_inside_the_base_by_way_of_a_link_is_refused(tmp_path):
    tiny_llama(tmp_path / "base", layers=1)
    adapters = llama_adapters(tmp_path / "base", tmp_path / "adapters", 1)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    before = sorted((tmp_path / "base").rglob("*"))
    with pytest.raises(ray_merge.Refusal, match="lies inside the base model"):
        ray_merge.run(
            {
                "base_model": str(tmp_path / "link"),
                "output": str(tmp_path / "base" / "out"),
                "adapters": adapters,
                "merges": [{"name": "m", "merge_method": "cat"}],
            },
            engine="local",
            cache_dir=tmp_path / "cache",
        )
    assert sorted((tmp_path / "base").rglob("*")) == before


def test_output_with_id_and_date(inputs, tmp_path):
    result = ray_merge.run(
        recipe(inputs, tmp_path / "{date}" / "{id}"),
        engine="local",
        cache_dir=tmp_path / "cache",
        only=["knots"],
        date="2026-01-02",
    )
    folder = tmp_path / "2026-01-02" / result.merges[0].id[:12] / "knots"
    assert (folder / MANIFEST).is_file()


def test_kill_9_of_the_driver_then_run_again_gives_the_same_bytes(inputs, undisturbed, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(inputs, tmp_path / "out")))
    command = [sys.executable, "-m", "ray_merge", "run", str(path), "--engine", "local", "--workers", "1"]
    process = subprocess.Popen([*command, "--cache-dir", str(tmp_path / "cache")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    receipts: list[Path] = []
    while len(receipts) < 7 and time.monotonic() < deadline:
        receipts = list((tmp_path / "out").rglob("receipts/*.json"))
        time.sleep(0.002)
    process.kill()
    process.wait()
    there = len(list((tmp_path / "out").rglob("receipts/*.json")))
    assert 7 <= there < 25  # some objects of the first two units are there
    result = merge(inputs, tmp_path / "out", tmp_path / "cache")
    assert result.units_adopted == there
    shutil.rmtree(tmp_path / "out" / ".ray_merge", ignore_errors=True)
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_a_run_in_this_process_leaves_torch_as_it_was(inputs, tmp_path):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ray_merge.run(
            recipe(inputs, tmp_path / "out"), engine="local", cache_dir=tmp_path / "cache", only=["knots"]
        )
        assert torch.get_num_threads() == 2
        assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_num_threads(before)
