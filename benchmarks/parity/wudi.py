"""WUDI-Merging: fusion_bench's and the authors' Adam beside our closed form, on the same tensors, one thread each.

    python benchmarks/parity/wudi.py --repo CLONE_OF_tanganke/fusion_bench
        [--authors CLONE_OF_nathanielyvo/WUDI-Merging]

Theirs stops after a number of steps of 1e-5, so the objective is compared as well: ours is its minimum. Adam divides
every entry's gradient by its own size and so leaves the row space of the deltas, where the objective does not see
it; the difference is measured inside that space. fusion_bench divides by |tau_i|^2, as the paper does; the authors'
ViT code by |tau_i|. With `--columns 7` the deltas overlap and the objective cannot reach zero.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from excerpts import cuda_is_the_cpu, function, source
from peer import adapters, best_of, relative_error, timed
from torch import Tensor

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

FUSION_BENCH = "54c9e8c9d9621620c720452cd8533332a32d3689"
AUTHORS = "dc3cd1204a68d1930a32da11c5cddb0cbd7410bb"
ENTRY = 1e-3
"""Entries of a delta: with steps of 1e-5, theirs needs a hundred to move one by its own size."""


def objective(merged: Tensor, deltas: Sequence[Tensor], power: int) -> float:
    return float(sum(((merged - d) @ d.T).square().sum() / d.norm() ** power for d in deltas))


def in_row_space(merged: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    _, s, Vt = torch.linalg.svd(torch.cat(list(deltas)), full_matrices=False)
    Vt = Vt[s > s[0] * 1e-10]
    return merged @ Vt.T @ Vt


def fusion_bench(repo: Path, deltas: Sequence[Tensor], steps: int) -> Tensor:
    names = {"torch": torch, "List": list, "timeit_context": contextlib.nullcontext, "tqdm": Quiet}
    run = function(source(repo, FUSION_BENCH, "fusion_bench/method/wudi/wudi.py"), "wudi_merging", names)
    vectors = [{"site": delta} for delta in deltas]
    return run(vectors, accelerator="cpu", iter_num=steps)["site"].detach()


def authors(repo: Path, deltas: Sequence[Tensor], steps: int) -> Tensor:
    names = {"torch": torch, "tqdm": Quiet}
    run = function(source(repo, AUTHORS, "vit/coef.py"), "get_redundant_task_vector", names)
    with cuda_is_the_cpu(), contextlib.redirect_stdout(io.StringIO()):
        return run("site", torch.stack(list(deltas)), iter_num=steps)


class Quiet:
    """A progress bar that says nothing."""

    def __new__(cls, items: object, **_: object) -> object:  # noqa: D102
        return items

    @staticmethod
    def write(text: str) -> None:  # noqa: D102
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--authors", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 3000])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--columns", type=int, default=40)
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    drawn = adapters(
        options.rows, options.columns, options.rank, options.adapters, options.seed, torch.float64
    )
    factors = [Factor(f.B * (ENTRY * options.columns), f.A, 1.0) for f in drawn]
    deltas = [f.B @ f.A for f in factors]
    print(f"{options.rows} x {options.columns}, {options.adapters} adapters of rank {options.rank}, float64")
    report(
        "fusion_bench",
        factors,
        deltas,
        "paper",
        options.steps,
        lambda n: fusion_bench(options.repo, deltas, n),
    )
    if options.authors:
        report(
            "authors",
            factors,
            deltas,
            "authors",
            options.steps,
            lambda n: authors(options.authors, deltas, n),
        )


def report(
    title: str,
    factors: Sequence[Factor],
    deltas: Sequence[Tensor],
    compat: str,
    steps: Sequence[int],
    peer: Callable[[int], Tensor],
) -> None:
    power = 2 if compat == "paper" else 1
    got, ours_in = best_of(lambda: merge_factors("wudi", factors, compat=compat).dense(), 3)
    print(f"{title}: ours {ours_in}, objective {objective(got, deltas, power):.12g}")
    print(f"  sum of deltas: objective {objective(sum(deltas), deltas, power):.12g}")
    for count in steps:
        want, theirs_in = timed(lambda count=count: peer(count))
        inside = in_row_space(want, deltas)
        print(
            f"  {count} steps: {theirs_in}, objective {objective(want, deltas, power):.12g}, relative error "
            f"{relative_error(got, want):.1e}, in the row space {relative_error(got, inside):.1e}"
        )
        print(
            f"    their norm in the row space {float(inside.norm()):.12g}, entry [3, 5] {float(inside[3, 5]):.12g}"
        )


if __name__ == "__main__":
    main()
