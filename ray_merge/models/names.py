"""Runtime names of parameters -> disk names, where the two differ by a prefix alone.

Adapters carry the names of the model class they were trained in (`bert.encoder.layer.0...`); a checkpoint
carries those of the class that saved it (`encoder.layer.0...`). Most differ by the base-model prefix
(`base_model_prefix` in transformers), which is found here by exact matching and never guessed. Whatever else
can differ needs the model class (`architecture.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Naming:
    """How runtime names become disk names: `strip` is cut off, `add` is put in front; both may be empty."""

    strip: str = ""
    add: str = ""

    def disk(self, parameter: str, tensors: Collection[str]) -> str | None:
        """Disk name of a parameter, or None when the base has none."""
        if parameter in tensors:
            return parameter
        if self.strip and not parameter.startswith(self.strip):
            return None
        name = f"{self.add}{parameter.removeprefix(self.strip)}"
        return name if name in tensors else None

    def describe(self) -> str:
        """The rule in words, for `plan`."""
        if self.strip:
            return f"runtime {self.strip}* -> disk *"
        return f"runtime * -> disk {self.add}*" if self.add else "runtime names = disk names"


def find_naming(parameters: Collection[str], tensors: Collection[str]) -> Naming:
    """The one prefix through which most parameters resolve.

    Args:
        parameters: runtime names.
        tensors: disk names of the base.
    """
    plain = Naming()
    missing = sorted(name for name in parameters if plain.disk(name, tensors) is None)
    if not missing:
        return plain
    candidates = [Naming(strip=prefix) for prefix in sorted({name.split(".")[0] + "." for name in missing})]
    candidates += [Naming(add=prefix) for prefix in sorted({name.split(".")[0] + "." for name in tensors})]
    scored = [(sum(n.disk(name, tensors) is not None for name in missing), n) for n in candidates]
    best = max(score for score, _ in scored)
    winners = [naming for score, naming in scored if score == best]
    return winners[0] if best and len(winners) == 1 else plain
