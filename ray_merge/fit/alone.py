"""One adapter by itself: its factors as they are stored, and what can be refused without a base.

Shapes come from the factors alone, so nothing is proven about a base, and layouts are told by rank only:

    lora_A (R, I), lora_B (O, R)                       linear; MultiheadAttention and HF Conv1D look the same
    lora_A (R, in, kernel ...), lora_B (O, R, 1 ...)   conv, A flattened to (R, in * kernel)
    lora_embedding_A (R, V), lora_embedding_B (H, R)   embedding; B A is the transpose of the table's delta
    factors of fused experts, BD-LoRA's blocks         not told: which product they make depends on the base
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_merge.errors import AdapterError
from ray_merge.fit.adapters import initial_modules
from ray_merge.fit.modules import TWICE, in_attention, scale_of
from ray_merge.spec import Adapter, FactorEntry, Layout, Product, Site, TensorEntry, TokenRows, View
from ray_merge.storage.adapter import StoredAdapter
from ray_merge.storage.modules import StoredModule

FUSED = "factors of several experts side by side (rank E * r)"
BLOCKS = "block-diagonal factors (BD-LoRA)"


@dataclass(frozen=True, slots=True)
class Alone:
    """An adapter that is fitted to nothing.

    Args:
        adapter: its `factors` and `modules` have runtime module names; every tensor beside them is in `heads`.
        sites: by module name.
        untold: modules whose delta cannot be told without the base -> (rank as stored, why).
    """

    adapter: Adapter
    sites: Mapping[str, Site]
    untold: Mapping[str, tuple[int, str]]


def stand_alone(stored: StoredAdapter) -> Alone:
    """The factors of an adapter, as they are stored.

    Raises:
        AdapterError: factors of different rank or of another rank than the config says, or that need the
            adapter that training started from.
    """
    initial_modules(stored)
    for name, entry in stored.tokens.items():
        if len(entry.shape) != 2:
            raise AdapterError(
                f"{stored.where}: {name} has trained tokens of shape {entry.shape}, expected rows"
            )
    sites: dict[str, Site] = {}
    factors: dict[str, FactorEntry] = {}
    untold: dict[str, tuple[int, str]] = {}
    others: list[TensorEntry] = [replace(tensor.entry, name=tensor.name) for tensor in stored.saved]
    for module in stored.modules:
        name = module.name + ".base_layer" * module.depth
        A, B, layout = _pair(stored, module)
        why = _why_untold(stored, module)
        if why:
            untold[name] = (A.shape[0], why)
            others += module.tensors.values()
            continue
        sites[name], factors[name] = _site(stored, name, A, B, layout)
        others += [entry for entry in module.tensors.values() if entry not in (A, B)]
    return Alone(_adapter(stored, factors, others), sites, untold)


def _pair(stored: StoredAdapter, module: StoredModule) -> tuple[TensorEntry, TensorEntry, Layout]:
    is_embedding = "embedding_A" in module.tensors
    A, B = (module.tensors[role] for role in (("embedding_A", "embedding_B") if is_embedding else ("A", "B")))
    if len(A.shape) < 2 or len(B.shape) != len(A.shape) or (is_embedding and len(A.shape) > 2):
        raise AdapterError(
            f"{stored.where}: {module.name}: lora_A is {A.shape} and lora_B is {B.shape}: no factors of any layer"
        )
    return A, B, "embedding" if is_embedding else "conv" if len(A.shape) > 2 else "linear"


def _why_untold(stored: StoredAdapter, module: StoredModule) -> str:
    settings = stored.settings
    if "A" not in module.tensors:
        return ""
    claimed = settings.scaling.rank_of(module.name)
    if settings.parameters and (module.depth or module.tensors["A"].shape[0] != claimed):
        return FUSED
    return BLOCKS if settings.blocks else ""


def _site(
    stored: StoredAdapter, name: str, A: TensorEntry, B: TensorEntry, layout: Layout
) -> tuple[Site, FactorEntry]:
    rank, columns, rows = A.shape[0], math.prod(A.shape[1:]), B.shape[0]
    scale = scale_of(stored, name, rank, math.prod(B.shape[1:]))
    scale *= TWICE if in_attention(stored, name) else 1.0
    product = Product(View(B, (rows, rank)), View(A, (rank, columns)), scale)
    return Site(name, "", (rows, columns), 0, layout), FactorEntry((product,))


def _adapter(stored: StoredAdapter, factors: Mapping[str, FactorEntry], others: list[TensorEntry]) -> Adapter:
    return Adapter(
        name=stored.name,
        url=stored.url,
        config=stored.config,
        factors=factors,
        layouts={},
        modules={name: name for name in factors},
        heads=tuple(others),
        replaced={},
        tables=frozenset(),
        tokens={name: TokenRows(entry, ()) for name, entry in stored.tokens.items()},
        same=stored.same,
        ignored=stored.ignored,
        names="as stored",
        file=stored.file,
        file_bytes=stored.file_bytes,
        file_version=stored.file_version,
        pickled=stored.pickled,
        side_files=tuple((info.path, info.n_bytes, info.version) for info in stored.side_files),
    )
