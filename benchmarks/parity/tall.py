"""Consensus merging: the authors' code beside ours, on the same deltas.

    python benchmarks/parity/tall.py --repo CLONE_OF_nik-dim/tall_masks

Theirs: generate_task_masks for each task with its own factor, construct_consensus_mask, and the sum or
ties_merging (`dis-sum`) as the merged vector, over a base of zeros. Their masks pass through files there; here
their loader is replaced. Ours runs `consensus`, and `consensus_ties` with `compat: authors`. fusion_bench 54c9e8c
(method/tall_mask/utils.py) has the same two functions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peer import adapters, best_of, checked_out, functions_module, import_peer, relative_error
from torch import Tensor

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "d10af8b21383322367fb35474bd9cd0f9ebe9ecf"
FILES = ["src/utils/tallmask_utils.py", "src/utils/ties_utils.py", "src/utils/utils.py"]
DENSITY, SCALE = 0.2, 0.3
CASES: dict[str, tuple[str, int]] = {"sum, 2 votes": ("consensus", 2), "ties, 1 vote": ("consensus_ties", 1)}


def factors_of_masks(count: int) -> list[float]:
    """Theirs are chosen for each task from 0.2, 0.3 .. 0.6."""
    return [0.2 + 0.1 * (index % 5) for index in range(count)]


def theirs(deltas: Sequence[Tensor], method: str, votes: int) -> Tensor:
    masks, ties = import_peer("src.utils.tallmask_utils"), import_peer("src.utils.ties_utils")
    vectors = torch.stack([delta.flatten() for delta in deltas])
    with contextlib.redirect_stdout(io.StringIO()):
        if method == "consensus_ties":
            merged = ties.ties_merging(vectors, reset_thresh=100 * DENSITY, merge_func="dis-sum")
        else:
            merged = vectors.sum(dim=0)
        own = {
            str(task): {
                "w": masks.generate_task_masks(
                    vectors, vectors, torch.zeros_like(merged), merged, tall_mask_lambda=factor
                )[task]
            }
            for task, factor in enumerate(factors_of_masks(len(deltas)))
        }
        masks.load_tall_mask = lambda *_: own
        kept = masks.construct_consensus_mask({"w": merged}, votes, config=None)
    return (SCALE * merged * kept).reshape(deltas[0].shape)


def ours(factors: Sequence[Factor], method: str, votes: int) -> Tensor:
    given: dict[str, Any] = {"votes": votes, "lambda_": SCALE}
    given["mask_lambda"] = factors_of_masks(len(factors))
    if method == "consensus_ties":
        given |= {"density": DENSITY, "compat": "authors"}
    return merge_factors(method, factors, **given).dense()


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
    deltas = [factor.B @ factor.A for factor in factors]
    wandb = functions_module("wandb", log=lambda values: None)
    print(f"consensus, {options.size} x {options.size}, {options.adapters} adapters, float64, one thread")
    with checked_out(options.repo, options.commit, FILES, {"wandb": wandb}) as folder:
        Path(folder, "src/utils/variables_and_paths.py").write_text("ALL_DATASETS = list(range(1000))\n")
        for name, case in CASES.items():
            reference, their_time = best_of(lambda case=case: theirs(deltas, *case), 3)
            merged, our_time = best_of(lambda case=case: ours(factors, *case), 3)
            print(
                f"  {name:13} error {relative_error(merged, reference):7.1e}  norm {float(reference.norm()):.12g}  "
                f"kept {float((reference != 0).double().mean()):.4f}\n"
                f"                theirs {their_time}\n                ours   {our_time}"
            )


if __name__ == "__main__":
    main()
