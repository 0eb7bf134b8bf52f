"""One RayJob per night, against a real HTTP server that behaves as the API server does."""

from __future__ import annotations

import json

import pytest

from api_server import TOKEN, ApiServer, serving
from ray_merge import contact
from ray_merge.errors import Refusal, RunFailed
from ray_merge.nightly.kubernetes import Kubernetes
from ray_merge.nightly.rayjob import Waiting, job_of, read_template, run_rayjob

TEMPLATE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "ray-merge-nightly", "labels": {"kueue.x-k8s.io/queue-name": "merges"}},
    "spec": {"entrypoint": "python nightly.py --recipes s3://b/recipes --date {date}", "backoffLimit": 1},
}
NAME = "ray-merge-nightly-20260131"
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
COMPLETE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(contact, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def account(tmp_path):
    for name, text in (("token", f"{TOKEN}\n"), ("namespace", "merging\n")):
        (tmp_path / name).write_text(text)
    return tmp_path


def run(server, account, said=None, **how):
    """What it says, and raises."""
    patience = {"poll_seconds": 0.01, "contact_seconds": 5.0, **how}
    kubernetes = Kubernetes(server.url, account)
    waiting = Waiting(say=(lambda _: None) if said is None else said.append, **patience)
    run_rayjob(TEMPLATE, "2026-01-31", kubernetes.namespace, kubernetes, waiting)


def test_it_creates_one_job_named_by_the_date_and_waits_for_it(account):
    said: list[str] = []
    states = [{}, {"jobDeploymentStatus": "Initializing"}, RUNNING, RUNNING, COMPLETE]
    with serving(ApiServer(states=states)) as server:
        run(server, account, said)
    job = server.jobs[NAME]
    assert job["metadata"]["namespace"] == "merging"
    assert job["metadata"]["labels"] == TEMPLATE["metadata"]["labels"]
    assert job["spec"]["entrypoint"].endswith("--date 2026-01-31")
    assert said == [
        f"created RayJob merging/{NAME}",
        f"RayJob {NAME}: new",
        f"RayJob {NAME}: Initializing",
        f"RayJob {NAME}: Running, job RUNNING",
        f"RayJob {NAME}: Complete, job SUCCEEDED",
    ]


def test_a_job_of_that_night_is_attached_to(account):
    said: list[str] = []
    with serving(ApiServer(states=[RUNNING, COMPLETE], jobs={NAME: dict(TEMPLATE)})) as server:
        run(server, account, said)
    assert said[0] == f"attached to RayJob merging/{NAME}"
    assert sum(one.startswith("POST") for one in server.requests) == 1


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit 1"}, "job FAILED: exit 1"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "ended as Complete, job STOPPED"),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, "never started: DeadlineExceeded"),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "bad spec"}, "bad spec"),
    ],
)
def test_a_job_that_did_not_succeed_is_a_failed_night_with_the_next_step(account, state, words):
    with (
        serving(ApiServer(states=[RUNNING, {"jobDeploymentStatus": "Retrying"}, state])) as server,
        pytest.raises(RunFailed, match=words) as failure,
    ):
        run(server, account)
    assert f"kubectl -n merging delete rayjob {NAME}" in str(failure.value)


def test_errors_of_the_server_and_a_rotated_token_are_waited_out(account):
    # At the create: 503, a closed connection; the object may be there by then, which the 409 tells.
    server = ApiServer(states=[RUNNING, COMPLETE], failures=[503, 0])
    with serving(server):
        original = server.get

        def get(name):
            if server.looks == 0:
                server.failures += [500, 401, 429, 0]
            return original(name)

        server.get = get
        said: list[str] = []
        run(server, account, said)
    assert any("asking again" in one for one in said)
    assert said[-1].endswith("Complete, job SUCCEEDED")


@pytest.mark.parametrize(
    ("failure", "step"), [(401, "serviceAccountName"), (403, "create, get, list and watch on rayjobs")]
)
def test_a_create_that_is_not_allowed_is_a_refusal(account, failure, step):
    with serving(ApiServer(failures=[failure])) as server, pytest.raises(Refusal, match=step):
        run(server, account)
    assert server.jobs == {}


def test_a_cluster_without_kuberay_or_the_namespace_is_a_refusal(account):
    (account / "namespace").write_text("elsewhere")
    with serving(ApiServer()) as server, pytest.raises(Refusal, match="install the KubeRay operator"):
        run(server, account)


def test_a_manifest_that_the_server_refuses_is_a_refusal_in_its_words(account):
    with (
        serving(ApiServer(failures=[422])) as server,
        pytest.raises(Refusal, match=r"was not created \(422"),
    ):
        run(server, account)


def test_a_job_that_somebody_deletes_is_a_failed_night(account):
    server = ApiServer(states=[RUNNING])
    original = server.get

    def get(name):
        if server.looks == 2:
            server.jobs.clear()
        return original(name)

    server.get = get
    with serving(server), pytest.raises(RunFailed, match="was deleted before it ended"):
        run(server, account)


def test_an_api_server_that_stays_away_is_a_failed_night_and_the_job_goes_on(account):
    server = ApiServer(states=[RUNNING])
    with serving(server):
        server.get = lambda name: (503, {"message": "away"})
        with pytest.raises(RunFailed, match=r"has not answered for .* s \(503: away\).*goes on"):
            run(server, account, contact_seconds=0.1)
    with pytest.raises(RunFailed, match="creates RayJob"):
        run(server, account, contact_seconds=0.1)


def test_a_job_that_takes_too_long_is_left_alone(account):
    with (
        serving(ApiServer(states=[RUNNING])) as server,
        pytest.raises(RunFailed, match=r"not done after 0 s \(Running, job RUNNING\).*goes on"),
    ):
        run(server, account, timeout_seconds=0.05)
    assert NAME in server.jobs


def test_outside_of_a_pod_the_namespace_must_be_given(tmp_path):
    with pytest.raises(Refusal, match="--namespace"):
        _ = Kubernetes(account=tmp_path / "none").namespace


def test_the_entrypoint_must_say_which_night_it_is():
    template = {**TEMPLATE, "spec": {"entrypoint": "python nightly.py --recipes r"}}
    with pytest.raises(Refusal, match=r"write --date \{date\}"):
        job_of(template, "2026-01-31", "merging")


def test_a_name_that_kuberay_would_refuse_is_refused_here():
    template = {**TEMPLATE, "metadata": {"name": "n" * 39}}
    with pytest.raises(Refusal, match="has 48 characters, KubeRay takes 47"):
        job_of(template, "2026-01-31", "merging")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "RayCluster"}, "not one RayJob"),
        ({"apiVersion": "batch/v1"}, "not one RayJob"),
        ({"spec": {}}, "spec.entrypoint is missing"),
        ({"metadata": {}}, "metadata.name is missing"),
    ],
)
def test_a_template_that_is_no_rayjob_is_refused(tmp_path, change, words):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({**TEMPLATE, **change}))
    with pytest.raises(Refusal, match=words):
        read_template(str(path))
    for text in ("a: [", "", "- 1"):
        path.write_text(text)
        with pytest.raises(Refusal, match="not"):
            read_template(str(path))
    with pytest.raises(Refusal, match="there is no such file"):
        read_template(str(tmp_path / "none.yaml"))
