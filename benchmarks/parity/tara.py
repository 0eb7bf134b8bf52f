"""TARA-A, TARA-B and AdaMerging: the authors' code beside ours, on the same batches of a tiny CLIP, one thread each.

    python benchmarks/parity/tara.py --repo CLONE_OF_wooseong97/TARA-Merge

Theirs is `train_merged_model` of merge_with_preference.py as published: their merge model, wrapper layers, loss and
AdamW loop, on their CLIP classifier. Anchors are computed on both sides. Their shared basis is an SVD in float32, which
turns directions of close singular values: so far apart, some 1e-5, are the phi of TARA-B. Then, with numbers, where
their code departs from the paper or fails, and what ours does there. learned_peer.py says which PEFT it needs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from clip_school import BATCH, INIT, RATE, SMALL, School, anchors, learn, make_school, probes
from excerpts import cuda_is_the_cpu
from learned_peer import checked_out, coefficients, compare, configs, listed, outcome, quiet, their_learning
from peer import import_peer
from safetensors.torch import load_file
from torch import Tensor

from ray_merge.algebra.directions import Directions
from ray_merge.algebra.objectives import information, rank_penalty, tchebycheff
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.merge_factors import merge_factors
from ray_merge.spec import Factor

COMMIT = "efbae686f73d2d2c9487d38f8caff24cb43383fd"
THEIRS = {"tara_a": ("tara-a", "stch"), "tara_b": ("tara-b", "stch"), "adamerging": ("weight", "default")}
"""Method -> their --merge_type and --loss_type."""

STEPS = 50
FIRST = "vision_model.encoder.layers.0.self_attn.q_proj"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, checked_out(options.repo, COMMIT):
        school = make_school(School(folder=Path(folder, "school")))
        print(f"{len(school.tasks)} tasks, {school.blocks} blocks of {school.width}, float32, {STEPS} steps")
        models = side_by_side(school, {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE})
        small = make_school(School.small(Path(folder, "small")))
        print(f"\nfor the test: {SMALL}")
        side_by_side(small, SMALL, probe=True)
        print("\nwhere their code departs from the paper or fails")
        no_bars()
        overflow()
        class_masks()
        regulariser(school, models)
        mixed_ranks()
        wide_basis(Path(folder))
        static_scale(Path(folder))


def side_by_side(school: School, given: dict[str, Any], *, probe: bool = False) -> dict[str, Any]:
    """Print all methods; their models."""
    ours = learn(school, {name: dict(given) for name in THEIRS})
    theirs = their_anchors(school)
    gap = max(abs(a - b) for a, b in zip(theirs, anchors(school).values(), strict=True))
    print(f"anchors: {listed(theirs)}; max |theirs - ours| {gap:.1e}")
    train, models = import_peer("merge_with_preference").train_merged_model, {}
    for name, (merge_type, loss_type) in THEIRS.items():
        models[name] = their_learning(
            train,
            school,
            [{"entropy": one} for one in theirs],
            num_epochs=1,
            stch_alpha=1.0,
            merge_type=merge_type,
            loss_type=loss_type,
            **given,
        )
        phi = coefficients(models[name])
        compare(name, phi, {site: one.flatten() for site, one in ours[name].items()})
        if probe:
            print(f"  |phi - {INIT}| of the first site and of all, weighed sum: {listed(probes(phi))}")
    return models


def their_anchors(school: School) -> list[float]:
    """The entropies of single adapters on all images, by their classifier and loss."""
    utils, found = import_peer("utils"), []
    for config, task in zip(configs(school), school.tasks, strict=True):
        with quiet(), torch.no_grad():
            model = utils.load_lora_model(utils.get_base_model(config), str(school.adapter(task))).eval()
            found.append(float(their_entropy(model(school.images(task)))))
    return found


def their_loss(baselines: Any, *, alpha: float = 1.0) -> Any:
    """Their STCHLoss of tasks with equal preference."""
    count = len(baselines)
    config = SimpleNamespace(task=SimpleNamespace(name="classification"))
    return import_peer("models").STCHLoss([config] * count, baselines, [1 / count] * count, alpha)


def their_entropy(logits: Tensor) -> Tensor:
    return their_loss([0.0])._get_score(logits, None, 0)


def theirs_at(logits: Sequence[Tensor], alpha: float) -> tuple[float, list[float]]:
    """Their Psi and its derivative with respect to each entropy, which is minus that with respect to the anchor."""
    z = torch.full((len(logits),), 0.3, requires_grad=True)
    value = their_loss(z, alpha=alpha)(logits, [None] * len(logits))
    (slope,) = torch.autograd.grad(value.sum(), z)
    return float(value.detach()), (-slope).tolist()


def ours_at(logits: Sequence[Tensor], alpha: float, *, absolute: bool = False) -> tuple[float, list[float]]:
    values = torch.stack([information(one) for one in logits])
    half = torch.full((len(values),), 1 / len(values))
    psi, weights = tchebycheff(values, half, torch.full((len(values),), 0.3), alpha=alpha, absolute=absolute)
    return float(psi), weights.tolist()


def said(result: tuple[float, list[float]]) -> str:
    return f"Psi {result[0]:.6g}, dPsi/df {', '.join(f'{one:.4f}' for one in result[1])}"


SURE_AND_UNSURE = (torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.0]]))


def no_bars() -> None:
    """A task below its anchor is pushed further down; the paper's bars push it up to the anchor."""
    values = listed([float(information(one)) for one in SURE_AND_UNSURE])
    print(f"no |f - z| (f {values}; z 0.3, 0.3; alpha 1)\n  theirs {said(theirs_at(SURE_AND_UNSURE, 1.0))}")
    print(f"  ours, absolute: false {said(ours_at(SURE_AND_UNSURE, 1.0))}")
    print(
        f"  ours, absolute: true (the paper's formula) {said(ours_at(SURE_AND_UNSURE, 1.0, absolute=True))}"
    )


def overflow() -> None:
    """Log sum exp without a maximum taken out."""
    print(f"alpha 0.004\n  theirs {said(theirs_at(SURE_AND_UNSURE, 0.004))}")
    print(f"  ours {said(ours_at(SURE_AND_UNSURE, 0.004))}")


def class_masks() -> None:
    """A task of two classes under a head of three: anchors mask the third, the training loss does not."""
    logits = torch.tensor([[0.2, 1.5, 0.4], [1.0, 1.2, -0.3], [0.1, 2.0, 0.6]])

    class Fixed(torch.nn.Module):
        mask_class = 1

        def forward(self, **_: Any) -> Tensor:
            return logits.clone()

    validate = import_peer("lora_vit_sequence_classification").validate_epoch
    loss = import_peer("models").SequenceClassificationLoss()
    with quiet():
        anchor = validate(None, Fixed(), [{"labels": torch.tensor([0, 2, 0])}], loss, "cpu")["entropy"]
    own = information(logits[:, [0, 2]])
    print("a class that the task does not have, same model and rows")
    print(f"  theirs: anchor {anchor:.6f}, value in training {float(their_entropy(logits)):.6f}")
    print(f"  ours, on the task's own head: anchor and value {float(own):.6f}")


def regulariser(school: School, models: dict[str, Any]) -> None:
    """Their divisor is the number of coefficients; of the shared form that is T times what a rank can be."""
    print("penalty on the rank, mean over sites, at the phi that were learned")
    for name, kind in (("tara_a", "direction"), ("tara_b", "shared")):
        phi = coefficients(models[name])
        ours = [penalty(school, site, kind, one) for site, one in phi.items()]
        theirs = float(models[name].reg_loss(1.0))
        print(f"  {name}: theirs {theirs:.6f}, ours {sum(ours) / len(ours):.6f}")


def penalty(school: School, site: str, kind: Any, phi: Tensor) -> float:
    directions = Directions(SiteFactors(factors(school, site)), kind)
    return float(rank_penalty(*directions.update(phi.reshape(directions.phi_shape))))


def factors(school: School, site: str) -> list[Factor]:
    found = []
    for task in school.tasks:
        tensors = load_file(school.adapter(task) / "adapter_model.safetensors")
        B, A = (tensors[f"base_model.model.{site}.lora_{side}.weight"] for side in "BA")
        found.append(Factor(B, A, school.multiple))
    return found


def mixed_ranks() -> None:
    """Their forward spreads one coefficient per adapter over rows of the mean rank; what it exports, over its own."""
    layer = import_peer("models.merging_utils").DiagonalLinear
    print("one coefficient per adapter, ranks 4 and 8, coefficients 1 and 0: rows that count")
    theirs = layer(12, [1, 1], [4, 8], "weight", 2.0)
    theirs.logit.data = torch.tensor([1.0, 0.0])
    forward, exported = float(theirs(torch.ones(1, 12)).sum()), float(theirs._logit_to_coeff().sum())
    site = SiteFactors([Factor(torch.ones(3, r), torch.ones(r, 5), 1.0) for r in (4, 8)])
    _, A = Directions(site, "adapter").update(torch.tensor([1.0, 0.0]))
    print(
        f"  theirs {forward:g} in the forward pass, {exported:g} in its export; ours {float(A[:, 0].sum()):g}"
    )
    odd = layer(11, [1, 1], [4, 7], "weight", 2.0)
    print(f"  ranks 4 and 7: theirs {outcome(lambda: odd(torch.ones(1, 11)).sum())}")


def wide_basis(folder: Path) -> None:
    """More ranks than rows: the shared basis has min(O, S) directions, their slice asks for S."""
    school = make_school(School(folder=folder / "wide", width=16, rank=8, blocks=1, n_rows=4))
    train = import_peer("merge_with_preference").train_merged_model
    options = {"num_epochs": 1, "stch_alpha": 1.0, "merge_type": "tara-b", "loss_type": "stch"}
    none = [{"entropy": 0.0}] * len(school.tasks)
    theirs = outcome(lambda: their_learning(train, school, none, steps=1, batch_size=4, **options))
    ours = learn(school, {"tara_b": {"steps": 1, "batch_size": 4}})["tara_b"][FIRST]
    print(f"S = {4 * school.rank} directions of {school.width} rows\n  theirs {theirs}")
    print(f"  ours: phi {tuple(ours.shape)}, {'finite' if bool(ours.isfinite().all()) else 'NaN'}")


def static_scale(folder: Path) -> None:
    """Their baselines multiply B A; what learns multiplies s B A."""
    school = make_school(School(folder=folder / "scaled", multiple=2.0, blocks=1, n_rows=4))
    held = {
        task: {"site.lora_A.weight": one.A, "site.lora_B.weight": one.B}
        for task, one in zip(school.tasks, factors(school, FIRST), strict=True)
    }
    with cuda_is_the_cpu(), quiet():
        theirs = import_peer("merge_strategy").TA(held, scaling_factor=INIT)["site.weight"]
    ours = merge_factors("task_arithmetic", factors(school, FIRST), lambda_=INIT).dense()
    print("task arithmetic of adapters with alpha / r = 2, norm of a site's update")
    print(f"  theirs {float(theirs.norm()):.6f}, ours {float(ours.norm()):.6f}")


if __name__ == "__main__":
    main()
