"""Diagnostics of whole runs against the same figures from transformers' own forward with hooks, in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import ray_merge
from ray_merge.algebra.moments import MomentSums
from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import RecipeError
from ray_merge.recipe import load_recipe
from ray_merge.spec import Factor, Merge, Site
from ray_merge.work.diagnostics import Diagnosis
from ray_merge.work.moments_file import MomentsFile
from zoo import digests, llama_adapters, lora, tiny_llama

PAIRS = ("interference", "activation", "projection")
LISTS = (*PAIRS, "anisotropy", "directions")
RANKS = ("erank_sum", "erank_deltas", "erank_all")
N_ROWS, LENGTH = 4, 9


def write_data(path: Path, seed: int) -> str:
    rows = torch.randint(4, 64, (N_ROWS, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base", layers=2)
    llama_adapters(folder / "base", folder, 3)
    for index in range(3):
        write_data(folder / f"a{index}.jsonl", index)
    return folder


def recipe(folder: Path, output: Path, merges, names=("a0", "a1", "a2"), **keys):
    return {
        "base_model": str(folder / "base"),
        "output": str(output),
        "adapters": {
            name: {"path": str(folder / name), "data": str(folder / f"{name}.jsonl")} for name in names
        },
        "calibration": {"batch_size": 2},
        "diagnostics": True,
        "merges": merges,
        **keys,
    }


MERGES = [
    {"name": "both", "merge_method": "task_arithmetic", "export": "both"},
    {"name": "pairs", "merge_method": "task_arithmetic", "adapters": ["a2", "a0"]},
    {"name": "only", "merge_method": "task_arithmetic", "export": "adapter"},
]


def run(given, cache: Path, **options):
    return ray_merge.run(given, engine="local", cache_dir=cache, **options)


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    run(recipe(inputs, folder / "out", MERGES), folder / "cache", workers=2)
    return folder / "out"


def table(folder: Path, export: str = "checkpoint"):
    rows = pq.read_table(folder / "ray_merge" / "sites.parquet").to_pylist()
    return {row["site"]: row for row in rows if row["export"] == export}


def tokens(model, path: Path, modules) -> dict[str, torch.Tensor]:
    """(N, I) float64: what goes into each module while the rows of a file run through the model."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0][0].double())
        )
        for name in modules
    ]
    with torch.no_grad():
        for line in path.read_text().splitlines():
            model(input_ids=torch.tensor([json.loads(line)["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def saved(folder: Path, module: str):
    """B (O, R), A (R, I) and the scale of one adapter at one module, None where it has none."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    prefix = f"base_model.model.{module}.lora_"
    if f"{prefix}A.weight" not in tensors:
        return None
    B, A = (tensors[f"{prefix}{side}.weight"].double() for side in "BA")
    return B, A, config["lora_alpha"] / config["r"]


def rms(X: torch.Tensor) -> float:
    return math.sqrt(float(X.square().sum(1).mean()))


def wanted(weight: torch.Tensor, seen, updates) -> dict[str, list[float]]:
    """The definitions, from W (O, I), tokens (N, I) of each task and the factors of each adapter."""
    want: dict[str, list[float]] = {figure: [] for figure in LISTS}
    for X in seen:
        for update in updates:
            if update is None:
                for figure in PAIRS:
                    want[figure].append(0.0)
                continue
            B, A, scale = update
            want["interference"].append(rms(scale * X @ A.T @ B.T) / rms(X @ weight.T))
            want["activation"].append(rms(X @ A.T))
            want["projection"].append(rms(X @ A.T) / (float(A.norm()) * rms(X)))
        values = torch.linalg.svdvals(X).square()
        want["anisotropy"].append(float(values[0] / values.sum()))
        want["directions"].append(float(values.sum() ** 2 / values.square().sum()))
    return want


def entropy_rank(stack: list[torch.Tensor]) -> float:
    if not stack:
        return 0.0
    s = torch.linalg.svdvals(torch.stack([one.flatten() for one in stack]))
    p = s[s > s[0] * 1e-7] / s.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def wanted_ranks(updates) -> list[float]:
    terms = [
        [scale * torch.outer(B[:, k], A[k]) for k in range(A.shape[0])]
        for B, A, scale in [update for update in updates if update is not None]
    ]
    return [
        sum(entropy_rank(own) for own in terms),
        entropy_rank([torch.stack(own).sum(0) for own in terms]),
        entropy_rank([term for own in terms for term in own]),
    ]


@pytest.fixture(scope="module")
def direct(inputs):
    """Site -> (W, tokens by task, factors by adapter)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(inputs / "base").eval()
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    seen = [tokens(model, inputs / f"a{index}.jsonl", modules) for index in range(3)]
    return {
        name: (
            model.get_submodule(name).weight.detach().double(),
            [one[name] for one in seen],
            [saved(inputs / f"a{index}", name) for index in range(3)],
        )
        for name in modules
    }


def picked(found, order):
    return [found[task * 3 + adapter] for task in order for adapter in order]


def test_every_figure_is_that_of_hooks_in_float64(made, direct):
    rows = table(made / "both")
    assert len(rows) == 2 * 5  # q, v and down of two adapters, q, o and gate of the third
    for site, row in rows.items():
        weight, seen, updates = direct[site]
        for figure, want in wanted(weight, seen, updates).items():
            assert row[figure] == pytest.approx(want, rel=1e-6), (site, figure)
        assert [row[name] for name in RANKS] == pytest.approx(wanted_ranks(updates), rel=1e-5), site


def test_merges_of_some_adapters_have_the_same_figures_in_their_own_order(made):
    all_rows = table(made / "both")
    for site, row in table(made / "pairs").items():
        for figure in PAIRS:
            assert row[figure] == pytest.approx(picked(all_rows[site][figure], (2, 0)), rel=1e-12)
        assert row["anisotropy"] == [all_rows[site]["anisotropy"][task] for task in (2, 0)]


def test_an_adapter_alone_has_what_needs_no_base_weight(made):
    all_rows = table(made / "both")
    for site, row in table(made / "only", "adapter").items():
        assert row["interference"] is None
        for name in (*LISTS[1:], *RANKS):
            assert row[name] == all_rows[site][name]
    # Where there is a checkpoint its rows have them.
    assert all(row[name] is None for row in table(made / "both", "adapter").values() for name in LISTS)
    assert "| projection | a0 | a1 | a2 |" in (made / "only" / "README.md").read_text()


def test_the_card_has_the_mean_over_sites(made):
    rows = table(made / "both").values()
    mean = math.fsum(row["interference"][1] for row in rows) / len(rows)
    lines = (made / "both" / "README.md").read_text().splitlines()
    start = lines.index("| interference | a0 | a1 | a2 |")
    assert lines[start + 2].split(" | ")[:3] == ["| a0", lines[start + 2].split(" | ")[1], f"{mean:.4g}"]
    assert len(lines[start + 2 :][:3]) == 3
    assert lines[start + 4].startswith("| a2 |")


def test_one_worker_and_what_a_stopped_run_left_give_the_same_bytes(made, inputs, tmp_path):
    again = tmp_path / "out"
    run(recipe(inputs, again, MERGES), tmp_path / "cache", workers=1)
    for name in ("both", "pairs", "only"):
        assert digests(again / name) == digests(made / name)
    for lost in ("ray_merge/MANIFEST.json", "ray_merge/sites.parquet", "README.md"):
        (again / "both" / lost).unlink()
    receipt = min((again / "both/ray_merge/receipts").glob("model-*.json"))
    receipt.unlink()  # its shard is made again, the figures of the others come from their receipts
    result = run(recipe(inputs, again, MERGES), tmp_path / "cache", workers=1)
    assert result.units_run == 1
    assert digests(again / "both") == digests(made / "both")


def test_without_diagnostics_the_columns_are_null_and_the_id_is_another(made, inputs, tmp_path):
    given = recipe(inputs, tmp_path / "out", MERGES[:1], diagnostics=False)
    result = run(given, tmp_path / "cache")
    for row in table(tmp_path / "out/both").values():
        assert [row[name] for name in (*RANKS, *LISTS)] == [None] * 8
    assert not (tmp_path / "out/.ray_merge/moments").exists()
    there = json.loads((made / "both/ray_merge/MANIFEST.json").read_text())
    assert there["id"] != result.merges[0].id
    assert there["inputs"]["diagnostics"] is True
    assert list(there["inputs"]["data"]) == ["a0", "a1", "a2"]


def test_the_recipe_in_the_output_makes_the_same_merge(made, tmp_path):
    result = run(str(made / "pairs/ray_merge/recipe.yaml"), tmp_path / "cache")
    assert not result.merges[0].done
    assert result.units_run == 0


def test_a_task_without_data_is_refused(inputs, tmp_path):
    given = recipe(inputs, tmp_path / "out", MERGES)
    del given["adapters"]["a1"]["data"]
    with pytest.raises(RecipeError, match=r"adapters\.a1 has no data, which diagnostics: true needs"):
        ray_merge.plan(given)


def test_the_plan_counts_the_memory_of_gram_matrices(inputs, tmp_path):
    given = recipe(inputs, tmp_path / "out", MERGES)
    peaks = [ray_merge.plan(given | {"diagnostics": on}).peak_bytes for on in (False, True)]
    assert peaks[1] - peaks[0] == 3 * 8 * 64 * 64  # down_proj has 64 inputs


def test_rows_of_inputs_are_seen_the_other_way_round(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base/tokenizer_config.json").write_text('{"model_max_length": 16}\n')
    for index in range(2):
        fresh = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        lora(fresh, tmp_path / f"a{index}", ["c_attn", "mlp.c_proj"], seed=index, fan_in_fan_out=True)
        write_data(tmp_path / f"a{index}.jsonl", index)
    merges = [{"name": "m", "merge_method": "linear"}]
    run(recipe(tmp_path, tmp_path / "out", merges, ("a0", "a1")), tmp_path / "cache")
    rows = table(tmp_path / "out/m")
    modules = ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"]
    seen = [tokens(model, tmp_path / f"a{index}.jsonl", modules) for index in range(2)]
    assert len(rows) == 2
    for module in modules:
        row = next(row for site, row in rows.items() if module.endswith(site))
        weight = model.get_submodule(module).weight.detach().double().T
        updates = [saved(tmp_path / f"a{index}", module) for index in range(2)]
        for figure, want in wanted(weight, [one[module] for one in seen], updates).items():
            assert row[figure] == pytest.approx(want, rel=1e-6), (module, figure)
        assert [row[name] for name in RANKS] == pytest.approx(wanted_ranks(updates), rel=1e-5)


def test_sketches_dora_and_a_site_without_moments(inputs, direct, tmp_path):
    from transformers import AutoModelForCausalLM

    for name in ("base", "a0", "a0.jsonl"):
        there = inputs / name
        (shutil.copytree if there.is_dir() else shutil.copy)(there, tmp_path / name)
    for index, use_dora in ((1, False), (2, True)):
        model = AutoModelForCausalLM.from_pretrained(inputs / "base")
        lora(model, tmp_path / f"a{index}", ["q_proj"], seed=index, use_dora=use_dora)
        write_data(tmp_path / f"a{index}.jsonl", index)
    tensors = load_file(tmp_path / "a1/adapter_model.safetensors")
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    generator = torch.Generator().manual_seed(5)
    tensors[f"{embedding}A"] = torch.randn(4, 64, generator=generator)
    tensors[f"{embedding}B"] = torch.randn(32, 4, generator=generator)
    save_file(tensors, tmp_path / "a1/adapter_model.safetensors")
    given = recipe(
        tmp_path,
        tmp_path / "out",
        [{"name": "m", "merge_method": "task_arithmetic"}],
        calibration={"precision": "sketch", "sketch_rows": 20},
    )
    run(given, tmp_path / "cache")
    rows = table(tmp_path / "out/m")
    card = (tmp_path / "out/m/README.md").read_text()
    assert "1 more have no moments" in card

    table_row = rows.pop("model.embed_tokens")
    assert [table_row[name] for name in LISTS] == [None] * 5
    assert table_row["erank_all"] > 1

    query = rows["model.layers.0.self_attn.q_proj"]
    assert [query[name] for name in RANKS] == [None] * 3  # DoRA's update is no product
    assert [value is None for value in query["interference"]] == [False, False, True] * 3
    assert None not in query["anisotropy"]
    weight, seen, updates = direct["model.layers.0.self_attn.q_proj"]  # 32 inputs: nothing to sketch
    assert query["interference"][0] == pytest.approx(
        wanted(weight, seen[:1], updates[:1])["interference"][0], rel=1e-6
    )

    site = "model.layers.1.mlp.down_proj"
    files = [MomentsFile(path) for path in sorted((tmp_path / "out/.ray_merge/moments").iterdir())]
    found = [file.moments(site) for file in files if site in file.leaders]
    weight = load_file(tmp_path / "base/model.safetensors")[f"{site}.weight"].double()
    B, A, scale = saved(tmp_path / "a0", site)
    want = []
    for moments in found:
        assert moments.gram_error > 0
        grams = [X @ moments.gram @ X.T for X in (scale * B @ A, weight)]
        want.append(math.sqrt(float(grams[0].trace() / grams[1].trace())))
    assert sorted(rows[site]["interference"][::3]) == pytest.approx(sorted(want), rel=1e-9)
    assert rows[site]["interference"][1::3] == [0.0] * 3


class OneSite:
    """Files of two adapters at one site; `statistics` is the object itself."""

    def __init__(self, tokens: dict[str, torch.Tensor]) -> None:
        self.statistics = self
        self.tokens = tokens

    def site(self, names, site, base):
        return SiteFactors([Factor(torch.ones(3, 1), torch.ones(1, 4)) for _ in names])

    def input_side(self, kind, site):
        return "columns"

    def gram(self, adapter, site):
        sums = MomentSums(4)
        sums.add(self.tokens[adapter])
        return sums.finish()


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_no_tokens_and_a_base_that_gives_zero_are_null(inputs, tmp_path, weight):
    parsed, _ = load_recipe(recipe(inputs, tmp_path, MERGES))
    merge = Merge(name="m", method="linear", adapters=("a", "b", "c"), parameters={})
    files = OneSite({"a": torch.ones(2, 4), "b": torch.ones(0, 4), "c": torch.zeros(2, 4)})
    diagnosis = Diagnosis(parsed, Site("s", "s.weight", (3, 4)), [merge], files, base=None)
    diagnosis.add(torch.full((1, 4), weight))
    diagnosis.add(torch.full((2, 4), weight))
    found = diagnosis.figures(merge.adapters)
    assert found["activation"] == pytest.approx([4.0] * 3 + [None] * 3 + [0.0] * 3)
    assert found["projection"] == pytest.approx([1.0] * 3 + [None] * 3 + [0.0] * 3)
    ratio = None if weight == 0 else 0.5
    assert found["interference"] == pytest.approx([ratio] * 3 + [None] * 6)
    assert found["anisotropy"] == pytest.approx([1.0, None, None])
    assert found["directions"] == pytest.approx([1.0, None, None])
