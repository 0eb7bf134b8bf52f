"""Runtime parameter names of one adapter -> disk tensors of the base.

Owns: the order of proofs. A name is taken as it is; else through one prefix; else through the rules of the
model class (transformers, meta device, loaded only when something needs it). `key_mapping` renames first.
What none of them proves has no disk tensor, and whoever asked refuses it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ray_merge.errors import AdapterError, Refusal
from ray_merge.models.architecture import Architecture, build_architecture, runtime_module
from ray_merge.models.conversion import Slot
from ray_merge.models.model_class import class_candidates
from ray_merge.models.names import Naming, find_naming
from ray_merge.storage.adapter import StoredAdapter
from ray_merge.storage.checkpoint import Checkpoint


class Architectures:
    """The model classes of one base, each built once and only when asked for."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._built: dict[str, Architecture | Refusal] = {}

    def get(self) -> Architecture:
        """The class that the base's config means.

        Raises:
            Refusal: transformers has no such class, or cannot build it.
        """
        found = next(self.candidates("", ""))
        if isinstance(found, Refusal):
            raise found
        return found

    def candidates(self, class_name: str, task_type: str) -> Iterator[Architecture | Refusal]:
        """The classes that an adapter may have been trained in, best guess first, or why one cannot be built."""
        config = self._base.config
        try:
            names = class_candidates(config, class_name=class_name or None, task_type=task_type or None)
        except Refusal as error:
            yield error
            return
        for name in names or ("",):
            if name not in self._built:
                shapes = {tensor: entry.shape for tensor, entry in self._base.tensors.items()}
                try:
                    self._built[name] = build_architecture(config, shapes, class_name=name or None)
                except Refusal as error:
                    self._built[name] = error
            yield self._built[name]


def mapped(adapter: StoredAdapter, mapping: Mapping[str, str]) -> StoredAdapter:
    """The adapter with every runtime name rewritten by the recipe's `key_mapping`, rules in order.

    Raises:
        AdapterError: two modules get one name.
    """
    if not mapping:
        return adapter

    def rename(name: str) -> str:
        for pattern, replacement in mapping.items():
            name = re.sub(pattern, replacement, name)
        return name

    modules = tuple(replace(module, name=rename(module.name)) for module in adapter.modules)
    saved = tuple(replace(tensor, name=rename(tensor.name)) for tensor in adapter.saved)
    tokens = {rename(name): entry for name, entry in adapter.tokens.items()}
    names = [(module.name, module.depth) for module in modules] + [(tensor.name, -1) for tensor in saved]
    twice = next((name for (name, _), count in Counter(names).items() if count > 1), None)
    if twice is not None or len(tokens) < len(adapter.tokens):
        raise AdapterError(
            f"{adapter.where}: key_mapping gives two tensors the name {twice or 'of one embedding'!r}"
        )
    initial = None if adapter.initial is None else mapped(adapter.initial, mapping)
    before = [module.name for module in adapter.modules] + [tensor.name for tensor in adapter.saved]
    trained = {rename(name): name for name in (*before, *adapter.tokens)}
    return replace(adapter, modules=modules, saved=saved, tokens=tokens, initial=initial, trained=trained)


@dataclass(slots=True)
class Resolver:
    """Answers for one adapter; remembers what it answered, for `plan`.

    Args:
        base: the base checkpoint.
        adapter: whose names.
        architectures: the model classes of the base.
        naming: the prefix rule of this adapter.
        found: runtime parameter -> disk tensors, of everything asked for.
        used_class: the class whose rules were needed; "" where prefixes did.
        no_class: why no class could be asked; "" where one could or none was needed.
    """

    base: Checkpoint
    adapter: StoredAdapter
    architectures: Architectures
    naming: Naming = field(default_factory=Naming)
    found: dict[str, tuple[Slot, ...]] = field(default_factory=dict)
    used_class: str = ""
    no_class: str = ""
    _class: Architecture | None = None
    _asked: bool = False

    @classmethod
    def of(cls, base: Checkpoint, adapter: StoredAdapter, architectures: Architectures) -> Resolver:
        """The resolver of an adapter, its prefix rule found."""
        modules = {module.name for module in adapter.modules} | set(adapter.tokens)
        wanted = {f"{name}.weight" for name in modules} | {tensor.name for tensor in adapter.saved}
        return cls(base, adapter, architectures, find_naming(wanted, base.tensors))

    def slots(self, parameter: str) -> tuple[Slot, ...]:
        """Disk tensors that make up a runtime parameter; empty where the base has none.

        Raises:
            AdapterError: the disk tensors exist but pass through an operation that is no rename and no stacking.
        """
        if parameter not in self.found:
            self.found[parameter] = self._slots(parameter)
        return self.found[parameter]

    def _slots(self, parameter: str) -> tuple[Slot, ...]:
        disk = self.naming.disk(parameter, self.base.tensors)
        if disk is not None:
            return (Slot(disk),)
        known = self.architecture()
        if known is None:
            return ()
        name = self._in_class(known, parameter)
        if name in known.unsupported:
            raise AdapterError(
                f"{self.adapter.where}: {parameter}: {known.unsupported[name]}; merge this adapter with PEFT"
            )
        slots = known.slots.get(name, ())
        if slots:
            self.used_class = known.name
        return slots

    def _in_class(self, known: Architecture, parameter: str) -> str:
        if parameter in known.parameters:
            return parameter
        module, _, leaf = parameter.rpartition(".")
        path = runtime_module(known, module)
        return parameter if path is None else f"{path}.{leaf}"

    def architecture(self) -> Architecture | None:
        """The model class that this adapter was trained in, or None where transformers does not know it.

        Several classes read one checkpoint (a text model and the vision-language model around it); the first one
        that has all adapted modules is taken.
        """
        if not self._asked:
            self._asked = True
            self._class = self._find_class()
        return self._class

    @property
    def asked_class(self) -> bool:
        """Whether anything needed more than the names of the base's tensors."""
        return self._asked

    def _find_class(self) -> Architecture | None:
        auto = self.adapter.config.get("auto_mapping")
        named = auto.get("base_model_class") if isinstance(auto, Mapping) else None
        task = self.adapter.config.get("task_type")
        first: Architecture | None = None
        for known in self.architectures.candidates(_text(named), _text(task)):
            if isinstance(known, Refusal):
                self.no_class = self.no_class or str(known)
                continue
            first = first or known
            if all(runtime_module(known, module.name) for module in self.adapter.modules):
                return known
        return first

    def is_parameter(self, name: str) -> bool:
        """Whether the class that the adapter was trained in has a parameter of that name."""
        known = self.architecture()
        return known is not None and self._in_class(known, name) in known.parameters

    def kind(self, module: str) -> str:
        """What kind of layer a runtime module is (models/architecture.py); "" where nobody knows."""
        known = self.architecture()
        path = None if known is None else runtime_module(known, module)
        return "" if known is None or path is None else known.kinds.get(path, "")

    def tied_to(self, parameter: str) -> str | None:
        """The parameter that stands for this one on disk, where the base ties the two."""
        known = self.architecture()
        if known is None:
            return None
        name = self._in_class(known, parameter)
        return None if name in known.slots else known.tied.get(name)

    def describe(self) -> str:
        """How names were resolved, in words."""
        words = self.naming.describe()
        return f"{words}; else as {self.used_class} of transformers loads them" if self.used_class else words


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def example(parameter: str, tensors: Collection[str]) -> str:
    """A disk tensor that looks like what was sought, for messages."""
    tail = ".".join(parameter.split(".")[-2:])
    same_tail = sorted(name for name in tensors if name.endswith(f".{tail}"))
    return (same_tail or sorted(tensors))[0]
