"""phi of a learned merge beside its result: ray_merge/phi.safetensors.

    phi.<site>              as the method takes it (DESIGN: merge_factors)
    history.objective ...   the curves of learning (learn/state.py), T tasks as the header names them

The state in the store, which the workers read, may be removed afterwards; this stays with the merge.
"""

from __future__ import annotations

import json

from ray_merge.identity import canonical_json
from ray_merge.methods.registry import get
from ray_merge.spec import Merge
from ray_merge.storage.store import Stores
from ray_merge.work.job import LEAF, PhiIndex
from ray_merge.work.stage_job import METADATA_KEY

PHI = "ray_merge/phi.safetensors"


def is_learned(merge: Merge) -> bool:
    """Whether a merge has a phi."""
    return bool(get(merge.method).learned)


def phi_bytes(index: PhiIndex, merge: Merge, stores: Stores) -> bytes:
    """The object that is published, made of the last state in the store."""
    import safetensors.torch

    tensors = safetensors.torch.load(stores.open(index.store).read(index.info.path))
    found = {f"{LEAF}{site}": tensors[LEAF + leaf].clone() for site, leaf in index.leaves.items()}
    found |= {name: tensor for name, tensor in tensors.items() if name.startswith("history.")}
    about = {"method": merge.method, "adapters": list(merge.adapters), "tasks": list(index.tasks)}
    # One entry: safetensors writes several of them in an order of its own, another one each time.
    return safetensors.torch.save(found, {METADATA_KEY: canonical_json(about)})


def learned_lines(data: bytes) -> list[str]:
    """What a model card says of the learning: Psi and each task's value, first and last, and what stands in between."""
    import safetensors.torch

    tensors = safetensors.torch.load(data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tasks = json.loads(header["__metadata__"][METADATA_KEY])["tasks"]
    objective, values = tensors["history.objective"], tensors["history.values"]
    if not len(objective):
        return ["phi is its init: no step was taken.", ""]
    kappa, xi = tensors["history.condition"][-1], tensors["history.misalignment"]
    unlike = max((float(xi[i, j]) for i in range(len(tasks)) for j in range(i)), default=0.0)
    return [
        f"phi was learned in {len(objective)} steps on unlabelled rows; the objective went from {objective[0]:.4g} to "
        f"{objective[-1]:.4g}. At the last step the condition number of the tasks' gradients was {kappa:.3g}, and the "
        f"largest misalignment between two preferences for one task each {unlike:.3g}.",
        "",
        "| task | first value | last value |",
        "|---|---|---|",
        *[f"| {task} | {values[0, at]:.4g} | {values[-1, at]:.4g} |" for at, task in enumerate(tasks)],
        "",
    ]
