"""NSC: the authors' code beside ours, on the same batches of a tiny CLIP of 32 blocks, one thread each.

    python benchmarks/parity/nsc.py --repo CLONE_OF_wonyoung01/nsc_merging

Theirs is `train_merged_model` of merge.py as published with --kernel: their KernelMergeModel with hooks on v_proj of
blocks 24 to 31 (fixed in the code: hence 32 blocks, rank 16 and their data sets' names in their order), their loss and
AdamW loop. Then, with numbers, where their code departs from the paper or fails, and what ours does there.
learned_peer.py says which PEFT it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from clip_school import BATCH, CLASSES, INIT, RATE, SMALL, School, learn, make_school, probes
from learned_peer import checked_out, coefficients, compare, configs, listed, outcome, quiet, their_learning
from peer import import_peer
from safetensors.torch import load_file
from torch import Tensor, nn

from ray_merge.algebra.objectives import null_space_ratio, row_basis

COMMIT = "412098bda9b1126b0e054e2d6970e9014ef7b90e"
STEPS, ADAPTER_RANK = 50, 16
THEIRS = {"merge_type": "weight", "coeff_type": "linear", "tracking": False, "kernel": True, "ada": False}
"""Their options for one coefficient per adapter and layer, learned by null-space ratios."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    three = tuple(CLASSES)[:3]
    with tempfile.TemporaryDirectory() as folder, checked_out(options.repo, COMMIT):
        here = Path(folder)
        deep = make_school(
            School(folder=here / "deep", tasks=three, blocks=32, width=64, rank=ADAPTER_RANK, n_rows=48)
        )
        print(f"3 tasks, {deep.blocks} blocks of {deep.width}, rank {deep.rank}, float32, {STEPS} steps")
        given = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE}
        side_by_side(deep, given)
        every_module(deep, given)
        print(f"\nfor the test, their rank set to 4 and their blocks to the last one: {SMALL}")
        small = make_school(School.small(here / "small"))
        with their_constants(small):
            side_by_side(small, SMALL, probe=True)
        print("\nwhere their code departs from the paper or fails")
        few_blocks(small)
        order_of_tasks(here)
        other_rank(small)
        scale()
        gauge()
        padding()
        inside()


def side_by_side(school: School, given: dict[str, Any], *, probe: bool = False) -> None:
    ours = learn(school, {"nsc": {**given, "modules": "v_proj"}})["nsc"]
    theirs = coefficients(their_run(school, given))
    compare("nsc", theirs, ours)
    still = sum(bool((one == torch.tensor(INIT)).all()) for one in theirs.values())
    print(f"  {still} sites lie behind the last one that is measured and stay at {INIT}")
    if probe:
        print(f"  |phi - {INIT}| of the first site and of all, weighed sum: {listed(probes(theirs))}")


def their_run(school: School, given: dict[str, Any]) -> Any:
    """Their model after learning."""
    sizes = {key: given[key] for key in ("steps", "batch_size", "learning_rate")}
    train = import_peer("merge").train_merged_model
    return their_learning(train, school, None, num_steps=given["steps"], **sizes, **THEIRS)


@contextlib.contextmanager
def their_constants(school: School) -> Iterator[None]:
    """The two constants that hold for their LLaVA alone, at this school's size."""
    kernel, model = import_peer("models.kernel_projection"), import_peer("models").KernelMergeModel
    rank, blocks = kernel.NSC_LORA_RANK, model.activate_projectors.__defaults__
    kernel.NSC_LORA_RANK = school.rank
    model.activate_projectors.__defaults__ = (str(school.blocks - 1), "v_proj")
    try:
        yield
    finally:
        kernel.NSC_LORA_RANK, model.activate_projectors.__defaults__ = rank, blocks


def every_module(school: School, given: dict[str, Any]) -> None:
    """The paper speaks of the last quarter of layers; their code looks at v_proj there, ours at all adapted modules."""
    short = {**given, "steps": 10}
    all_of_them = learn(school, {"nsc": short}, "every")["nsc"]
    of_v = learn(school, {"nsc": {**short, "modules": "v_proj"}}, "v")["nsc"]
    gap = max(float((all_of_them[site] - of_v[site]).abs().max()) for site in of_v)
    print(
        f"  ours with all adapted modules of these blocks in the place of v_proj: phi differs by {gap:.4f} in 10 steps"
    )


def few_blocks(school: School) -> None:
    """Blocks 24 to 31 by number: a model that has none is measured nowhere, and nothing says so."""
    phi = coefficients(their_run(school, {**SMALL, "steps": 2}))
    moved = max(float((one - INIT).abs().max()) for one in phi.values())
    ours = learn(school, {"nsc": {**SMALL, "steps": 2}}, "few")["nsc"]
    went = max(float((one - INIT).abs().max()) for one in ours.values())
    print(f"a model of {school.blocks} blocks, 2 steps: their phi moves by {moved:.4f}, ours by {went:.4f}")


def order_of_tasks(folder: Path) -> None:
    """Rows of A are looked up by the data set's name, whatever order the adapters are given in."""
    tasks = ("eurosat", "stanford_cars", "dtd")
    school = make_school(
        School(folder=folder / "order", tasks=tasks, blocks=32, width=64, rank=ADAPTER_RANK, n_rows=4)
    )
    found = their_ratios(school)
    print("omega at the first of these v_proj, adapters in the order eurosat, stanford_cars, dtd")
    for task, (theirs, ours) in found.items():
        print(f"  {task}: theirs {theirs:.6f}, ours {ours:.6f}")


def their_ratios(school: School) -> dict[str, tuple[float, float]]:
    """Task -> omega at the first hooked module: theirs, and ours of the inputs that it had and the task's own A."""
    folders = {f"{task}-classification": str(school.adapter(task)) for task in school.tasks}
    with quiet(), torch.no_grad():
        model = import_peer("models").KernelMergeModel(
            cfgs=configs(school), model_dirs=[str(school.folder)] * 3, lora_dicts=folders, preference=None,
            merge_type="weight", coeff_type="linear", scaling_coeff=INIT * 3,
        ).eval()  # fmt: skip
    inputs: list[Tensor] = []
    site = "vision_model.encoder.layers.24.self_attn.v_proj"
    hooked = model.vit.model.get_submodule(site).lora_A[model.scaled_name][0]
    hooked.register_forward_hook(lambda _module, args, _out: inputs.append(args[0]))
    with quiet(), torch.no_grad():
        model([school.images(task) for task in school.tasks])
    found = {}
    for task, x in zip(school.tasks, inputs, strict=True):
        losses = model.loss_cluster.kernel_losses[f"{task}-classification"]
        found[task] = float(losses[site][0]), our_ratio(x, own_rows(school, task, site))
    return found


def own_rows(school: School, task: str, site: str) -> Tensor:
    return load_file(school.adapter(task) / "adapter_model.safetensors")[
        f"base_model.model.{site}.lora_A.weight"
    ]


def other_rank(school: School) -> None:
    """Rows are cut out 16 by 16."""
    with quiet():
        kernel = import_peer("models.kernel_projection")
    projector = their_projector(normal(4, 32, seed=0))
    rows = kernel._get_start_end("dtd-classification")
    x, y = normal(3, 32, seed=2), normal(3, 12, seed=1)[..., rows[0] : rows[1]]
    print(f"rank {school.rank}: their rows of dtd are {rows[0]} to {rows[1]} of 12")
    print(f"  theirs {outcome(lambda: projector.get_ratio(x, y))}; ours takes any rank, each its own")


def their_projector(A: Tensor) -> Any:
    layer = nn.Linear(A.shape[1], A.shape[0], bias=False)
    layer.weight.data = A
    return import_peer("models.kernel_projection").KernelProjector("site", layer)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def our_ratio(x: Tensor, A: Tensor) -> float:
    return float(null_space_ratio(x.flatten(0, -2), row_basis(A).to(x)).mean())


def scale() -> None:
    """The hooked rows are s A, the cached inverse is of A A^T."""
    A, x = normal(16, 32, seed=3), normal(5, 32, seed=4)
    print("alpha / r folded into the rows that are hooked, omega (rank 16 of 32 columns)")
    for s in (0.5, 1.0, 1.4, 2.0):
        theirs = float(their_projector(A).get_ratio(x, x @ (s * A).T))
        print(f"  alpha / r {s:g}: theirs {theirs:.6f}, ours {our_ratio(x, s * A):.6f}")


def gauge() -> None:
    """A and c A span the same rows; 1e-8 on the diagonal of A A^T is much where A is small."""
    A, x = normal(16, 32, seed=3), normal(5, 32, seed=4)
    print("the same rows made smaller, omega")
    for c in (1.0, 1e-3, 1e-5):
        theirs = float(their_projector(c * A).get_ratio(x, x @ (c * A).T))
        print(f"  {c:g} A: theirs {theirs:.6f}, ours {our_ratio(x, c * A):.6f}")


def padding() -> None:
    """A mean over all positions, masked or not."""
    A, x = normal(16, 32, seed=3), normal(2, 6, 32, seed=4)
    x[0, 2:] = normal(1, 16, seed=5) @ A + normal(1, 32, seed=7)  # the hidden state of 4 padding tokens
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 2:] = False
    theirs = float(their_projector(A).get_ratio(x, x @ A.T))
    print(f"4 of 12 tokens are padding, omega: theirs {theirs:.6f}, ours {our_ratio(x[mask], A):.6f}")


def inside() -> None:
    """An activation in the row space of A: the root of what rounding leaves, and its slope."""
    A = normal(16, 32, seed=3)
    x = normal(64, 16, seed=6) @ A
    leaf = x.clone().requires_grad_()
    theirs = their_projector(A).get_ratio(leaf, leaf @ A.T)
    theirs.backward()
    own = x.clone().requires_grad_()
    ours = null_space_ratio(own, row_basis(A).float()).mean()
    ours.backward()
    print("activations inside the row space, omega and the largest |gradient|")
    print(f"  theirs {float(theirs.detach()):.3g}, {float(leaf.grad.abs().max()):.3g}")
    print(f"  ours {float(ours.detach()):.3g}, {float(own.grad.abs().max()):.3g}")


if __name__ == "__main__":
    main()
