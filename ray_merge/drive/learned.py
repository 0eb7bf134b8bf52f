"""phi of a learned merge beside its result: ray_merge/phi.safetensors.

    phi.<site>              as the method takes it (DESIGN: merge_factors)
    history.objective ...   the curves of learning (learn/state.py), T tasks in the order of the merge's adapters

The state in the store, which the workers read, may be removed afterwards; this stays with the merge.
"""

from __future__ import annotations

from ray_merge.identity import canonical_json
from ray_merge.methods.registry import get
from ray_merge.spec import Merge
from ray_merge.storage.store import Stores
from ray_merge.work.job import LEAF, PhiIndex

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
    about = {"method": merge.method, "adapters": canonical_json(list(merge.adapters))}
    return safetensors.torch.save(found, about)
