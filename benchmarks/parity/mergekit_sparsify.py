"""mergekit's Breadcrumbs and DELLA on one weight beside ours.

    python benchmarks/parity/mergekit_sparsify.py --python PYTHON_OF_A_VENV_WITH_MERGEKIT_0.1.5

Theirs is the installed package: the registered method's merge of one tensor, over a base of zeros, in its own
process. Ours runs with `compat: mergekit` where that exists, and for DELLA with the masks that mergekit draws
from torch's global generator. The factors hold whole numbers (see mergekit.py): what is compared is the rules.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit import WEIGHTS, whole_number_factors
from peer import best_of, relative_error
from torch import Tensor

from ray_merge.algebra.grid import chunk_rows
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.dare import weighted_sum
from ray_merge.methods.della import sampled
from ray_merge.methods.election import election
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.methods.registry import at_site, get, resolve_parameters
from ray_merge.spec import Factor

LAMBDA, SEED = 0.6, 7
CRUMBS, DELLA = {"density": 0.3, "gamma": 0.05}, {"density": 0.6, "epsilon": 0.15}

# name -> (method, what both get per adapter, normalize)
CASES: dict[str, tuple[str, dict[str, float], bool]] = {
    "breadcrumbs": ("breadcrumbs", CRUMBS, False),
    "breadcrumbs, no room": ("breadcrumbs", {"density": 0.9, "gamma": 0.3}, False),
    "breadcrumbs_ties": ("breadcrumbs_ties", CRUMBS, False),
    "breadcrumbs_ties, normalize": ("breadcrumbs_ties", CRUMBS, True),
    "della": ("della", DELLA, True),
    "della, normalize: false": ("della", DELLA, False),
    "della_linear": ("della_linear", DELLA, False),
}

RUNNER = """
import sys, time, torch
from types import SimpleNamespace
from mergekit.merge_methods.registry import get
from mergekit.sparsify import della_magprune
torch.set_num_threads(1)
job = torch.load(sys.argv[1])
deltas, base = job["deltas"], torch.zeros_like(job["deltas"][0])
group = SimpleNamespace(
    base=SimpleNamespace(tensor=base), non_base=[SimpleNamespace(tensor=d, id=i) for i, d in enumerate(deltas)])
results = {}
for name, (method, own, normalize) in job["cases"].items():
    each = {key: dict.fromkeys(range(len(deltas)), value) for key, value in own.items()}
    torch.manual_seed(job["seed"])
    start = time.perf_counter()
    merged = get(method).merge_group(
        group, weight=dict(enumerate(job["weights"])), normalize=normalize, int8_mask=False,
        rescale=method.startswith("della"), **{"lambda": job["lambda"]}, **each)
    seconds, masks = time.perf_counter() - start, None
    if method.startswith("della"):
        torch.manual_seed(job["seed"])
        masks = [della_magprune(d, rescale_norm=None, **own) != 0 for d in deltas]
    results[name] = (merged, masks, seconds)
torch.save(results, sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    factors = whole_number_factors(options.size, options.rank, options.seed)
    print(f"mergekit, {options.size} x {options.size}, {len(factors)} adapters, float32, one thread")
    for name, (reference, masks, their_seconds) in run_theirs(options.python, factors).items():
        merged, ours_in = best_of(lambda name=name, masks=masks: ours(name, factors, masks), 3)
        print(
            f"  {name:28} error {relative_error(merged, reference):7.1e}  "
            f"norm {float(reference.double().norm()):.9g}  theirs {their_seconds:.3f} s  ours {ours_in.wall:.3f} s"
        )


def run_theirs(python: str, factors: Sequence[Factor]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.pt"), Path(folder, "result.pt")
        deltas = [factor.B @ factor.A for factor in factors]
        torch.save(
            {"deltas": deltas, "weights": WEIGHTS, "cases": CASES, "lambda": LAMBDA, "seed": SEED}, job
        )
        subprocess.run([python, "-I", "-c", RUNNER, str(job), str(result)], check=True)
        return torch.load(result)


def ours(name: str, factors: Sequence[Factor], masks: Sequence[Tensor] | None) -> Tensor:
    method, own, normalize = CASES[name]
    given: dict[str, Any] = {**own, "normalize": normalize}
    if method != "breadcrumbs":
        given["compat"] = "mergekit"
    if masks is None:
        return merge_factors(method, factors, weight=WEIGHTS, lambda_=LAMBDA, **given).dense()
    names = [str(index) for index in range(len(factors))]
    by_name = {**given, "weight": dict(zip(names, WEIGHTS, strict=True)), "lambda": LAMBDA}
    p = at_site(get(method), resolve_parameters(get(method), by_name, names), names, "")
    space = SiteFactors(factors).space("dense")
    step = chunk_rows(space.shape[1])
    numbers = [(~mask).float() for mask in masks]  # 0 is below every probability, 1 below none
    kept = sampled(space, p, lambda i, c, shape: numbers[i][c * step : c * step + shape[0]])
    if method == "della_linear":
        rule = weighted_sum(kept, [LAMBDA * weight for weight in WEIGHTS])
    else:
        rule = election(space, kept, WEIGHTS, LAMBDA, compat="mergekit", divide=normalize)
    return space.lift(rule).dense()


if __name__ == "__main__":
    main()
