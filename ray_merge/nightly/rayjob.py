"""One RayJob per night: create it by its date, or find it there already, and wait until KubeRay says how it ended.

A RayJob of that name which was made from another template is another night's work, and not attached to.

`jobDeploymentStatus: Complete` also covers jobs that somebody stopped, so `jobStatus` must be SUCCEEDED; and the
manifests of all merges must be there, which the caller looks at.
"""

from __future__ import annotations

import copy
import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yaml

from ray_merge.contact import Contact, NoContact
from ray_merge.errors import ContactLost, JobOver, Refusal, RunFailed, Unwatched, shown
from ray_merge.identity import digest
from ray_merge.nightly.kubernetes import Answer, Kubernetes, message
from ray_merge.storage.store import open_store

MAX_NAME = 47
"""KubeRay adds to a RayJob's name to name its cluster and services."""

POLL_SECONDS = 15.0
MADE_FROM = "ray-merge/spec"
"""Annotation of a RayJob: digest of the spec as it was sent; the API server adds defaults to the spec itself."""

SCHEDULED = "batch.kubernetes.io/cronjob-scheduled-timestamp"
"""Annotation that a CronJob gives to its Jobs."""

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
    notes = {**(job["metadata"].get("annotations") or {}), MADE_FROM: digest(job["spec"])[:12]}
    job["metadata"] = {**job["metadata"], "name": name, "namespace": namespace, "annotations": notes}
    return job


def day_of_job(name: str, namespace: str, server: Kubernetes, how: Waiting) -> str:
    """The UTC day for which a Job of Kubernetes was scheduled, or on which it was created by hand.

    A pod that starts again after midnight finds the same day, unlike by its clock.

    Raises:
        Refusal: the Job cannot be read.
        Unwatched: the API server is silent.
    """
    path = f"/apis/batch/v1/namespaces/{quote(namespace, safe='')}/jobs/{quote(name, safe='')}"
    try:
        code, answer = _contact(server, how)(lambda: _look(server, path))
    except ContactLost as error:
        raise Unwatched(f"{error}; run the same command again") from error
    try:
        notes = answer["metadata"].get("annotations") or {}
        when = datetime.datetime.fromisoformat(
            notes.get(SCHEDULED) or answer["metadata"]["creationTimestamp"]
        )
        return when.astimezone(datetime.UTC).date().isoformat()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Refusal(
            f"--of-job {name}: Job {namespace}/{name} does not say when it was created ({code}: {message(answer)}); "
            "the ServiceAccount needs get on jobs; or give --date"
        ) from error


def run_rayjob(job: Mapping[str, Any], server: Kubernetes, how: Waiting) -> None:
    """Create a night's RayJob or attach to it, and wait until it has succeeded.

    Args:
        job: by `job_of`.
        server: the API server.
        how: to wait.

    Raises:
        Refusal: it was not created.
        RunFailed: there is another one of that name.
        JobOver: it failed, was stopped or was deleted.
        Unwatched: it took too long, or the API server is gone.
    """
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    path = f"/apis/{job['apiVersion']}/namespaces/{quote(namespace, safe='')}/rayjobs"
    contact = _contact(server, how)
    try:
        status, answer = contact(lambda: server.create(path, job))
    except ContactLost as error:
        raise Unwatched(
            f"{error}; run the same command again: it creates RayJob {name}, or attaches to it"
        ) from error
    _check_created(status, answer, name, namespace)
    try:
        if status == 409:
            _check_same(job, _read(f"{path}/{name}", name, namespace, server, contact))
        how.say(f"{'attached to' if status == 409 else 'created'} RayJob {namespace}/{name}")
        _wait(f"{path}/{name}", name, namespace, server, contact, how)
    except ContactLost as error:
        raise Unwatched(
            f"{error}: RayJob {name} goes on without this program, which attaches when run again"
        ) from error


def _contact(server: Kubernetes, how: Waiting) -> Contact:
    return Contact(server=server.url, seconds=how.contact_seconds, say=how.say)


def _check_same(job: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Refuse to take another RayJob for this night's."""
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    spec, notes = there.get("spec") or {}, (there.get("metadata") or {}).get("annotations") or {}
    ours, theirs = job["spec"]["entrypoint"], spec.get("entrypoint")
    what = "runs"
    if ours == theirs:
        what, ours = "was made from spec", job["metadata"]["annotations"][MADE_FROM]
        theirs = notes.get(MADE_FROM, ours)  # created by hand
    if ours != theirs:
        raise RunFailed(
            f"RayJob {namespace}/{name} is there already and {what} {shown(theirs)}, this night's {shown(ours)}; "
            f"wait for its end, or: kubectl -n {namespace} delete rayjob {name}; then the same command"
        )


def _check_created(status: int, answer: Mapping[str, Any], name: str, namespace: str) -> None:
    if status in (200, 201, 202, 409):
        return
    steps = {
        401: "the token is not accepted: give the pod a serviceAccountName",
        403: f"its ServiceAccount needs create and get on rayjobs in namespace {namespace}",
        404: "the cluster knows no RayJob: install the KubeRay operator, or the namespace is missing",
    }
    step = steps.get(status, "mend the template")
    raise Refusal(f"RayJob {namespace}/{name} was not created ({status}: {message(answer)}); {step}")


def _wait(path: str, name: str, namespace: str, server: Kubernetes, contact: Contact, how: Waiting) -> None:
    deadline = None if how.timeout_seconds is None else time.monotonic() + how.timeout_seconds
    before = ""
    while True:
        answer = _read(path, name, namespace, server, contact)
        found = answer.get("status")
        state: Mapping[str, Any] = found if isinstance(found, dict) else {}
        deployment, job = (str(state.get(key) or "") for key in ("jobDeploymentStatus", "jobStatus"))
        if (words := f"{deployment or 'new'}{f', job {job}' if job else ''}") != before:
            how.say(f"RayJob {name}: {words}")
            before = words
        if deployment in TERMINAL:
            return _judge(name, namespace, deployment, job, state)
        if deadline is not None and time.monotonic() >= deadline:
            raise Unwatched(
                f"RayJob {namespace}/{name} is not done after {how.timeout_seconds:.0f} s ({words}); it goes on: run "
                "the same command again to attach to it"
            )
        time.sleep(how.poll_seconds)


def _read(path: str, name: str, namespace: str, server: Kubernetes, contact: Contact) -> Mapping[str, Any]:
    code, answer = contact(lambda: _look(server, path))
    if code == 404:
        raise JobOver(
            f"RayJob {namespace}/{name} was deleted before it ended; run the same command again to create another"
        )
    if code != 200:
        raise RunFailed(f"RayJob {namespace}/{name} cannot be read ({code}: {message(answer)})")
    return answer


def _look(server: Kubernetes, path: str) -> Answer:
    status, answer = server.get(path)
    if status == 401:  # a token that is just being rotated
        raise NoContact(f"401: {message(answer)}")
    return status, answer


def _judge(name: str, namespace: str, deployment: str, job: str, state: Mapping[str, Any]) -> None:
    if deployment == "Complete" and job == "SUCCEEDED":
        return
    why = " ".join(str(state.get("message") or state.get("reason") or "no message").split())
    raise JobOver(
        f"RayJob {namespace}/{name} ended as {deployment}, job {job or 'never started'}: {why}; to run that night "
        f"again: kubectl -n {namespace} delete rayjob {name}, then the same command"
    )
