"""KnOTS-TIES and KnOTS-DARE-TIES: the authors' code beside ours, on the same tensors, one thread each.

    python benchmarks/parity/knots.py --repo CLONE_OF_gstoica27/KnOTS

Two forms of theirs are run. `as published`: their SVDMerger, which takes the SVD of the stacked dense deltas in
float64, casts U, s and V to float32 and goes on in float32. `float64`: the same steps without that cast
(their masking_ops functions on the float64 U, s, V), which is what the 1e-6 is measured against. Ours runs
with `compat: authors`. For DARE the mask that their code draws from torch's global generator is given to
ours, because the random streams differ.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peer import adapters, best_of, checked_out, functions_module, import_peer, relative_error, timed
from torch import Tensor, nn

from ray_merge.algebra.grid import chunk_rows
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.dare import dropped
from ray_merge.methods.election import election
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "baa35e85768b8841820d35edc3e41b25304248c5"
FILES = ["masking_ops.py", "merging_functions.py", "task_merger.py"]
DENSITY, LAMBDA = 0.2, 0.6  # configs/vitB_r16_knots_ties.py: topK 20, scaling_coeffs .6
DARE_KEPT, DARE_LAMBDA = 0.9, 0.7  # configs/vitB_r16_knots_dare_ties.py: drop 0.1, scaling_coeffs .7
KEY = "site.weight"


class Deltas:
    """What their code calls a parameter handler: one dense delta."""

    def __init__(self, model: Any) -> None:
        self.delta = model if isinstance(model, Tensor) else torch.zeros_like(model.state_dict()[KEY])

    def get_ft_parameters(self) -> OrderedDict[str, Tensor]:
        """The name that their merger calls."""
        return OrderedDict({KEY: self.delta})


def as_published(deltas: Sequence[Tensor], config: dict[str, Any]) -> Tensor:
    rows, columns = deltas[0].shape
    base = nn.Module()
    base.site = nn.Linear(columns, rows, bias=False)
    nn.init.zeros_(base.site.weight).requires_grad_(False)
    with contextlib.redirect_stdout(io.StringIO()):
        merger = import_peer("task_merger").SVDMerger(list(deltas), base, Deltas, device="cpu")
        merger.set_scaling_coeffs(config["scaling_coeffs"])
        merger.transform(config)
        return merger.merge(config).state_dict()[KEY]


def in_float64(deltas: Sequence[Tensor]) -> Tensor:
    masking = import_peer("masking_ops")
    U, s, Vt = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    keep = s > 1e-5
    coordinates = (s[keep, None] * Vt[keep]).split(deltas[0].shape[1], dim=1)
    vectors = [block.reshape(-1) for block in coordinates]
    masked = torch.vstack(vectors) * masking.ties_masking(vectors, topK=100 * DENSITY)
    merged = masking.masked_merge(masked, "mean", weights=[LAMBDA])
    return U[:, keep] @ merged.reshape(coordinates[0].shape)


def ours(factors: Sequence[Factor]) -> Tensor:
    return merge_factors("knots_ties", factors, density=DENSITY, lambda_=LAMBDA, compat="authors")


def dare_with_their_masks(factors: Sequence[Factor], seed: int) -> Tensor:
    """Ours with the masks that their apply_dare draws: torch.manual_seed, then one Bernoulli per adapter."""
    space = SiteFactors(factors).space("knots")
    torch.manual_seed(seed)
    masks = [
        torch.randint(2, size=space.shape, dtype=torch.float32).bernoulli(DARE_KEPT).bool() for _ in factors
    ]
    density = [DARE_KEPT] * len(factors)
    step = chunk_rows(space.shape[1])
    kept = dropped(space, density, "authors", lambda i, c, shape: masks[i][c * step : c * step + shape[0]])
    rule = election(space, kept, [1.0] * len(factors), DARE_LAMBDA, compat="authors", divide=True)
    return space.lift(rule).dense()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--commit", default=COMMIT)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = (options.size, options.size, options.rank, options.adapters, options.seed)
    stub = functions_module(
        "utils",
        get_mask_fn=lambda name: getattr(import_peer("masking_ops"), f"{name}_masking"),
        get_merging_fn=lambda name: getattr(import_peer("merging_functions"), f"{name}_merging"),
    )
    with checked_out(options.repo, options.commit, FILES, {"utils": stub}):
        report(size)


def report(size: tuple[int, int, int, int, int]) -> None:
    exact = adapters(*size, torch.float64)
    single = adapters(*size, torch.float32)
    deltas = [factor.B @ factor.A for factor in exact]
    theirs, theirs_in = timed(lambda: in_float64(deltas))
    delta, to_factors = best_of(lambda: ours(exact), 5)
    dense, to_dense = best_of(lambda: ours(exact).dense(), 5)
    print(f"knots_ties, {size[0]} x {size[1]}, {size[3]} adapters of rank {size[2]}, one thread")
    print(f"  theirs, float64   {theirs_in}")
    print(f"  ours, to factors  {to_factors}: {theirs_in.times_slower_than(to_factors)}")
    print(f"  ours, to dense    {to_dense}: {theirs_in.times_slower_than(to_dense)}")
    print(f"  relative error    {relative_error(dense, theirs):.1e}   their norm {float(theirs.norm()):.12g}")
    print(f"  probe [3, 5]      {float(theirs[3, 5]):.12g}   ours {float(delta.rows(3, 4)[0, 5]):.12g}")

    config = {"merge_method": "ties", "merging_type": "mean", "topK": 100 * DENSITY, "scaling_coeffs": LAMBDA}
    deltas = [factor.B @ factor.A for factor in single]
    published, theirs_in = timed(lambda: as_published(deltas, config))
    dense, to_dense = best_of(lambda: ours(single).dense(), 5)
    print("knots_ties as published (float32 after the SVD), float32 factors")
    print(f"  theirs            {theirs_in}")
    print(f"  ours, to dense    {to_dense}: {theirs_in.times_slower_than(to_dense)}")
    print(f"  relative error    {relative_error(dense, published):.1e}")

    dare = {"dare": True, "dare_pruning_coeffs": 1 - DARE_KEPT, "dare_seed": 421, "topK": 100}
    published = as_published(deltas, {**config, **dare, "scaling_coeffs": DARE_LAMBDA})
    print("knots_dare_ties as published, their masks")
    print(f"  relative error    {relative_error(dare_with_their_masks(single, 421), published):.1e}")


if __name__ == "__main__":
    main()
