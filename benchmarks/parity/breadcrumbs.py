"""Model Breadcrumbs: the authors' code beside ours, on the same deltas.

    python benchmarks/parity/breadcrumbs.py --repo CLONE_OF_rezazzr/breadcrumbs

Theirs is TaskVectorMiddleKeep, which drops top_k_remove (our `gamma`) and keeps top_k_keep (our `density`) of each
row; the task vectors are added and scaled. Ours runs with `compat: authors`. The rules of the paper, over the
whole weight, are compared with mergekit's in mergekit_sparsify.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peer import adapters, best_of, checked_out, import_peer, relative_error
from torch import Tensor

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "f89fc664a171df2b90567aa1313ec7be677f2669"
DENSITY, GAMMA, ALPHA = 0.2, 0.1, 0.4  # the README's example


def theirs(factors: Sequence[Factor]) -> Tensor:
    kept = import_peer("src.task_vectors").TaskVectorMiddleKeep
    vectors = [
        kept(vector={"w": factor.B @ factor.A}, top_k_keep=DENSITY, top_k_remove=GAMMA) for factor in factors
    ]
    return ALPHA * sum(vectors[1:], start=vectors[0]).vector["w"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--commit", default=COMMIT)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    factors = adapters(
        options.size, options.size, options.rank, options.adapters, options.seed, torch.float64
    )
    with checked_out(options.repo, options.commit, ["src/task_vectors.py"]) as folder:
        Path(folder, "src/utils.py").write_text("safe_load_state_dict = None\n")
        reference, their_time = best_of(lambda: theirs(factors), 3)
    given = {"density": DENSITY, "gamma": GAMMA, "lambda_": ALPHA, "compat": "authors"}
    merged, our_time = best_of(lambda: merge_factors("breadcrumbs", factors, **given).dense(), 3)
    print(
        f"breadcrumbs, {options.size} x {options.size}, {options.adapters} adapters, float64, one thread\n"
        f"  error {relative_error(merged, reference):.1e}  norm {float(reference.norm()):.12g}  "
        f"probe [3, 5] {float(reference[3, 5]):.12g}  largest {float(reference.abs().max()):.12g}\n"
        f"  theirs {their_time}\n  ours   {our_time}"
    )


if __name__ == "__main__":
    main()
