"""`merge_factors`: any method on the factors of one weight, for notebooks and tests.

Owns: the Python form of parameters (`lambda_`, sequences in the order of factors) and the checks of tensors
that come from outside. Everything else is what a worker does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ray_merge.algebra.delta import Delta
from ray_merge.algebra.site import SiteFactors
from ray_merge.errors import MethodError
from ray_merge.methods.declare import Method
from ray_merge.methods.given_phi import given_phi
from ray_merge.methods.given_statistics import given_statistics
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.registry import get, takes_dense
from ray_merge.methods.resolve import at_site, resolve_parameters
from ray_merge.methods.statistics import InputSide
from ray_merge.spec import Factor


def merge_factors(
    method: str,
    factors: Sequence[Factor],
    *,
    base: Any = None,
    moments: Any = None,
    phi: Any = None,
    seed: int = 0,
    input_side: InputSide = "columns",
    **parameters: Any,
) -> Delta:
    """Merge the factors of one weight.

    Args:
        method: a merge method's name.
        factors: one per adapter: B (O, R_i), A (R_i, I) of any floating dtype, and its scale.
        base: the base weight (O, I), only for methods that need it and for factors with a DoRA magnitude.
        moments: only for methods that need them, one for each factor: `Moments` of the weight's inputs for regmean,
            the Fisher diagonal (O, I) for fisher; None with `without_moments="average"`.
        phi: learned coefficients, only for methods that need them: (T,) for nsc and adamerging, (sum of ranks,)
            adapter-major for tara_a, (T, min(O, sum of ranks)) for tara_b; T factors.
        seed: of random masks; adapter i is called "i" there.
        input_side: "rows" for the weight of a HF Conv1D, which is stored (in, out); asked by regmean alone.
        **parameters: as in a recipe (`lambda` may be written `lambda_`); weight and density may be a
            number or a sequence in the order of `factors`.

    Returns:
        The merged update; `.dense()` is (O, I) float32, float64 if a factor is float64.

    Raises:
        MethodError: unknown method or parameter, or factors that cannot be merged.
    """
    declared = get(method)
    is_dora = any(isinstance(factor, Factor) and factor.magnitude is not None for factor in factors)
    names = tuple(str(index) for index in range(len(factors)))
    given = _as_recipe(declared, parameters, names)
    resolved = resolve_parameters(declared, given, names)
    inputs = _inputs(declared, {"base": None if is_dora else base, "moments": moments, "phi": phi}, resolved)
    _check_factors(factors)
    if is_dora:
        _check_dora(declared, resolved, factors, base)
    if declared.statistics and "moments" in inputs:
        inputs |= given_statistics(declared, moments, factors, input_side)
    if declared.learned:
        inputs["phi"] = given_phi(declared, phi, factors)
    chosen = at_site(declared, resolved, names, site="")
    site = SiteFactors(factors, base if is_dora else None)
    return merge_site(declared.name, site, chosen, names=names, site="", seed=seed, inputs=inputs)


def _check_dora(
    method: Method, parameters: Mapping[str, Any], factors: Sequence[Factor], base: Tensor | None
) -> None:
    """A DoRA delta is dense and made of its base weight."""
    shape = (factors[0].B.shape[0], factors[0].A.shape[1])
    if base is None or tuple(base.shape) != shape:
        got = "none" if base is None else tuple(base.shape)
        raise MethodError(f"a factor has a DoRA magnitude, which needs `base` of shape {shape}, got {got}")
    if not base.is_floating_point() or not bool(torch.isfinite(base).all()):
        raise MethodError(f"base holds NaN or Inf, or is no floating tensor ({base.dtype})")
    if not takes_dense(method, parameters):
        raise MethodError(
            f"{method.name} works on factors, but a DoRA delta is dense; use a method with space: dense"
        )
    for index, factor in enumerate(factors):
        if factor.magnitude is not None and tuple(factor.magnitude.shape) not in (
            (shape[0], 1),
            (1, shape[1]),
        ):
            raise MethodError(
                f"factors[{index}].magnitude is {tuple(factor.magnitude.shape)}, expected {(shape[0], 1)} of rows or "
                f"{(1, shape[1])} of columns"
            )


def _inputs(method: Method, given: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    averaged = parameters.get("without_moments") == "average"
    for word, value in given.items():
        if word == "moments" and value is None and averaged:
            continue
        if (value is not None) != (word in method.needs):
            verb = "needs" if word in method.needs else "takes no"
            raise MethodError(f"{method.name} {verb} `{word}`")
    return {word: value for word, value in given.items() if value is not None}


def _as_recipe(method: Method, parameters: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    given = {"lambda" if key == "lambda_" else key: value for key, value in parameters.items()}
    if len(given) < len(parameters):
        raise MethodError("give lambda or lambda_, not both")
    declared = method.declared()
    for key, value in given.items():
        is_sequence = isinstance(value, list | tuple) and not any(isinstance(item, Mapping) for item in value)
        if key in declared and declared[key].per_adapter and is_sequence:
            if len(value) != len(names):
                raise MethodError(f"{method.name}: {key} has {len(value)} values for {len(names)} factors")
            given[key] = dict(zip(names, value, strict=True))
    # One weight is the whole model here, so both scopes mean the same.
    if "scope" in declared and given.get("scope") in (None, *declared["scope"].choices):
        given["scope"] = "tensor"
    return given


def _check_factors(factors: Sequence[Factor]) -> None:
    for index, factor in enumerate(factors):
        if not isinstance(factor, Factor):
            raise MethodError(
                f"factors[{index}] is a {type(factor).__name__}, expected ray_merge.spec.Factor"
            )
        B, A = factor.B, factor.A
        if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0]:
            raise MethodError(
                f"factors[{index}]: B {tuple(B.shape)} and A {tuple(A.shape)}; expected (O, R) and (R, I)"
            )
        for word, tensor in (("B", B), ("A", A), ("magnitude", factor.magnitude)):
            if tensor is None:
                continue
            if not tensor.is_floating_point():
                raise MethodError(
                    f"factors[{index}].{word} has dtype {tensor.dtype}, expected a floating dtype"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise MethodError(
                    f"factors[{index}].{word} holds NaN or Inf; train or save that adapter again"
                )
        if not torch.isfinite(torch.tensor(float(factor.scale))):
            raise MethodError(f"factors[{index}].scale is {factor.scale}, expected a finite number")
        first = factors[0]
        if (B.shape[0], A.shape[1]) != (first.B.shape[0], first.A.shape[1]):
            raise MethodError(
                f"factors[{index}] is for a weight of {(B.shape[0], A.shape[1])}, but factors[0] is for "
                f"{(first.B.shape[0], first.A.shape[1])}; all factors belong to one weight"
            )
