"""OSRM: the authors' code beside ours, on the same features, one thread each.

    python benchmarks/parity/osrm.py --repo CLONE_OF_illidanlab/OSRM

Three functions of their utils.py are run, on the CPU: `get_pretrained_latent_features` (means by hooks, in bfloat16),
`peft_analytical_init` (A from the null space of the other tasks' means) and `get_post_analytical_init_weights` (B of a
finished adapter for a new A; with float64 in the place of its bfloat16 casts, and as published).

Which null directions they take is up to LAPACK's last reflections, so what is compared is what both must have: the
features do not reach A, and where r is the dimension of the null space, both span it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from excerpts import function, source
from peer import best_of, relative_error
from torch import Tensor, nn

from ray_merge.algebra.moments import Moments, MomentSums
from ray_merge.algebra.osrm import osrm_directions, osrm_project

COMMIT = "bfe8b6ddabb21666cb77e93aee1b5ccd649bcae0"
KEY = "base_model.model.layer.query.lora_A.default.weight"
SCALE = 2.0  # their lora_alpha / r = 16 / 8


class Model(nn.Module):
    """One linear layer that their hooks find by its name."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.query = nn.Linear(columns, rows, bias=False)
        nn.init.zeros_(self.layer.query.weight).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of the weight."""
        return self.layer.query(x.to(self.layer.query.weight.dtype))


@contextlib.contextmanager
def any_cuda_is_the_cpu() -> Iterator[None]:
    """`.to("cuda:-1")`, which they ask for where there is no device, leaves a tensor where it is."""
    to = Tensor.to

    def stay(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        there = bool(args) and isinstance(args[0], str) and args[0].startswith("cuda")
        return self if there else to(self, *args, **kwargs)

    Tensor.to = stay
    try:
        yield
    finally:
        Tensor.to = to


def theirs(repo: Path, name: str, *, exact: bool = False) -> Any:
    """A function of their utils.py; `exact` puts float64 where they cast to bfloat16."""
    namespace = {"torch": torch, "nn": nn, "Tuple": tuple, "tqdm": lambda items, desc: items}
    if exact:
        names = ("linalg", "matmul", "cuda")
        namespace["torch"] = SimpleNamespace(
            **{key: getattr(torch, key) for key in names}, bfloat16=torch.float64
        )
    return function(source(repo, COMMIT, "utils.py"), name, namespace)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task_means(tasks: int, columns: int, seed: int) -> Tensor:
    """(T, I) float64: what the tasks share, 3 in every column, and what is their own."""
    return normal(tasks, columns, seed=seed) + 3


def as_moments(means: Tensor) -> list[Moments]:
    return [Moments(torch.outer(mean, mean), mean, 1) for mean in means]


def span(A_RI: Tensor) -> Tensor:
    return A_RI.double().T @ A_RI.double()


def their_rows(repo: Path, means: Tensor, task: int, r: int) -> Tensor:
    init = theirs(repo, "peft_analytical_init")
    features = {str(t): {KEY: mean[None]} for t, mean in enumerate(means) if t != task}
    with any_cuda_is_the_cpu():
        return init(r, features)[KEY]


def our_rows(moments: Sequence[Moments], task: int, r: int) -> Tensor:
    others = [one for t, one in enumerate(moments) if t != task]
    return osrm_directions(others, r, mode="means", seed=task).A_RI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.tasks} tasks, {options.columns} columns, one thread")
    report_means(options.repo, options.columns)
    report_rows(options.repo, options.tasks, options.columns, options.rank, options.seed)
    for columns in (96, 192, options.columns):
        report_span(options.repo, options.tasks, columns, options.seed)


def report_means(repo: Path, columns: int) -> None:
    """Four batches of one length: theirs is 4/3 of the mean, because the last index is not the count."""
    batches = [normal(2, 5, columns, seed=seed).float() + 3 for seed in range(4)]
    features = theirs(repo, "get_pretrained_latent_features")
    with any_cuda_is_the_cpu():
        found = features(Model(4, columns), 8, {"task": [{"x": x} for x in batches]}, ["query"])
    sums = MomentSums(columns)
    for x in batches:
        sums.add(x.flatten(0, 1))
    want, mean = found["task"][KEY][0].double(), sums.finish().mean
    print(f"means: theirs over ours {float(want @ mean / (mean @ mean)):.6f}")
    print(
        f"  relative error but for that factor {relative_error(mean / mean.norm(), want / want.norm()):.1e}"
    )


def report_rows(repo: Path, tasks: int, columns: int, r: int, seed: int) -> None:
    means = task_means(tasks, columns, seed)
    moments = as_moments(means)
    _, theirs_in = best_of(lambda: their_rows(repo, means.float(), 0, r), 5)
    _, ours_in = best_of(lambda: our_rows(moments, 0, r), 5)
    print(f"A of {r} rows: theirs {theirs_in}, ours {ours_in}: {theirs_in.times_slower_than(ours_in)}")
    found = {
        "theirs": [their_rows(repo, means.float(), task, r).double() for task in range(tasks)],
        "ours": [our_rows(moments, task, r).double() for task in range(tasks)],
    }
    for name, rows in found.items():
        reach = max(
            float((A @ mean).norm() / mean.norm())
            for t, A in enumerate(rows)
            for o, mean in enumerate(means)
            if o != t
        )
        overlap = float((rows[0] @ rows[1].T).square().sum()) / r
        print(
            f"  {name}: |A mean| / |mean| of others at most {reach:.1e}; overlap of two tasks' A {overlap:.3f}"
        )


def report_span(repo: Path, tasks: int, columns: int, seed: int) -> None:
    """Where r is the dimension of the null space: the span, and a finished adapter projected on it."""
    means, r = task_means(tasks, columns, seed), columns - (tasks - 1)
    A = their_rows(repo, means, 0, r)
    got = our_rows(as_moments(means), 0, r)
    print(f"{columns} columns, A of {r} rows, the whole null space, float64")
    print(f"  relative error of the projection {relative_error(span(got), span(A)):.1e}")
    print(f"  entries [0, 0] and [3, 5] of theirs {float(span(A)[0, 0]):.12g} {float(span(A)[3, 5]):.12g}")

    B_old, A_old = normal(64, 4, seed=seed + 1), normal(4, columns, seed=seed + 2) + 3
    tuned, base = Model(64, columns).double(), Model(64, columns).double()
    tuned.layer.query.weight.copy_(SCALE * B_old @ A_old)
    others = as_moments(means)[1:]
    ours_B, ours_A, lost = osrm_project(B_old, A_old, SCALE, others, r, mode="means")
    ours = SCALE * ours_B.double() @ ours_A.double()
    for exact in (True, False):
        post = theirs(repo, "get_post_analytical_init_weights", exact=exact)
        dtype = torch.float64 if exact else torch.bfloat16
        with any_cuda_is_the_cpu():
            B = post(tuned.to(dtype), base.to(dtype), {KEY: A}, ["query"])[KEY.replace("lora_A", "lora_B")]
        want = B.double() @ A.double()
        title = "their B' A' in float64" if exact else "their B' A' in bfloat16, as published"
        print(f"  {title}: norm {float(want.norm()):.12g}, entry [3, 5] {float(want[3, 5]):.12g}")
        print(f"    ours against it {relative_error(ours, want):.1e}; in PEFT it counts {SCALE:g} times")
    print(f"  lost by projecting {lost:.12g}")


if __name__ == "__main__":
    main()
