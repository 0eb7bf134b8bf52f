import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from ray_merge.errors import RunFailed
from ray_merge.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_exception_and_is_named(number):
    before = signal.getsignal(number)
    with Interrupts() as asked, pytest.raises(RunFailed, match=f"stopped by {number.name}"):
        os.kill(os.getpid(), number)
    assert asked.name == number.name
    assert signal.getsignal(number) is before


def test_the_second_signal_does_not_interrupt_the_tidying_up():
    tidied = False
    with Interrupts() as asked:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except RunFailed:
            os.kill(os.getpid(), signal.SIGINT)
            tidied = True
    assert tidied
    assert asked.name == "SIGTERM"


def test_without_a_signal_nothing_is_named():
    with Interrupts() as asked:
        pass
    assert asked.name == ""


def test_a_signal_in_the_middle_of_an_import_waits_for_its_end(tmp_path, monkeypatch):
    """As transformers imports its parts: whatever an import raises, it takes the module for broken."""
    (tmp_path / "slow_part.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Interrupts() as asked:
        part = importlib.import_module("slow_part")
        assert part.whole
        with pytest.raises(RunFailed, match="stopped by SIGINT"):
            time.sleep(10)
    assert asked.name == "SIGINT"


def test_a_script_that_runs_from_an_import_is_stopped_at_once(tmp_path, monkeypatch):
    (tmp_path / "script_part.py").write_text(
        "import os, signal, time\n"
        "from ray_merge.interrupts import Interrupts\n"
        "with Interrupts():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(10)\n"
        "    open(__file__ + '.end', 'w').close()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RunFailed, match="stopped by SIGTERM"):
        importlib.import_module("script_part")
    assert not list(tmp_path.glob("*.end"))


def test_the_command_line_stops_where_a_heavy_library_is_being_imported():
    """Ctrl-C while torch comes in: exit 1 and one sentence, no traceback, and the signal is not lost."""
    program = (
        "import importlib, sys, threading, os, signal, time\n"
        "import typer\n"
        "from ray_merge.cli import main\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def command() -> None:\n"
        "    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "    import torch\n"
        "    from transformers import AutoModel\n"
        "    time.sleep(20)\n"
        "main([], app)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.strip() == "ray-merge: stopped by SIGINT; run the recipe again to finish it"
