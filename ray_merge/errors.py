"""What can go wrong, as a tree that survives pickling between processes.

    RayMergeError
    +-- Refusal          found before anything was written; exit code 2
    |   +-- RecipeError, AdapterError, CheckpointError (NotCuttable), MethodError, OutputConflict, StoreDenied,
    |   |   StoreUnfit, NotFinite
    +-- RunFailed        found after the first object was written; exit code 1
    |   +-- UnitFailed, ShardConflict, StoreError
    |   +-- JobOver      the RayJob of a night has ended and not succeeded; exit code 4 (`jobs/nightly.py` only)
    +-- ContactLost      a cluster that was given a job does not answer; exit code 3 (`jobs/submit.py` only)
    +-- Unwatched        how a night ends is not known here; exit code 3 (`jobs/nightly.py` only)

A class with several arguments hands all of them to `super().__init__` and makes its text in `__str__`:
an exception whose `__init__` does not match its `args` cannot be unpickled, and Ray then hides it behind
`UnserializableException`.
"""

from __future__ import annotations

import re
import reprlib

_CREDENTIALS = re.compile(r"(?<=://)[^\s/@:]*:(?!\d{1,5}/)[^\s'\"]*@|(?<=://)(?<!hf://)[^\s/'\"]*@")
"""user:password@, also where the password has a slash (keys of AWS do); user@, but for the revision of hf://name@x. A
port and a slash begin no password."""

_SIGNATURE = re.compile(r"(?<=://)([^\s?'\"]*)\?[^\s'\"]*=[^\s'\"]*")
"""What follows the path of a signed URL."""


def redacted(text: str) -> str:
    """A text for people, whatever it quotes: without user names, passwords and signatures in URLs."""
    return _SIGNATURE.sub(r"\1", _CREDENTIALS.sub("", text)) if "://" in text else text


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(
            redacted(x), level
        )  # cut first, a password might lose the @ that shows what it is


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut where a hostile file would fill the terminal with it."""
    return _SHORT.repr(value)


MAX_SENTENCE = 2000
"""Characters of a message."""


def sentence(text: str) -> str:
    """A message on one line, without credentials and control characters and of bounded length, whatever it quotes."""
    text = redacted(text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= MAX_SENTENCE else f"{text[:1200]} ... {text[-600:]}"


class RayMergeError(Exception):
    """Base of every error that this package raises on purpose; `str(error)` is one sentence for a person."""

    exit_code = 1

    def __str__(self) -> str:
        return sentence(super().__str__())


class Refusal(RayMergeError):
    """The input cannot be merged as asked, and nothing has been written."""

    exit_code = 2


class RecipeError(Refusal):
    """The recipe is not valid: the place (file and line, or key), what is wrong, the nearest right thing."""


class DataGone(RecipeError):
    """Data, labels or a head that a recipe names are not there; a manifest may still say what they were."""


class AdapterError(Refusal):
    """An adapter cannot be merged exactly: unknown variant, unmatched tensor, wrong shape or rank."""


class AdapterShapeError(AdapterError):
    """A factor does not fit its base weight."""

    def __init__(
        self, site: str, tensor: str, got: tuple[int, ...], want: str, source: str, base: str
    ) -> None:
        super().__init__(site, tensor, got, want, source, base)

    def __str__(self) -> str:
        site, tensor, got, want, source, base = self.args
        return sentence(
            f"{site}: {tensor} is {tuple(got)} in {source}, but {want} ({base}); "
            "the adapter was trained on another base model"
        )


class CheckpointError(Refusal):
    """A base checkpoint or safetensors file is missing, truncated or malformed."""


class NotCuttable(CheckpointError):
    """A model whose blocks depend on more than the hidden state before them: it runs as one stage only."""


class MethodError(Refusal):
    """Unknown merge method, or parameters outside its range."""


class OutputConflict(Refusal):
    """The output holds something else than what this recipe would write there."""


class StoreDenied(Refusal):
    """The store refused for good: credentials, rights, a bucket that is not there, a read-only disk."""

    def __init__(self, url: str, action: str, answer: str) -> None:
        super().__init__(url, action, answer)

    def __str__(self) -> str:
        url, action, answer = self.args
        return sentence(
            f"{action} {url} was refused: {answer}; check the URL, the credentials and their rights"
        )


class StoreUnfit(Refusal):
    """The output store has no put-if-absent, so nothing can be published exactly once."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)

    def __str__(self) -> str:
        url, reason = self.args
        return sentence(f"{url} cannot publish exactly once ({reason}); use a store with conditional writes")


class NotFinite(Refusal):
    """A tensor of an adapter holds NaN or Inf."""

    def __init__(self, adapter: str, tensor: str, count: int, source: str) -> None:
        super().__init__(adapter, tensor, count, source)

    def __str__(self) -> str:
        adapter, tensor, count, source = self.args
        return sentence(
            f"adapter {adapter}: {tensor} holds {count} NaN or Inf values ({source}); train or save it again"
        )


class RunFailed(RayMergeError):
    """The run stopped after its first object was written; run the recipe again to finish it."""


class ContactLost(RayMergeError):
    """Nobody answers any more, so nobody knows how the job ends: what was asked, for how long, the last answer."""

    exit_code = 3

    def __init__(self, what: str, seconds: float, answer: str) -> None:
        super().__init__(what, seconds, answer)

    def __str__(self) -> str:
        what, seconds, answer = self.args
        return sentence(f"{what} has not answered for {seconds:.0f} s ({answer}); its state is unknown")


class JobOver(RunFailed):
    """The RayJob of a night failed, was stopped or was deleted: asking again would find the same."""

    exit_code = 4


class Unwatched(RayMergeError):
    """How a night ends is not known here, since this program stopped looking; the same command goes on looking."""

    exit_code = 3


class UnitFailed(RunFailed):
    """One unit of work did not succeed within its attempts."""

    def __init__(self, unit: str, attempts: int, reason: str) -> None:
        super().__init__(unit, attempts, reason)

    def __str__(self) -> str:
        unit, attempts, reason = self.args
        return sentence(f"unit {unit} failed after {attempts} attempt(s): {reason}")


class ShardConflict(RunFailed):
    """An object of that name is there already, with other bytes."""

    def __init__(self, url: str, there: str, ours: str) -> None:
        super().__init__(url, there, ours)

    def __str__(self) -> str:
        url, there, ours = self.args
        return sentence(
            f"{url} is there already with {there}, this run made {ours}; "
            "remove that merge's folder and run again, or choose another output"
        )


class StoreError(RunFailed):
    """A read or write failed for good after its retries: store, key, number of tries, last cause."""

    def __init__(self, url: str, action: str, tries: int, cause: str) -> None:
        super().__init__(url, action, tries, cause)

    def __str__(self) -> str:
        url, action, tries, cause = self.args
        return sentence(f"{action} {url} failed after {tries} {'try' if tries == 1 else 'tries'}: {cause}")


__all__ = [
    "AdapterError",
    "AdapterShapeError",
    "CheckpointError",
    "ContactLost",
    "DataGone",
    "JobOver",
    "MethodError",
    "NotCuttable",
    "NotFinite",
    "OutputConflict",
    "RayMergeError",
    "RecipeError",
    "Refusal",
    "RunFailed",
    "ShardConflict",
    "StoreDenied",
    "StoreError",
    "StoreUnfit",
    "UnitFailed",
    "Unwatched",
]
