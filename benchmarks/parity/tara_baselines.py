"""LoRA-LEGO, RobustMerge and FREE as TARA's repository has them, and the latter two as their authors do, beside ours.

    python benchmarks/parity/tara_baselines.py --repo CLONE_OF_wooseong97/TARA-Merge
        [--robust CLONE_OF_AuroraZengfh/RobustMerge] [--free CLONE_OF_Zhengsh123/FREE-Merging]

Same seeded tensors, one thread each. LoRA-LEGO starts k-means at random pairs; their random stream is not ours, so
ours is started at the pairs that they draw. No repository of LoRA-LEGO's authors was found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from excerpts import cuda_is_the_cpu, function, source, statements
from peer import adapters, best_of, checked_out, import_peer, relative_error, timed
from torch import Tensor

from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.catalogue.lego import LoraLego
from ray_merge.methods.lego import Pool, assemble, k_means
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

TARA = "efbae686f73d2d2c9487d38f8caff24cb43383fd"
ROBUST = "12128022190516cc93a549cc4931112ce4bdcda3"
FREE = "36c0f415f6b3c4868505c46a2427bfec1ba41fe3"
LEGO_SEED, LEGO_STEPS = 7, 10


def task_vectors(factors: Sequence[Factor]) -> dict[str, dict[str, Tensor]]:
    """What their functions take: {task: {name with lora_A. or lora_B.: tensor}}."""
    return {
        f"task{index}": {"site.lora_A.weight": factor.A, "site.lora_B.weight": factor.B}
        for index, factor in enumerate(factors)
    }


def theirs(name: str, factors: Sequence[Factor], **given: Any) -> Tensor:
    with (
        cuda_is_the_cpu(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        merged: dict[str, Tensor] = getattr(import_peer("merge_strategy"), name)(
            task_vectors(factors), **given
        )
    return merged["site.weight"]


def lego_from_their_start(factors: Sequence[Factor], count: int) -> Tensor:
    """Ours with compat tara, the pool in their order and the centres that their generator draws."""
    left = torch.cat([factor.B.T for factor in factors]).double()
    right = torch.cat([factor.A for factor in factors]).double()
    pool = Pool(left, right, factors[0].A.shape[0])
    start_K = torch.randperm(len(left), generator=torch.Generator().manual_seed(LEGO_SEED))[:count]
    found = k_means(pool.gram(), start_K, LEGO_STEPS, signed=False)
    chosen = LoraLego(
        weight=(1.0,) * len(factors),
        lambda_=1.0,
        rank=count,
        parameter_reweighting=True,
        output_reweighting=True,
        restarts=1,
        iterations=LEGO_STEPS,
        compat="tara",
    )
    return assemble(pool, found, chosen, SiteFactors(factors).dtype).dense()


def robust_authors(text: str, factors: Sequence[Factor]) -> Tensor:
    """Their script's block on adapter files; its output adapter, multiplied out."""
    clamp = function(text, "clamp", {"torch": torch})
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for index, factor in enumerate(factors):
            paths.append(str(Path(folder, str(index))))
            Path(paths[-1]).mkdir()
            named = {"site.lora_A.weight": factor.A, "site.lora_B.weight": factor.B}
            torch.save(named, Path(paths[-1], "adapter_model.bin"))
        names = {"torch": torch, "os": os, "clamp": clamp, "model_paths": paths}
        names |= {"mask_ratio": 0.2, "att_ratio": 0.2}
        merged = statements(text, "fuse_weight = (", "model.config.save_pretrained", names)[
            "merged_model_weights"
        ]
    return merged["site.lora_B.weight"] @ merged["site.lora_A.weight"]


def free_authors(text: str, factors: Sequence[Factor]) -> Tensor:
    """Their ViT filter on every delta, summed as their task vectors are."""
    filtered = function(text, "cal_low_and_high_fft_for_tensor", {"torch": torch}, owner="TaskVectorFFT")
    settings = argparse.Namespace(filter_ratio=0.7)
    total = 0
    for factor in factors:
        _, high, band = filtered(settings, factor.B @ factor.A)
        total = total + band + high
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--robust", type=Path)
    parser.add_argument("--free", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--columns", type=int, default=160)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    exact = adapters(
        options.rows, options.columns, options.rank, options.adapters, options.seed, torch.float64
    )
    print(f"{options.rows} x {options.columns}, {options.adapters} adapters of rank {options.rank}, float64")
    with checked_out(options.repo, TARA, ["src/merge_strategy.py"]) as folder:
        sys.path.insert(0, str(folder / "src"))
        for count in (options.rank, 2 * options.rank):
            compare(
                f"lora_lego, {count} clusters, tara",
                partial(theirs, "LoRA_LEGO", exact, K=count, seed=LEGO_SEED),
                partial(lego_from_their_start, exact, count),
            )
        compare(
            "robustmerge, tara",
            lambda: theirs("RobustMerge", exact),
            lambda: merge_factors("robustmerge", exact, compat="tara").dense(),
        )
        compare(
            "free, tara",
            lambda: theirs("FreeMerge", exact),
            lambda: merge_factors("free", exact, compat="tara").dense(),
        )
        sys.path.remove(str(folder / "src"))
    if options.robust:
        text = source(options.robust, ROBUST, "llava/model/builder.py")
        compare(
            "robustmerge, authors",
            lambda: robust_authors(text, exact),
            lambda: merge_factors("robustmerge", exact, compat="authors", density=0.2, lambda_=4.0).dense(),
        )
    if options.free:
        text = source(options.free, FREE, "merge_vit/src/task_vectors.py")
        compare(
            "free, authors",
            lambda: free_authors(text, exact),
            lambda: merge_factors("free", exact, compat="authors").dense(),
        )


def compare(title: str, peer: Callable[[], Tensor], own: Callable[[], Tensor]) -> None:
    want, theirs_in = timed(peer)
    got, ours_in = best_of(own, 3)
    print(f"{title}\n  relative error {relative_error(got, want):.1e}; theirs {theirs_in}, ours {ours_in}")
    print(f"  their norm {float(want.norm()):.12g}, entry [3, 5] {float(want[3, 5]):.12g}")


if __name__ == "__main__":
    main()
