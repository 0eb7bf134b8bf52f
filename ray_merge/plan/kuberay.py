"""A plan as a RayJob of KubeRay: the document that `ray-merge plan RECIPE --emit-kuberay` prints.

Pure: plan -> mapping -> YAML. What each field is for, and the traps around it, stands beside the same fields in
cluster/kuberay/job/rayjob.yaml; a test holds the two together.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from ray_merge.errors import Refusal
from ray_merge.identity import digest
from ray_merge.plan.estimate import Cluster
from ray_merge.plan.kuberay_sizes import (
    MIB,
    OWN_DISK_BYTES,
    PENDING_SECONDS,
    SLACK,
    STAGES_SECONDS,
    STORE_BYTES,
    Sizes,
    pod_sizes,
)
from ray_merge.plan.plan import Plan
from ray_merge.recipe import Recipe, named_urls

RAY_VERSION = "2.60.0"
"""Of the image that cluster/Dockerfile makes. Without a version KubeRay can neither use tokens nor the health check."""

SERVICE_ACCOUNT = "ray-merge"

LABELS = {"app": "ray-merge"}
"""What the NetworkPolicy and the PodMonitor select by; KubeRay has an app.kubernetes.io/name of its own."""

ENVIRONMENT = {"XDG_CACHE_HOME": "/tmp/cache", "RAY_MERGE_LOG_FORMAT": "json"}
"""Of every pod; the root is read-only, and logs are collected."""

MAX_NAME = 47
"""Characters of a RayJob's name that KubeRay takes."""

SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how a recipe is to run.

    Args:
        recipe: its URL.
        image: made by cluster/Dockerfile.
        namespace: of the RayJob.
        queue: LocalQueue of Kueue, if any.
        device: "cpu" or "cuda".
        options: of `jobs/merge.py`, besides the workers and the device.
        merges: ids and places of what it makes.
    """

    recipe: str
    image: str
    namespace: str = "ray-merge"
    queue: str | None = None
    device: str = "cpu"
    options: Sequence[str] = ()
    merges: Sequence[str] = ()


def emit(plan: Plan, cluster: Cluster, target: Target) -> str:
    """The RayJob of `plan` as YAML, with what was assumed on top.

    Args:
        plan: with its moments laid out for `cluster.workers`.
        cluster: workers and their rates.
        target: where and how.

    Raises:
        Refusal: pods could not read the recipe, or something that it names.
    """
    refuse_local(target.recipe, plan.recipe)
    sizes = pod_sizes(plan, cluster, target.device)
    body = yaml.dump(
        _without_aliases(rayjob(sizes, cluster, target)), Dumper=_Dumper, sort_keys=False, width=110
    )
    return "".join(f"# {line}\n" for line in _assumed(plan, cluster, sizes, target)) + body


def refuse_local(recipe: str, parsed: Recipe) -> None:
    """Refuse what lies on this machine.

    Raises:
        Refusal: naming the first path that pods could not read.
    """
    for what, url in (("the recipe", recipe), *named_urls(parsed)):
        if "://" not in url or url.startswith("file://"):
            raise Refusal(
                f"--emit-kuberay: {what} is {url}, a path of this machine that no pod can read; copy it to an "
                "object store and give its URL, such as s3://bucket/recipe.yaml"
            )


def rayjob(sizes: Sizes, cluster: Cluster, target: Target) -> dict[str, Any]:
    """The RayJob as a mapping."""
    labels = {**LABELS, **({"kueue.x-k8s.io/queue-name": target.queue} if target.queue else {})}
    device = ("--device", target.device) if target.device != "cpu" else ()
    words = ("python", "jobs/merge.py", target.recipe, "--workers", str(cluster.workers), *device)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job_name(target), "namespace": target.namespace, "labels": labels},
        "spec": {
            "submissionMode": "HTTPMode",
            "entrypoint": shlex.join([*words, *target.options]),
            "backoffLimit": 1,
            "preRunningDeadlineSeconds": PENDING_SECONDS,
            "activeDeadlineSeconds": sizes.deadline_seconds,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": _ray_cluster(sizes, target.image),
        },
    }


def job_name(target: Target) -> str:
    """A name that is a DNS label of at most 47 characters and belongs to this recipe, its inputs and options alone.

    KubeRay does not run a RayJob again that was applied again: what makes something else needs another name.
    """
    stem = re.sub(r"\.ya?ml$", "", target.recipe.rpartition("/")[2])
    plain = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    made = digest([target.recipe, target.device, list(target.options), list(target.merges)])
    return f"{f'merge-{plain}'[: MAX_NAME - 9].rstrip('-')}-{made[:8]}"


NO_TEXT = re.compile(r"[-+.~<=0-9].*|y|n|yes|no|on|off|true|false|null|", re.IGNORECASE)
"""Text that another reader of YAML than the one here may take for a number, a truth value or nothing: 12e4, 0x1, on."""


class _Dumper(yaml.SafeDumper):
    """Quotes all of it."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, '"' if NO_TEXT.fullmatch(text) else None)


_Dumper.add_representer(str, _text)


def _ray_cluster(sizes: Sizes, image: str) -> dict[str, Any]:
    head = replace(
        sizes,
        gpus=0,
        cpus=sizes.head_cpus,
        memory_bytes=sizes.head_memory_bytes,
        disk_bytes=sizes.head_disk_bytes,
    )
    ports = {"gcs-server": 6379, "dashboard": 8265, "as-metrics": 44217, "dash-metrics": 44227}
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", **_store_params(STORE_BYTES)},
            "template": _pod("ray-head", image, head, ports),
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu" if sizes.gpus else "cpu",
                "replicas": sizes.pods,
                "minReplicas": sizes.pods,
                "maxReplicas": sizes.pods,
                "rayStartParams": {
                    "num-cpus": str(max(sizes.cpus, sizes.workers_per_pod)),
                    "memory": str(sizes.workers_per_pod * sizes.worker_bytes),
                    **_store_params(sizes.store_bytes),
                },
                "template": _pod("ray-worker", image, sizes, {}),
            }
        ],
    }


def _store_params(store_bytes: int) -> dict[str, str]:
    return {"object-store-memory": str(store_bytes), "object-spilling-directory": "/tmp/spill"}


def _pod(name: str, image: str, sizes: Sizes, ports: dict[str, int]) -> dict[str, Any]:
    resources = {
        "cpu": str(sizes.cpus),
        "memory": _mebibytes(sizes.memory_bytes),
        "ephemeral-storage": _mebibytes(sizes.disk_bytes + OWN_DISK_BYTES),
        **({"nvidia.com/gpu": str(sizes.gpus)} if sizes.gpus else {}),
    }
    spec: dict[str, Any] = {
        "serviceAccountName": SERVICE_ACCOUNT,
        "terminationGracePeriodSeconds": 120,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": name,
                "image": image,
                "env": [{"name": name, "value": value} for name, value in ENVIRONMENT.items()],
                "ports": [
                    {"containerPort": port, "name": word} for word, port in {**ports, "metrics": 8080}.items()
                ],
                "resources": {"requests": resources, "limits": resources},
                "securityContext": SECURITY,
                "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": _mebibytes(sizes.disk_bytes)}}],
    }
    if sizes.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": LABELS}, "spec": spec}


def _mebibytes(n_bytes: int) -> str:
    return f"{n_bytes // MIB}Mi"


def _without_aliases(value: Any) -> Any:
    """Copies of what stands twice, which YAML would write as an alias that few people can read."""
    if isinstance(value, dict):
        return {key: _without_aliases(item) for key, item in value.items()}
    return [_without_aliases(item) for item in value] if isinstance(value, list) else value


def _assumed(plan: Plan, cluster: Cluster, sizes: Sizes, target: Target) -> Iterator[str]:
    yield f"Made by: ray-merge plan {target.recipe} --emit-kuberay"
    yield (
        f"Workers: {sizes.workers} for {plan.n_units} unit(s), {sizes.workers_per_pod} in each of {sizes.pods} pod(s); "
        f"each takes {sizes.worker_bytes / 1e6:.0f} MB at most"
    )
    yield (
        f"Deadline: {sizes.deadline_seconds / 3600:.1f} h, which are {SLACK} times what the plan takes when each "
        f"worker reads {cluster.read_bytes_per_second / 1e6:.0f} MB/s and writes "
        f"{cluster.write_bytes_per_second / 1e6:.0f} MB/s, and 1.5 h to start"
        + (f", and {STAGES_SECONDS / 3600:.0f} h for moments and learning" if plan.moments else "")
    )
    yield f"Image: {target.image}, made by cluster/Dockerfile; nodes must be able to pull it"
    yield (
        "Applied twice, it runs once. A job that failed or was stopped goes on where it was: delete it first, "
        f"`kubectl -n {target.namespace} delete rayjob {job_name(target)}`, and apply this again"
    )
