"""The parameters of every method as frozen dataclasses, one instance per site; torch-free.

Owns: names, defaults, ranges and help. Tuples are in adapter order. Defaults are the papers': TIES keeps
0.2 and scales by 1 (arXiv 2306.01708), DARE drops 0.9 (arXiv 2311.03099), the KnOTS authors' ViT settings
keep 0.2 (knots_ties) and drop 0.1 (knots_dare_ties) (arXiv 2410.19735 and its configs).
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_merge.methods.declare import Interval, choice, flag, integer, number

SHARE = Interval(0.0, 1.0, open_low=True)
AT_LEAST_ONE = Interval(1.0)

WEIGHT = "factor of each adapter's update"
LAMBDA = "factor of the merged update"
SPACE = "where entries are compared: the deltas, Core Space, or the KnOTS basis"
KEPT = "share of entries kept, largest magnitudes first"
KEPT_AT_RANDOM = "share of entries kept, drawn at random; what is kept is divided by it"
SCOPE = "over what entries compete for the kept share: the whole model, or each weight for itself"
ENTRYWISE = "each weight for itself; the rule looks at single entries, so there is nothing else to choose"
COMPAT = "whose arithmetic, where publications and tools differ"
NORMALIZE_MERGEKIT = "compat mergekit only: divide by the weights of the adapters that agree"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Ties:
    """ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.2, KEPT, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("model", ("model", "tensor"), SCOPE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "peft", "mergekit", "authors"), COMPAT)
    normalize: bool | None = flag(None, NORMALIZE_MERGEKIT + "; default true")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnotsTies:
    """knots_ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.2, KEPT, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("model", ("model", "tensor"), SCOPE)
    compat: str = choice("paper", ("paper", "authors"), COMPAT)


@dataclass(frozen=True, kw_only=True, slots=True)
class DareLinear:
    """dare_linear."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.1, KEPT_AT_RANDOM, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), ENTRYWISE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "mergekit"), COMPAT)
    normalize: bool | None = flag(
        None, "compat mergekit only: divide by the sum of the weights; default false"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DareTies:
    """dare_ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.1, KEPT_AT_RANDOM, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), ENTRYWISE)
    space: str = choice("dense", ("dense", "core", "knots"), SPACE)
    compat: str = choice("paper", ("paper", "peft", "mergekit", "authors"), COMPAT)
    normalize: bool | None = flag(None, NORMALIZE_MERGEKIT + "; default false")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnotsDareTies:
    """knots_dare_ties."""

    weight: tuple[float, ...] = number(1.0, WEIGHT, per_adapter=True)
    density: tuple[float, ...] = number(0.9, KEPT_AT_RANDOM, SHARE, per_adapter=True)
    lambda_: float = number(1.0, LAMBDA, key="lambda", per_site=True)
    scope: str = choice("tensor", ("tensor",), ENTRYWISE)
    compat: str = choice("paper", ("paper", "authors"), COMPAT)
