"""`jobs/submit.py` on a real head with its Jobs API: the exit code is the truth, whatever happens to the stream."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cutting_proxy import cutting_proxy
from jobs_server import JobsServer, jobs_server
from ray_head import RayHead, run_head
from ray_merge.errors import RayMergeError, Refusal
from ray_merge.interrupts import Interrupts
from ray_merge.runtime.jobs_api import JobsApi
from ray_merge.storage.commit import MANIFEST
from ray_merge.submit import Patience, Request, _after_interrupt, _Log, submit
from tiny import Q0, factors, llama_tensors, write_adapter, write_base, write_recipe_files

JOBS = Path(__file__).parents[1] / "jobs"
DATE = "2026-01-31"


def script(head: RayHead, url: str, recipe: Path, *words: str) -> subprocess.Popen[str]:
    """The script as a user starts it, with RAY_ADDRESS set to something else, which Ray's client would prefer."""
    return subprocess.Popen(
        [sys.executable, str(JOBS / "submit.py"), str(recipe), "--address", url, "--date", DATE, *words],
        env={**os.environ, **head.environment, "RAY_ADDRESS": "127.0.0.1:1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(started: subprocess.Popen[str]) -> tuple[int, str, str]:
    printed, said = started.communicate(timeout=240)
    return started.returncode, printed, said


def in_process(
    url: str,
    recipe: Path,
    cache: Path,
    say: Callable[[str, JobsApi], None],
    *,
    stop: bool = False,
    log: Callable[[str], None] = lambda _: None,
    **changes: Any,
) -> str:
    """What `submit` raises, with a hook at everything that it says; "" when it returns."""
    jobs = JobsApi(url)
    patience = Patience(
        contact_seconds=1.5, stop_on_interrupt=stop, say=lambda text: say(text, jobs), log=log
    )
    options = ("--workers", "1", "--cache-dir", str(cache))
    request = Request(**{"recipe": str(recipe), "scripts": JOBS, "date": DATE, "options": options, **changes})
    try:
        submit(request, jobs, patience)
    except RayMergeError as error:
        return f"{error.exit_code}: {error}"
    return ""


def write_recipes(folder: Path) -> dict[str, Path]:
    """Recipes of one tiny merge each: good ones, a base with NaN (found at work), an adapter with NaN (refused)."""
    document = write_recipe_files(folder)
    broken = llama_tensors()
    broken[f"{Q0}.weight"][0, 0] = float("nan")
    write_base(folder / "broken-base", broken)
    tensors = factors(Q0)
    tensors[f"base_model.model.{Q0}.lora_B.weight"] = torch.full((8, 2), float("nan"))
    write_adapter(folder / "broken", tensors)
    changes = {
        "good": {},
        "failing": {"base_model": str(folder / "broken-base")},
        "refused": {"adapters": {"a": str(folder / "broken")}},
    }
    recipes = {}
    for name, change in changes.items():
        recipes[name] = folder / f"{name}.yaml"
        recipes[name].write_text(json.dumps({**document, **change, "output": str(folder / "out" / name)}))
    return recipes


def submit_all() -> dict[str, Any]:
    """Every way that a job can go, one after another on one head."""
    with tempfile.TemporaryDirectory() as home, run_head() as head:
        folder = Path(home)
        recipes, cache = write_recipes(folder), folder / "cache"
        words = ("--", "--workers", "1", "--cache-dir", str(cache))
        found: dict[str, Any] = {}
        with cutting_proxy(head.jobs_url, cuts=3) as proxy:
            first = script(head, proxy.url, recipes["good"], *words)
            begun = next(line for line in first.stderr if "submitted" in line)
            found["attached"] = outcome(script(head, head.jobs_url, recipes["good"], *words))
            code, printed, said = outcome(first)
            found["cut"] = (code, printed, begun + said, proxy.streams)
        found["published"] = (folder / "out/good/m" / MANIFEST).is_file()
        found["again"] = outcome(script(head, "http://127.0.0.1:1", recipes["good"], *words))
        with mock.patch.dict(os.environ, head.environment):
            found |= hooked(head, recipes, cache)
        return found


def hooked(head: RayHead, recipes: dict[str, Path], cache: Path) -> dict[str, Any]:
    """Runs in which something happens as soon as the job was submitted."""
    names = []

    def stop(text: str, jobs: JobsApi) -> None:
        if text.startswith("submitted"):
            names.append(text.split()[2])
            jobs.stop(names[-1])

    found: dict[str, Any] = {"stopped": in_process(head.jobs_url, recipes["failing"], cache, stop)}
    said: list[str] = []
    found["failing"] = in_process(head.jobs_url, recipes["failing"], cache, lambda text, _: said.append(text))
    found["names"] = [*names, *(text.split()[2] for text in said if text.startswith("submitted"))]
    with cutting_proxy(head.jobs_url, cuts=0) as proxy:

        def cut(text: str, _: JobsApi) -> None:
            if text.startswith("submitted"):
                proxy.close()

        found["lost"] = in_process(proxy.url, recipes["refused"], cache, cut)

    def interrupt(text: str, jobs: JobsApi) -> None:
        if text.startswith(("submitted", "attached")):
            names.append(text.split()[text.split().index("job") + 1])
            os.kill(os.getpid(), signal.SIGTERM)

    found["interrupted"] = in_process(head.jobs_url, recipes["refused"], cache, interrupt, stop=True)
    while not JobsApi(head.jobs_url).state(names[-1]).ended:
        time.sleep(0.2)
    found["refused"] = in_process(head.jobs_url, recipes["refused"], cache, lambda *_: None)
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.own_process(work=submit_all)
def test_a_submitted_recipe_ends_with_the_truth(answer):
    found = answer
    code, printed, said, streams = found["cut"]
    assert code == 0, said
    assert streams >= 2  # a tiny job may end before the third cut; tests/hosts has one that does not
    assert found["published"]
    assert printed.count("published m") == 1  # every stream began with the log's beginning
    assert said.startswith("submit: submitted job ray-merge-")
    assert "complete: all 1 merge(s)" in said
    code, printed, said = found["attached"]
    assert code == 0, said
    assert "attached to job" in said
    assert printed.count("published m") == 1
    code, _, said = found["again"]
    assert code == 0, said  # nobody listens at that address, and nobody needs to
    assert "nothing to do: all 1 merge(s) are complete" in said
    assert found["stopped"].startswith("1: job ray-merge-")
    assert "was stopped" in found["stopped"]
    assert found["names"][1] == f"{found['names'][0]}-2"
    assert found["lost"].startswith("3: http://127.0.0.1")
    assert "its state is unknown" in found["lost"]
    assert found["failing"].startswith(f"1: job {found['names'][1]} failed")
    assert "NaN" in found["failing"]
    assert re.fullmatch(r"1: stopped by SIGTERM; job \S+ was told to stop", found["interrupted"])
    assert found["refused"].startswith("2: job ray-merge-")
    assert "NaN" in found["refused"]


def test_nobody_at_the_address_is_a_refusal_that_says_that_nothing_was_submitted(tmp_path):
    recipe = write_recipes(tmp_path)["good"]
    said: list[str] = []
    text = in_process("http://127.0.0.1:1", recipe, tmp_path / "cache", lambda text, _: said.append(text))
    assert text.startswith("2: http://127.0.0.1:1 has not answered")
    assert "has submitted nothing" in text
    assert any("asking again" in one for one in said)


@pytest.mark.parametrize("address", ["ray://head:10001", "head:8265", "auto"])
def test_an_address_is_the_url_of_a_dashboard(address):
    with pytest.raises(Refusal, match="http://HEAD:8265"):
        JobsApi(address)


@pytest.mark.parametrize("word", ["--date", "--output=x", "--only", "--engine"])
def test_what_decides_where_merges_go_stands_before_the_dashes(tmp_path, word):
    request = Request(recipe="r.yaml", scripts=tmp_path, options=(word, "x"))
    patience = Patience(contact_seconds=0, stop_on_interrupt=False, say=print, log=print)
    with pytest.raises(Refusal, match="before the --"):
        submit(request, JobsApi("http://127.0.0.1:1"), patience)


def test_an_interrupted_call_leaves_its_job_alone_by_default():
    patience = Patience(contact_seconds=0, stop_on_interrupt=False, say=print, log=print)
    text = _after_interrupt("SIGINT", "night", JobsApi("http://127.0.0.1:1"), patience)
    assert text == "stopped by SIGINT; job night goes on, and the same command attaches to it again"


def test_a_log_is_printed_once_however_its_streams_are_cut():
    printed: list[str] = []
    log = _Log(printed.append)
    for stream in (["one\n", "tw"], ["one"], [], ["one\ntwo\n", "three\n"], ["one\ntwo\nthree\n"]):
        log.begin()
        for text in stream:
            log.add(text)
    assert "".join(printed) == "one\ntwo\nthree\n"


@pytest.fixture
def head(monkeypatch) -> Iterator[JobsServer]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with jobs_server() as server:
        yield server


def end_all(head: JobsServer) -> None:
    for job in head.jobs.values():
        job["status"] = "STOPPED"


def interrupted(head: JobsServer, recipe: Path, cache: Path, **changes: Any) -> tuple[str, list[str]]:
    """What `submit` raises when SIGTERM comes while it prints a log that never rests, and what it said before."""
    said: list[str] = []

    def say(text: str, _: JobsApi) -> None:
        said.append(text)
        if text.startswith(("submitted", "attached")):
            wait = 0.02 + 0.05 * random.random()
            threading.Timer(wait, os.kill, (os.getpid(), signal.SIGTERM)).start()
            deadline.append(time.monotonic() + 3)

    def log(text: str) -> None:
        if time.monotonic() > deadline[-1]:  # the signal was lost: let it end in another way
            end_all(head)

    deadline: list[float] = []
    with Interrupts():  # else a signal that comes too late would end the tests
        return in_process(head.url, recipe, cache, say, log=log, **changes), said


def test_every_signal_is_obeyed_whatever_it_interrupts(tmp_path, head):
    recipe = write_recipes(tmp_path)["good"]
    for turn in range(25):
        name = f"night{turn}"
        text, _ = interrupted(head, recipe, tmp_path / "cache", stop=True, name=name)
        assert text == f"1: stopped by SIGTERM; job {name} was told to stop"
        assert head.jobs[name]["status"] == "STOPPED"


def test_a_signal_whose_error_was_dropped_is_obeyed_at_the_next_text(tmp_path, head):
    texts: list[str] = []

    def log(text: str) -> None:
        texts.append(text)
        if len(texts) == 1:
            with contextlib.suppress(RayMergeError):  # as logging's handlers do
                os.kill(os.getpid(), signal.SIGTERM)
        elif len(texts) == 100:
            end_all(head)

    recipe = write_recipes(tmp_path)["good"]
    text = in_process(head.url, recipe, tmp_path / "cache", lambda *_: None, log=log, name="night")
    assert text.startswith("1: stopped by SIGTERM; job night goes on")


def test_a_job_of_that_name_is_attached_to_only_if_it_makes_these_merges(tmp_path, head):
    recipes, cache = write_recipes(tmp_path), tmp_path / "cache"
    _, said = interrupted(head, recipes["good"], cache, name="night")
    assert said[-1].startswith("submitted job night")
    _, said = interrupted(head, recipes["good"], cache, name="night")
    assert said[-1].startswith("attached to job night")
    made = head.jobs["night"]["metadata"]["merges"]
    text, _ = interrupted(head, recipes["failing"], cache, name="night")
    assert re.match(
        rf"2: --submission-id night: .* merges {made} of \S*good.yaml, not merges \w{{12}} of", text
    )
    head.jobs["night"]["metadata"] = {}
    text, _ = interrupted(head, recipes["good"], cache, name="night")
    assert text.startswith("2: --submission-id night: a job of that name makes something else")
    head.jobs["night"]["status"] = "SUCCEEDED"
    _, said = interrupted(head, recipes["good"], cache, name="night")
    assert said[-1].startswith("submitted job night-2")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"output": "out"}, "output is out"),
        ({"store": "moments"}, "store is moments"),
        ({"adapters": {"a": "broken"}}, "path of adapter a is broken"),
    ],
)
def test_a_path_relative_to_a_folder_that_the_job_lacks_is_refused(tmp_path, head, monkeypatch, change, what):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipes(tmp_path)["good"]
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), **change}))
    head.status = "SUCCEEDED"
    text = in_process(head.url, recipe, tmp_path / "cache", lambda *_: None)
    assert text.startswith(f"2: {recipe}: {what}, a path relative to")
    assert "s3://" in text
    assert not head.jobs


def test_an_output_on_the_command_line_counts_from_the_folder_of_the_caller(tmp_path, head, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipes(tmp_path)
    head.status = "SUCCEEDED"
    text = in_process(head.url, Path("good.yaml"), tmp_path / "cache", lambda *_: None, output="there")
    (job,) = head.jobs.values()
    assert f"merge.py {tmp_path}/good.yaml" in job["entrypoint"]
    assert f"--output {tmp_path}/there" in job["entrypoint"]
    assert f"no manifest, first {tmp_path}/there/m; " in text
    assert text.endswith("or to a URL if the cluster's nodes do not share this machine's disk")
