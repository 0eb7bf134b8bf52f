import importlib.util
from pathlib import Path

import pytest
import torch
from entrywise_cases import (
    CLOSE,
    DENSITY,
    SHAPES_AND_RANKS,
    SPACES,
    WEIGHTS,
    check_rows_in_any_block,
    check_zero_adapters,
    chunks_move,
    dora_error,
    float32_error,
    gauge_moves,
    in_space,
    merged_as,
    order_moves,
)
from method_cases import deltas, random_factors, relative, trim_dense, weighted

from ray_merge.errors import MethodError
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import get, resolve_parameters

METHOD = "magnitude_prune"


def reference(values, density=(0.2, 0.2, 0.2), weights=(1.0, 1.0, 1.0)):
    return weighted(trim_dense(values, density), weights).sum(0)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES_AND_RANKS)
@pytest.mark.parametrize("space", SPACES)
def test_it_is_the_weighted_sum_of_trimmed_coordinates(space, shape, ranks):
    factors = random_factors(shape, ranks)
    merged = merge_factors(METHOD, factors, weight=WEIGHTS, density=DENSITY, lambda_=0.6, space=space)
    want = in_space(space, factors, lambda values: 0.6 * reference(values, DENSITY, WEIGHTS))
    assert relative(merged.dense(), want) < CLOSE
    assert (merged.factors() is None) is (space == "dense")


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_on_deltas_it_is_peft_magnitude_prune(density):
    # The file alone: importing PEFT takes longer than all tests here.
    package = importlib.util.find_spec("peft")
    path = Path(package.submodule_search_locations[0], "utils", "merge_utils.py")
    spec = importlib.util.spec_from_file_location("peft_merge_utils", path)
    peft = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peft)
    factors = random_factors((20, 14), (3, 5, 2))
    want = peft.magnitude_prune(list(deltas(factors)), torch.tensor(WEIGHTS, dtype=torch.float64), density)
    assert relative(merge_factors(METHOD, factors, weight=WEIGHTS, density=density).dense(), want) < 1e-12


@pytest.mark.parametrize("space", SPACES)
def test_density_one_is_the_plain_sum(space):
    factors = random_factors((24, 17), (3, 5))
    want = merge_factors("task_arithmetic", factors, lambda_=0.4).dense()
    assert (
        relative(merge_factors(METHOD, factors, density=1.0, lambda_=0.4, space=space).dense(), want) < CLOSE
    )


def test_one_entry_is_kept_where_the_share_is_less_than_one():
    (factor,) = random_factors((3, 2), [1])
    merged = merge_factors(METHOD, [factor], density=0.01).dense()
    assert int((merged != 0).sum()) == 1
    assert merged.abs().max() == deltas([factor]).abs().max()


def test_thresholds_from_the_whole_model_take_the_place_of_the_site():
    factors = random_factors((24, 17), (3, 5, 2))
    values, thresholds = deltas(factors), [1.0, 0.0, float("inf")]
    merged = merged_as(METHOD, factors, thresholds=[(t,) for t in thresholds], density=0.5)
    want = sum(v * (v.abs() >= t) for v, t in zip(values, thresholds, strict=True))
    assert relative(merged.dense(), want) < CLOSE


def test_the_count_is_the_floor_of_the_share():
    values = {"density": {"a": 0.25, "b": 1.0}}
    assert [get(METHOD).counts(values, name, 10) for name in "ab"] == [(2,), (10,)]


@pytest.mark.parametrize("space", SPACES)
def test_adapters_that_are_zero_are_harmless(space):
    check_zero_adapters(METHOD, space)


@pytest.mark.parametrize("space", SPACES)
def test_the_order_of_adapters_does_not_matter(space):
    assert order_moves(METHOD, space, weight=WEIGHTS, density=DENSITY) < CLOSE


def test_it_sees_deltas_and_in_core_space_also_the_gauge_of_their_factors():
    assert gauge_moves(METHOD, "dense") < 1e-9
    assert gauge_moves(METHOD, "knots") < 1e-9
    assert gauge_moves(METHOD, "core") > 1e-2


def test_rows_have_the_same_bits_in_any_block():
    check_rows_in_any_block(METHOD)


def test_the_grid_of_chunks_does_not_show(monkeypatch):
    assert chunks_move(METHOD, monkeypatch) < CLOSE


def test_float32_factors_are_merged_in_float32():
    assert float32_error(METHOD, reference) < 1e-5


def test_a_dora_delta_is_trimmed_like_any_other():
    assert dora_error(METHOD, lambda values: reference(values, [0.2, 0.2], [1.0, 1.0])) < CLOSE


@pytest.mark.parametrize("density", [0.0, 1.5, -0.1])
def test_a_share_outside_0_to_1_is_refused(density):
    with pytest.raises(
        MethodError, match=rf"magnitude_prune: density .*is {density!r}, expected a number in"
    ):
        resolve_parameters(get(METHOD), {"density": density}, ["a"])


def test_the_scope_may_be_the_model_if_the_share_is_one():
    per_site = [{"filter": "mlp", "value": 0.1}, {"value": 0.2}]
    assert resolve_parameters(get(METHOD), {"scope": "model"}, ["a"])["scope"] == "model"
    assert resolve_parameters(get(METHOD), {"density": per_site}, ["a"])["scope"] == "tensor"
    with pytest.raises(MethodError, match="density differs between sites"):
        resolve_parameters(get(METHOD), {"scope": "model", "density": per_site}, ["a"])
