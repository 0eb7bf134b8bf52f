"""The different kinds of sites that sets of adapters have, without looking at every site of every adapter.

Owns the grouping: sites of one shape that the same updates touch are one kind. Adapters that fit alike
(fit/ranked.py) share the marks of one of them, so that a thousand adapters with 882 sites each cost as many steps as
they have families.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ray_merge.fit.ranked import RankedFactors, alike
from ray_merge.methods.declare import Method
from ray_merge.spec import DTYPE_BYTES, Adapter, FactorEntry, Site, TensorEntry, Update, needs_base

Kind = tuple[tuple[int, int], tuple[int, ...], int]
"""Shape, ranks of the adapters, and bytes of the base weight where an update depends on it."""


class SiteKinds:
    """The sites of all adapters, each with one bit for each (family, rank, need of the base) that touches it."""

    def __init__(
        self, adapters: Mapping[str, Adapter], sites: Mapping[str, Site], tensors: Mapping[str, TensorEntry]
    ) -> None:
        self._touched = dict.fromkeys(sites, 0)
        self._needs_base = 0
        self._bits: dict[str, list[tuple[int, int]]] = {}  # adapter -> (bit, rank)
        self._file_bytes: dict[str, int] = {}
        self._n_bits = 0
        families: dict[int, tuple[list[tuple[int, int]], int]] = {}
        for name, adapter in adapters.items():
            factors, like = adapter.factors, alike(adapter.factors)
            if id(like) not in families:
                families[id(like)] = self._mark(factors)
            bits, picked = families[id(like)]
            one = factors.rank if isinstance(factors, RankedFactors) else None
            self._bits[name] = bits if one is None else [(bit, one) for bit, _ in bits]
            self._file_bytes[name] = picked + sum(2 * rows.entry.n_bytes for rows in adapter.tokens.values())
        self._places = {
            name: (site.shape, DTYPE_BYTES[tensors[site.tensor].dtype]) for name, site in sites.items()
        }
        self._by_rows = frozenset(site.shape for site in sites.values() if site.layout == "conv1d")

    def of(self, names: Sequence[str]) -> Counter[Kind]:
        """The kinds of sites that the adapters called `names` touch, ranks in that order, and how many of each."""
        mine = 0
        for name in names:
            for bit, _ in self._bits[name]:
                mine |= bit
        found = Counter(
            (self._places[site], touched & mine) for site, touched in self._touched.items() if touched & mine
        )
        kinds: Counter[Kind] = Counter()
        for ((shape, item), touched), count in found.items():
            kinds[self._kind(names, shape, item, touched)] += count
        return kinds

    def seen_by(self, method: Method, shape: tuple[int, int]) -> tuple[int, int]:
        """A kind's shape as `Method.sizes` and `work` take it: (O, I), I the inputs where Gram matrices are merged by.

        A HF Conv1D is stored (I, O); a linear layer that has its very shape is taken for one.
        """
        return shape[::-1] if method.statistics == "gram" and shape in self._by_rows else shape

    def file_bytes(self, names: Sequence[str]) -> int:
        """What is held of adapter files: lora_B of two stacks of experts, and the trained rows of a table."""
        return sum(self._file_bytes[name] for name in names)

    def _mark(self, factors: Mapping[str, Update]) -> tuple[list[tuple[int, int]], int]:
        """(bit, rank) of every combination of rank and need, and the bytes held of one picked stack."""
        if isinstance(factors, RankedFactors):
            bit = self._new_bit(needs=False)
            for site in factors:
                self._touched[site] |= bit
            return [(bit, factors.rank)], 0
        bits: dict[tuple[int, bool], int] = {}
        for site, update in factors.items():
            key = (update.rank, needs_base(update))
            if key not in bits:
                bits[key] = self._new_bit(needs=key[1])
            self._touched[site] |= bits[key]
        return [(bit, rank) for (rank, _), bit in bits.items()], _picked_bytes(factors)

    def _new_bit(self, *, needs: bool) -> int:
        bit = 1 << self._n_bits
        self._n_bits += 1
        self._needs_base |= bit if needs else 0
        return bit

    def _kind(self, names: Sequence[str], shape: tuple[int, int], item: int, touched: int) -> Kind:
        ranks = tuple(rank for name in names for bit, rank in self._bits[name] if touched & bit)
        # DoRA and saved parameters need the base's own values; the weight is held as it is stored.
        needed = shape[0] * shape[1] * item if touched & self._needs_base else 0
        return (shape, ranks, needed)


def _picked_bytes(factors: Mapping[str, Update]) -> int:
    products = (p for one in factors.values() if isinstance(one, FactorEntry) for p in one.products)
    return 2 * max((p.B.entry.n_bytes for p in products if p.B.pick is not None), default=0)
