"""A night by a RayJob, against a server that behaves as the API server does; the job's work is done in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from night_cases import DAY, NEXT, Folder

from api_server import TOKEN, ApiServer, serving
from ray_merge import contact
from ray_merge.errors import JobOver, Refusal, RunFailed, Unwatched
from ray_merge.nightly import night as night_module
from ray_merge.nightly import run_night
from ray_merge.nightly.kubernetes import Kubernetes
from ray_merge.nightly.rayjob import Waiting
from ray_merge.nightly.there import run_there
from tiny import V1, factors, write_adapter

RUNNING = {"jobDeploymentStatus": "Running"}
STATES = [RUNNING, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
TYPO = [{"name": "m", "merge_method": "tees"}]


class Pod:
    """What the CronJob's pod has, and what it says."""

    def __init__(self, folder):
        self.folder = folder
        self.said: list[str] = []
        self.account = folder.root / "account"
        self.account.mkdir()
        for name, text in (("token", TOKEN), ("namespace", "merging")):
            (self.account / name).write_text(text)
        self.template(f"python jobs/nightly.py --recipes {folder.root}/recipes --date {{date}}")

    def template(self, entrypoint):
        document = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": "nightly"},
            "spec": {"entrypoint": entrypoint},
        }
        (self.folder.root / "rayjob.yaml").write_text(json.dumps(document))

    def run(self, server, of_job=None, date=DAY, **change):
        """`--rayjob`, without the options of what merges."""
        night = self.folder.night(date, **{"engine": "ray", "workers": None, **change})
        how = Waiting(poll_seconds=0.01, contact_seconds=0.2, say=self.said.append)
        with serving(server):
            kubernetes = Kubernetes(server.url, self.account)
            run_there(night, str(self.folder.root / "rayjob.yaml"), None, kubernetes, how, of_job=of_job)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(contact, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture
def pod(folder):
    return Pod(folder)


def test_a_night_is_complete_when_its_manifests_are_there(folder, pod):
    folder.recipe("a")
    pod.run(ApiServer(states=STATES, done=lambda: run_night(folder.night())))
    assert folder.manifest("a").exists()
    assert pod.said[0].endswith("a.yaml: 1 of 1 merge(s) to make")
    assert pod.said[-1] == "complete: every merge has its manifest"


def test_a_rayjob_that_says_succeeded_without_its_manifests_is_a_failed_night(folder, pod):
    folder.recipe("a")
    with pytest.raises(RunFailed, match=r"1 thing\(s\) are not complete, first .*/a/m has no manifest"):
        pod.run(ApiServer(states=STATES))


def test_no_rayjob_is_created_for_a_folder_without_recipes(pod):
    server = ApiServer(states=STATES)
    with pytest.raises(Refusal, match="no file there ends in"):
        pod.run(server)
    assert server.requests == []


def test_a_night_with_nothing_to_make_creates_nothing_and_has_its_summary(folder, pod):
    folder.recipe("a")
    run_night(folder.night())
    server = ApiServer(states=STATES)
    pod.run(server, date=NEXT)
    assert server.requests == []
    summary = json.loads((folder.root / f"recipes/summaries/nightly-{NEXT}-1.json").read_text())
    assert summary["complete"]
    assert [row["state"] for row in summary["results"]] == ["skipped"]


def test_a_typo_costs_no_cluster_and_is_still_a_failed_night(folder, pod):
    folder.recipe("a", merges=TYPO)
    server = ApiServer(states=STATES)
    with pytest.raises(RunFailed, match=r"is refused: .*unknown merge method 'tees'") as failure:
        pod.run(server)
    assert failure.value.exit_code == 1
    assert server.requests == []


def test_a_typo_beside_a_good_recipe_is_judged_after_the_job_that_makes_the_rest(folder, pod):
    folder.recipe("a", merges=TYPO)
    folder.recipe("b")
    with pytest.raises(RunFailed, match=r"1 thing\(s\) are not complete, first .*a.yaml is refused"):
        pod.run(ApiServer(states=STATES, done=lambda: run_night(folder.night())))
    assert folder.manifest("b").exists()


def test_a_recipe_that_comes_during_the_night_belongs_to_the_next_one(folder, pod):
    folder.recipe("a")

    def done():
        run_night(folder.night())
        folder.recipe("late")

    pod.run(ApiServer(states=STATES, done=done))
    assert any(one.endswith("late.yaml: new, next night") for one in pod.said)
    assert not folder.manifest("late").exists()


@pytest.mark.parametrize("before_the_job", [True, False])
def test_an_adapter_that_changes_during_the_night_does_not_fail_it(folder, pod, before_the_job):
    folder.recipe("a")

    def done():
        if not before_the_job:
            run_night(folder.night())
        write_adapter(folder.root / "a", factors(V1))
        if before_the_job:
            run_night(folder.night())

    pod.run(ApiServer(states=STATES, done=done))


def test_a_merge_that_is_added_during_the_night_belongs_to_the_next_one(folder, pod):
    folder.recipe("a")

    def done():  # the recipe changes in every way at once: the job makes `m` by another method, and `new` comes later
        merges = [{"name": "m", "merge_method": "linear"}]
        folder.recipe("a", merges=merges)
        run_night(folder.night())
        folder.recipe("a", merges=[*merges, {"name": "new", "merge_method": "linear"}])

    pod.run(ApiServer(states=STATES, done=done))
    assert any(one.endswith("a/new: new, next night") for one in pod.said)


def test_a_recipe_that_is_removed_during_the_night_is_not_missed(folder, pod):
    folder.recipe("a")
    path = folder.recipe("b")

    def done():
        os.remove(path)
        run_night(folder.night())

    pod.run(ApiServer(states=STATES, done=done))
    assert any(one.endswith("b.yaml: removed during the night") for one in pod.said)


def test_a_pod_that_starts_again_after_midnight_attaches_to_the_job_of_its_day(folder, pod, monkeypatch):
    folder.recipe("a")
    job = {"metadata": {"creationTimestamp": f"{DAY}T01:00:00Z"}}
    server = ApiServer(states=[RUNNING], batch={"nightly-1": job})
    for today in (DAY, NEXT):
        monkeypatch.setattr(night_module, "today", lambda today=today: today)
        server.states = [RUNNING] if today == DAY else STATES
        server.done = lambda: run_night(folder.night())
        if today == DAY:
            server.get = lambda name: (503, {"message": "away"})
            with pytest.raises(Unwatched):
                pod.run(server, of_job="nightly-1", date=None)
            del server.get
        else:
            pod.run(server, of_job="nightly-1", date=None)
    assert sorted(server.jobs) == ["nightly-20260131"]
    assert "attached to RayJob merging/nightly-20260131" in pod.said


def test_who_deletes_the_rayjob_stops_the_night(folder, pod):
    folder.recipe("a")
    server = ApiServer(states=[RUNNING])
    server.get = lambda name: (404, {"message": "not found"})
    with pytest.raises(JobOver, match="was deleted before it ended") as failure:
        pod.run(server)
    assert failure.value.exit_code == 4


def test_sigterm_leaves_the_job_and_says_that_the_same_command_attaches(folder, pod):
    folder.recipe("a")
    server = ApiServer(states=[RUNNING])
    original = server.get

    def get(name):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(name)

    server.get = get
    with pytest.raises(Unwatched, match=r"stopped by SIGTERM.*attaches"):
        pod.run(server)
    assert sorted(server.jobs) == ["nightly-20260131"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": "s3://else"}, "--output is s3://else here and not given in the RayJob's entrypoint"),
        ({"summary": "s3://else"}, "--summary is s3://else here and not given"),
        ({"device": "cuda"}, "--device cuda would have no effect here"),
        ({"workers": 7}, "--workers 7 would have no effect here"),
        ({"memory": "1GB"}, "--memory 1GB would have no effect here"),
        ({"address": "head:1"}, "--address head:1 would have no effect here"),
        ({"engine": "local"}, "--engine local would have no effect here"),
    ],
)
def test_an_option_that_the_job_would_not_obey_is_refused(folder, pod, change, words):
    folder.recipe("a")
    server = ApiServer(states=STATES)
    with pytest.raises(Refusal) as refusal:
        pod.run(server, **change)
    assert words in str(refusal.value)
    assert server.requests == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--of-job", "x"], "--of-job is for --rayjob"),
        (["--rayjob", "r.yaml", "--json"], "--json would have no effect with --rayjob"),
        (["--rayjob", "r.yaml", "--refused-ok"], "--refused-ok would have no effect with --rayjob"),
        (["--rayjob", "r.yaml", "--of-job", "x", "--date", DAY], "--of-job and --date both say"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message):
    script = Path(__file__).parents[2] / "jobs/nightly.py"
    command = [sys.executable, str(script), "--recipes", "none", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("entrypoint", "words"),
    [
        ("python n.py --recipes s3://else --date {date}", "in the RayJob's entrypoint"),
        ("python n.py --date {date}", "and not given in the RayJob's entrypoint"),
        ("python n.py --recipes {recipes} --output=s3://x --date {date}", "--output is not given here and s3://x in"),
        ("python n.py --recipes 'x --date {date}", "is no shell command"),
    ],
)  # fmt: skip
def test_an_entrypoint_that_makes_something_else_is_refused(folder, pod, entrypoint, words):
    folder.recipe("a")
    pod.template(entrypoint.replace("{recipes}", f"{folder.root}/recipes"))
    with pytest.raises(Refusal) as refusal:
        pod.run(ApiServer(states=STATES))
    assert words in str(refusal.value)


def test_options_of_both_may_be_spelt_in_either_way(folder, pod):
    folder.recipe("a")
    output = f"{folder.root}/made/{{date}}"
    pod.template(f"python n.py --recipes={folder.root}/recipes/ --output {output} --date {{date}}")
    pod.run(ApiServer(states=STATES, done=lambda: run_night(folder.night(output=output))), output=output)
    assert (folder.root / "made" / DAY / "m").is_dir()
