"""EMR-Merging: the authors' function beside ours, on the same deltas.

    python benchmarks/parity/emr.py --repo CLONE_OF_harveyhuang18/EMR_Merging

Theirs: emr_merge of merge_vit/src/main_emr_merging.py (a model of several tensors) and of main_emr_30_vits.py (flat
vectors). Ours: `emr` at each weight, and the rescalers of the model from the sums that a run's receipts carry.
Their rescalers are added up in float32, which is all the difference that there is. Entries whose sum is exactly zero
(`compat: authors`) are made by a second pair of adapters that cancel.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from excerpts import function, source
from peer import adapters, best_of, relative_error
from torch import Tensor

from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.catalogue.emr import rescaler
from ray_merge.methods.emr import Unified
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.registry import at_site, get, resolve_parameters
from ray_merge.spec import Factor

COMMIT = "cc225ecb5589aae273dc10889676d94366cd34fc"
BY_TENSOR, FLAT = "merge_vit/src/main_emr_merging.py", "merge_vit/src/main_emr_30_vits.py"
SHAPES = [(192, 192), (48, 96)]

Model = Sequence[Sequence[Factor]]
"""For each weight the factors of all adapters."""


def model(rank: int, count: int, seed: int) -> Model:
    """Two weights of different size; the last two adapters cancel in the first row of each, the others are 0 there."""
    sites = []
    for place, shape in enumerate(SHAPES):
        factors = adapters(*shape, rank, count, seed + place, torch.float64)
        for factor in factors:
            factor.B[0] = 0.0
        factors[-1].B[0] = 1.0
        factors[-2].B[0] = -1.0
        factors[-1].A.copy_(factors[-2].A)
        sites.append(factors)
    return sites


def theirs(code: Any, sites: Model) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Per adapter its updates of all weights, and the unified vectors; by tensors."""
    names = [f"w{place}" for place in range(len(sites))]
    vectors = [
        SimpleNamespace(vector={n: f[i].B @ f[i].A for n, f in zip(names, sites, strict=True)})
        for i in range(len(sites[0]))
    ]
    unified, masks, rescalers = code(vectors)
    return [[unified[n] * masks[n][i] * rescalers[i] for n in names] for i in range(len(vectors))], [
        unified[n] for n in names
    ]


def theirs_flat(code: Any, sites: Model) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The same of the whole model as one vector."""
    flat = torch.stack(
        [torch.cat([(f[i].B @ f[i].A).flatten() for f in sites]) for i in range(len(sites[0]))]
    )
    unified, masks, rescalers = code(flat)

    def split(vector: Tensor) -> list[Tensor]:
        parts = vector.split([math.prod(shape) for shape in SHAPES])
        return [part.view(shape) for part, shape in zip(parts, SHAPES, strict=True)]

    return [split(unified * masks[i] * rescalers[i]) for i in range(len(flat))], split(unified)


def ours(sites: Model, share: Any) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The same by our kernel; `share` is what a weight's sums count."""
    names = [str(i) for i in range(len(sites[0]))]
    method = get("emr")
    given = at_site(method, resolve_parameters(method, {"compat": "authors"}, names), names, "w")
    merged = [merge_site("emr", SiteFactors(f), given, names=names, site="w", seed=0) for f in sites]
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for delta, shape in zip(merged, SHAPES, strict=True):
        assert isinstance(delta, Unified)
        for index in range(delta.elected.space.n_chunks):
            sums += torch.tensor(delta.elected.look(index).sums) * share(shape)
    rescalers = [rescaler(*pair) for pair in sums.tolist()]
    return [
        [d.per_adapter[i].dense() / d.rescalers[i] * rescalers[i] for d in merged]  # type: ignore[attr-defined]
        for i in range(len(names))
    ], [delta.dense() for delta in merged]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--commit", default=COMMIT)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sites = model(options.rank, options.adapters, options.seed)
    print(f"emr, weights of {SHAPES}, {options.adapters} adapters, float64, one thread")
    cases = [
        ("by tensor", BY_TENSOR, theirs, lambda shape: 1.0 / math.prod(shape)),
        ("flat", FLAT, theirs_flat, lambda shape: 1.0),
    ]
    for name, file, run, share in cases:
        code = function(source(options.repo, options.commit, file), "emr_merge", {"torch": torch})
        (parts, unified), their_time = best_of(lambda code=code, run=run: run(code, sites), 3)
        (our_parts, our_unified), our_time = best_of(lambda share=share: ours(sites, share), 3)
        off = max(relative_error(a, b) for a, b in zip(our_unified, unified, strict=True))
        print(f"  {name}: unified {off:.1e}")
        for i, (mine, peer) in enumerate(zip(our_parts, parts, strict=True)):
            flat, wanted = (torch.cat([w.flatten().double() for w in some]) for some in (mine, peer))
            print(
                f"    adapter {i}: error {relative_error(flat, wanted):.1e}  norm {float(wanted.norm()):.12g}"
            )
        print(
            f"    unified norm {float(torch.cat([w.flatten() for w in unified]).norm()):.12g}\n"
            f"    theirs {their_time}\n    ours   {our_time}"
        )


if __name__ == "__main__":
    main()
