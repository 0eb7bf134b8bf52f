"""A merge into a quantised base is the merge into what its weights decode to, and says so."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ray_merge
from quantised_files import CASES, FP8, MXFP4, Stored, float8, four_bit, pattern, ramp
from ray_merge.errors import Refusal
from ray_merge.identity import canonical_json
from tiny import write_adapter

Q, KEEP = "model.layers.0.self_attn.q_proj", "model.norm.weight"


def fp8():
    return FP8, {f"{Q}.weight": float8(70, 50), f"{Q}.weight_scale_inv": ramp(3, 4)}


def nf4():
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return quantisation, four_bit("nf4", (70, 50), 64, nested=True, name=f"{Q}.weight")


def int8():
    weight = (pattern(70, 50).to(torch.int16) - 128).to(torch.int8)
    tensors = {f"{Q}.weight": weight, f"{Q}.SCB": (torch.arange(70) + 1) / 13}
    return {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors


def write_base(folder: Path, tensors, **config) -> Path:
    folder.mkdir(parents=True)
    save_file({**tensors, KEEP: torch.ones(50)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **config}))
    return folder


def decoded(quantisation, tensors) -> dict[str, torch.Tensor]:
    """The plain checkpoint that a quantised one stands for, in its config's dtype."""
    stored = Stored(tensors)
    found, plain = stored.find({"quantization_config": quantisation})
    assert plain == {}
    return {name: stored.whole(weight).bfloat16() for name, weight in found.items()}


def adapter(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    prefix = f"base_model.model.{Q}.lora_"
    tensors = {
        f"{prefix}A.weight": torch.randn(2, 50, generator=generator),
        f"{prefix}B.weight": torch.randn(70, 2, generator=generator),
    }
    return write_adapter(folder, tensors)


def recipe(home: Path, base: Path, output: str, **keys):
    return {
        "base_model": str(base),
        "output": str(home / output),
        "adapters": {"a": str(home / "a")},
        "merges": [{"name": "m", "merge_method": "task_arithmetic"}],
        **keys,
    }


@pytest.mark.parametrize("make", [fp8, nf4, int8])
@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_a_dequantised_base_gives_the_bytes_of_the_base_that_it_decodes_to(make, out_dtype, tmp_path):
    quantisation, tensors = make()
    adapter(tmp_path / "a")
    packed = write_base(tmp_path / "packed", tensors, quantization_config=quantisation)
    plain = write_base(tmp_path / "plain", decoded(quantisation, tensors))
    keys = {"out_dtype": out_dtype} if out_dtype else {}
    given = {
        "one": recipe(tmp_path, packed, "one", base_numerics="dequantise", **keys),
        "two": recipe(tmp_path, plain, "two", **keys),
    }
    for each in given.values():
        ray_merge.run(each, engine="local", cache_dir=tmp_path / "cache")
    one, two = (load_all(tmp_path / name / "m") for name in given)
    assert one.keys() == two.keys() == {f"{Q}.weight", KEEP}
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name])
    config = json.loads((tmp_path / "one" / "m" / "config.json").read_text())
    assert "quantization_config" not in canonical_json(config)
    assert config["dtype"] == (out_dtype or "bfloat16")
    manifest = json.loads((tmp_path / "one" / "m" / "ray_merge" / "MANIFEST.json").read_text())
    assert manifest["base_numerics"] == "dequantised"
    (checked,) = ray_merge.verify(str(tmp_path / "one"), cache_dir=tmp_path / "cache")
    assert checked.probed == 1


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_experts_of_a_fused_quantised_tensor_are_merged_one_by_one(tmp_path):
    case = CASES["mxfp4"]  # (experts, in, out) after decoding, as gpt-oss has it
    name, (experts, inputs, outputs) = case.weight, case.shape
    config = {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 1, "hidden_size": inputs,
        "intermediate_size": outputs // 2, "num_local_experts": experts, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 8,
    }  # fmt: skip
    base = write_base(tmp_path / "base", case.tensors, quantization_config=MXFP4, **config)
    generator, rank = torch.Generator().manual_seed(5), 2
    A = torch.randn(experts * rank, inputs, generator=generator)
    B = torch.randn(outputs, rank * experts, generator=generator)
    prefix = "base_model.model.model.layers.0.mlp.experts.lora_"
    write_adapter(
        tmp_path / "a", {f"{prefix}A.weight": A, f"{prefix}B.weight": B},
        target_parameters=["mlp.experts.gate_up_proj"], peft_version="0.21.2",
    )  # fmt: skip
    given = recipe(tmp_path, base, "out", base_numerics="dequantise", out_dtype="float32")
    ray_merge.run(given, engine="local", cache_dir=tmp_path / "cache")
    merged = load_all(tmp_path / "out" / "m")[name].double()
    begun = decoded(MXFP4, case.tensors)[name].double()
    for expert in range(experts):
        delta = 2 * B[:, expert::experts].double() @ A[expert * rank : (expert + 1) * rank].double()
        assert torch.allclose(merged[expert], begun[expert] + delta.T, rtol=1e-5, atol=1e-5)


def test_a_quantised_base_is_refused_unless_asked_for(tmp_path):
    quantisation, tensors = fp8()
    adapter(tmp_path / "a")
    base = write_base(tmp_path / "base", tensors, quantization_config=quantisation)
    with pytest.raises(Refusal, match="base_numerics: dequantise"):
        ray_merge.run(recipe(tmp_path, base, "out"), engine="local", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_a_scheme_that_cannot_be_decoded_is_refused_by_name(tmp_path):
    adapter(tmp_path / "a")
    base = write_base(
        tmp_path / "base", {f"{Q}.qweight": torch.ones(4, 4)}, quantization_config={"quant_method": "gptq"}
    )
    with pytest.raises(Refusal, match="gptq"):
        ray_merge.plan(recipe(tmp_path, base, "out", base_numerics="dequantise"))
