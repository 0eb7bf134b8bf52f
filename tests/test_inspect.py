"""`inspect`: numbers against dense references, and refused adapters that hide no other."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ray_merge
from ray_merge.cli import main
from ray_merge.inspect import Inspection
from ray_merge.inspect.adapters import unique_names
from ray_merge.recipe.names import check_name
from tiny import HIDDEN, Q0, V1, llama_tensors, write_adapter, write_base

EMBEDDING = "model.embed_tokens"
ROWS = 16


def random_pair(module: str, rank: int, seed: int, rows: int = HIDDEN, columns: int = HIDDEN) -> dict:
    generator = torch.Generator().manual_seed(seed)
    prefix = f"base_model.model.{module}.lora_"
    return {
        f"{prefix}A.weight": torch.randn(rank, columns, generator=generator),
        f"{prefix}B.weight": torch.randn(rows, rank, generator=generator),
    }


def delta(tensors: dict, module: str, scale: float) -> torch.Tensor:
    A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return scale * B.flatten(1) @ A.flatten(1)


def look(tmp_path: Path, *names: str, **options) -> Inspection:
    return ray_merge.inspect([tmp_path / name for name in names], cache_dir=tmp_path / "cache", **options)


def call(arguments: list[str], capfd) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments])
    printed = capfd.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err.strip().rpartition("\n")[2]


@pytest.fixture
def pair(tmp_path) -> tuple[dict, dict]:
    """Adapters `a` (r 2, scale 2; q and v) and `b` (r 3, rsLoRA; q alone), and their tensors."""
    a = random_pair(Q0, 2, seed=1) | random_pair(V1, 2, seed=2)
    b = random_pair(Q0, 3, seed=3)
    write_adapter(tmp_path / "a", a, peft_version="0.19.1", base_model_name_or_path="org/tiny")
    write_adapter(tmp_path / "b", b, r=3, lora_alpha=6, use_rslora=True)
    return a, b


def entropy_rank(dense: torch.Tensor) -> float:
    s = torch.linalg.svdvals(dense)
    p = s[s > 1e-12 * s.max()] / s.sum()
    return math.exp(float(-(p * p.log()).sum()))


@pytest.mark.parametrize("with_base", [False, True])
def test_the_numbers_of_an_adapter_are_those_of_its_dense_deltas(tmp_path, pair, with_base):
    base = write_base(tmp_path / "base") if with_base else None
    found = look(tmp_path, "a", "b", base=base)
    (first, second), (a, b) = found.adapters, pair
    assert found.refused == ()
    assert [site.site for site in first.sites] == [Q0, V1]
    dense = [delta(a, Q0, 2.0), delta(a, V1, 2.0)]
    for site, reference in zip(first.sites, dense, strict=True):
        assert (site.rank, site.scale, site.layout) == (2, 2.0, "linear")
        assert site.norm == pytest.approx(float(reference.norm()), rel=1e-10)
        assert site.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(reference, 2)), rel=1e-10)
        assert site.effective_rank == pytest.approx(entropy_rank(reference), rel=1e-10)
    assert first.norm == pytest.approx(float(torch.stack(dense).norm()), rel=1e-10)
    ranks = [entropy_rank(reference) for reference in dense]
    assert first.effective_rank == pytest.approx(sum(ranks) / 2, rel=1e-10)
    assert first.rank_used == pytest.approx(sum(ranks) / 4, rel=1e-10)
    assert (first.modules, first.ranks, first.alphas, first.scales) == (2, (2,), (4.0,), (2.0,))
    assert (first.peft_version, first.task_type, first.base) == ("0.19.1", "CAUSAL_LM", "org/tiny")
    assert second.variants == ("rsLoRA",)
    assert second.norm == pytest.approx(float(delta(b, Q0, 6 / math.sqrt(3)).norm()), rel=1e-10)


def test_the_numbers_of_a_pair_are_those_of_the_dense_deltas(tmp_path, pair):
    a, b = pair
    (found,) = look(tmp_path, "a", "b").pairs
    d1, d2 = delta(a, Q0, 2.0), delta(b, Q0, 6 / math.sqrt(3))
    U1, _, V1t = torch.linalg.svd(d1)
    U2, _, V2t = torch.linalg.svd(d2)
    P1, P2 = V1t[:2].T @ V1t[:2], V2t[:3].T @ V2t[:3]
    numbers = found.sites[Q0]
    assert list(found.sites) == [Q0]
    assert numbers == found.total
    assert numbers.outputs == pytest.approx(float((U1[:, :2].T @ U2[:, :3]).square().sum()) / 2, rel=1e-10)
    assert numbers.inputs == pytest.approx(float((P1 * P2).sum()) / 2, rel=1e-10)
    assert numbers.cosine == pytest.approx(float((d1 * d2).sum() / d1.norm() / d2.norm()), rel=1e-10)
    assert numbers.on_first == pytest.approx(float((d2 @ P1).norm() / d1.norm()), rel=1e-10)
    assert numbers.on_second == pytest.approx(float((d1 @ P2).norm() / d2.norm()), rel=1e-10)
    assert numbers.outputs_by_chance == numbers.inputs_by_chance == 3 / HIDDEN


def test_over_the_model_cosine_and_interference_are_those_of_all_shared_deltas_together(tmp_path, pair):
    a, _ = pair
    c = random_pair(Q0, 2, seed=7) | random_pair(V1, 2, seed=8)
    write_adapter(tmp_path / "c", c)
    (found,) = look(tmp_path, "a", "c").pairs
    d1 = torch.block_diag(delta(a, Q0, 2.0), delta(a, V1, 2.0))
    d2 = torch.block_diag(delta(c, Q0, 2.0), delta(c, V1, 2.0))
    P1 = torch.linalg.pinv(d1) @ d1
    assert found.total.cosine == pytest.approx(float((d1 * d2).sum() / d1.norm() / d2.norm()), rel=1e-10)
    assert found.total.on_first == pytest.approx(float((d2 @ P1).norm() / d1.norm()), rel=1e-9)
    assert found.total.inputs == pytest.approx(sum(site.inputs for site in found.sites.values()) / 2)


def test_adapters_that_share_no_module_and_updates_of_zero_have_no_numbers_together(tmp_path, pair):
    write_adapter(tmp_path / "v", random_pair(V1, 2, seed=4))
    zero = random_pair(Q0, 3, seed=5)
    zero[f"base_model.model.{Q0}.lora_B.weight"].zero_()
    write_adapter(tmp_path / "zero", zero, r=3)
    apart, untrained, _ = look(tmp_path, "b", "v", "zero").pairs
    assert (apart.sites, apart.total.cosine, apart.total.outputs) == ({}, None, None)
    assert (untrained.total.cosine, untrained.total.inputs, untrained.total.on_first) == (None, None, 0.0)
    assert look(tmp_path, "zero").adapters[0].norm == 0.0


def test_a_refused_adapter_hides_no_other_and_the_last_line_names_it(tmp_path, pair, capfd):
    write_adapter(tmp_path / "pissa", random_pair(Q0, 2, seed=4), init_lora_weights="pissa")
    code, out, last = call(
        [
            *(str(tmp_path / name) for name in ("a", "pissa", "nosuch", "b")),
            "--cache-dir",
            str(tmp_path / "cache"),
        ],
        capfd,
    )
    assert code == 2
    assert last == "ray-merge: 2 of 4 adapter(s) would be refused: pissa, nosuch"
    assert "init_lora_weights is 'pissa'" in out
    assert f"{tmp_path}/nosuch/adapter_config.json does not exist" in out
    found = look(tmp_path, "a", "pissa", "nosuch", "b")
    assert [len(adapter.sites) for adapter in found.adapters] == [2, 0, 0, 1]
    assert [(pair.first, pair.second) for pair in found.pairs] == [("a", "b")]
    assert found.adapters[1].variants == ("init: pissa",)
    assert found.adapters[1].ranks == (2,)


def nan(tensors):
    tensors[f"base_model.model.{Q0}.lora_B.weight"][3, 1] = math.nan


def uneven(tensors):
    tensors[f"base_model.model.{Q0}.lora_B.weight"] = torch.ones(HIDDEN, 5)


def flat(tensors):
    tensors[f"base_model.model.{Q0}.lora_A.weight"] = torch.ones(2)


def no_rows(tensors):
    tensors[f"base_model.model.{EMBEDDING}.token_adapter.trainable_tokens_delta"] = torch.tensor(1.0)


REFUSALS = {
    "NaN": ({}, nan, "lora_B.weight holds 1 NaN or Inf values"),
    "uneven ranks": ({}, uneven, "lora_A has rank 2 but lora_B has rank 5"),
    "a vector": ({}, flat, "no factors of any layer"),
    "tokens without rows": ({"trainable_token_indices": [0]}, no_rows, "trained tokens of shape ()"),
    "another rank than the config's": ({"r": 4}, None, "have rank 2 but adapter_config.json says 4"),
    "another PEFT type": ({"peft_type": "LOHA"}, None, "peft_type is 'LOHA'"),
    "an unknown setting": ({"use_magic": True}, None, "use_magic"),
    "DoRA without magnitudes": ({"use_dora": True}, None, "lacks a lora_magnitude_vector"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_be_refused_is_told_without_a_base(tmp_path, name):
    options, change, why = REFUSALS[name]
    tensors = random_pair(Q0, 2, seed=4)
    if change is not None:
        change(tensors)
    write_adapter(tmp_path / "bad", tensors, **options)
    (found,) = look(tmp_path, "bad").adapters
    assert why in found.refusal
    assert (found.sites, found.norm, found.scales) == ((), None, ())


def test_an_adapter_that_does_not_fit_the_base_is_refused_only_with_one(tmp_path, pair):
    wide = random_pair(Q0, 2, seed=4, columns=2 * HIDDEN)
    write_adapter(tmp_path / "wide", wide)
    assert look(tmp_path, "wide", "a").refused == ()
    found = look(tmp_path, "wide", "a", base=write_base(tmp_path / "base"))
    assert found.refused == ("wide",)
    assert "trained on another base model" in found.adapters[0].refusal
    assert len(found.adapters[1].sites) == 2


def test_with_a_base_sites_have_disk_names_and_the_rule_is_told(tmp_path):
    tensors = {name.removeprefix("model."): value for name, value in llama_tensors().items()}
    base = write_base(tmp_path / "base", tensors)
    write_adapter(tmp_path / "a", random_pair(Q0, 2, seed=1))
    (found,) = look(tmp_path, "a", base=base).adapters
    assert [site.site for site in found.sites] == [Q0.removeprefix("model.")]
    assert found.names
    assert found.layouts == {"linear": 1}
    assert look(tmp_path, "a").adapters[0].names == ""


def test_another_base_is_warned_of_and_two_of_them_cannot_be_merged_together(tmp_path, pair):
    write_adapter(tmp_path / "other", random_pair(Q0, 2, seed=5), base_model_name_or_path="org/other")
    base = write_base(tmp_path / "base")
    found = look(tmp_path, "a", "other", base=base)
    assert ["trained on org/tiny" in warning for warning in found.adapters[0].warnings] == [True]
    assert found.refused == ()
    assert ["adapter a was trained on org/tiny, adapter other on org/other" in w for w in found.warnings] == [
        True
    ]


def test_factors_of_embeddings_and_convolutions_have_numbers(tmp_path):
    generator = torch.Generator().manual_seed(0)
    A_RV, B_HR = (torch.randn(*size, generator=generator) for size in ((2, ROWS), (HIDDEN, 2)))
    conv_A, conv_B = (torch.randn(*size, generator=generator) for size in ((2, 3, 5, 5), (6, 2, 1, 1)))
    prefix = "base_model.model."
    embedding = {f"{prefix}{EMBEDDING}.lora_embedding_A": A_RV, f"{prefix}{EMBEDDING}.lora_embedding_B": B_HR}
    conv = {f"{prefix}conv.lora_A.weight": conv_A, f"{prefix}conv.lora_B.weight": conv_B}
    write_adapter(tmp_path / "both", embedding | conv)
    write_adapter(tmp_path / "embedding", embedding)
    both, alone = look(tmp_path, "both", "embedding").adapters
    assert both.layouts == {"conv": 1, "embedding": 1}
    norms = {site.site: site.norm for site in both.sites}
    assert norms["conv"] == pytest.approx(float(delta(conv, "conv", 2.0).norm()), rel=1e-10)
    assert norms[EMBEDDING] == pytest.approx(float((2 * B_HR.double() @ A_RV.double()).norm()), rel=1e-10)
    (fitted,) = look(tmp_path, "embedding", base=write_base(tmp_path / "base")).adapters
    assert fitted.refusal == ""
    assert fitted.sites == alone.sites


def test_the_sides_of_an_embedding_are_the_same_with_a_base_and_without(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        A_RV, B_HR = (torch.randn(*size, generator=generator) for size in ((2, ROWS), (HIDDEN, 2)))
        prefix = f"base_model.model.{EMBEDDING}.lora_embedding_"
        write_adapter(tmp_path / name, {f"{prefix}A": A_RV, f"{prefix}B": B_HR})
    alone, fitted = (
        look(tmp_path, "a", "b", base=base).pairs[0] for base in (None, write_base(tmp_path / "base"))
    )
    assert alone.total == fitted.total
    assert (alone.total.outputs_by_chance, alone.total.inputs_by_chance) == (2 / HIDDEN, 2 / ROWS)


def test_factors_of_fused_experts_are_listed_as_stored_without_a_base(tmp_path):
    prefix = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(8, 16),
        f"{prefix}.lora_B.weight": torch.ones(8, 8),
        f"{prefix}.base_layer.lora_A.weight": torch.ones(8, 8),
        f"{prefix}.base_layer.lora_B.weight": torch.ones(32, 8),
        **random_pair(Q0, 2, seed=1),
    }
    write_adapter(
        tmp_path / "moe", tensors, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    (found,) = look(tmp_path, "moe").adapters
    assert found.refusal == ""
    assert found.ranks == (2, 8)
    told = [site for site in found.sites if site.norm is not None]
    assert [site.site for site in told] == [Q0]
    assert found.norm == told[0].norm
    assert ["2 module(s) hold factors of several experts" in note for note in found.notes] == [True]


@pytest.mark.slow
def test_with_a_base_every_expert_is_a_site(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, moe_intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=4, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*size, generator=generator) for size in ((8, 12), (8, 8)))
    prefix = "base_model.model.model.layers.0.mlp.experts.lora_"
    tensors = {f"{prefix}A.weight": A, f"{prefix}B.weight": B}
    write_adapter(
        tmp_path / "moe",
        tensors,
        target_parameters=["mlp.experts.down_proj"],
        target_modules=[],
        peft_version="0.19.1",
    )
    (found,) = look(tmp_path, "moe", base=tmp_path / "base").adapters
    assert found.refusal == ""
    assert found.layouts == {"expert": 4}
    # A holds the experts one after the other, B has the expert fastest.
    norms = [float((2 * B[:, e::4] @ A[2 * e : 2 * e + 2]).double().norm()) for e in range(4)]
    assert [site.norm for site in found.sites] == pytest.approx(norms, rel=1e-6)


def test_block_diagonal_factors_have_no_numbers_without_a_base(tmp_path):
    write_adapter(
        tmp_path / "blocks", random_pair(Q0, 2, seed=1, columns=HIDDEN // 2), use_bdlora={"nblocks": 2}
    )
    (found,) = look(tmp_path, "blocks").adapters
    assert (found.norm, [site.rank for site in found.sites]) == (None, [2])
    assert "block-diagonal" in found.notes[0]


def test_dora_is_measured_by_its_low_rank_part_and_says_so(tmp_path, pair):
    a, _ = pair
    magnitudes = {
        f"base_model.model.{module}.lora_magnitude_vector": torch.ones(HIDDEN) for module in (Q0, V1)
    }
    write_adapter(tmp_path / "dora", a | magnitudes, use_dora=True)
    for base in (None, write_base(tmp_path / "base")):
        plain, dora = look(tmp_path, "a", "dora", base=base).adapters
        assert dora.sites == plain.sites
        assert dora.variants == ("DoRA",)
        assert "low-rank part" in dora.notes[0]


def test_saved_parameters_tokens_and_leftovers_are_listed(tmp_path):
    prefix = "base_model.model."
    more = {
        f"{prefix}score.modules_to_save.weight": torch.ones(3, HIDDEN),
        f"{prefix}score.original_module.weight": torch.ones(3, HIDDEN),
        f"{prefix}{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(2, HIDDEN),
    }
    options = {"modules_to_save": ["score"], "trainable_token_indices": [1, 5], "task_type": "SEQ_CLS"}
    write_adapter(tmp_path / "a", random_pair(Q0, 2, seed=1) | more, **options)
    for base in (None, write_base(tmp_path / "base")):
        (found,) = look(tmp_path, "a", base=base).adapters
        assert found.refusal == ""
        assert found.saved == ("score.weight",)
        assert found.tokens == {EMBEDDING: 2}
        assert list(found.ignored) == [f"{prefix}score.original_module.weight"]
        assert any("not part of the numbers" in note for note in found.notes)


def test_a_nan_in_a_saved_head_is_a_refusal_too(tmp_path):
    head = {"base_model.model.score.weight": torch.full((3, HIDDEN), math.nan)}
    write_adapter(tmp_path / "a", random_pair(Q0, 2, seed=1) | head, modules_to_save=["score"])
    assert "score.weight holds 24 NaN" in look(tmp_path, "a").adapters[0].refusal


def test_an_update_beyond_float64_has_no_numbers(tmp_path, pair, capfd):
    huge = {name: tensor.double() * 1e200 for name, tensor in random_pair(Q0, 2, seed=1).items()}
    write_adapter(tmp_path / "huge", huge)
    found = look(tmp_path, "huge", "a")
    assert (found.adapters[0].norm, found.adapters[0].scales) == (None, (2.0,))
    assert "too large for float64" in found.adapters[0].notes[0]
    assert found.pairs[0].total.cosine is None


def test_a_pickle_is_read_only_when_allowed(tmp_path, pair):
    pytest.importorskip("ray_merge.storage.pickled")
    a, _ = pair
    folder = write_adapter(tmp_path / "pickled", a)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(a, folder / "adapter_model.bin")
    assert "--allow-pickle" in look(tmp_path, "pickled").adapters[0].refusal
    plain, found = look(tmp_path, "a", "pickled", allow_pickle=True).adapters
    assert found.sites == plain.sites
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": print}))
    assert look(tmp_path, "pickled", allow_pickle=True).refused == ("pickled",)


@pytest.mark.parametrize("with_base", [False, True])
def test_json_is_valid_and_the_same_every_time(tmp_path, pair, capfd, with_base):
    write_adapter(tmp_path / "bad", random_pair(Q0, 2, seed=4), init_lora_weights="pissa")
    arguments = [str(tmp_path / name) for name in ("a", "b", "bad")]
    arguments += ["--base", str(write_base(tmp_path / "base"))] if with_base else []
    printed = [call([*arguments, "--json", "--cache-dir", str(tmp_path / name)], capfd) for name in "xy"]
    assert printed[0] == printed[1]
    code, out, last = printed[0]
    document = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (code, last) == (2, "ray-merge: 1 of 3 adapter(s) would be refused: bad")
    assert document["refused"] == ["bad"]
    assert [adapter["name"] for adapter in document["adapters"]] == ["a", "b", "bad"]
    assert document["pairs"][0]["sites"][Q0]["cosine"] == document["pairs"][0]["total"]["cosine"]
    assert document["base"] == (str(tmp_path / "base") if with_base else None)


def test_what_can_be_merged_exits_with_0_and_is_shown_in_a_table(tmp_path, pair, capfd):
    arguments = [str(tmp_path / name) for name in ("a", "b")]
    code, out, last = call([*arguments, "--cache-dir", str(tmp_path / "cache")], capfd)
    assert (code, last) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert next(row for row in rows if row[:1] == ["a"])[1:5] == ["2", "2", "4", "2"]
    assert next(row for row in rows if row[:2] == ["a", "b"])[2] == "1"
    assert "No data is used" in out


def test_a_base_that_is_not_there_stops_everything(tmp_path, pair, capfd):
    code, _, last = call([str(tmp_path / "a"), "--base", str(tmp_path / "nosuch")], capfd)
    assert (code, "does not exist" in last) == (2, True)
    with pytest.raises(ray_merge.Refusal, match="at least one adapter"):
        ray_merge.inspect([])


def test_a_file_in_place_of_a_folder_and_a_web_page_are_refused_by_name(tmp_path, pair):
    found = ray_merge.inspect(
        [tmp_path / "a" / "adapter_model.safetensors", "https://example.org/a"], cache_dir=tmp_path / "cache"
    )
    assert ["is a file" in found.adapters[0].refusal, "web page" in found.adapters[1].refusal] == [True, True]


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        (["x/a", "s3://bucket/b/"], ["a", "b"]),
        (["one/checkpoint-9", "two/checkpoint-9", "c"], ["one-checkpoint-9", "two-checkpoint-9", "c"]),
        (["a", "a", "a"], ["a", "a-2", "a-3"]),
        (["a", "a", "a-2"], ["a", "a-2", "a-2-2"]),
        (["hf://org/name@main", "/"], ["name-main", "adapter"]),
        ([".hidden", "x/__init__", "é"], ["hidden", "_init_", "-"]),
        (["x" * 100, "x" * 100], ["x" * 60, "x" * 60 + "-2"]),
    ],
)
def test_names_are_unique_and_a_recipe_could_use_them(urls, names):
    assert unique_names(urls) == names
    assert [check_name(name) for name in names] == names


def test_the_public_name_is_the_function_after_its_modules_were_imported():
    code = "import ray_merge, ray_merge.inspect.report; assert not hasattr(ray_merge.inspect, '__path__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
