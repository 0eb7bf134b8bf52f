"""Lines on stderr as JSON, one object each, with what is known beside the message and without credentials."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ray_merge import logs
from ray_merge.cli import main
from ray_merge.drive.events import Event
from ray_merge.errors import Refusal
from ray_merge.show_progress import Progress
from tiny import write_recipe_files


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Logging, warnings and the state of `logs` as pytest had them."""
    names = ("", "ray", "ray_merge")
    kept = [(one, one.level, one.handlers[:], one.propagate) for one in map(logging.getLogger, names)]
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(capture=False)
    for one, level, handlers, propagate in kept:
        one.setLevel(level)
        one.handlers[:], one.propagate = handlers, propagate
    logs._State.form, logs._State.recipe = "text", None


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_run_says_every_line_as_one_object_and_keeps_stdout(tmp_path, capsys, monkeypatch, how):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(write_recipe_files(tmp_path)))
    words = ["run", str(path), "--engine", "local", "--cache-dir", str(tmp_path / "c"), "--json"]
    if how == "variable":
        monkeypatch.setenv(logs.VARIABLE, "json")
    code, out, err = command(capsys, *words, *(["--log-format", "json"] if how == "option" else []))
    assert code == 0
    assert json.loads(out)["merges"][0]["name"] == "m"
    said = [json.loads(line) for line in err.splitlines()]
    assert {line["recipe"] for line in said} == {str(path)}
    assert {line["level"] for line in said} == {"info"}
    unit, merge = said[-2:]
    assert (unit["done"], unit["of"]) == (2, 2)
    assert unit["unit"] in ("group-000/shard-00001", "group-000/shard-00002")  # one uploads beside the other
    size = sum(file.stat().st_size for file in (tmp_path / "out" / "m").glob("*.safetensors"))
    assert unit["bytes"] == size
    assert merge["merge"] == "m"
    assert 0 < unit["seconds"] <= merge["seconds"]
    passed = datetime.now(UTC) - datetime.fromisoformat(merge["time"])
    assert 0 <= passed.total_seconds() < 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "Missing argument"),
        (["run", "x", "--nope"], "--nope"),
        (["run", "x", "--engine", "spark"], "spark"),
        (["verify", "/nowhere/at/all"], "/nowhere/at/all"),
        (["run", "s3://user:geheim@bucket/recipe.txt"], "s3://bucket: credentials"),
    ],
)
def test_a_refusal_is_one_object(capsys, monkeypatch, words, message):
    monkeypatch.setenv(logs.VARIABLE, "json")
    code, out, err = command(capsys, *words)
    (line,) = [json.loads(line) for line in err.splitlines()]
    assert (code, out, line["level"]) == (2, "", "error")
    assert message in line["message"]
    assert "geheim" not in err


def test_help_and_nothing_at_all_end_as_in_text(capsys, monkeypatch):
    assert command(capsys, "--help")[0] == 0
    code, *_ = command(capsys)
    monkeypatch.setenv(logs.VARIABLE, "json")
    assert command(capsys, "--help")[0] == 0
    assert command(capsys)[0] == code


def test_a_variable_that_names_no_format_is_refused_and_a_bad_option_is_left_to_the_parser():
    with pytest.raises(Refusal, match=r"RAY_MERGE_LOG_FORMAT is 'xml'; use text or json"):
        logs.asked_format([], {logs.VARIABLE: "xml"})
    assert logs.asked_format(["--log-format", "xml"], {}) == "text"


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (["run", "r", "--log-format", "json"], "json"),
        (["run", "--log-format=json", "r"], "json"),
        (["run", "--log-format"], "text"),
        (["submit", "r", "--", "--log-format", "json"], "text"),
        ([], "text"),
    ],
)
def test_the_option_is_found_before_the_command_line_is_parsed(words, form):
    assert logs.asked_format(words, {}) == form
    assert logs.asked_format(["--log-format", "text", *words], {logs.VARIABLE: "json"}) == "text"


def test_library_loggers_warnings_and_bugs_are_objects_without_credentials(capsys, monkeypatch):
    logs.set_up("json")
    logs.work_on("s3://user:geheim@bucket/recipe.yaml")
    monkeypatch.setattr(logging.getLogger("botocore"), "level", logging.DEBUG)
    logging.getLogger("botocore").info("quiet")
    logging.getLogger("botocore").warning("asked https://host/x?X-Amz-Signature=geheim")
    warnings.warn("old", stacklevel=1)
    try:
        raise ValueError("s3://user:geheim@bucket")
    except ValueError as error:
        logs.trace(error)
    said = lines(capsys)
    assert [line["logger"] for line in said] == ["botocore", "py.warnings", "ray_merge"]
    assert "Traceback" in said[2]["exception"]
    assert {line["recipe"] for line in said} == {"s3://bucket/recipe.yaml"}
    assert "geheim" not in json.dumps(said)


def test_what_is_not_known_is_left_out(capsys):
    logs.set_up("json")
    with Progress() as progress:
        progress(Event(kind="warning", text="odd"))
    (line,) = lines(capsys)
    assert sorted(line) == ["level", "logger", "message", "seconds", "time"]
    assert (line["level"], line["message"]) == ("warning", "warning: odd")


def test_a_log_has_the_first_line_of_a_selection_and_the_last_of_each_round(capsys):
    logs.set_up("json")
    with Progress() as progress:
        progress(Event(kind="select", text="selecting over the whole model for 2 merge(s)"))
        for round in (1, 2):
            for done in (1, 2, 3):
                progress(Event(kind="select", text=f"selecting, round {round}", units=(done, 3)))
    said = lines(capsys)
    assert [line["message"] for line in said] == [
        "selecting over the whole model for 2 merge(s)",
        "selecting, round 1: 3/3 shards",
        "selecting, round 2: 3/3 shards",
    ]
    assert [(line.get("done"), line.get("of")) for line in said] == [(None, None), (3, 3), (3, 3)]


def test_text_is_what_it_was(tmp_path: Path, capsys):
    code, _, err = command(capsys, "run", str(tmp_path / "none.yaml"), "--log-format", "text")
    assert code == 2
    assert err.startswith("ray-merge: cannot read recipe")
    assert logs.message_of(err) == err
    assert logs.message_of('{"message": "no"}') == "no"
