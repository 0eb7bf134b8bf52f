"""mergekit's task arithmetic, TIES and DARE on one weight beside ours, one thread each.

    python benchmarks/parity/mergekit.py --repo CLONE_OF_arcee-ai/mergekit
    python benchmarks/parity/mergekit.py --python PYTHON_OF_A_VENV_WITH_MERGEKIT

mergekit merges whole models: it needs base + delta of every adapter as dense weights. Here its merge task is
called directly on the deltas over a base of zeros, in its own process. With --repo only sparsify.py and
generalized_task_arithmetic.py are taken, beside empty stand-ins for the modules that they import; with
--python it is the installed package. Ours runs with `compat: mergekit`, and for DARE with the masks that
mergekit draws from torch's global generator.

The factors hold whole numbers, so that every delta is exact in float32 and no rounding decides what is
trimmed: what is compared is the rules.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peer import best_of, checked_out, relative_error
from torch import Tensor

from ray_merge.algebra.grid import chunk_rows
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spaces import Rule, Space
from ray_merge.methods.dare import dropped, weighted_sum
from ray_merge.methods.election import election
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "a6e402884ba9bc30da7f23e8304a35f19485de95"
FILES = ["mergekit/sparsify.py", "mergekit/merge_methods/generalized_task_arithmetic.py"]
WEIGHTS = [0.5, 1.0, 0.75, 0.25, 1.0, 0.5, 0.8, 0.6]
DENSITY, LAMBDA, SEED = 0.2, 0.6, 7
LARGEST_ENTRY = 2**10  # sums of 16 products stay below 2**24

RULES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"sparsify": None, "elect": False, "normalize": False, "rescale": False},
    "linear": {"sparsify": None, "elect": False, "normalize": True, "rescale": False},
    "ties": {"sparsify": "magnitude", "elect": True, "normalize": True, "rescale": False},
    "ties, normalize: false": {"sparsify": "magnitude", "elect": True, "normalize": False, "rescale": False},
    "dare_linear": {"sparsify": "random", "elect": False, "normalize": False, "rescale": True},
    "dare_ties": {"sparsify": "random", "elect": True, "normalize": False, "rescale": True},
}

STAND_INS = {
    "mergekit/__init__.py": "",
    "mergekit/merge_methods/__init__.py": "",
    "mergekit/architecture.py": "class WeightInfo: pass\n",
    "mergekit/common.py": (
        "class ModelReference: pass\nclass ImmutableMap:\n    def __class_getitem__(cls, key): return dict\n"
    ),
    "mergekit/graph.py": "class Task:\n    def __class_getitem__(cls, key): return cls\n",
    "mergekit/merge_methods/base.py": (
        "class ConfigParameterDef: pass\nclass MergeMethod: pass\nclass MergeTensorInput: pass\n"
    ),
}

RUNNER = """
import sys, time, torch
from types import SimpleNamespace
job_file, result_file, *folders = sys.argv[1:]
sys.path[:0] = folders
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, GTATask
from mergekit.sparsify import RescaleNorm, SparsificationMethod
torch.set_num_threads(1)
job = torch.load(job_file)
base = torch.zeros_like(job["deltas"][0])
results = {}
for name, rule in job["rules"].items():
    method = SimpleNamespace(
        consensus_method=ConsensusMethod.sum if rule["elect"] else None,
        sparsification_method=SparsificationMethod[rule["sparsify"]] if rule["sparsify"] else None)
    own = {i: {"weight": weight, "density": job["density"]} for i, weight in enumerate(job["weights"])}
    task = SimpleNamespace(
        method=method, base_model="base", weight_info=SimpleNamespace(name="w", is_embed=False),
        int8_mask=False, normalize=rule["normalize"], lambda_=job["lambda"],
        rescale_norm=RescaleNorm.l1 if rule["rescale"] else None, tensor_parameters=SimpleNamespace(data=own))
    tensors = {"base": base, **dict(enumerate(job["deltas"]))}
    torch.manual_seed(job["seed"])
    start = time.perf_counter()
    merged = GTATask.execute(task, tensors)
    results[name] = (merged, time.perf_counter() - start)
torch.save(results, result_file)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--repo", type=Path)
    where.add_argument("--python")
    parser.add_argument("--commit", default=COMMIT)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    factors = whole_number_factors(options.size, options.rank, options.seed)
    if options.python:
        theirs = run_theirs(options.python, factors, [])
    else:
        with checked_out(options.repo, options.commit, FILES) as folder:
            for name, text in STAND_INS.items():
                Path(folder, name).write_text(text)
            theirs = run_theirs(sys.executable, factors, [str(folder)])
    report(factors, theirs)


def whole_number_factors(size: int, rank: int, seed: int) -> list[Factor]:
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-LARGEST_ENTRY, LARGEST_ENTRY + 1, shape, generator=generator).float()

    return [Factor(whole(size, rank), whole(rank, size), 1.0) for _ in WEIGHTS]


def run_theirs(
    python: str, factors: Sequence[Factor], folders: Sequence[str]
) -> dict[str, tuple[Tensor, float]]:
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.pt"), Path(folder, "result.pt")
        deltas = [factor.B @ factor.A for factor in factors]
        torch.save(
            {
                "deltas": deltas,
                "weights": WEIGHTS,
                "rules": RULES,
                "density": DENSITY,
                "lambda": LAMBDA,
                "seed": SEED,
            },
            job,
        )
        subprocess.run([python, "-c", RUNNER, str(job), str(result), *folders], check=True)
        return torch.load(result)


def ours(name: str, factors: Sequence[Factor]) -> Tensor:
    if name.startswith("dare"):
        space = SiteFactors(factors).space("dense")
        return space.lift(dare_rule(name, space)).dense()
    method, _, keep_sum = name.partition(", ")
    parameters = {"density": DENSITY, "compat": "mergekit"} if method == "ties" else {}
    if keep_sum:
        parameters["normalize"] = False
    return merge_factors(method, factors, weight=WEIGHTS, lambda_=LAMBDA, **parameters).dense()


def dare_rule(name: str, space: Space) -> Rule:
    """Our rule with the masks that mergekit draws: torch.manual_seed, then one Bernoulli per adapter."""
    torch.manual_seed(SEED)
    masks = [torch.bernoulli(torch.full(space.shape, DENSITY)).bool() for _ in WEIGHTS]
    step = chunk_rows(space.shape[1])
    density = [DENSITY] * len(WEIGHTS)
    kept = dropped(space, density, "mergekit", lambda i, c, shape: masks[i][c * step : c * step + shape[0]])
    if name == "dare_linear":
        return weighted_sum(kept, [LAMBDA * weight for weight in WEIGHTS])
    return election(space, kept, WEIGHTS, LAMBDA, compat="mergekit", divide=False)


def report(factors: Sequence[Factor], theirs: dict[str, tuple[Tensor, float]]) -> None:
    print(
        f"mergekit, {tuple(next(iter(theirs.values()))[0].shape)}, {len(factors)} adapters, float32, one thread"
    )
    for name, (reference, their_seconds) in theirs.items():
        merged, ours_in = best_of(lambda name=name: ours(name, factors), 3)
        error, norm = relative_error(merged, reference), float(reference.double().norm())
        ratio = their_seconds / ours_in.wall
        print(
            f"  {name:23} error {error:7.1e}  norm {norm:.9g}  "
            f"theirs {their_seconds:.3f} s  ours {ours_in.wall:.4f} s  ({ratio:.1f} x by the clock)"
        )


if __name__ == "__main__":
    main()
