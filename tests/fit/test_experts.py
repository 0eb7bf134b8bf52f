"""MoE factors against plain loops in float64, in every layout that PEFT and Unsloth have written."""

import pytest
import torch
import transformers
from fit_cases import DECODER, UNKNOWN, P, dense, fit, random, refusal

from ray_merge.errors import AdapterError, AdapterShapeError
from ray_merge.spec import FactorEntry

E, R, H, F = 3, 2, 8, 6  # experts, rank, hidden, width of an expert
ALPHA = 5
EXPERTS = "model.layers.0.mlp.experts"

GPT_OSS = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **DECODER, "intermediate_size": F,
    "num_local_experts": E, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
QWEN = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **DECODER, "num_experts": E,
    "num_experts_per_tok": 2, "moe_intermediate_size": F,
}  # fmt: skip

fused_in_memory = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 has one module per expert"
)


def gpt_oss_base(width: int = F) -> dict[str, torch.Tensor]:
    """(experts, in, out) on disk and in memory."""
    return random(
        {
            f"{EXPERTS}.gate_up_proj": (E, H, 2 * width),
            f"{EXPERTS}.gate_up_proj_bias": (E, 2 * width),
            f"{EXPERTS}.down_proj": (E, width, H),
            f"{EXPERTS}.down_proj_bias": (E, H),
        }
    )


def qwen_base(width: int = F) -> dict[str, torch.Tensor]:
    """One matrix per expert and projection on disk; (experts, out, in) in memory."""
    shapes = {}
    for expert in range(E):
        shapes[f"{EXPERTS}.{expert}.gate_proj.weight"] = (width, H)
        shapes[f"{EXPERTS}.{expert}.up_proj.weight"] = (width, H)
        shapes[f"{EXPERTS}.{expert}.down_proj.weight"] = (H, width)
    return random(shapes)


def factors(a: int, b: int, wraps: int = 0, seed: int = 1) -> dict[str, torch.Tensor]:
    """Stored factors of a fused parameter: A (E R, a), B (b, R E)."""
    module = EXPERTS + ".base_layer" * wraps
    shapes = {f"{P}{module}.lora_A.weight": (E * R, a), f"{P}{module}.lora_B.weight": (b, R * E)}
    return random(shapes, seed)


def loop(tensors: dict[str, torch.Tensor], packing: str, wraps: int = 0) -> list[torch.Tensor]:
    """delta_e (b, a) of every expert, one entry after the other: the definition."""
    module = EXPERTS + ".base_layer" * wraps
    A, B = (tensors[f"{P}{module}.lora_{side}.weight"].double() for side in "AB")
    deltas = []
    for e in range(E):
        delta = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
        for k in range(R):
            column = k * E + e if packing == "rank_major" else e * R + k
            for row in range(B.shape[0]):
                delta[row] += B[row, column] * A[e * R + k] * (ALPHA / R)
        deltas.append(delta)
    return deltas


def settings(*parameters: str, version: str | None = None, **keys) -> dict:
    return {
        "r": R, "lora_alpha": ALPHA, "target_parameters": [f"mlp.experts.{name}" for name in parameters],
        "target_modules": [], "peft_version": version, **keys,
    }  # fmt: skip


ERAS = [
    # version, gpt-oss: is B_e A_e the transpose of (d1, d2)?, Qwen3-MoE: the same
    ("0.17.1", True, True),
    ("0.18.1", True, True),
    ("0.19.0", False, True),
    ("0.19.1", True, False),
    ("0.21.2", True, False),
]


@pytest.mark.parametrize("packing", ["rank_major", "grouped_by_expert"])
@pytest.mark.parametrize(("version", "turned", "_"), ERAS)
def test_gpt_oss_in_every_era_and_packing(tmp_path, version, turned, _, packing):
    d1, d2 = F, H  # down_proj, (E, in, out)
    tensors = factors(a=d1, b=d2) if turned else factors(a=d2, b=d1)
    given = settings("down_proj", version=version, lora_B_layout=packing)
    _, adapter = fit(tmp_path, gpt_oss_base(), GPT_OSS, tensors, given)
    found, want = dense(adapter, tmp_path / "a"), loop(tensors, packing)
    assert list(found) == [f"{EXPERTS}.down_proj[{e}]" for e in range(E)]
    for e in range(E):
        expected = want[e].T if turned else want[e]
        assert torch.allclose(found[f"{EXPERTS}.down_proj[{e}]"], expected, rtol=1e-12, atol=1e-12)


@fused_in_memory
@pytest.mark.parametrize("packing", ["rank_major", "grouped_by_expert"])
@pytest.mark.parametrize(("version", "_", "turned"), ERAS)
def test_qwen_in_every_era_and_packing(tmp_path, version, _, turned, packing):
    d1, d2 = H, F  # down_proj, (E, out, in)
    tensors = factors(a=d1, b=d2) if turned else factors(a=d2, b=d1)
    given = settings("down_proj", version=version, lora_B_layout=packing)
    _, adapter = fit(tmp_path, qwen_base(), QWEN, tensors, given)
    found, want = dense(adapter, tmp_path / "a"), loop(tensors, packing)
    assert list(found) == [f"{EXPERTS}.{e}.down_proj" for e in range(E)]
    for e in range(E):
        expected = want[e].T if turned else want[e]
        assert torch.allclose(found[f"{EXPERTS}.{e}.down_proj"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("version", "turned", "_"), ERAS)
def test_where_an_experts_weight_is_square_the_version_decides_for_gpt_oss(tmp_path, version, turned, _):
    tensors = factors(a=H, b=H)
    config = {**GPT_OSS, "intermediate_size": H}
    given = settings("down_proj", version=version)
    _, adapter = fit(tmp_path, gpt_oss_base(H), config, tensors, given)
    want = loop(tensors, "rank_major")
    for e, found in enumerate(dense(adapter, tmp_path / "a").values()):
        assert torch.allclose(found, want[e].T if turned else want[e], rtol=1e-12, atol=1e-12)


@fused_in_memory
@pytest.mark.parametrize(("version", "_", "turned"), ERAS)
def test_where_an_experts_weight_is_square_the_version_decides_for_qwen(tmp_path, version, _, turned):
    tensors = factors(a=H, b=H)
    config = {**QWEN, "moe_intermediate_size": H}
    given = settings("down_proj", version=version)
    _, adapter = fit(tmp_path, qwen_base(H), config, tensors, given)
    want = loop(tensors, "rank_major")
    for e, found in enumerate(dense(adapter, tmp_path / "a").values()):
        assert torch.allclose(found, want[e].T if turned else want[e], rtol=1e-12, atol=1e-12)


def test_a_square_weight_without_a_version_is_refused(tmp_path):
    config, base = {**GPT_OSS, "intermediate_size": H}, gpt_oss_base(H)
    message = refusal(AdapterError, fit, tmp_path, base, config, factors(H, H), settings("down_proj"))
    assert "one expert's weight is square (8 x 8)" in message
    assert "peft_version" in message
    # What is not square needs no version.
    _, adapter = fit(tmp_path, gpt_oss_base(), GPT_OSS, factors(F, H), settings("down_proj"))
    assert len(adapter.factors) == E


def test_an_adapter_that_mentions_unsloth_needs_the_packing_said(tmp_path):
    tensors, given = factors(F, H), settings("down_proj", version="0.19.1")
    fit(tmp_path, gpt_oss_base(), GPT_OSS, tensors, given)
    (tmp_path / "a" / "README.md").write_text("Trained with Unsloth.\n")
    message = refusal(AdapterError, fit, tmp_path, gpt_oss_base(), GPT_OSS, tensors, given)
    assert (
        "moe_lora_b_layout: grouped_by_expert (older Unsloth) or rank_major (PEFT, newer Unsloth)" in message
    )
    for packing in ("rank_major", "grouped_by_expert"):
        for said in (
            {"source": {"moe_lora_b_layout": packing}},
            {"settings": {**given, "lora_B_layout": packing}},
        ):
            keys = {"settings": given, **said}
            _, adapter = fit(tmp_path, gpt_oss_base(), GPT_OSS, tensors, **keys)
            found = dense(adapter, tmp_path / "a")
            for e, want in enumerate(loop(tensors, packing)):
                assert torch.allclose(found[f"{EXPERTS}.down_proj[{e}]"], want.T, rtol=1e-12, atol=1e-12)


def test_the_recipes_word_on_the_packing_comes_before_the_configs(tmp_path):
    tensors = factors(F, H)
    given = settings("down_proj", version="0.19.1", lora_B_layout="grouped_by_expert")
    source = {"moe_lora_b_layout": "rank_major"}
    _, adapter = fit(tmp_path, gpt_oss_base(), GPT_OSS, tensors, given, source=source)
    want = loop(tensors, "rank_major")[1].T
    assert torch.allclose(dense(adapter, tmp_path / "a")[f"{EXPERTS}.down_proj[1]"], want)


def test_two_parameters_of_one_module_are_told_apart_by_their_order(tmp_path):
    # gate_up_proj comes first in the module, so PEFT wraps it first: its factors are the inner ones.
    inner, outer = factors(a=H, b=2 * F, wraps=1), factors(a=F, b=H, seed=2)
    given = settings("down_proj", "gate_up_proj", version="0.19.1")
    _, adapter = fit(tmp_path, gpt_oss_base(), GPT_OSS, inner | outer, given)
    found = dense(adapter, tmp_path / "a")
    assert len(found) == 2 * E
    for e in range(E):
        gate_up, down = loop(inner, "rank_major", wraps=1)[e].T, loop(outer, "rank_major")[e].T
        assert torch.allclose(found[f"{EXPERTS}.gate_up_proj[{e}]"], gate_up, rtol=1e-12, atol=1e-12)
        assert torch.allclose(found[f"{EXPERTS}.down_proj[{e}]"], down, rtol=1e-12, atol=1e-12)


@fused_in_memory
def test_a_fused_parameter_reaches_the_matrices_that_the_disk_has(tmp_path):
    tensors = factors(a=H, b=2 * F)
    fitted, adapter = fit(tmp_path, qwen_base(), QWEN, tensors, settings("gate_up_proj", version="0.21.2"))
    found, want = dense(adapter, tmp_path / "a"), loop(tensors, "rank_major")
    for e in range(E):
        for rows, part in ((slice(0, F), "gate_proj"), (slice(F, 2 * F), "up_proj")):
            site = f"{EXPERTS}.{e}.{part}"
            assert fitted.sites[site].tensor == f"{site}.weight"
            assert torch.allclose(found[site], want[e][rows], rtol=1e-12, atol=1e-12)
    assert len(found) == 2 * E
    table = fitted.renamed["a"][f"{EXPERTS}.gate_up_proj"]
    assert sorted(table) == sorted(f"{name}.weight" for name in found)


@fused_in_memory
def test_a_turned_factor_is_cut_on_its_other_side(tmp_path):
    # PEFT up to 0.18.1: a = d1, so the halves of gate_up are columns of A.
    tensors = factors(a=2 * F, b=H)
    _, adapter = fit(tmp_path, qwen_base(), QWEN, tensors, settings("gate_up_proj", version="0.18.0"))
    found, want = dense(adapter, tmp_path / "a"), loop(tensors, "rank_major")
    for e in range(E):
        assert torch.allclose(found[f"{EXPERTS}.{e}.gate_proj"], want[e].T[:F], rtol=1e-12, atol=1e-12)
        assert torch.allclose(found[f"{EXPERTS}.{e}.up_proj"], want[e].T[F:], rtol=1e-12, atol=1e-12)


def test_sites_are_slabs_of_rows_of_the_stored_tensor(tmp_path):
    fitted, adapter = fit(
        tmp_path, gpt_oss_base(), GPT_OSS, factors(F, H), settings("down_proj", version="0.19.1")
    )
    for e in range(E):
        site = fitted.sites[f"{EXPERTS}.down_proj[{e}]"]
        assert (site.tensor, site.shape, site.start) == (f"{EXPERTS}.down_proj", (F, H), e * F)
        assert site.layout == "expert"
        assert adapter.modules[site.name] == f"{EXPERTS}.down_proj[{e}]"
        assert isinstance(adapter.factors[site.name], FactorEntry)
        assert adapter.factors[site.name].rank == R


def test_patterns_name_the_parameter_and_change_rank_and_scale(tmp_path):
    patterns = {"rank_pattern": {"experts.down_proj": R}, "alpha_pattern": {"experts.down_proj": 3}, "r": 4}
    given = {**settings("down_proj", version="0.19.1"), **patterns}
    tensors = factors(F, H)
    _, adapter = fit(tmp_path, gpt_oss_base(), GPT_OSS, tensors, given)
    found = dense(adapter, tmp_path / "a")[f"{EXPERTS}.down_proj[2]"]
    assert torch.allclose(found, loop(tensors, "rank_major")[2].T * 3 / ALPHA, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("tensors", "parameters", "kind", "words"),
    [
        (factors(F + 1, H), ["down_proj"], AdapterShapeError, ", but one expert's weight is (6, 8)"),
        (
            factors(F, H),
            ["gate_up_proj", "down_proj"],
            AdapterError,
            "1 pair(s) of factors, but target_parameters",
        ),
        (factors(F, H) | factors(H, 2 * F, 1), ["down_proj"], AdapterError, "2 pair(s) of factors"),
        (factors(F, H), ["router.weight"], AdapterError, "names 0 of its parameters"),
    ],
)
def test_factors_that_fit_no_parameter_are_refused(tmp_path, tensors, parameters, kind, words):
    given = settings(*parameters, version="0.19.1")
    assert words in refusal(kind, fit, tmp_path, gpt_oss_base(), GPT_OSS, tensors, given)


def test_a_rank_that_the_number_of_experts_denies_is_refused(tmp_path):
    given = {**settings("down_proj", version="0.19.1"), "r": R + 1}
    message = refusal(AdapterError, fit, tmp_path, gpt_oss_base(), GPT_OSS, factors(F, H), given)
    assert "are no factors of rank 3 (adapter_config.json) for 3 experts" in message


def test_wrapped_factors_without_target_parameters_are_refused(tmp_path):
    tensors = factors(H, 2 * F, 1)
    message = refusal(AdapterError, fit, tmp_path, gpt_oss_base(), GPT_OSS, tensors, {"r": R})
    assert "as PEFT saves target_parameters, but adapter_config.json names none" in message


def test_an_unknown_model_class_is_decided_by_shapes_or_not_at_all(tmp_path):
    given = settings("down_proj", "gate_up_proj", version="0.19.1")
    tensors = factors(H, 2 * F, 1) | factors(F, H)
    _, adapter = fit(tmp_path, gpt_oss_base(), UNKNOWN, tensors, given)
    want = loop(tensors, "rank_major")[0].T
    assert torch.allclose(dense(adapter, tmp_path / "a")[f"{EXPERTS}.down_proj[0]"], want)
    ambiguous = gpt_oss_base() | {f"{EXPERTS}.gate_up_proj": torch.zeros(E, F, H)}
    message = refusal(
        AdapterError, fit, tmp_path, ambiguous, UNKNOWN, factors(F, H, 1) | factors(F, H), given
    )
    assert "it cannot be proven which" in message


ROUTER = "model.layers.0.mlp.router"


@pytest.mark.parametrize(("rows", "config"), [(E, GPT_OSS), (E, UNKNOWN), (H, UNKNOWN)])
def test_a_raw_matrix_is_a_target_too_and_never_turned(tmp_path, rows, config):
    # PEFT adapts any parameter that target_parameters names; one of two axes is (out, in), square or not.
    shapes = {f"{P}{ROUTER}.lora_A.weight": (R, H), f"{P}{ROUTER}.lora_B.weight": (rows, R)}
    tensors = random(shapes)
    given = {"r": R, "lora_alpha": ALPHA, "target_parameters": ["router.weight"], "target_modules": []}
    fitted, adapter = fit(tmp_path, random({f"{ROUTER}.weight": (rows, H)}), config, tensors, given)
    B, A = (tensors[f"{P}{ROUTER}.lora_{side}.weight"].double() for side in "BA")
    ((name, delta),) = dense(adapter, tmp_path / "a").items()
    assert fitted.sites[name].tensor == f"{ROUTER}.weight"
    assert torch.allclose(delta, ALPHA / R * (B @ A), rtol=1e-12, atol=1e-12)


def test_a_fused_parameter_that_the_disk_lacks_is_refused(tmp_path):
    base = {name: tensor for name, tensor in gpt_oss_base().items() if "down_proj" not in name}
    given = settings("down_proj", version="0.19.1")
    assert "matches nothing" in refusal(AdapterError, fit, tmp_path, base, GPT_OSS, factors(F, H), given)


def test_experts_that_are_not_stored_as_floats_are_refused(tmp_path):
    base = gpt_oss_base() | {f"{EXPERTS}.down_proj": torch.zeros(E, F, H, dtype=torch.int8)}
    given = settings("down_proj", version="0.19.1")
    assert "is stored as I8" in refusal(AdapterError, fit, tmp_path, base, GPT_OSS, factors(F, H), given)


def test_experts_of_another_shape_than_their_class_has_are_refused(tmp_path):
    base = gpt_oss_base() | {f"{EXPERTS}.down_proj": torch.zeros(E, F, H + 1)}
    given = settings("down_proj", version="0.19.1")
    message = refusal(AdapterError, fit, tmp_path, base, GPT_OSS, factors(F, H), given)
    assert f"{EXPERTS}.down_proj" in message
