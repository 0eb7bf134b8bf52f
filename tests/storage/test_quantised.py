import json
import pickle

import pytest
import torch

from quantised_files import (
    BITSANDBYTES,
    CASES,
    FP8,
    MXFP4,
    Stored,
    compressed,
    float8,
    four_bit,
    pattern,
    ramp,
)
from ray_merge.errors import CheckpointError
from ray_merge.storage.quantised import (
    REFUSED,
    SCHEMES,
    find_quantised,
    is_metadata,
    part_ranges,
    quantisation_config,
    row_unit,
)


def refusal(quantisation, tensors, dtypes=None, **config):
    if quantisation is not None:
        config["quantization_config"] = quantisation
    with pytest.raises(CheckpointError) as caught:
        Stored(tensors, dtypes).find(config)
    message = str(caught.value)
    assert message.startswith("base: ")
    assert message.endswith("; give the unquantised base")
    return message


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_parts_of_a_weight_are_found(case):
    _, quantised = case.open()
    assert (quantised.scheme, quantised.shape) == (case.scheme, case.shape)
    assert {entry.name for entry in quantised.parts.values()} == set(case.tensors)
    assert quantised.scheme in SCHEMES


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_quantised_weight_can_be_sent_to_another_process(case):
    _, quantised = case.open()
    assert pickle.loads(pickle.dumps(quantised)) == quantised
    assert json.loads(json.dumps(quantised.settings)) == quantised.settings


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_tensor_ends_up_in_one_place_and_only_metadata_is_read(case):
    plain = {"m.bias": torch.ones(3), "norm.weight": torch.ones(2), "q_norm.scale": torch.ones(2)}
    stored = Stored({"first.weight": torch.ones(2, 2), **case.tensors, **plain})
    asked = []

    def read(entry):
        asked.append(entry.name)
        return stored.read(entry)

    found, rest = find_quantised({"quantization_config": case.quantisation}, stored.entries, "base", read)
    assert list(found) == [case.weight]
    assert list(rest) == ["first.weight", *plain]
    assert sorted(asked) == sorted(name for name in stored.entries if is_metadata(name))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_whole_weight_needs_all_bytes_of_its_values(case):
    _, quantised = case.open()
    ranges = part_ranges(quantised, 0, quantised.n_rows)
    assert set(quantised.parts) - set(ranges) <= {"quant_state", "weight_format"}
    for role, span in ranges.items():
        assert span == (quantised.parts[role].start, quantised.parts[role].end)


def test_one_row_needs_its_own_bytes_only():
    def sizes(name, start, stop):
        _, quantised = CASES[name].open()
        return {role: end - begin for role, (begin, end) in part_ranges(quantised, start, stop).items()}

    assert sizes("fp8 cut blocks", 31, 32) == {"weight": 50, "scale": 4 * 4}
    assert sizes("fp8 cut blocks", 31, 33) == {"weight": 100, "scale": 2 * 4 * 4}
    assert sizes("fp8 stack", 39, 41) == {"weight": 100, "scale": 2 * 4 * 4}
    assert sizes("nf4", 3, 4) == {"weight": 32, "absmax": 4, "quant_map": 64}
    assert sizes("nf4 many nested", 15, 17) == {
        "weight": 512, "absmax": 32, "quant_map": 64, "nested_absmax": 8, "nested_quant_map": 1024,
    }  # fmt: skip
    assert sizes("mxfp4", 64, 128) == {"blocks": 6 * 2 * 16, "scales": 6 * 2}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_decode_one_by_one_but_for_experts(case):
    _, quantised = case.open()
    assert row_unit(quantised) == (case.shape[-2] if case.scheme == "mxfp4" else 1)


@pytest.mark.parametrize(("start", "stop"), [(0, 65), (5, 64), (64, 64), (128, 64), (-64, 64), (0, 256)])
def test_rows_that_cannot_be_decoded_alone_are_our_own_mistake(start, stop):
    _, quantised = CASES["mxfp4"].open()
    with pytest.raises(AssertionError):
        part_ranges(quantised, start, stop)


def test_a_plain_checkpoint_stays_as_it_is():
    tensors = {
        "a.weight": torch.ones(2, 3),
        "attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "k_scale": torch.ones(1),
        "attn.k_scale": torch.ones(1),
    }
    stored = Stored(tensors)
    assert find_quantised({}, stored.entries, "base", stored.read) == ({}, stored.entries)


def test_the_config_of_a_text_model_inside_another_counts():
    assert quantisation_config({"text_config": {"quantization_config": FP8}}) == FP8
    assert quantisation_config({"quantization_config": MXFP4, "text_config": {}}) == MXFP4
    assert quantisation_config({"quantization_config": {}, "text_config": 3}) is None
    stored = Stored(CASES["fp8 blocks"].tensors)
    found, _ = stored.find({"text_config": {"quantization_config": FP8}})
    assert list(found) == ["m.weight"]


@pytest.mark.parametrize("old", [{"load_in_4bit": True}, {"load_in_8bit": True, "quant_method": None}])
def test_bitsandbytes_is_known_from_before_it_had_a_name(old):
    name = "nf4" if "load_in_4bit" in old else "int8"
    found, _ = Stored(CASES[name].tensors).find({"quantization_config": old})
    assert found["m.weight"].scheme == CASES[name].scheme


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_other_methods_are_refused_by_name_with_the_reason(method):
    message = refusal({"quant_method": method, "bits": 4}, {"m.weight": torch.ones(2, 2)})
    assert f"quant_method {method!r} cannot be dequantised: {REFUSED[method]}" in message


def test_every_method_of_transformers_is_read_or_refused_by_name():
    auto = pytest.importorskip("transformers.quantizers.auto")
    known = {name.partition("_4bit")[0].partition("_8bit")[0] for name in auto.AUTO_QUANTIZER_MAPPING}
    assert known - set(REFUSED) == {"fp8", "compressed-tensors", "mxfp4", "bitsandbytes"}


@pytest.mark.parametrize(
    ("quantisation", "words"),
    [
        ({"quant_method": "new"}, "quant_method 'new' cannot be dequantised: it is not known"),
        ({"bits": 4}, "quant_method None cannot be dequantised"),
        ({"quant_method": ["fp8"]}, r"quant_method ['fp8'] cannot be dequantised"),
        (["fp8"], "quantization_config is ['fp8'], not an object"),
        ("fp8", "quantization_config is 'fp8', not an object"),
        (FP8, "config.json says quant_method fp8, but no tensor is quantised that way"),
        (MXFP4, "config.json says quant_method mxfp4, but no tensor is quantised that way"),
        (FP8 | {"weight_block_size": [32]}, "weight_block_size is [32], not two whole numbers above 0"),
        (FP8 | {"weight_block_size": [32, 0]}, "weight_block_size is [32, 0]"),
        (FP8 | {"weight_block_size": [32, 16.0]}, "weight_block_size is [32, 16.0]"),
        (FP8 | {"weight_block_size": 32}, "weight_block_size is 32"),
        (compressed("channel", num_bits=4), "group 'group_0' stores its weights as float-quantized, 4-bit float"),
        (compressed("channel", type="int"), "as float-quantized, 8-bit int; read are 8-bit floats in"),
        (compressed("channel") | {"format": "pack-quantized"}, "as pack-quantized, 8-bit float"),
        (compressed("channel") | {"config_groups": {"g": {"weights": None}}}, "None-bit None"),
        (compressed("channel") | {"config_groups": {"FP8": ["Linear"]}}, "group 'FP8' stores its weights as"),
        (compressed("channel") | {"config_groups": {}}, "compressed-tensors has no config_groups"),
        (compressed("channel") | {"config_groups": 3}, "compressed-tensors has no config_groups"),
        (compressed("block", block_structure="128"), "block_structure of group 'group_0' is '128'"),
        (
            compressed("channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity format 'sparse-24-bitmask' is not read",
        ),
        (
            compressed("channel") | {"transform_config": {"config_groups": {"u": {}}}},
            "transform_config stores its weights rotated",
        ),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_read_are_refused(quantisation, words):
    assert words in refusal(quantisation, {"m.weight": torch.ones(2, 2)})


def test_the_sizes_of_a_block_may_be_text():
    tensors = {"m.weight": float8(20, 40), "m.weight_scale": ramp(3, 3)}
    quantisation = compressed("block", block_structure="8x16") | {"sparsity_config": {"format": "dense"}}
    found, _ = Stored(tensors).find({"quantization_config": quantisation})
    assert found["m.weight"].settings["block"] == [8, 16]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"m.weight": float8(64, 48)},
            "m.weight is quantised, but m.weight_scale_inv or m.weight_scale is missing",
        ),
        (
            {"m.weight": float8(64, 48), "m.scale": ramp(2, 3)},
            "m.weight_scale_inv or m.weight_scale is missing",
        ),
        (
            {"m.weight": float8(4, 4), "m.weight_scale": ramp(1), "m.weight_scale_inv": ramp(1)},
            "m.weight has both m.weight_scale_inv and m.weight_scale",
        ),
        (
            {"m.weight": float8(64, 48), "m.weight_scale_inv": ramp(3, 3)},
            "m.weight_scale_inv is (3, 3); m.weight (64, 48) takes one scale, one a row, or one a block of 32x16",
        ),
        ({"m.weight": float8(64, 48), "m.weight_scale_inv": ramp(3, 2)}, "m.weight_scale_inv is (3, 2)"),
        ({"m.weight": float8(64, 48), "m.weight_scale_inv": ramp(64)}, "m.weight_scale_inv is (64,)"),
        (
            {"m.weight": float8(64, 48), "m.weight_scale_inv": ramp(1, 2, 3)},
            "m.weight_scale_inv is (1, 2, 3)",
        ),
        ({"up": float8(2, 64, 48), "up_scale_inv": ramp(2, 3)}, "up_scale_inv is (2, 3)"),
        ({"up": float8(2, 64, 48), "up_scale_inv": ramp(1)}, "up_scale_inv is (1,)"),
        ({"m.weight": float8(64), "m.weight_scale_inv": ramp(1)}, "(F8_E4M3, (64,)) is not a matrix"),
        ({"m.weight": float8(0, 48), "m.weight_scale_inv": ramp(1)}, "(F8_E4M3, (0, 48)) is not a matrix"),
        (
            {"m.weight": float8(64, 48), "m.weight_scale_inv": ramp(2, 3).double()},
            "m.weight_scale_inv is F64, not one of F32, F16, BF16, U8, F8_E8M0",
        ),
        (
            {"m.weight": torch.ones(64, 48), "m.weight_scale_inv": ramp(2, 3)},
            "m.weight_scale_inv (F32, (2, 3)) looks like a part",
        ),
        (
            {"m.weight": pattern(64, 24).view(torch.int8), "m.weight_scale_inv": ramp(64, 2)},
            "m.weight (I8, (64, 24)) looks like a part",
        ),
    ],
)
def test_fp8_weights_that_do_not_fit_are_refused(tensors, words):
    assert words in refusal(FP8, tensors)


def test_without_blocks_in_the_config_only_one_scale_or_one_a_row_fits():
    tensors = {"m.weight": float8(20, 40), "m.weight_scale": ramp(3, 3)}
    message = refusal(compressed("block"), tensors)
    assert "m.weight_scale is (3, 3); m.weight (20, 40) takes one scale, one a row;" in message


def test_compressed_scales_are_floats():
    tensors = {"m.weight": float8(20, 40), "m.weight_scale": pattern(20, 1)}
    assert "m.weight_scale is U8, not one of F32, F16, BF16" in refusal(compressed("channel"), tensors)


def test_scales_of_inputs_go_with_their_weight():
    tensors = {
        "m.weight": float8(4, 4),
        "m.weight_scale": ramp(1),
        "m.input_scale": ramp(1),
        "up": float8(2, 4, 4),
        "up_scale_inv": ramp(2, 1, 1),
        "up_activation_scale": ramp(2),
    }
    found, rest = Stored(tensors).find({"quantization_config": FP8})
    assert rest == {}
    assert set(found["m.weight"].parts) == {"weight", "scale", "input_scale"}
    assert set(found["up"].parts) == {"weight", "scale", "activation_scale"}
    assert set(part_ranges(found["m.weight"], 0, 4)) == {"weight", "scale"}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a.weight", float8(2, 2)),
        ("a.weight", pattern(2, 2)),
        ("a.weight", pattern(2, 2).view(torch.int8)),
        ("a.weight_scale", ramp(1)),
        ("a.input_scale", ramp(1)),
        ("a.weight_zero_point", ramp(1)),
        ("a.weight_packed", torch.ones(2, 2, dtype=torch.int32)),
        ("a.qweight", torch.ones(2, 2, dtype=torch.int32)),
        ("a.weight.absmax", ramp(1)),
        ("a.weight.quant_state.bitsandbytes__nf4", pattern(3)),
        ("a.SCB", ramp(1)),
        ("e.gate_up_proj_blocks", pattern(1, 2, 1, 16)),
        ("e.gate_up_proj_scales", pattern(1, 2, 1)),
    ],
)
@pytest.mark.parametrize("quantisation", [None, MXFP4])
def test_what_looks_quantised_and_belongs_to_nothing_is_refused(quantisation, name, tensor):
    tensors = dict(CASES["mxfp4"].tensors) if quantisation else {"m.weight": torch.ones(2, 2)}
    message = refusal(quantisation, tensors | {name: tensor})
    assert name.removesuffix("_blocks").removesuffix("_scales") in message


@pytest.mark.parametrize("name", ["self_attn.k_scale", "self_attn.v_scale", "k_proj.output_scale"])
def test_scales_of_a_quantised_cache_are_refused(name):
    assert name in refusal(FP8, {**CASES["fp8 blocks"].tensors, name: ramp(1)})


def test_a_weight_of_another_kind_beside_known_ones_is_refused():
    message = refusal(MXFP4, {**CASES["mxfp4"].tensors, "other_blocks": pattern(1, 2, 1, 16)})
    assert "other_blocks (U8, (1, 2, 1, 16)) looks like a part" in message


def test_a_weight_that_is_there_twice_is_refused():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert f"{name} is there both quantised and plain" in refusal(
        MXFP4, {**CASES["mxfp4"].tensors, name: torch.ones(2)}
    )


@pytest.mark.parametrize(
    ("blocks", "scales", "words"),
    [
        (pattern(3, 6, 2, 16), None, "down_proj is quantised, but down_proj_scales is missing"),
        (pattern(3, 6, 2, 16), pattern(3, 6, 3), "(U8, (3, 6, 3)) are not U8 of shapes"),
        (pattern(3, 6, 2, 8), pattern(3, 6, 2), "down_proj_blocks (U8, (3, 6, 2, 8))"),
        (pattern(6, 2, 16), pattern(6, 2), "down_proj_blocks (U8, (6, 2, 16))"),
        (pattern(0, 6, 2, 16), pattern(0, 6, 2), "down_proj_blocks (U8, (0, 6, 2, 16))"),
        (pattern(3, 6, 2, 16), ramp(3, 6, 2), "down_proj_scales (F32, (3, 6, 2))"),
    ],
)
def test_mxfp4_weights_that_do_not_fit_are_refused(blocks, scales, words):
    tensors = {"down_proj_blocks": blocks} | ({} if scales is None else {"down_proj_scales": scales})
    assert words in refusal(MXFP4, tensors)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(four_bit("nf4", (4, 64), 64), "m.weight"), "m.weight is quantised, but m.weight is missing"),
        (without(four_bit("nf4", (4, 64), 64), "m.weight.absmax"), "but m.weight.absmax is missing"),
        (without(four_bit("nf4", (4, 64), 64), "m.weight.quant_map"), "but m.weight.quant_map is missing"),
        (
            without(four_bit("nf4", (4, 64), 64), "m.weight.quant_state.bitsandbytes__nf4"),
            "looks like a part of a quantised weight",
        ),
        (
            without(four_bit("nf4", (4, 64), 64, nested=True), "m.weight.nested_absmax"),
            "m.weight.nested_absmax is missing, where m.weight (4, 64) needs 1 F32",
        ),
        (
            without(four_bit("nf4", (4, 64), 64, nested=True), "m.weight.nested_quant_map"),
            "m.weight.nested_quant_map is missing",
        ),
        (
            without(
                four_bit("nf4", (4, 64), 64, nested=True), "m.weight.nested_absmax", "m.weight.nested_quant_map"
            ),
            "m.weight.absmax is U8 (4,), where m.weight (4, 64) needs 4 F32",
        ),
        (four_bit("nf4", (4, 64), 64, shape=[4, 96]), "is F32 (4,), where m.weight (4, 96) needs 6 F32"),
        (
            four_bit("nf4", (4, 64), 64, shape=[4, 62]),
            "m.weight is 128 bytes long, but its quant_state has the shape [4, 62]",
        ),
        (four_bit("nf4", (4, 64), 64, shape=None), "holds shape None, not a list of whole numbers above 0"),
        (four_bit("nf4", (4, 64), 64, shape=[]), "holds shape []"),
        (four_bit("nf4", (4, 64), 64, shape=[4, -64]), "holds shape [4, -64]"),
        (four_bit("nf4", (4, 64), 64, shape=[4.0, 64]), "holds shape [4.0, 64]"),
        (four_bit("nf4", (4, 64), 64, blocksize=48), "holds blocksize 48, not one of (32, 64,"),
        (four_bit("nf4", (4, 64), 64, blocksize="64"), "holds blocksize '64'"),
        (four_bit("nf4", (4, 64), 64, quant_type="fp4"), "holds quant_type 'fp4', not nf4 or fp4"),
        (
            four_bit("nf4", (4, 64), 64, nested=True, nested_blocksize=0),
            "holds nested_blocksize 0 and nested_offset 0.875",
        ),
        (
            four_bit("nf4", (4, 64), 64, nested=True, nested_offset=None),
            "holds nested_blocksize 256 and nested_offset None",
        ),
        (
            four_bit("nf4", (4, 64), 64) | {"m.weight.quant_map": torch.ones(8)},
            "m.weight.quant_map is F32 (8,), where m.weight (4, 64) needs 16 F32",
        ),
    ],
)  # fmt: skip
def test_4_bit_weights_that_do_not_fit_are_refused(tensors, words):
    assert words in refusal(BITSANDBYTES, tensors)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\xfd", "is not valid JSON"),
        (b"[" * 60_000, "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b" " * 70_000, "is 70000 bytes long, too large for metadata"),
    ],
)
def test_a_quant_state_that_cannot_be_read_is_refused(content, words):
    state = "m.weight.quant_state.bitsandbytes__nf4"
    tensors = four_bit("nf4", (4, 64), 64) | {state: torch.frombuffer(bytearray(content), dtype=torch.uint8)}
    assert f"{state} {words}" in refusal(BITSANDBYTES, tensors)


def test_other_4_bit_kinds_are_refused():
    tensors = four_bit("nf4", (4, 64), 64, quant_type="int4")
    state = tensors.pop("m.weight.quant_state.bitsandbytes__nf4")
    message = refusal(BITSANDBYTES, tensors | {"m.weight.quant_state.bitsandbytes__int4": state})
    assert "m.weight.quant_state.bitsandbytes__int4 holds quant_type 'int4', not nf4 or fp4" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"m.weight": None}, "m.weight is quantised, but m.weight is missing"),
        ({"m.SCB": None}, "looks like a part of a quantised weight"),
        ({"m.SCB": ramp(23)}, "m.SCB (F32, (23,)) are not an I8 matrix and one F32 a row"),
        ({"m.SCB": ramp(24).half()}, "m.SCB (F16, (24,))"),
        ({"m.weight": torch.ones(24, 40)}, "m.weight (F32, (24, 40))"),
        ({"m.weight": pattern(24).view(torch.int8)}, "m.weight (I8, (24,))"),
        ({"m.weight_format": torch.tensor(2, dtype=torch.uint8)}, "m.weight_format is not 0: m.weight is tiled"),
        ({"m.weight_format": torch.zeros(70_000, dtype=torch.uint8)}, "m.weight_format is not 0"),
    ],
)  # fmt: skip
def test_8_bit_weights_that_do_not_fit_are_refused(change, words):
    tensors = {**CASES["int8"].tensors, **change}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    assert words in refusal(BITSANDBYTES, present)


def test_both_widths_of_bitsandbytes_in_one_checkpoint_are_read():
    tensors = {**CASES["int8"].tensors, **four_bit("nf4", (4, 64), 64, name="n.weight")}
    found, rest = Stored(tensors).find({"quantization_config": BITSANDBYTES})
    assert (sorted(found), rest) == (["m.weight", "n.weight"], {})


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_weights_that_bitsandbytes_stores_transposed_are_refused(model_type):
    message = refusal(BITSANDBYTES, CASES["nf4"].tensors, model_type=model_type)
    assert f"bitsandbytes stores weights of a {model_type} transposed" in message
