"""PCB-Merging: the authors' function beside ours, on the same deltas.

    python benchmarks/parity/pcb.py --repo CLONE_OF_duguodong7/pcb-merging

pcb-merging.py goes on with an experiment that lacks its data, so only its functions are taken. Theirs merges
flat vectors of a whole model; here the model is one weight. Ours runs with `compat: authors`. The two forms in
their vision_source_code (other clamps, other signs) and the softmax of the paper have no runnable counterpart.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peer import adapters, best_of, checked_out, relative_error
from torch import Tensor

from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "5897888b5d24adfcd33e124793d113746e00f3ff"
FILE = "pcb-merging.py"
RATIO = 0.1
SCALE = 32.0  # entries of about 1, so that their tanh saturates


def functions(path: Path) -> dict[str, Any]:
    """What the file defines, without running its experiment."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names: dict[str, Any] = {"torch": torch}
    exec(compile(tree, str(path), "exec"), names)
    return names


def theirs(defined: dict[str, Any], factors: Sequence[Factor]) -> Tensor:
    deltas = [factor.scale * factor.B @ factor.A for factor in factors]
    merged, _, _ = defined["PCB_merge"](torch.stack([delta.flatten() for delta in deltas]), pcb_ratio=RATIO)
    return merged.reshape(deltas[0].shape)


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
    plain = adapters(options.size, options.size, options.rank, options.adapters, options.seed, torch.float64)
    factors = [Factor(factor.B, factor.A, SCALE) for factor in plain]
    with checked_out(options.repo, options.commit, [FILE]) as folder:
        defined = functions(Path(folder, FILE))
        reference, their_time = best_of(lambda: theirs(defined, factors), 3)
    merged, our_time = best_of(
        lambda: merge_factors("pcb", factors, density=RATIO, compat="authors").dense(), 3
    )
    print(
        f"pcb, {options.size} x {options.size}, {options.adapters} adapters, float64, one thread\n"
        f"  error {relative_error(merged, reference):.1e}  norm {float(reference.norm()):.12g}  "
        f"probe [3, 5] {float(reference[3, 5]):.12g}\n"
        f"  theirs {their_time}\n  ours   {our_time}"
    )
    paper, paper_time = best_of(lambda: merge_factors("pcb", factors, density=RATIO).dense(), 3)
    print(f"  paper's form, ours: {paper_time}, differs by {relative_error(paper, reference):.2f}")


if __name__ == "__main__":
    main()
