"""What one site costs: every registered method against its formula on dense matrices, in one process, on one thread.

    python benchmarks/site_kernels.py [--size 2048] [--adapters 8] [--rank 16] [--methods GLOB] [--dtype float32]
        [--repo knots=CLONE] [--repo core_space=CLONE] [--json FILE]

dense: the published formula written plainly in torch (dense_methods.py), from deltas that are there already, in the
dtype that the published code uses. ours: `merge_factors`, from float32 factors to the dense (O, I) update, the best of
--repeats. ratio = dense / ours by wall. factors: ours without making the update dense, for methods that give factors.
error: relative Frobenius difference of both updates; where a method draws at random only the norms can be compared.
Every method of the registry is a row, and one without a dense form says so.
Of wudi's 300 published steps 3 are timed and scaled; its error is against a dense closed form.

With --repo the authors' own code runs too (the clones that parity/*.py take), on the same factors.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dense_methods import DENSE, Dense
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "parity"))
import core_space
import knots
from peer import adapters, checked_out, functions_module, import_peer

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import METHODS
from ray_merge.spec import Factor


class Row(NamedTuple):
    """Figures of one method; None where there is none."""

    name: str
    dense_seconds: float | None
    seconds: float
    factors_seconds: float | None
    error: float | None
    note: str


def best(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What a call returns, and its least wall."""
    least, result = float("inf"), None
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        least = min(least, time.perf_counter() - started)
    return result, least


def deltas(factors: Sequence[Factor], dtype: torch.dtype) -> Tensor:
    """(T, O, I)."""
    return torch.stack([factor.scale * (factor.B.to(dtype) @ factor.A.to(dtype)) for factor in factors])


def ours(
    name: str, form: Dense, factors: Sequence[Factor], repeats: int
) -> tuple[Tensor, float, float | None]:
    """Our update, its seconds, and its seconds as factors."""
    method = form.method or name
    inputs = form.inputs(factors)
    call = lambda: merge_factors(method, factors, **form.parameters, **inputs)  # noqa: E731 - timed twice
    update, seconds = best(lambda: call().dense(), repeats)
    made, as_factors = best(call, repeats)
    return update, seconds, as_factors if made.factors() is not None else None


def against_formula(name: str, form: Dense, factors: Sequence[Factor], repeats: int) -> Row:
    """One method against its dense form."""
    update, seconds, as_factors = ours(name, form, factors, repeats)
    tau = deltas(factors, form.dtype)
    if form.timed is not None:
        _, piece = best(lambda: form.timed(tau, factors), 2)  # the first call loads torch's optimisers
        dense, dense_seconds = form.make(tau, factors), piece * form.times
    else:
        dense, dense_seconds = best(lambda: form.make(tau, factors), 1)
    if form.random:
        return Row(
            name, dense_seconds, seconds, as_factors, None, f"norms {float(update.norm() / dense.norm()):.3f}"
        )
    return Row(name, dense_seconds, seconds, as_factors, difference(update, dense), "")


def difference(one: Tensor, other: Tensor) -> float:
    """Relative Frobenius difference."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-300))


def against_authors(repos: Mapping[str, Path], factors: Sequence[Factor], repeats: int) -> Iterator[Row]:
    """The authors' code where a clone of it was given."""
    exact = [Factor(factor.B.double(), factor.A.double(), factor.scale) for factor in factors]
    if "knots" in repos:
        stub = functions_module(
            "utils",
            get_mask_fn=lambda name: getattr(import_peer("masking_ops"), f"{name}_masking"),
            get_merging_fn=lambda name: getattr(import_peer("merging_functions"), f"{name}_merging"),
        )
        with checked_out(repos["knots"], knots.COMMIT, knots.FILES, {"utils": stub}):
            tau = list(deltas(exact, torch.float64))
            theirs, their_seconds = best(lambda: knots.in_float64(tau), 1)
        parameters = {"density": knots.DENSITY, "lambda": knots.LAMBDA, "compat": "authors"}
        form = Dense(lambda tau, _: tau[0], parameters, method="knots_ties")
        update, seconds, as_factors = ours("", form, factors, repeats)
        error = difference(update, theirs)
        yield Row("knots_ties", their_seconds, seconds, as_factors, error, "authors' code")
    if "core_space" in repos:
        yield from core_space_rows(repos["core_space"], exact, factors, repeats)


def core_space_rows(
    repo: Path, exact: Sequence[Factor], factors: Sequence[Factor], repeats: int
) -> Iterator[Row]:
    """TIES in Core Space by its authors."""
    config = {"merge_method": "ties", "topK": 100 * core_space.DENSITY}
    # einops is imported by their file and used by none of the functions called here.
    stubs = {
        "utils": functions_module("utils", get_mask_fn=None),
        "einops": functions_module("einops", rearrange=None),
    }
    with checked_out(repo, core_space.COMMIT, core_space.FILES, stubs):
        theirs, their_seconds = best(lambda: core_space.theirs(exact, config), 1)
    parameters = {"density": core_space.DENSITY, "lambda": core_space.LAMBDA, "space": "core"}
    form = Dense(lambda tau, _: tau[0], {**parameters, "compat": "authors"}, method="ties")
    update, seconds, as_factors = ours("", form, factors, repeats)
    yield Row("ties in core", their_seconds, seconds, as_factors, difference(update, theirs), "authors' code")


def show(row: Row) -> None:
    """One line."""

    def cell(value: float | None, width: str) -> str:
        return f"{'-':>{width.split('.')[0]}}" if value is None else f"{value:{width}}"

    ratio = None if row.dense_seconds is None else row.dense_seconds / row.seconds
    print(
        f"{row.name:18}{cell(row.dense_seconds, '10.4f')}{row.seconds:10.4f}{cell(ratio, '9.1f')}"
        f"{cell(row.factors_seconds, '11.4f')}{cell(row.error, '10.1e')}  {row.note}",
        flush=True,
    )


def rows(chosen: str) -> Iterator[tuple[str, Dense | None]]:
    """Every registered method and what else has a dense form."""
    registered = [method.name for method in METHODS]
    extra = [name for name, form in DENSE.items() if form.method in registered]
    for name in [*registered, *extra]:
        if fnmatch.fnmatchcase(name, chosen):
            yield name, DENSE.get(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--methods", default="*", metavar="GLOB")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of the factors")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--repo", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    factors = adapters(given.size, given.size, given.rank, given.adapters, 0, getattr(torch, given.dtype))
    print(
        f"{given.size} x {given.size}, {given.adapters} adapters of rank {given.rank}, {given.dtype}, one thread"
    )
    _, made = best(lambda: deltas(factors, torch.float32), given.repeats)
    print(f"forming the deltas, which is in no figure of `dense`: {made:.4f} s")
    print(f"{'method':18}{'dense s':>10}{'ours s':>10}{'ratio':>9}{'factors s':>11}{'error':>10}")
    done = []
    for name, form in rows(given.methods):
        if form is None:
            print(f"{name:18} no dense form in dense_methods.py", flush=True)
            continue
        done.append(against_formula(name, form, factors, given.repeats))
        show(done[-1])
    for row in against_authors(dict(_pair(repo) for repo in given.repo), factors, given.repeats):
        done.append(row)
        show(row)
    if given.json:
        settings = {key: str(value) for key, value in vars(given).items()}
        given.json.write_text(
            json.dumps({"settings": settings, "rows": [row._asdict() for row in done]}, indent=1)
        )


def _pair(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path)


if __name__ == "__main__":
    main()
