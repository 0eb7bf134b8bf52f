import math

import pytest
import torch
from fit_cases import GPT2, LLAMA, UNKNOWN, P, dense, fit, pair, random, refusal

from ray_merge.errors import AdapterError, AdapterShapeError
from tiny import Q0, V1, factors, llama_tensors

M = "encoder.layer"
SCALE = 4 / 2  # lora_alpha over r of tiny.write_adapter


def stored(tensors, module, side):
    return tensors[f"{P}{module}.lora_{side}"].double()


def one(folder, shape, tensors, settings=None, config=None, **keys):
    """The only site of an adapter of one layer whose weight has that shape."""
    base = random({f"{M}.weight": shape, "head.weight": (3, 3)})
    fitted, adapter = fit(folder, base, config or UNKNOWN, tensors, settings, **keys)
    ((name, delta),) = dense(adapter, folder / "a").items()
    return fitted.sites[name], adapter.factors[name], delta


def test_a_linear_layer(tmp_path):
    tensors = pair(M, 2, outputs=5, inputs=7)
    site, _, delta = one(tmp_path, (5, 7), tensors)
    assert (site.name, site.tensor, site.shape, site.start, site.layout) == (
        M,
        f"{M}.weight",
        (5, 7),
        0,
        "linear",
    )
    assert torch.equal(delta, SCALE * (stored(tensors, M, "B.weight") @ stored(tensors, M, "A.weight")))


@pytest.mark.parametrize("flag", [True, False])
def test_a_conv1d_layer_of_other_sides_is_known_by_its_shape(tmp_path, flag):
    tensors = pair(M, 2, outputs=5, inputs=7)
    site, _, delta = one(tmp_path, (7, 5), tensors, {"fan_in_fan_out": flag})
    assert (site.shape, site.layout) == ((7, 5), "conv1d")
    product = stored(tensors, M, "B.weight") @ stored(tensors, M, "A.weight")
    assert torch.allclose(delta, SCALE * product.T, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("flag", "layout"), [(True, "conv1d"), (False, "linear")])
def test_a_square_layer_of_an_unknown_class_is_what_the_config_says(tmp_path, flag, layout):
    tensors = pair(M, 2, outputs=6, inputs=6)
    site, _, delta = one(tmp_path, (6, 6), tensors, {"fan_in_fan_out": flag})
    assert site.layout == layout
    product = stored(tensors, M, "B.weight") @ stored(tensors, M, "A.weight")
    assert torch.allclose(delta, SCALE * (product.T if flag else product), rtol=1e-14, atol=0)


@pytest.mark.parametrize("flag", [True, False])
def test_the_class_decides_a_square_layer_before_the_config(tmp_path, flag):
    # GPT-2 stores c_proj as (in, out); PEFT overrides the flag by the type of the module, both ways.
    module = "transformer.h.0.attn.c_proj"
    tensors = pair(module, 2, outputs=8, inputs=8)
    base = random({f"{module}.weight": (8, 8), "transformer.wte.weight": (16, 8)})
    fitted, adapter = fit(tmp_path, base, GPT2, tensors, {"fan_in_fan_out": flag})
    assert fitted.sites[module].layout == "conv1d"
    product = stored(tensors, module, "B.weight") @ stored(tensors, module, "A.weight")
    assert torch.allclose(dense(adapter, tmp_path / "a")[module], SCALE * product.T, rtol=1e-14, atol=0)


def test_a_flag_that_no_layer_answers_to_is_refused(tmp_path):
    tensors = factors(Q0)
    message = refusal(AdapterError, fit, tmp_path, llama_tensors(), LLAMA, tensors, {"fan_in_fan_out": True})
    assert "fan_in_fan_out: true, but no adapted layer" in message
    assert "HF Conv1D" in message


def test_an_embedding_is_the_transpose_of_its_factors(tmp_path):
    tensors = random({f"{P}{M}.lora_embedding_A": (2, 9), f"{P}{M}.lora_embedding_B": (4, 2)})
    site, _, delta = one(tmp_path, (9, 4), tensors)
    assert (site.shape, site.layout) == ((9, 4), "embedding")
    product = stored(tensors, M, "embedding_B") @ stored(tensors, M, "embedding_A")
    assert torch.allclose(delta, SCALE * product.T, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (2, 3, 2)])
def test_a_convolution_of_any_dimension(tmp_path, kernel):
    ones = (1,) * len(kernel)
    tensors = random({f"{P}{M}.lora_A.weight": (2, 4, *kernel), f"{P}{M}.lora_B.weight": (5, 2, *ones)})
    site, _, delta = one(tmp_path, (5, 4, *kernel), tensors)
    assert (site.shape, site.layout) == ((5, 4 * math.prod(kernel)), "conv")
    A, B = (stored(tensors, M, f"{side}.weight") for side in "AB")
    want = torch.zeros(5, 4, *kernel, dtype=torch.float64)
    for out in range(5):
        for rank in range(2):
            want[out] += SCALE * B[out, rank].reshape(()) * A[rank]
    assert torch.allclose(delta.reshape(want.shape), want, rtol=1e-14, atol=1e-14)


def test_a_convolution_of_one_point_is_no_matrix(tmp_path):
    tensors = random({f"{P}{M}.lora_A.weight": (2, 4, 1), f"{P}{M}.lora_B.weight": (5, 2, 1)})
    site, _, delta = one(tmp_path, (5, 4, 1), tensors)
    assert site.layout == "conv"
    assert delta.shape == (5, 4)


@pytest.mark.parametrize(
    ("shape", "A", "B"),
    [
        ((6, 2, 3), (2, 4, 3), (6, 2, 1)),  # a group sees 2 of 4 inputs
        ((6, 4, 3), (4, 4, 3), (6, 2, 1)),  # a group sees 2 of 4 ranks
    ],
)
def test_a_grouped_convolution_is_refused(tmp_path, shape, A, B):
    tensors = random({f"{P}{M}.lora_A.weight": A, f"{P}{M}.lora_B.weight": B})
    message = refusal(AdapterError, one, tmp_path, shape, tensors, {"r": A[0]})
    assert "is a grouped convolution, whose LoRA has no exact delta" in message


def test_another_kernel_is_refused(tmp_path):
    tensors = random({f"{P}{M}.lora_A.weight": (2, 4, 5), f"{P}{M}.lora_B.weight": (5, 2, 1)})
    assert ", but the kernel of the base is (3,)" in refusal(
        AdapterShapeError, one, tmp_path, (5, 4, 3), tensors
    )


def test_multihead_attention_has_two_weights_and_adds_out_proj_twice(tmp_path):
    tensors = pair("attn", 2, outputs=24, inputs=8) | pair("attn.base_layer.out_proj", 2, 8, 8, seed=1)
    base = random(
        {"attn.in_proj_weight": (24, 8), "attn.out_proj.weight": (8, 8), "attn.in_proj_bias": (24,)}
    )
    settings = {"alpha_pattern": {"attn": 6}}
    fitted, adapter = fit(tmp_path, base, UNKNOWN, tensors, settings)
    found = dense(adapter, tmp_path / "a")
    assert fitted.sites["attn.in_proj_weight"].layout == "mha"
    in_proj = stored(tensors, "attn", "B.weight") @ stored(tensors, "attn", "A.weight")
    out_proj = [stored(tensors, "attn.base_layer.out_proj", f"{side}.weight") for side in "BA"]
    assert torch.allclose(found["attn.in_proj_weight"], 3 * in_proj, rtol=1e-14, atol=0)
    assert torch.allclose(found["attn.out_proj"], 2 * 3 * (out_proj[0] @ out_proj[1]), rtol=1e-14, atol=0)


def test_an_out_proj_of_its_own_is_a_linear_layer(tmp_path):
    tensors = pair("attn.out_proj", 2, 8, 8)
    base = random({"attn.out_proj.weight": (8, 8)})
    _, adapter = fit(tmp_path, base, UNKNOWN, tensors)
    product = stored(tensors, "attn.out_proj", "B.weight") @ stored(tensors, "attn.out_proj", "A.weight")
    assert torch.equal(dense(adapter, tmp_path / "a")["attn.out_proj"], SCALE * product)


@pytest.mark.parametrize("side", ["A", "B"])
def test_bdlora_stores_the_blocks_of_one_side_without_their_zeros(tmp_path, side):
    blocks, rank, outputs, inputs = 2, 4, 6, 8
    shapes = {"A": (rank, inputs), "B": (outputs, rank)}
    shapes[side] = (shapes[side][0], shapes[side][1] // blocks)
    tensors = random({f"{P}{M}.lora_{key}.weight": shape for key, shape in shapes.items()})
    settings = {"r": rank, "use_bdlora": {"nblocks": blocks}}
    _, _, delta = one(tmp_path, (outputs, inputs), tensors, settings)
    sides = {key: stored(tensors, M, f"{key}.weight") for key in "AB"}
    full = torch.zeros((rank, inputs) if side == "A" else (outputs, rank), dtype=torch.float64)
    rows, columns = full.shape[0] // blocks, full.shape[1] // blocks
    for block in range(blocks):
        for row in range(rows):
            for column in range(columns):
                at = (block * rows + row, block * columns + column)
                full[at] = sides[side][block * rows + row, column]
    sides[side] = full
    assert torch.allclose(delta, 4 / rank * (sides["B"] @ sides["A"]), rtol=1e-14, atol=1e-14)


def test_bdlora_leaves_a_module_that_it_did_not_cut_alone(tmp_path):
    tensors = pair(M, 2, 6, 8)
    _, _, delta = one(tmp_path, (6, 8), tensors, {"use_bdlora": {"nblocks": 2}})
    assert torch.equal(delta, SCALE * (stored(tensors, M, "B.weight") @ stored(tensors, M, "A.weight")))


def test_blocks_that_do_not_divide_the_rows_are_refused(tmp_path):
    tensors = random({f"{P}{M}.lora_A.weight": (3, 4), f"{P}{M}.lora_B.weight": (6, 3)})
    settings = {"r": 3, "use_bdlora": {"nblocks": 2}}
    assert "cannot be cut into the 2 blocks" in refusal(
        AdapterError, one, tmp_path, (6, 8), tensors, settings
    )


def test_a_bias_on_b_is_added_to_the_layers_bias_with_the_scale(tmp_path):
    tensors = pair(M, 2, 5, 7) | random({f"{P}{M}.lora_B.bias": (5,)}, seed=3)
    base = random({f"{M}.weight": (5, 7), f"{M}.bias": (5,)})
    fitted, adapter = fit(tmp_path, base, UNKNOWN, tensors, {"lora_bias": True})
    found = dense(adapter, tmp_path / "a")
    assert list(found) == [M, f"{M}.bias"]
    assert fitted.sites[f"{M}.bias"].layout == "raw"
    assert torch.equal(found[f"{M}.bias"], SCALE * stored(tensors, M, "B.bias")[:, None])
    assert adapter.modules[f"{M}.bias"] == f"{M}.bias"


@pytest.mark.parametrize(
    ("bias", "kind", "words"),
    [
        ({}, AdapterError, "has no bias to add it to"),
        ({f"{M}.bias": (6,)}, AdapterShapeError, "the bias is (6,)"),
    ],
)
def test_a_bias_on_b_needs_a_bias_of_its_length(tmp_path, bias, kind, words):
    tensors = pair(M, 2, 5, 7) | random({f"{P}{M}.lora_B.bias": (5,)})
    base = random({f"{M}.weight": (5, 7), **bias})
    assert words in refusal(kind, fit, tmp_path, base, UNKNOWN, tensors, {"lora_bias": True})


def test_rank_and_scale_of_every_module(tmp_path):
    tensors = factors(Q0) | factors(V1, rank=4)
    patterns = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 2}}
    _, adapter = fit(tmp_path, llama_tensors(), LLAMA, tensors, patterns)
    assert list(adapter.factors) == [Q0, V1]
    assert [update.rank for update in adapter.factors.values()] == [2, 4]
    assert [update.products[0].scale for update in adapter.factors.values()] == [2.0, 0.5]


def test_rslora_is_scaled_by_the_root_of_each_rank(tmp_path):
    tensors = factors(Q0) | factors(V1, rank=4)
    settings = {"use_rslora": True, "rank_pattern": {"v_proj": 4}}
    _, adapter = fit(tmp_path, llama_tensors(), LLAMA, tensors, settings)
    assert adapter.factors[Q0].products[0].scale == 4 / math.sqrt(2)
    assert adapter.factors[V1].products[0].scale == 4 / 2


def test_sides_of_different_rank_are_refused(tmp_path):
    tensors = factors(Q0) | {f"{P}{Q0}.lora_B.weight": torch.ones(8, 3)}
    message = refusal(AdapterError, fit, tmp_path, llama_tensors(), LLAMA, tensors)
    assert "lora_A has rank 2 but lora_B has rank 3" in message
    assert Q0 in message


def test_a_rank_that_the_config_does_not_claim_is_refused(tmp_path):
    message = refusal(AdapterError, fit, tmp_path, llama_tensors(), LLAMA, factors(Q0, rank=4))
    assert "the factors have rank 4 but adapter_config.json says 2" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_adapted_module_is_refused(tmp_path, field):
    message = refusal(
        AdapterError, fit, tmp_path, llama_tensors(), LLAMA, factors(Q0), {field: {"k_proj": 2}}
    )
    assert f"{field} 'k_proj' matches none of the 1 adapted modules" in message


def test_factors_that_do_not_fit_name_site_shapes_and_both_files(tmp_path):
    message = refusal(AdapterShapeError, fit, tmp_path, llama_tensors(), LLAMA, factors(Q0, columns=9))
    assert message == (
        f"{Q0}: lora_A is (2, 9) in adapter a: {tmp_path}/a/adapter_model.safetensors, but {Q0}.weight has 8 inputs "
        f"({tmp_path}/base); the adapter was trained on another base model"
    )
    message = refusal(AdapterShapeError, fit, tmp_path, llama_tensors(), LLAMA, factors(Q0, rows=7))
    assert "lora_B is (7, 2) in adapter a: " in message
    assert f"but {Q0}.weight has 8 outputs" in message


def test_factors_of_a_convolution_at_a_linear_layer_are_refused(tmp_path):
    tensors = random({f"{P}{Q0}.lora_A.weight": (2, 8, 3, 3), f"{P}{Q0}.lora_B.weight": (8, 2, 1, 1)})
    message = refusal(AdapterError, fit, tmp_path, llama_tensors(), LLAMA, tensors)
    assert "has 4 dimensions (2, 8, 3, 3), expected 2" in message


def test_a_weight_that_is_no_matrix_is_refused(tmp_path):
    message = refusal(AdapterError, fit, tmp_path, llama_tensors(), LLAMA, factors("model.norm"))
    assert "base weight model.norm.weight has shape (8,); LoRA needs a matrix or a convolution" in message


def test_a_weight_that_is_not_stored_as_floats_is_refused(tmp_path):
    base = llama_tensors() | {f"{Q0}.weight": torch.zeros(8, 8, dtype=torch.int8)}
    message = refusal(AdapterError, fit, tmp_path, base, LLAMA, factors(Q0))
    assert "is stored as I8, not as floats" in message


def dora(module, values, *shape):
    return {f"{P}{module}.lora_magnitude_vector": torch.arange(1.0, values + 1).reshape(shape or (values,))}


@pytest.mark.parametrize(
    ("shape", "tensors", "magnitude", "view"),
    [
        ((5, 7), pair(M, 2, 5, 7), dora(M, 5), (5, 1)),
        (
            (7, 5),
            pair(M, 2, 5, 7),
            dora(M, 5),
            (1, 5),
        ),  # HF Conv1D: the norm is of outputs, which are columns
        (
            (9, 4),
            random({f"{P}{M}.lora_embedding_A": (2, 9), f"{P}{M}.lora_embedding_B": (4, 2)}),
            dora(M, 4),
            (1, 4),
        ),
        (
            (5, 4, 3),
            random({f"{P}{M}.lora_A.weight": (2, 4, 3), f"{P}{M}.lora_B.weight": (5, 2, 1)}),
            dora(M, 5, 1, 5, 1),
            (5, 1),
        ),
    ],
    ids=["linear", "conv1d", "embedding", "conv"],
)
def test_a_dora_magnitude_is_of_rows_or_of_columns(tmp_path, shape, tensors, magnitude, view):
    _, update, _ = one(tmp_path, shape, tensors | magnitude, {"use_dora": True})
    assert update.magnitude.matrix == view
    values = update.magnitude.entry.n_bytes // 4
    message = refusal(AdapterError, one, tmp_path, shape, tensors | dora(M, values + 1), {"use_dora": True})
    assert f"expected {values} values" in message


def test_one_tensor_may_not_be_two_modules_of_an_adapter(tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    tensors = factors(Q0) | factors(Q0.removeprefix("model."))
    message = refusal(AdapterError, fit, tmp_path, bare, UNKNOWN, tensors)
    assert "both change" in message
    assert "saved from two models" in message


INITIAL = {"init_lora_weights": "pissa"}


def test_the_factors_that_training_started_from_are_taken_away(tmp_path):
    trained, before = pair(M, 2, 5, 7, seed=1), pair(M, 2, 5, 7, seed=2)
    _write_initial(tmp_path, before)
    site, update, delta = one(
        tmp_path, (5, 7), trained, INITIAL, source={"initial": str(tmp_path / "initial")}
    )
    products = [stored(x, M, "B.weight") @ stored(x, M, "A.weight") for x in (trained, before)]
    assert torch.allclose(delta, SCALE * (products[0] - products[1]), rtol=1e-13, atol=1e-13)
    assert (update.rank, update.initial, site.name) == (4, 1, M)


def _write_initial(tmp_path, tensors, **config):
    from tiny import write_adapter

    return write_adapter(tmp_path / "initial", tensors, **{**INITIAL, **config})


def test_a_changed_base_without_the_initial_adapter_is_refused(tmp_path):
    message = refusal(AdapterError, one, tmp_path, (5, 7), pair(M, 2, 5, 7), INITIAL)
    assert "init_lora_weights is 'pissa', which trains against a changed base" in message
    assert "initial: URL" in message


def test_an_initial_adapter_that_is_not_needed_is_refused(tmp_path):
    _write_initial(tmp_path, pair(M, 2, 5, 7))
    source = {"initial": str(tmp_path / "initial")}
    message = refusal(AdapterError, one, tmp_path, (5, 7), pair(M, 2, 5, 7), source=source)
    assert "remove initial" in message


def test_an_initial_adapter_of_other_modules_is_refused(tmp_path):
    _write_initial(tmp_path, pair("head", 2, 3, 3))
    source = {"initial": str(tmp_path / "initial")}
    message = refusal(AdapterError, one, tmp_path, (5, 7), pair(M, 2, 5, 7), INITIAL, source=source)
    assert "differ in their modules" in message


def test_an_initial_adapter_is_taken_from_plain_factors_only(tmp_path):
    trained = pair(M, 2, 5, 7) | dora(M, 5)
    _write_initial(tmp_path, trained, use_dora=True)
    source, settings = {"initial": str(tmp_path / "initial")}, {**INITIAL, "use_dora": True}
    message = refusal(AdapterError, one, tmp_path, (5, 7), trained, settings, source=source)
    assert "can be taken away from plain factors only" in message


def test_an_initial_adapter_of_another_rank_is_refused(tmp_path):
    _write_initial(tmp_path, pair(M, 3, 5, 7), r=3)
    source = {"initial": str(tmp_path / "initial")}
    message = refusal(AdapterError, one, tmp_path, (5, 7), pair(M, 2, 5, 7), INITIAL, source=source)
    assert f"{M} has rank 2, but the initial adapter has rank 3 there" in message


def test_a_factor_without_axes_is_refused(tmp_path):
    tensors = {f"{P}{M}.lora_A.weight": torch.tensor(1.0), f"{P}{M}.lora_B.weight": torch.tensor(1.0)}
    assert "has 0 dimensions" in refusal(AdapterError, one, tmp_path, (5, 7), tensors)


def test_a_bias_on_the_in_proj_of_an_attention_is_never_applied_by_peft_and_listed(tmp_path):
    tensors = pair("attn", 2, outputs=24, inputs=8) | {f"{P}attn.lora_B.bias": torch.ones(24)}
    base = random({"attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,)})
    _, adapter = fit(tmp_path, base, UNKNOWN, tensors, {"lora_bias": True})
    assert list(adapter.factors) == ["attn.in_proj_weight"]
    assert list(adapter.ignored) == [f"{P}attn.lora_B.bias"]


def test_an_initial_adapter_of_another_scale_is_not_the_one_that_training_started_from(tmp_path):
    from tiny import factors, plan_of, write_adapter, write_recipe_files

    recipe = write_recipe_files(tmp_path, ("a",))
    write_adapter(tmp_path / "a", factors(Q0), init_lora_weights="pissa")
    write_adapter(tmp_path / "initial", factors(Q0), init_lora_weights="pissa", lora_alpha=6)
    recipe["adapters"]["a"] = {"path": str(tmp_path / "a"), "initial": str(tmp_path / "initial")}
    with pytest.raises(AdapterError, match="scale 2, but the initial adapter has scale 3"):
        plan_of(recipe)
