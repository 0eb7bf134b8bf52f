import importlib.metadata

import pytest

from ray_merge.cli import main


def test_the_list_of_commands_says_what_each_does_in_whole_sentences(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    commands = capsys.readouterr().out.partition("Commands:")[2].splitlines()[1:]
    assert (stop.value.code, len(commands)) == (0, 12)
    assert [line for line in commands if "..." in line] == []


def test_the_version_is_that_of_the_installed_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (
        0,
        f"ray-merge {importlib.metadata.version('ray-merge')}\n",
    )
