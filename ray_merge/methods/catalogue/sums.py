"""Declarations of the weighted sums."""

from __future__ import annotations

from dataclasses import dataclass

from ray_merge.methods import cost, memory, rules
from ray_merge.methods.catalogue.common import AT_LEAST_ONE, COMPAT, LAMBDA, WEIGHT
from ray_merge.methods.declare import Method, choice, flag, integer, number

SUMS = "ray_merge.methods.sums"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """task_arithmetic."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    normalize: bool = flag(False, "divide by the sum of the weights")


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """linear."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    normalize: bool = flag(None, "divide by the sum of the weights; default true, with compat peft false")
    compat: str = choice("paper", ("paper", "peft"), COMPAT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Concatenate:
    """cat."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncate:
    """svd."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    rank: int = integer("rank that the weighted sum is truncated to", AT_LEAST_ONE)


METHODS: tuple[Method, ...] = (
    Method(
        name="task_arithmetic",
        family="sum",
        summary="lambda * sum_i weight_i * delta_i",
        reference="Task Arithmetic, arXiv 2212.04089",
        low_rank_spaces=("dense",),
        parameters=Sum,
        rule=rules.divided_sum,
        sizes=memory.factors,
        work=cost.summed,
        kernel=f"{SUMS}:task_arithmetic",
    ),
    Method(
        name="linear",
        family="sum",
        summary="lambda * sum_i weight_i * delta_i / sum_i weight_i",
        reference="model soups, arXiv 2203.05482; compat peft: add_weighted_adapter(linear)",
        low_rank_spaces=("dense",),
        parameters=Linear,
        rule=rules.linear,
        equal_ranks=("peft",),
        sizes=memory.factors,
        work=cost.summed,
        kernel=f"{SUMS}:linear",
    ),
    Method(
        name="cat",
        factors_only=True,
        family="sum",
        summary="the exact weighted sum as concatenated factors",
        reference="PEFT add_weighted_adapter(cat)",
        low_rank_spaces=("dense",),
        parameters=Concatenate,
        sizes=memory.factors,
        work=cost.summed,
        kernel=f"{SUMS}:cat",
    ),
    Method(
        name="svd",
        factors_only=True,
        family="sum",
        summary="the weighted sum truncated to `rank`, with the relative error reported",
        reference="PEFT add_weighted_adapter(svd)",
        low_rank_spaces=("dense",),
        parameters=Truncate,
        sizes=memory.truncated,
        work=cost.truncated,
        kernel=f"{SUMS}:svd",
    ),
)
