"""One RayJob per night: create it by its date, or find it there already, and wait until KubeRay says how it ended.

`jobDeploymentStatus: Complete` also covers jobs that somebody stopped, so `jobStatus` must be SUCCEEDED; and the
manifests of all merges must be there, which the caller looks at.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yaml

from ray_merge.contact import Contact, NoContact
from ray_merge.errors import ContactLost, Refusal, RunFailed
from ray_merge.nightly.kubernetes import Answer, Kubernetes, message
from ray_merge.storage.store import open_store

MAX_NAME = 47
"""KubeRay adds to a RayJob's name to name its cluster and services."""

POLL_SECONDS = 15.0
TERMINAL = ("Complete", "Failed", "ValidationFailed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How to wait.

    Args:
        timeout_seconds: for the whole job; None for as long as it takes.
        contact_seconds: how long the API server may be silent.
        poll_seconds: between two looks.
        say: what happens to the job.
    """

    timeout_seconds: float | None = None
    contact_seconds: float = 600.0
    poll_seconds: float = POLL_SECONDS
    say: Callable[[str], None] = lambda _: None


def read_template(path: str) -> Mapping[str, Any]:
    """A RayJob manifest, from a file or URL.

    Raises:
        Refusal: there is none, or it is something else.
    """
    folder, _, name = path.rpartition("/")
    store = open_store(folder or ("/" if path.startswith("/") else "."))
    if store.info(name) is None:
        raise Refusal(f"--rayjob {path}: there is no such file")
    try:
        found = yaml.safe_load(store.read(name))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(f"--rayjob {path}: not valid YAML ({' '.join(str(error).split())})") from error
    group = str(found.get("apiVersion", "")) if isinstance(found, dict) else ""
    if not isinstance(found, dict) or found.get("kind") != "RayJob" or not group.startswith("ray.io/"):
        raise Refusal(f"--rayjob {path}: not one RayJob (kind: RayJob, apiVersion: ray.io/v1)")
    if not isinstance(found.get("spec"), dict) or not isinstance(found["spec"].get("entrypoint"), str):
        raise Refusal(f"--rayjob {path}: spec.entrypoint is missing")
    if not isinstance(found.get("metadata"), dict) or not isinstance(found["metadata"].get("name"), str):
        raise Refusal(f"--rayjob {path}: metadata.name is missing; the date is added to it")
    return found


def job_of(template: Mapping[str, Any], date: str, namespace: str) -> dict[str, Any]:
    """The manifest of one night: `{date}` in the entrypoint filled in, the date in the name.

    Raises:
        Refusal: the name is too long, or nothing tells the job which night it is.
    """
    job = copy.deepcopy(dict(template))
    entrypoint = job["spec"]["entrypoint"]
    if "{date}" not in entrypoint:
        # A cluster that comes up after midnight would otherwise take the next day for its own.
        raise Refusal(
            f"the RayJob's entrypoint {entrypoint!r} has no {{date}}: write --date {{date}} into it"
        )
    name = f"{job['metadata']['name']}-{date.replace('-', '')}"
    if len(name) > MAX_NAME:
        raise Refusal(f"the RayJob's name {name} has {len(name)} characters, KubeRay takes {MAX_NAME}")
    job["spec"]["entrypoint"] = entrypoint.replace("{date}", date)
    job["metadata"] = {**job["metadata"], "name": name, "namespace": namespace}
    return job


def run_rayjob(
    template: Mapping[str, Any], date: str, namespace: str, server: Kubernetes, how: Waiting
) -> None:
    """Create the RayJob of that night or attach to it, and wait until it has succeeded.

    Raises:
        Refusal: it was not created.
        RunFailed: it failed, was stopped, took too long, or the API server is gone.
    """
    job = job_of(template, date, namespace)
    name, path = (
        job["metadata"]["name"],
        f"/apis/{job['apiVersion']}/namespaces/{quote(namespace, safe='')}/rayjobs",
    )
    contact = Contact(server=server.url, seconds=how.contact_seconds, say=how.say)
    try:
        status, answer = contact(lambda: server.create(path, job))
    except ContactLost as error:
        raise RunFailed(
            f"{error}; run the same command again: it creates RayJob {name}, or attaches to it"
        ) from error
    _check_created(status, answer, name, namespace)
    how.say(f"{'attached to' if status == 409 else 'created'} RayJob {namespace}/{name}")
    try:
        _wait(f"{path}/{name}", name, namespace, server, contact, how)
    except ContactLost as error:
        raise RunFailed(
            f"{error}: RayJob {name} goes on without this program, which attaches when run again"
        ) from error


def _check_created(status: int, answer: Mapping[str, Any], name: str, namespace: str) -> None:
    if status in (200, 201, 202, 409):
        return
    steps = {
        401: "the token is not accepted: give the pod a serviceAccountName",
        403: f"its ServiceAccount needs create, get, list and watch on rayjobs in namespace {namespace}",
        404: "the cluster knows no RayJob: install the KubeRay operator, or the namespace is missing",
    }
    step = steps.get(status, "mend the template")
    raise Refusal(f"RayJob {namespace}/{name} was not created ({status}: {message(answer)}); {step}")


def _wait(path: str, name: str, namespace: str, server: Kubernetes, contact: Contact, how: Waiting) -> None:
    deadline = None if how.timeout_seconds is None else time.monotonic() + how.timeout_seconds
    before = ""
    while True:
        code, answer = contact(lambda: _look(server, path))
        if code == 404:
            raise RunFailed(
                f"RayJob {namespace}/{name} was deleted before it ended; run the same command again"
            )
        if code != 200:
            raise RunFailed(f"RayJob {namespace}/{name} cannot be read ({code}: {message(answer)})")
        found = answer.get("status")
        state: Mapping[str, Any] = found if isinstance(found, dict) else {}
        deployment, job = (str(state.get(key) or "") for key in ("jobDeploymentStatus", "jobStatus"))
        if (words := f"{deployment or 'new'}{f', job {job}' if job else ''}") != before:
            how.say(f"RayJob {name}: {words}")
            before = words
        if deployment in TERMINAL:
            return _judge(name, namespace, deployment, job, state)
        if deadline is not None and time.monotonic() >= deadline:
            raise RunFailed(
                f"RayJob {namespace}/{name} is not done after {how.timeout_seconds:.0f} s ({words}); it goes on: run "
                "the same command again to attach to it"
            )
        time.sleep(how.poll_seconds)


def _look(server: Kubernetes, path: str) -> Answer:
    status, answer = server.get(path)
    if status == 401:  # a token that is just being rotated
        raise NoContact(f"401: {message(answer)}")
    return status, answer


def _judge(name: str, namespace: str, deployment: str, job: str, state: Mapping[str, Any]) -> None:
    if deployment == "Complete" and job == "SUCCEEDED":
        return
    why = " ".join(str(state.get("message") or state.get("reason") or "no message").split())
    raise RunFailed(
        f"RayJob {namespace}/{name} ended as {deployment}, job {job or 'never started'}: {why}; to run that night "
        f"again: kubectl -n {namespace} delete rayjob {name}, then the same command"
    )
