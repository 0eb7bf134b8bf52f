"""A merged model on its way to be learned: what phi makes of some adapters at the sites of one stage.

A site that is the whole weight of a linear layer gets its update beside the weight, y + (x A^T) B^T, which costs as
much as PEFT's and nothing of the weight's own size. Any other site (an expert, a part of a fused weight, a bias) gets
it as a changed weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ray_merge.algebra.directions import Directions
from ray_merge.algebra.phi_shape import Coefficients
from ray_merge.errors import RunFailed
from ray_merge.models.conversion import Slot
from ray_merge.models.stage_calls import Add, Alter
from ray_merge.models.stored_weights import StoredWeights
from ray_merge.spec import Adapter, Site, TensorEntry
from ray_merge.work.altered import add_update, matrix_of, part_of
from ray_merge.work.factors import AdapterFiles

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredients:
    """What a mixture is made of.

    Args:
        names: of the adapters, in order.
        coefficients: what phi multiplies.
        beside: site -> module path, of whole linear weights that this stage may run.
        conv1d: those of them whose weight is stored (in, out).
        inside: the sites that are changed weights.
        sites: all of them by name.
        replaced: disk tensor -> (adapter, saved tensor) that takes its place.
    """

    names: Sequence[str]
    coefficients: Coefficients
    beside: Mapping[str, str]
    conv1d: frozenset[str]
    inside: Sequence[str]
    sites: Mapping[str, Site]
    replaced: Mapping[str, tuple[str, TensorEntry]] = field(default_factory=dict)


class Mixture:
    """The frozen part of a merged model's updates; phi comes with every call.

    Args:
        made_of: which adapters, where.
        files: of the adapters, open while this is made and no longer.
        weights: of the base, for adapters that saved whole parameters.
        slots: runtime parameter -> the disk tensors that it is made of.
    """

    def __init__(
        self,
        made_of: Ingredients,
        files: AdapterFiles,
        weights: StoredWeights,
        slots: Mapping[str, Sequence[Slot]],
    ) -> None:
        self._made_of, self._slots = made_of, slots
        self._parameters: dict[str, tuple[str, Slot]] = {}
        for name, some in slots.items():
            for slot in some:
                self._parameters.setdefault(slot.tensor, (name, slot))
        self._site_of = {path: site for site, path in made_of.beside.items()}
        self._looked_up: dict[str, None] = {}
        self._called: set[str] = set()
        self._inside: dict[str, list[Site]] = {}
        for name in made_of.inside:
            self._inside.setdefault(made_of.sites[name].tensor, []).append(made_of.sites[name])
        self._directions: dict[str, Directions] = {}
        for name in (*made_of.beside, *made_of.inside):
            site = made_of.sites[name]
            factors = files.site(made_of.names, site, partial(self._stored, site, weights))
            self._directions[name] = Directions(factors, made_of.coefficients)
        self._replaced = {
            tensor: files.saved(owner).read(entry) for tensor, (owner, entry) in made_of.replaced.items()
        }

    def _stored(self, site: Site, weights: StoredWeights) -> Tensor:
        parameter, slot = self._parameters[site.tensor]
        return matrix_of(part_of(weights.read(parameter), slot), site)

    def update(self, site: str, phi: Tensor) -> tuple[Tensor, Tensor]:
        """B (O, P) and A (P, I) of the merged update at a site."""
        return self._directions[site].update(phi)

    def added(self, phi: Tensors) -> Add:
        """What is added to the outputs of linear layers."""

        def add(path: str, x: Tensor) -> Tensor | None:
            site = self._site_of.get(path)
            if site is None or site not in phi:
                return None
            self._called.add(site)
            B_OP, A_PI = self.update(site, phi[site])
            if site in self._made_of.conv1d:  # the weight is (in, out), and so is its update
                return (x @ B_OP) @ A_PI
            return (x @ A_PI.T) @ B_OP.T

        return add

    def altered(self, phi: Tensors, head: Tensors) -> Alter:
        """How weights change: heads, saved parameters, and updates of sites that are no whole linear weight."""

        def alter(parameter: str, weight: Tensor) -> Tensor:
            if parameter in head:
                return head[parameter].to(weight.device, weight.dtype)
            self._looked_up[self._site_of.get(parameter.removesuffix(".weight"), "")] = None
            used = weight
            for slot in self._slots.get(parameter, ()):
                if slot.tensor in self._replaced:  # moved once, and only where the stage runs it
                    used = self._replaced[slot.tensor].to(weight.device, weight.dtype)
                    self._replaced[slot.tensor] = used
                for site in self._inside.get(slot.tensor, ()):
                    if site.name in phi:
                        used = (
                            used.clone()
                            if used is weight or used is self._replaced.get(slot.tensor)
                            else used
                        )
                        B_OP, A_PI = self.update(site.name, phi[site.name])
                        add_update(part_of(used, slot), site, (B_OP @ A_PI).to(used.dtype))
            return used

        return alter

    def check_called(self, phi: Tensors) -> None:
        """Refuse a layer whose weight was used by its parent without calling it: its update went nowhere.

        Raises:
            RunFailed: the site.
        """
        for site in self._looked_up:
            if site in phi and site not in self._called:
                raise RunFailed(
                    f"{site}: its module {self._made_of.beside[site]} is never called, its weight is used alone, "
                    "so what is learned there has no effect; leave that module out of the adapters"
                )


def head_of(adapter: Adapter, files: AdapterFiles) -> dict[str, Tensor]:
    """The saved head of an adapter, by runtime names."""
    return {entry.name: torch.clone(files.open(adapter).read(entry)) for entry in adapter.heads}
