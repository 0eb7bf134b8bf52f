"""DELLA: the authors' MAGPRUNE beside ours, on the same deltas.

    python benchmarks/parity/della.py --repo CLONE_OF_declare-lab/della

Their fork of mergekit draws Bernoulli masks. For the comparison `torch.bernoulli` is replaced by "the probability
is above a cut", in theirs, and ours gets the cut as its random numbers: the same entries are kept if and only if
the probabilities are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from peer import adapters, best_of, checked_out, relative_error
from torch import Tensor

from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.dare import weighted_sum
from ray_merge.methods.della import sampled
from ray_merge.methods.registry import at_site, get, resolve_parameters
from ray_merge.spec import Factor

COMMIT = "80675156d6742edb81548c8037947d92dc79dc66"
FILE = "mergekit/mergekit/sparsify.py"
DENSITY, EPSILON, CUT = 0.7, 0.07, 0.6801  # README: drop 0.3, window 0.14


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("their_sparsify", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(module: ModuleType, factors: Sequence[Factor]) -> Tensor:
    with mock.patch.object(torch, "bernoulli", lambda p: (p > CUT).to(p.dtype)):
        return sum(
            module.rank_magnitude(factor.B @ factor.A, DENSITY, rescale=True, epsilon=EPSILON)
            for factor in factors
        )


def ours(factors: Sequence[Factor]) -> Tensor:
    names = [str(index) for index in range(len(factors))]
    method = get("della_linear")
    given = {"density": DENSITY, "epsilon": EPSILON}
    p = at_site(method, resolve_parameters(method, given, names), names, "")
    space = SiteFactors(factors).space("dense")
    kept = sampled(space, p, lambda adapter, index, shape: torch.full(shape, CUT))
    return space.lift(weighted_sum(kept, p.weight)).dense()


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
    with checked_out(options.repo, options.commit, [FILE]) as folder:
        module = load(Path(folder, FILE))
        reference, their_time = best_of(lambda: theirs(module, factors), 3)
    merged, our_time = best_of(lambda: ours(factors), 3)
    print(
        f"della_linear, {options.size} x {options.size}, {options.adapters} adapters, one thread "
        f"(theirs rounds to float32)\n"
        f"  error {relative_error(merged, reference):.1e}  norm {float(reference.double().norm()):.12g}  "
        f"probe [3, 5] {float(reference[3, 5]):.12g}\n"
        f"  theirs {their_time}\n  ours   {our_time}"
    )


if __name__ == "__main__":
    main()
