"""What a method says about itself, without torch: `Method`, and the fields its parameters are made of.

Owns: the vocabulary of declarations. Never computes and never imports a kernel, so that planning a merge of
a 405B model starts in the time it takes to read headers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_merge.algebra.phi_shape import Coefficients
from ray_merge.methods.cost import Work, entries
from ray_merge.methods.memory import Sizes, entrywise

Kind = Literal["number", "integer", "flag", "choice", "text"]
Space = Literal["dense", "core", "knots"]
Statistics = Literal["", "gram", "fisher"]
Check = Callable[[str], None]
"""Raises ValueError, which says what may be written."""

Rule = Callable[[dict[str, Any]], None]
"""Checks and completes resolved parameters that depend on each other, in place; raises MethodError."""

Counts = Callable[[Mapping[str, Any], str, int], tuple[int, ...]]
"""(resolved parameters, adapter, entries n) -> the k whose k-th largest magnitude the kernel compares with."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The allowed numbers; None is unbounded, `open_low` leaves the lower end out."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        left = "(" if self.open_low or self.low is None else "["
        low = "-inf" if self.low is None else f"{self.low:g}"
        return f"{left}{low}, inf)" if self.high is None else f"{left}{low}, {self.high:g}]"


ANY_NUMBER = Interval()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as a recipe writes it.

    Args:
        key: its name in a recipe (`lambda`), which may differ from the attribute (`lambda_`).
        kind: what type its value has.
        help: one sentence for a person.
        default: filled in where the recipe is silent; None with `required` False means "depends on others".
        required: whether the recipe must give it.
        interval: allowed numbers.
        choices: allowed words.
        check: of a text.
        per_adapter: whether it may be a mapping by adapter.
        per_site: whether it may be a list of {filter, value}.
    """

    key: str
    kind: Kind
    help: str
    default: Any
    required: bool = False
    interval: Interval = ANY_NUMBER
    choices: tuple[str, ...] = ()
    check: Check | None = None
    per_adapter: bool = False
    per_site: bool = False


def number(
    default: float | None,
    text: str,
    interval: Interval = ANY_NUMBER,
    *,
    key: str = "",
    per_adapter: bool = False,
    per_site: bool = False,
) -> Any:
    """A dataclass field that holds a finite number, or a tuple of them in adapter order if `per_adapter`.

    A default of None is decided by the method's rule, or means that there is none.
    """
    meta = {"kind": "number", "help": text, "interval": interval, "key": key, "default": default}
    return field(metadata={**meta, "per_adapter": per_adapter, "per_site": per_site or per_adapter})


def integer(text: str, interval: Interval, default: int | None = None, *, required: bool = True) -> Any:
    """A dataclass field that holds a whole number; one without a default is required, or decided by the rule."""
    meta = {"kind": "integer", "help": text, "interval": interval, "default": default}
    return field(metadata={**meta, "required": required and default is None})


def text(default: str | None, help_: str, check: Check) -> Any:
    """A dataclass field that holds a text that `check` takes; a default of None is decided by the method's rule."""
    return field(metadata={"kind": "text", "help": help_, "default": default, "check": check})


def flag(default: bool | None, text: str) -> Any:
    """A dataclass field that holds true or false; a default of None is decided by the method's rule."""
    return field(metadata={"kind": "flag", "help": text, "default": default})


def choice(default: str | None, choices: tuple[str, ...], text: str) -> Any:
    """A dataclass field that holds one of some words; a default of None is decided by the method's rule."""
    return field(metadata={"kind": "choice", "help": text, "default": default, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """The declaration of one merge method.

    Args:
        name: the recipe's `merge_method`.
        family: methods of a family share a file and a way of thinking.
        summary: the formula in one line.
        reference: paper or source of the formula.
        parameters: frozen dataclass whose fields were made by `number`, `integer`, `flag` and `choice`.
        kernel: "module:function" of the pure function (SiteFactors, parameters, Context) -> Delta.
        aliases: other names for exactly the same thing.
        spaces: where it can work; the first is the default.
        low_rank_spaces: those in which its result has factors, so that it can be exported as an adapter.
        factors_only: cannot take a delta that is no product of factors (DoRA), whatever the space.
        needs: inputs beyond the factors: "moments", "phi", "base".
        statistics: what its moments are: "gram", the Gram matrix of a site's inputs, or "fisher", the squared gradients
            of its weight; "" where it needs none.
        learned: what its phi multiplies (algebra/phi_shape.py); "" where it has none.
        rule: completes and checks parameters that depend on each other.
        counts: for methods that keep entries by magnitude and know `scope`: which magnitudes they need, so that
            `scope: model` can select them over all sites.
        sizes: the bytes that one merge holds at one site.
        work: the operations that one merge takes at one site.
        equal_ranks: values of `compat` that add up factors of adapters, which then need one rank at each site.
    """

    name: str
    family: str
    summary: str
    reference: str
    parameters: type
    kernel: str
    aliases: tuple[str, ...] = ()
    spaces: tuple[Space, ...] = ("dense",)
    low_rank_spaces: tuple[Space, ...] = ()
    factors_only: bool = False
    needs: tuple[str, ...] = ()
    statistics: Statistics = ""
    learned: Coefficients | Literal[""] = ""
    rule: Rule | None = None
    counts: Counts | None = None
    sizes: Sizes = entrywise
    work: Work = field(default_factory=entries)
    equal_ranks: tuple[str, ...] = ()

    def declared(self) -> dict[str, Parameter]:
        """The parameters by the recipe's key, in declaration order."""
        made = (_parameter(item.name, item.metadata) for item in dataclasses.fields(self.parameters))
        return {parameter.key: parameter for parameter in made}

    def adds_factors(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the kernel, with resolved `parameters`, adds up factors instead of their products."""
        return parameters.get("compat") in self.equal_ranks


def _parameter(name: str, metadata: Mapping[str, Any]) -> Parameter:
    known = {item.name for item in dataclasses.fields(Parameter)}
    given = {key: value for key, value in metadata.items() if key in known}
    return Parameter(**{**given, "key": metadata.get("key") or name})
