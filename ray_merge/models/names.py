"""Runtime names of adapted modules -> disk names of base weights.

Adapters carry the names of the model class they were trained in (`bert.encoder.layer.0...`); a checkpoint
carries those of the class that saved it (`encoder.layer.0...`). The two differ by the base-model prefix
(`base_model_prefix` in transformers), which is found here by exact matching and never guessed: every adapted
module of a recipe must resolve, through one prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ray_merge.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Naming:
    """How runtime names become disk names: `strip` is cut off, `add` is put in front; both may be empty."""

    strip: str = ""
    add: str = ""

    def disk(self, module: str, tensors: Collection[str]) -> str | None:
        """Disk name of the module's weight, or None when the base has none."""
        if f"{module}.weight" in tensors:
            return f"{module}.weight"
        if self.strip and not module.startswith(self.strip):
            return None
        name = f"{self.add}{module.removeprefix(self.strip)}.weight"
        return name if name in tensors else None

    def describe(self) -> str:
        """The rule in words, for `plan`."""
        if self.strip:
            return f"runtime {self.strip}* -> disk *"
        return f"runtime * -> disk {self.add}*" if self.add else "runtime names = disk names"


def find_naming(modules: Collection[str], tensors: Collection[str]) -> Naming:
    """The one prefix through which most modules resolve; `resolve` then refuses whatever is left.

    Args:
        modules: runtime names of adapted modules.
        tensors: disk names of the base.
    """
    plain = Naming()
    missing = sorted(module for module in modules if plain.disk(module, tensors) is None)
    if not missing:
        return plain
    candidates = [
        Naming(strip=prefix) for prefix in sorted({module.split(".")[0] + "." for module in missing})
    ]
    candidates += [Naming(add=prefix) for prefix in sorted({name.split(".")[0] + "." for name in tensors})]
    scored = [(sum(n.disk(module, tensors) is not None for module in missing), n) for n in candidates]
    best = max(score for score, _ in scored)
    winners = [naming for score, naming in scored if score == best]
    return winners[0] if best and len(winners) == 1 else plain


def resolve(
    modules_by_adapter: Mapping[str, Collection[str]], tensors: Collection[str], base: str
) -> tuple[Naming, dict[str, str]]:
    """Disk name of every adapted module of a recipe.

    Args:
        modules_by_adapter: adapter name -> runtime names of its modules.
        tensors: disk names of the base.
        base: how messages call the base.

    Returns:
        The naming rule and {runtime module: disk tensor}.

    Raises:
        AdapterError: a module that matches nothing in the base, or two modules that match one tensor.
    """
    modules = sorted({module for names in modules_by_adapter.values() for module in names})
    naming = find_naming(modules, tensors)
    found = {module: naming.disk(module, tensors) for module in modules}
    for adapter, names in modules_by_adapter.items():
        lost = sorted(module for module in names if found[module] is None)
        if lost:
            raise AdapterError(
                f"adapter {adapter}: {len(lost)} of {len(names)} adapted modules match nothing in {base}, first "
                f"{lost[0]} (the base has, for example, {_example(lost[0], tensors)}); it was trained on another model"
            )
    result = {module: name for module, name in found.items() if name is not None}
    owner: dict[str, str] = {}
    for module, name in result.items():
        if name in owner:
            raise AdapterError(
                f"modules {owner[name]} and {module} both resolve to {name} in {base}; adapters of different model "
                "classes are not merged together: save them from one class"
            )
        owner[name] = module
    return naming, result


def _example(module: str, tensors: Collection[str]) -> str:
    tail = module.rpartition(".")[2]
    same_tail = sorted(name for name in tensors if name.endswith(f".{tail}.weight"))
    return (same_tail or sorted(tensors))[0]
