"""`scope: model`: thresholds over all sites, found by counting, against a sort of all entries at once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ray_merge
from ray_merge.drive import thresholds as under_test
from ray_merge.drive.events import Event
from ray_merge.drive.thresholds import THRESHOLDS, read_thresholds
from ray_merge.errors import OutputConflict
from ray_merge.storage.commit import MANIFEST
from ray_merge.storage.store import open_store
from ray_merge.verify import verify
from zoo import digests, llama_adapters, tiny_llama

RANKS = {"a0": (2, 4), "a1": (4, 5), "a2": (6, 6)}
TARGETS = {"a0": ("q_proj", "v_proj", "down_proj"), "a1": ("q_proj", "o_proj", "gate_proj")}
TARGETS["a2"] = TARGETS["a0"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base")
    llama_adapters(folder / "base", folder / "adapters", 3)
    return folder


def recipe(inputs: Path, output: Path, *merges, **keys):
    return {
        "base_model": str(inputs / "base"),
        "output": str(output),
        "adapters": {name: str(inputs / "adapters" / name) for name in RANKS},
        "merges": list(merges),
        **keys,
    }


def merge(**parameters):
    return {"name": "m", "merge_method": "ties", "parameters": parameters}


def run(inputs, folder, *merges, **keys):
    cache = folder / "cache"
    return ray_merge.run(recipe(inputs, folder / "out", *merges, **keys), engine="local", cache_dir=cache)


def deltas(inputs: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Adapter -> disk name of the weight -> float32 delta, zeros where the adapter has none."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, (rank, alpha) in RANKS.items():
        with safe_open(inputs / "adapters" / name / "adapter_model.safetensors", "pt") as file:
            keys = [key for key in file.keys() if "lora_A" in key]  # noqa: SIM118
            found[name] = {}
            for key in keys:
                A, B = file.get_tensor(key), file.get_tensor(key.replace("lora_A", "lora_B"))
                weight = key.removeprefix("base_model.model.").replace(".lora_A", "")
                found[name][weight] = B @ (A * (alpha / rank))
    sites = {site: delta.shape for own in found.values() for site, delta in own.items()}
    return {n: {s: own.get(s, torch.zeros(shape)) for s, shape in sites.items()} for n, own in found.items()}


def base_and_merged(inputs, folder):
    """(base weight, merged weight) by name, of every tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(inputs / "base" / "model.safetensors", "pt") as base:
        for name, file in index.items():
            with safe_open(folder / file, "pt") as merged:
                yield name, base.get_tensor(name), merged.get_tensor(name)


@pytest.mark.parametrize("density", [0.05, 0.3, {"a0": 0.02, "a1": 0.5, "a2": 1.0}])
def test_dense_thresholds_are_those_of_a_sort_over_the_whole_model(inputs, tmp_path, density):
    run(inputs, tmp_path, merge(density=density))
    found = json.loads((tmp_path / "out" / "m" / THRESHOLDS).read_text())
    for name, own in deltas(inputs).items():
        flat = torch.cat([delta.flatten() for delta in own.values()]).abs()
        share = density[name] if isinstance(density, dict) else density
        k = math.floor(share * len(flat))
        want = 0.0 if share == 1.0 else float(flat.sort(descending=True).values[k - 1])
        assert found[name] == [pytest.approx(want, rel=1e-6)]


def test_the_merge_is_ties_on_one_vector_of_all_sites(inputs, tmp_path):
    run(inputs, tmp_path, merge(density=0.2, **{"lambda": 0.7}))
    stacks = deltas(inputs)
    names = list(next(iter(stacks.values())))
    flat = torch.stack([torch.cat([stacks[a][n].flatten() for n in names]) for a in RANKS]).double()
    k = math.floor(0.2 * flat.shape[1])
    bounds = flat.abs().sort(dim=1, descending=True).values[:, k - 1 : k]
    kept = torch.where(flat.abs() >= bounds * (1 - 1e-6), flat, 0.0)
    agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    want = 0.7 * (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    parts = dict(zip(names, want.split([stacks["a0"][n].numel() for n in names]), strict=True))
    for name, base, merged in base_and_merged(inputs, tmp_path / "out" / "m"):
        update = merged.double() - base.double()
        expected = parts[name].view_as(base) if name in parts else torch.zeros_like(update)
        assert (update - expected).abs().max() < 2e-6


@pytest.mark.parametrize("space", ["core", "knots"])
def test_other_spaces_compete_over_the_whole_model_too(inputs, tmp_path, space):
    given = merge(density=0.1, space=space) | {"export": "both"}
    run(inputs, tmp_path, given, {**merge(density=0.1, space=space, scope="tensor"), "name": "each"})
    found = json.loads((tmp_path / "out" / "m" / THRESHOLDS).read_text())
    assert all(values[0] > 0 for values in found.values())
    assert not (tmp_path / "out" / "each" / THRESHOLDS).exists()
    ours, each = (digests(tmp_path / "out" / name) for name in ("m", "each"))
    assert ours["model-00001-of-00004.safetensors"] != each["model-00001-of-00004.safetensors"]
    assert max(checked.worst for checked in verify(str(tmp_path / "out"))) <= 1


@pytest.mark.parametrize("gathered", [0, 2**16])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_counting_to_the_last_bit_and_gathering_candidates_agree(
    inputs, tmp_path, monkeypatch, gathered, dtype
):
    monkeypatch.setattr(under_test, "GATHERED", gathered)
    run(inputs, tmp_path, merge(density=0.2), dtype=dtype)
    found = json.loads((tmp_path / "out" / "m" / THRESHOLDS).read_text())
    run(inputs, tmp_path / "core", merge(density=0.2, space="core"), dtype=dtype)
    for name, own in deltas(inputs).items():
        flat = torch.cat([delta.flatten() for delta in own.values()]).abs()
        k = math.floor(0.2 * len(flat))
        assert found[name] == [pytest.approx(float(flat.sort(descending=True).values[k - 1]), rel=1e-6)]


def test_shards_do_not_change_a_byte_of_the_result(inputs, tmp_path):
    run(inputs, tmp_path / "a", merge(density=0.2))
    run(inputs, tmp_path / "b", merge(density=0.2), max_shard_size="10KB")
    one, other = (json.loads((tmp_path / f / "out" / "m" / THRESHOLDS).read_text()) for f in "ab")
    assert one == other


@pytest.mark.parametrize("at_once", [2, 128])
def test_merges_share_the_counting_of_an_adapter(inputs, tmp_path, monkeypatch, at_once):
    asked = []
    inner = under_test._Rounds.ask
    monkeypatch.setattr(under_test, "QUESTIONS_AT_ONCE", at_once)
    monkeypatch.setattr(
        under_test._Rounds,
        "ask",
        lambda self, questions: (asked.append(len(questions)), inner(self, questions))[1],
    )
    swept = {"name": "s", "merge_method": "ties", "sweep": {"density": [0.1, 0.2], "lambda": [0.5, 1.0]}}
    run(inputs, tmp_path, swept)
    assert asked == [3, 6]  # three adapters, then two densities of each; lambda asks for nothing


def test_whoever_watches_hears_of_each_shard_that_was_counted(inputs, tmp_path):
    events: list[Event] = []
    ray_merge.run(
        recipe(inputs, tmp_path / "out", merge(density=0.2), max_shard_size="10KB"),
        engine="local",
        cache_dir=tmp_path / "cache",
        progress=events.append,
    )
    first, *others = [event for event in events if event.kind == "select"]
    assert first.units == (0, 0)
    shards = others[0].units[1]
    assert shards > 2
    rounds = {text: [one.units for one in others if one.text == text] for text in (e.text for e in others)}
    assert len(rounds) >= 2
    assert all(units == [(n + 1, shards) for n in range(shards)] for units in rounds.values())
    kinds = [event.kind for event in events]
    assert kinds.index("unit") > max(n for n, kind in enumerate(kinds) if kind == "select")


def test_a_run_that_was_stopped_does_not_count_again(inputs, tmp_path, monkeypatch):
    run(inputs, tmp_path, merge(density=0.2))
    before = digests(tmp_path / "out" / "m")
    folder = tmp_path / "out" / "m"
    (folder / MANIFEST).unlink()
    (folder / "ray_merge" / "receipts" / "model-00002-of-00004.safetensors.json").unlink()
    (folder / "model-00002-of-00004.safetensors").unlink()
    monkeypatch.setattr(under_test._Rounds, "ask", lambda *_: pytest.fail("counted again"))
    run(inputs, tmp_path, merge(density=0.2))
    assert digests(folder) == before


@pytest.mark.parametrize(
    "content",
    [
        '{"a0": [1]',
        "null",
        '{"a0": []}',
        '{"a0": [NaN]}',
        '{"a0": ["1"]}',
        '{"a0": [-1.0]}',
        '{"a0": [1.0, 1.0]}',
    ],
)
def test_damaged_thresholds_are_refused_by_name(inputs, tmp_path, content):
    folder = tmp_path / "out" / "m"
    (folder / "ray_merge").mkdir(parents=True)
    (folder / THRESHOLDS).write_text(content)
    planned = ray_merge.plan(recipe(inputs, tmp_path / "out", merge(density=0.2)))
    with pytest.raises(OutputConflict, match=r"thresholds\.json is damaged"):
        read_thresholds(open_store(str(folder)), planned.merges[0])


def test_an_adapter_whose_places_are_zeros_keeps_everything(inputs, tmp_path):
    """a1 has entries in two thirds of the sites: at a density of 0.9 its threshold is one of the zeros."""
    run(inputs, tmp_path, merge(density=0.9))
    found = json.loads((tmp_path / "out" / "m" / THRESHOLDS).read_text())
    n_own = sum(int((delta != 0).any()) * delta.numel() for delta in deltas(inputs)["a1"].values())
    n_all = sum(delta.numel() for delta in deltas(inputs)["a1"].values())
    assert n_own < 0.9 * n_all
    assert found["a1"] == [0.0]


def test_the_smallest_entry_of_an_adapter_is_a_threshold_too(inputs, tmp_path):
    """breadcrumbs drops what lies above: a place that is just the last of an adapter's own entries is no zero."""
    n_all = sum(delta.numel() for delta in deltas(inputs)["a1"].values())
    own = torch.cat([delta.flatten() for delta in deltas(inputs)["a1"].values() if (delta != 0).any()]).abs()
    gamma = (len(own) - 1) / n_all
    given = {"name": "m", "merge_method": "breadcrumbs", "adapters": ["a0", "a1"]}
    given["parameters"] = {"scope": "model", "density": 0.1, "gamma": gamma}
    run(inputs, tmp_path, given)
    found = json.loads((tmp_path / "out" / "m" / THRESHOLDS).read_text())["a1"]
    assert pytest.approx(float(own.min()), rel=1e-5) in found
