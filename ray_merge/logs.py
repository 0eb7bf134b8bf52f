"""How lines on stderr look: plain text, or one JSON object each (`--log-format json`, RAY_MERGE_LOG_FORMAT=json).

Owns: the shape of a JSON line, and which recipe this process works on. stdout is a command's result and none of it.
Never: lets a credential through; every text of a JSON line is redacted.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from ray_merge.errors import Refusal, redacted, sentence, shown

LogFormat = Literal["text", "json"]

VARIABLE = "RAY_MERGE_LOG_FORMAT"
OPTION = "--log-format"

FIELDS = ("recipe", "merge", "unit", "done", "of", "bytes", "seconds")
"""What a line may say beside its message, where it is known."""

logger = logging.getLogger("ray_merge")


class _State:
    """Of this process: the format that was asked for, and the recipe at work."""

    form: LogFormat = "text"
    recipe: str | None = None


def is_json() -> bool:
    """Whether lines are JSON."""
    return _State.form == "json"


def recipe() -> str | None:
    """The recipe at work, as it was named, without credentials."""
    return _State.recipe


def work_on(recipe: str) -> str:
    """Note the recipe that later lines are about, and return it."""
    _State.recipe = redacted(recipe)
    return recipe


def asked_format(arguments: Sequence[str], environment: Mapping[str, str]) -> LogFormat:
    """What a command line asks for, before it is parsed, so that its own mistakes are said in that format too.

    Raises:
        Refusal: the variable names no format. A bad option is left to the parser, which knows the usage.
    """
    for asked in _asked(arguments):
        if asked in get_args(LogFormat):
            return "json" if asked == "json" else "text"
    form = environment.get(VARIABLE) or "text"
    if form not in get_args(LogFormat):
        raise Refusal(f"{VARIABLE} is {shown(form)}; use text or json")
    return "json" if form == "json" else "text"


def _asked(arguments: Sequence[str]) -> Iterator[str]:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for word, following in zip(own, [*own, ""][1:], strict=True):
        if word == OPTION:
            yield following
        elif word.startswith(f"{OPTION}="):
            yield word.removeprefix(f"{OPTION}=")


def set_up(form: LogFormat) -> None:
    """Choose the format of this process; a second call changes nothing but the handlers that others have added."""
    _State.form = form
    if form == "text":
        return
    handler = _Stderr()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(_is_wanted)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)
    # Ray's logger comes with a handler of its own, and ray.init(logging_config=...) adds one to the root.
    rays = logging.getLogger("ray")
    rays.handlers.clear()
    rays.propagate = True
    logging.captureWarnings(capture=True)


def set_up_worker() -> None:
    """In a worker, whose handler Ray made: one line for each unit, and other libraries only where they warn.

    HTTP libraries tell of every request at INFO, with URLs that may be signed.
    """
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_wanted)
    logger.setLevel(logging.INFO)


def _is_wanted(record: logging.LogRecord) -> bool:
    # The level of the root does not decide: a record of a logger that has a level of its own passes it by.
    return record.levelno >= logging.WARNING or record.name.split(".")[0] == logger.name


def say(text: str, *, level: int = logging.INFO, json_text: str | None = None, **fields: Any) -> None:
    """One line on stderr.

    Args:
        text: the line.
        level: of logging.
        json_text: the message in JSON, where the text begins with what a field says there.
        fields: of `FIELDS`; those that are None are left out.
    """
    if is_json():
        logger.log(level, "%s", text if json_text is None else json_text, extra=fields)
        return
    with suppress(OSError):  # a log that nobody reads any more (`2>&1 | head`) must not end a merge
        print(text, file=sys.stderr, flush=True)


def trace(error: BaseException) -> None:
    """The traceback of a bug, without credentials."""
    if is_json():
        logger.error("%s", type(error).__name__, exc_info=error)
    else:
        say(redacted("".join(traceback.format_exception(error))))


def message_of(line: str) -> str:
    """What a line of either format says."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(line)["message"])
    return line


class JsonFormatter(logging.Formatter):
    """One record as one JSON object on one line, without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        """The line: time, level, logger, message, the known of `FIELDS`, and the traceback if there is one."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": sentence(" ".join(record.getMessage().split())),
            "recipe": _State.recipe,
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(
            {name: redacted(value) if isinstance(value, str) else value for name, value in line.items()
             if value is not None},
            default=str,
        )  # fmt: skip


class _Stderr(logging.Handler):
    """Writes to what stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            print(self.format(record), file=sys.stderr, flush=True)


__all__ = [
    "FIELDS",
    "OPTION",
    "VARIABLE",
    "JsonFormatter",
    "LogFormat",
    "asked_format",
    "is_json",
    "message_of",
    "recipe",
    "say",
    "set_up",
    "set_up_worker",
    "trace",
    "work_on",
]
