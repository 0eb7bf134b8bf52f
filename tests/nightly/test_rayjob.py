"""One RayJob per night, against a real HTTP server that behaves as the API server does."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from api_server import TOKEN, ApiServer, serving
from ray_merge import contact
from ray_merge.errors import JobOver, Refusal, RunFailed, Unwatched
from ray_merge.nightly.kubernetes import Kubernetes
from ray_merge.nightly.rayjob import MADE_FROM, Waiting, day_of_job, job_of, read_template, run_rayjob

TEMPLATE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "ray-merge-nightly", "labels": {"kueue.x-k8s.io/queue-name": "merges"}},
    "spec": {"entrypoint": "python nightly.py --recipes s3://b/recipes --date {date}", "backoffLimit": 1},
}
JOB = job_of(TEMPLATE, "2026-01-31", "merging")
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
    run_rayjob(job_of(TEMPLATE, "2026-01-31", kubernetes.namespace), kubernetes, waiting)


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
    with serving(ApiServer(states=[RUNNING, COMPLETE], jobs={NAME: JOB})) as server:
        run(server, account, said)
    assert said[0] == f"attached to RayJob merging/{NAME}"
    assert sum(one.startswith("POST") for one in server.requests) == 1


def test_a_job_of_that_night_which_somebody_created_by_hand_is_attached_to(account):
    by_hand = {**JOB, "metadata": {"name": NAME}}
    with serving(ApiServer(states=[COMPLETE], jobs={NAME: by_hand})) as server:
        run(server, account)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec": {"entrypoint": "python nightly.py --recipes s3://OTHERS"}},
         "runs 'python nightly.py --recipes s3://OTHERS', this night's 'python nightly.py --recipes s3://b/recipes"),
        ({"metadata": {"annotations": {MADE_FROM: "another"}}}, "was made from spec 'another', this night's '"),
    ],
)  # fmt: skip
def test_another_job_of_that_name_is_not_attached_to(account, change, words):
    server = ApiServer(states=[COMPLETE], jobs={NAME: {**JOB, **change}})
    with serving(server), pytest.raises(RunFailed) as failure:
        run(server, account)
    assert words in str(failure.value)
    assert f"kubectl -n merging delete rayjob {NAME}" in str(failure.value)


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
        pytest.raises(JobOver, match=words) as failure,
    ):
        run(server, account)
    assert failure.value.exit_code == 4
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
    ("failure", "step"), [(401, "serviceAccountName"), (403, "needs create and get on rayjobs")]
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
    with serving(server), pytest.raises(JobOver, match="was deleted before it ended"):
        run(server, account)


def test_an_api_server_that_stays_away_is_a_failed_night_and_the_job_goes_on(account):
    server = ApiServer(states=[RUNNING])
    with serving(server):
        server.get = lambda name: (503, {"message": "away"})
        with pytest.raises(Unwatched, match=r"has not answered for .* s \(503: away\).*goes on"):
            run(server, account, contact_seconds=0.1)
    with pytest.raises(Unwatched, match="creates RayJob"):
        run(server, account, contact_seconds=0.1)


def test_a_job_that_takes_too_long_is_left_alone(account):
    with (
        serving(ApiServer(states=[RUNNING])) as server,
        pytest.raises(Unwatched, match=r"not done after 0 s \(Running, job RUNNING\).*goes on"),
    ):
        run(server, account, timeout_seconds=0.05)
    assert NAME in server.jobs


@pytest.mark.parametrize(
    "cut",
    [
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n{"status":',
        b"\x15\x03\x01\x00\x02\x02P\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n{"status":',
    ],
    ids=["chunked", "no HTTP", "length"],
)
def test_an_answer_that_is_cut_or_is_no_http_is_asked_for_again(tmp_path, cut):
    listening = socket.create_server(("127.0.0.1", 0))

    def answer():
        with listening, listening.accept()[0] as client:
            client.recv(65536)
            client.sendall(cut)

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(contact.NoContact):
        Kubernetes(f"http://127.0.0.1:{listening.getsockname()[1]}", tmp_path).get("/x")
    thread.join()


@pytest.mark.parametrize(
    ("metadata", "day"),
    [
        ({"creationTimestamp": "2026-01-31T01:00:03Z"}, "2026-01-31"),
        ({"creationTimestamp": "2026-02-01T00:20:00Z",
          "annotations": {"batch.kubernetes.io/cronjob-scheduled-timestamp": "2026-01-31T23:30:00Z"}}, "2026-01-31"),
        ({"annotations": {"batch.kubernetes.io/cronjob-scheduled-timestamp": "2026-02-01T00:30:00+01:00"}},
         "2026-01-31"),
    ],
)  # fmt: skip
def test_the_day_is_that_of_the_job_of_the_pod(account, metadata, day):
    with serving(ApiServer(batch={"first": {"metadata": metadata}})) as server:
        assert day_of_job("first", "merging", Kubernetes(server.url, account), Waiting()) == day


@pytest.mark.parametrize("answer", [{}, {"metadata": {"creationTimestamp": "yesterday"}}, None])
def test_a_job_of_the_pod_that_cannot_be_read_is_a_refusal(account, answer):
    batch = {} if answer is None else {"first": answer}
    with (
        serving(ApiServer(batch=batch)) as server,
        pytest.raises(Refusal, match=r"Job merging/first does not say .* get on jobs"),
    ):
        day_of_job("first", "merging", Kubernetes(server.url, account), Waiting())


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
