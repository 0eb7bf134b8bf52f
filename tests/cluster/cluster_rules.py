"""What a manifest must obey beyond the schemas, as data: KubeRay's validation.go and behaviour, Kueue's, and our own.

Each rule has a breakage: a change of a good document that the rule must notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cluster_checks as checks
from cluster_checks import Document

RAY_KINDS = ("RayJob", "RayCluster", "RayCronJob")
JOB_KINDS = ("RayJob", "RayCronJob")
POD_KINDS = (*RAY_KINDS, "CronJob")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule.

    Args:
        why: what happens to a manifest that breaks it.
        kinds: documents that it is about.
        check: complaints about one of them.
        breakage: makes a good document bad.
    """

    why: str
    kinds: tuple[str, ...]
    check: Callable[[Document], Iterator[str]]
    breakage: Callable[[Document], None]


def _set(path: str, value: Any) -> Callable[[Document], None]:
    """A breakage that puts `value` at a path such as `spec/x/0/y`; `job/` and `cluster/` find their specs."""

    def change(document: Document) -> None:
        first, *rest = path.split("/")
        at: Any = (
            {"job": checks.job, "cluster": checks.cluster}[first](document)
            if first in ("job", "cluster")
            else document[first]
        )
        for word in rest[:-1]:
            at = at[int(word)] if isinstance(at, list) else at[word]
        last = int(rest[-1]) if isinstance(at, list) else rest[-1]
        if value is None:
            del at[last]
        else:
            at[last] = value

    return change


HEAD = "cluster/headGroupSpec"
WORKERS = "cluster/workerGroupSpecs/0"
CONTAINER = "template/spec/containers/0"

RULES: Mapping[str, Rule] = {
    "name": Rule(
        why="KubeRay refuses it", kinds=RAY_KINDS, check=checks.check_name,
        breakage=_set("metadata/name", "7" * 60),
    ),
    "http mode": Rule(
        why="a log tail that ends early fails a running job",
        kinds=JOB_KINDS, check=checks.check_http_mode, breakage=_set("job/submissionMode", "K8sJobMode"),
    ),
    "driver on the head": Rule(
        why="the driver would land on a worker",
        kinds=JOB_KINDS, check=checks.check_on_head, breakage=_set("job/entrypointNumCpus", 1),
    ),
    "cleaned up": Rule(
        why="KubeRay refuses both, and nothing ends a cluster without either",
        kinds=JOB_KINDS, check=checks.check_cleaned_up, breakage=_set("job/deletionStrategy", {"deletionRules": [
            {"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 1}},
            {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 2}},
        ]}),
    ),
    "deadlines": Rule(
        why="a job that never starts holds its nodes",
        kinds=JOB_KINDS, check=checks.check_deadlines, breakage=_set("job/activeDeadlineSeconds", 60),
    ),
    "owns its cluster": Rule(
        why="KubeRay refuses it with a backoffLimit", kinds=JOB_KINDS, check=checks.check_owns_its_cluster,
        breakage=_set("job/clusterSelector", {"ray.io/cluster": "x"}),
    ),
    "no runtime environment": Rule(
        why="a pip install on every node at 01:00", kinds=JOB_KINDS, check=checks.check_runtime_env,
        breakage=_set("job/runtimeEnvYAML", "pip: [x]"),
    ),
    "token": Rule(
        why="KubeRay refuses it, or the Jobs API is open", kinds=RAY_KINDS, check=checks.check_token,
        breakage=_set("cluster/rayVersion", "2.51.0"),
    ),
    "start parameters": Rule(
        why="KubeRay refuses it", kinds=RAY_KINDS, check=checks.check_start_params,
        breakage=_set(f"{WORKERS}/resources", {"CPU": "8"}),
    ),
    "head without work": Rule(
        why="a worker beside the driver takes its memory", kinds=RAY_KINDS, check=checks.check_head_without_work,
        breakage=_set(f"{HEAD}/rayStartParams/num-cpus", "2"),
    ),
    "group sizes": Rule(
        why="KubeRay refuses it, or a gang waits for ever", kinds=RAY_KINDS, check=checks.check_group_sizes,
        breakage=_set(f"{WORKERS}/minReplicas", 99),
    ),
    "autoscaler": Rule(
        why="KubeRay refuses it", kinds=RAY_KINDS, check=checks.check_autoscaler,
        breakage=_set("cluster/autoscalerOptions", {"version": "v1"}),
    ),
    "environment": Rule(
        why="KubeRay refuses it, or the dashboard shows it", kinds=POD_KINDS, check=checks.check_environment,
        breakage=lambda d: checks.pods(d)[0]["containers"][0]["env"].append({"name": "AWS_SECRET_ACCESS_KEY"}),
    ),
    "requests": Rule(
        why="KubeRay reads limits alone; a request below is memory that is not there",
        kinds=POD_KINDS, check=checks.check_requests,
        breakage=lambda d: checks.pods(d)[-1]["containers"][0]["resources"]["requests"].update(memory="1Mi"),
    ),
    "memory": Rule(
        why="the container is killed", kinds=RAY_KINDS, check=checks.check_memory,
        breakage=_set(f"{WORKERS}/rayStartParams/object-store-memory", "9000000000"),
    ),
    "disk": Rule(
        why="the pod is evicted", kinds=RAY_KINDS, check=checks.check_disk,
        breakage=_set(f"{WORKERS}/rayStartParams/object-spilling-directory", "/var/spill"),
    ),
    "ports": Rule(
        why="the operator finds no dashboard to post the job to", kinds=RAY_KINDS, check=checks.check_ports,
        breakage=_set(f"{HEAD}/{CONTAINER}/ports/1", None),
    ),
    "images": Rule(
        why="versions of head and workers differ", kinds=POD_KINDS, check=checks.check_images,
        breakage=lambda d: checks.pods(d)[-1]["containers"][0].update(image="ray-merge:latest"),
    ),
    "identity": Rule(
        why="a pod without it reaches no bucket", kinds=POD_KINDS, check=checks.check_identity,
        breakage=lambda d: checks.pods(d)[-1].pop("serviceAccountName"),
    ),
    "security": Rule(
        why="namespaces that enforce `restricted` refuse it", kinds=POD_KINDS, check=checks.check_security,
        breakage=lambda d: checks.pods(d)[-1]["containers"][0]["securityContext"].pop("capabilities"),
    ),
    "labels": Rule(
        why="the Jobs API is open to every pod", kinds=RAY_KINDS, check=checks.check_labels,
        breakage=_set(f"{WORKERS}/template/metadata", {}),
    ),
    "schedule": Rule(
        why="KubeRay refuses TZ in a schedule, and 1.6 takes the operator's zone", kinds=("CronJob", "RayCronJob"),
        check=checks.check_schedule, breakage=_set("spec/schedule", "TZ=UTC 0 1 * * *"),
    ),
    "cron job": Rule(
        why="nights overlap, or pile up", kinds=("CronJob",), check=checks.check_cron_job,
        breakage=_set("spec/concurrencyPolicy", "Allow"),
    ),
    "rights": Rule(
        why="least rights", kinds=("Role",), check=checks.check_rights, breakage=_set("rules/0/verbs", ["*"]),
    ),
    "scope": Rule(
        why="the API server refuses it", check=checks.check_scope, breakage=_set("metadata/namespace", "x"),
        kinds=("ClusterQueue", "ResourceFlavor", "LocalQueue", *RAY_KINDS, "CronJob", "Role"),
    ),
}  # fmt: skip
