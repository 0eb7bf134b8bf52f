"""Checks of manifests, each a generator of complaints about one document (cluster_rules.py says which and why)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Document = dict[str, Any]

MAX_NAME = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
NODE_BYTES = 512 * 2**20


def job(document: Document) -> Document:
    """The RayJobSpec of a RayJob or a RayCronJob."""
    spec = document["spec"]
    return spec["jobTemplate"] if document["kind"] == "RayCronJob" else spec


def cluster(document: Document) -> Document:
    """The RayClusterSpec of any of Ray's documents."""
    return document["spec"] if document["kind"] == "RayCluster" else job(document)["rayClusterSpec"]


def groups(document: Document) -> list[Document]:
    """The head group and the worker groups."""
    return [cluster(document)["headGroupSpec"], *cluster(document)["workerGroupSpecs"]]


def pods(document: Document) -> list[Document]:
    """The pod specs of a document."""
    if document["kind"] == "CronJob":
        return [document["spec"]["jobTemplate"]["spec"]["template"]["spec"]]
    return [group["template"]["spec"] for group in groups(document)]


def quantity(text: str) -> float:
    """A quantity of Kubernetes as a number."""
    number, suffix = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text).groups()
    scale = {
        "": 1,
        "m": 1e-3,
        "k": 1e3,
        "M": 1e6,
        "G": 1e9,
        "Ki": 2**10,
        "Mi": 2**20,
        "Gi": 2**30,
        "Ti": 2**40,
    }
    return float(number) * scale[suffix]


def autoscaled(document: Document) -> bool:
    """Whether an autoscaler changes the number of pods."""
    return bool(cluster(document).get("enableInTreeAutoscaling"))


def check_name(document: Document) -> Iterator[str]:
    name, longest = document["metadata"]["name"], MAX_NAME[document["kind"]]
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"{name} is no DNS-1035 label of at most {longest} characters"


def check_http_mode(document: Document) -> Iterator[str]:
    if job(document).get("submissionMode") != "HTTPMode":
        yield "submissionMode is not HTTPMode"
    yield from (f"{word} has no place in HTTPMode" for word in ("submitterConfig", "submitterPodTemplate", "jobId")
                if word in job(document))  # fmt: skip


def check_on_head(document: Document) -> Iterator[str]:
    yield from (
        word for word in job(document) if word.startswith("entrypointNum") or word == "entrypointResources"
    )


def check_cleaned_up(document: Document) -> Iterator[str]:
    spec = job(document)
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if bool(rules) == bool(spec.get("shutdownAfterJobFinishes")):
        yield "exactly one of shutdownAfterJobFinishes and deletionRules"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    by_condition: dict[Any, dict[str, int]] = {}
    for rule in rules:
        condition = {key: value for key, value in rule["condition"].items() if key != "ttlSeconds"}
        ttls = by_condition.setdefault(tuple(sorted(condition.items())), {})
        if len(condition) != 1 or rule["policy"] in ttls:
            yield f"{rule}: one condition, and once"
        ttls[rule["policy"]] = rule["condition"].get("ttlSeconds", 0)
    for ttls in by_condition.values():
        times = [ttls[p] for p in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if p in ttls]
        if times != sorted(times) or ("DeleteWorkers" in ttls and autoscaled(document)):
            yield f"{ttls}: workers, then the cluster, then the job; no DeleteWorkers with an autoscaler"
    if rules and len(by_condition) < 2:
        yield "the end of a failed job is missing, or that of a good one"


def check_deadlines(document: Document) -> Iterator[str]:
    spec = job(document)
    if not 0 < spec.get("preRunningDeadlineSeconds", 0) < spec.get("activeDeadlineSeconds", 0):
        yield "0 < preRunningDeadlineSeconds < activeDeadlineSeconds"
    if spec.get("backoffLimit") != 1:
        yield "backoffLimit is 1"


def check_owns_its_cluster(document: Document) -> Iterator[str]:
    spec = job(document)
    if "clusterSelector" in spec or "rayClusterSpec" not in spec:
        yield "clusterSelector excludes backoffLimit and Kueue"
    if "suspend" in spec or "managedBy" in spec:
        yield "suspend and managedBy are Kueue's to set"
    if "gcsFaultToleranceOptions" in spec.get("rayClusterSpec", {}):
        yield "a retry is a new cluster, so a GCS that survives helps nothing"


def check_runtime_env(document: Document) -> Iterator[str]:
    if "runtimeEnvYAML" in job(document):
        yield "the image holds everything, and a key in a runtime environment is readable in the dashboard"


def check_token(document: Document) -> Iterator[str]:
    spec = cluster(document)
    options, version = spec.get("authOptions", {}), spec.get("rayVersion", "0")
    if options.get("mode") != "token" or tuple(map(int, version.split(".")[:2])) < (2, 52):
        yield f"token needs rayVersion 2.52 or later, found {options} and {version}"
    if options.get("enableK8sTokenAuth"):
        yield "KubeRay refuses enableK8sTokenAuth for a RayJob"


def check_start_params(document: Document) -> Iterator[str]:
    for group in groups(document):
        params = group["rayStartParams"]
        yield from (f"{key}: a value is text, found {value!r}" for key, value in params.items()
                    if not isinstance(value, str))  # fmt: skip
        if {"labels", "redis-password", "redis-username"} & set(params):
            yield "labels and redis-* stand elsewhere"
        if "resources" in group and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
            yield "resources stand in the group or in rayStartParams"


def check_head_without_work(document: Document) -> Iterator[str]:
    head = groups(document)[0]
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "the head offers CPUs"
    if any("gpu" in name for name in pods(document)[0]["containers"][0]["resources"]["limits"]):
        yield "the head asks for a GPU"


def check_group_sizes(document: Document) -> Iterator[str]:
    for group in groups(document)[1:]:
        sizes = [group.get(word, -1) for word in ("minReplicas", "replicas", "maxReplicas")]
        if sizes[0] < 0 or sizes != sorted(sizes):
            yield f"{group['groupName']}: 0 <= minReplicas <= replicas <= maxReplicas, all of them written"
        if not autoscaled(document) and len(set(sizes)) > 1:
            yield f"{group['groupName']}: without an autoscaler a group is fixed in size"
        if {"suspend", "scaleStrategy"} & set(group):
            yield f"{group['groupName']}: suspend and scaleStrategy are the autoscaler's to set"


def check_autoscaler(document: Document) -> Iterator[str]:
    if not autoscaled(document):
        if "autoscalerOptions" in cluster(document):
            yield "autoscalerOptions without enableInTreeAutoscaling"
        return
    if cluster(document)["autoscalerOptions"].get("version") != "v2":
        yield "version is not v2"
    if any(pod.get("restartPolicy", "Never") != "Never" for pod in pods(document)):
        yield "v2 wants restartPolicy Never, or none"
    if not pods(document)[0].get("automountServiceAccountToken"):
        yield "the autoscaler speaks to the API server, so the head needs its token"
    if "kueue.x-k8s.io/queue-name" in document["metadata"].get("labels", {}):
        yield "Kueue takes no RayJob with an autoscaler"


def check_environment(document: Document) -> Iterator[str]:
    managed = {"RAY_enable_autoscaler_v2", "RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
    for pod in pods(document):
        names = {one["name"] for one in pod["containers"][0].get("env", [])}
        if names & managed or any("SECRET" in name or "KEY" in name for name in names):
            yield f"{sorted(names)}: set by KubeRay, or a secret"


def check_requests(document: Document) -> Iterator[str]:
    for pod in pods(document):
        resources = pod["containers"][0]["resources"]
        requests, limits = resources["requests"], resources["limits"]
        for name in ("memory", "ephemeral-storage", *(n for n in limits if n.endswith("gpu"))):
            if requests.get(name) != limits.get(name) or name not in limits:
                yield f"{name}: the request is the limit"


def check_memory(document: Document) -> Iterator[str]:
    for group, pod in zip(groups(document), pods(document), strict=True):
        params, limit = (
            group["rayStartParams"],
            quantity(pod["containers"][0]["resources"]["limits"]["memory"]),
        )
        workers = int(params.get("memory", 0))
        if group is not groups(document)[0] and not workers:
            yield "KubeRay would offer the whole limit to actors"
        need = workers + int(params.get("object-store-memory", limit)) + NODE_BYTES
        if need > 0.9 * limit + 1:
            yield f"workers, object store and daemons take {need:.0f} bytes, 90 % of the limit are {0.9 * limit:.0f}"


def check_disk(document: Document) -> Iterator[str]:
    for group, pod in zip(groups(document), pods(document), strict=True):
        container, params = pod["containers"][0], group["rayStartParams"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        sizes = {volume["name"]: volume["emptyDir"].get("sizeLimit") for volume in pod["volumes"]}
        size = sizes.get(mounts.get("/tmp", ""))
        if size is None or not params.get("object-spilling-directory", "/").startswith("/tmp/"):
            yield "Ray, what it spills and the cache lie on a volume at /tmp that has a limit"
        elif quantity(container["resources"]["limits"]["ephemeral-storage"]) <= quantity(size):
            yield "the volume counts as the pod's storage, and so does what it prints"


def check_ports(document: Document) -> Iterator[str]:
    head, *others = pods(document)
    wanted = {
        "gcs-server": 6379,
        "dashboard": 8265,
        "metrics": 8080,
        "as-metrics": 44217,
        "dash-metrics": 44227,
    }
    if {port["name"]: port["containerPort"] for port in head["containers"][0]["ports"]} != wanted:
        yield f"the head declares {wanted}"
    if any("metrics" not in [port["name"] for port in pod["containers"][0]["ports"]] for pod in others):
        yield "a worker declares its metrics"


def check_images(document: Document) -> Iterator[str]:
    images = {container["image"] for pod in pods(document) for container in pod["containers"]}
    if len(images) != 1 or not all(re.search(r":[0-9]", image) for image in images):
        yield f"one image with a version, found {sorted(images)}"


def check_identity(document: Document) -> Iterator[str]:
    names = {pod.get("serviceAccountName") for pod in pods(document)}
    if len(names) != 1 or not str(names).startswith("{'ray-merge"):
        yield f"one ServiceAccount for all pods, found {names}"


def check_security(document: Document) -> Iterator[str]:
    for pod in pods(document):
        whole, own = pod.get("securityContext", {}), pod["containers"][0].get("securityContext", {})
        restricted = (
            whole.get("runAsNonRoot") is True
            and whole.get("runAsUser") == whole.get("fsGroup") == 1000
            and whole.get("seccompProfile") == {"type": "RuntimeDefault"}
            and own.get("allowPrivilegeEscalation") is False
            and own.get("readOnlyRootFilesystem") is True
            and own.get("capabilities") == {"drop": ["ALL"]}
        )
        if not restricted:
            yield "not what the Pod Security Standard `restricted` asks for"


def check_labels(document: Document) -> Iterator[str]:
    for group in groups(document):
        if group["template"].get("metadata", {}).get("labels", {}).get("app") != "ray-merge":
            yield "pods without app: ray-merge are outside the NetworkPolicy and the PodMonitor"


def check_schedule(document: Document) -> Iterator[str]:
    spec = document["spec"]
    if "TZ" in spec["schedule"] or spec.get("timeZone") != "Etc/UTC" or len(spec["schedule"].split()) != 5:
        yield "five fields, in UTC, the zone apart"


def check_cron_job(document: Document) -> Iterator[str]:
    spec = document["spec"]
    if spec.get("concurrencyPolicy") != "Forbid":
        yield "two nights may overlap"
    wanted = {"startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"}
    if not wanted <= set(spec):
        yield "a start that was missed has a deadline, and the history a limit"
    work = spec["jobTemplate"]["spec"]
    if work["template"]["spec"]["restartPolicy"] != "Never" or not work.get("activeDeadlineSeconds"):
        yield "podFailurePolicy wants restartPolicy Never, and a wait has an end"
    if not work["template"]["spec"].get("automountServiceAccountToken"):
        yield "the pod speaks to the API server"


def check_rights(document: Document) -> Iterator[str]:
    wanted = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]},
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get"]},
    ]
    if document["rules"] != wanted:
        yield f"no more and no less than {wanted}"


def check_scope(document: Document) -> Iterator[str]:
    global_kinds = ("ClusterQueue", "ResourceFlavor")
    if (document["kind"] in global_kinds) == ("namespace" in document["metadata"]):
        yield "a namespace, unless the kind has none"
