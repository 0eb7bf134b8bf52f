"""What the manifests of one overlay must obey together: rights, walls, deadlines and exit codes of the nightly pod.

Each rule has breakages: changes of good documents that the rule must notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from cluster_checks import Document

from ray_merge.plan.kuberay_sizes import PENDING_SECONDS, START_SECONDS

DAY_SECONDS = 86400

LISTENS = {"kuberay-system": {8265}, "monitoring": {8080, 44217, 44227}}
"""Namespace -> ports of our pods that it may reach, and no other namespace any."""

OURS = {"podSelector": {"matchLabels": {"app": "ray-merge"}}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One rule.

    Args:
        why: what happens to manifests that break it.
        overlay: that it is shown on.
        check: complaints about the documents of one overlay.
        breakages: each makes good documents bad.
    """

    why: str
    overlay: str
    check: Callable[[Sequence[Document]], Iterator[str]]
    breakages: Mapping[str, Callable[[Sequence[Document]], Any]]


def of(documents: Sequence[Document], kind: str) -> list[Document]:
    """Documents of a kind."""
    return [one for one in documents if one["kind"] == kind]


def policy(documents: Sequence[Document], name: str = "ray-merge") -> Document:
    """The spec of a NetworkPolicy."""
    return next(one["spec"] for one in of(documents, "NetworkPolicy") if one["metadata"]["name"] == name)


def cron(documents: Sequence[Document]) -> Document:
    """The spec of the nightly pod's Job."""
    return of(documents, "CronJob")[0]["spec"]["jobTemplate"]["spec"]


def template(documents: Sequence[Document]) -> Document:
    """The RayJob in the ConfigMap, as it is written."""
    (found,) = [one["data"]["rayjob.yaml"] for one in documents if "rayjob.yaml" in one.get("data", {})]
    return yaml.safe_load(found)


def rewrite(documents: Sequence[Document], old: str, new: str) -> None:
    """Change the text of the RayJob in the ConfigMap."""
    data = next(one["data"] for one in documents if "rayjob.yaml" in one.get("data", {}))
    assert old in data["rayjob.yaml"]
    data["rayjob.yaml"] = data["rayjob.yaml"].replace(old, new)


def check_walls(documents: Sequence[Document]) -> Iterator[str]:
    for one in of(documents, "NetworkPolicy"):
        name, spec = one["metadata"]["name"], one["spec"]
        app = spec["podSelector"].get("matchLabels", {}).get("app")
        if app not in ("ray-merge", "ray-merge-nightly") or spec.get("policyTypes") != ["Ingress"]:
            yield f"{name}: of pods of {app}, for {spec.get('policyTypes')}"
        for rule in spec.get("ingress", []):
            if app != "ray-merge" or not rule.get("from"):
                yield f"{name}: lets everybody in, or somebody into the nightly pod"
            ports = {port.get("port") for port in rule.get("ports", [])}
            for peer in rule.get("from", []):
                if peer == OURS and not ports:
                    continue
                space = peer.get("namespaceSelector", {}).get("matchLabels", {})
                wanted = LISTENS.get(space.get("kubernetes.io/metadata.name", ""))
                if list(peer) != ["namespaceSelector"] or len(space) != 1 or ports != wanted:
                    yield f"{name}: {peer} reaches {sorted(ports) or 'all ports'}"
                if len(peer.get("namespaceSelector", {})) > 1 or any("endPort" in p for p in rule["ports"]):
                    yield f"{name}: {peer} is more than one namespace, or a range of ports"
    if of(documents, "Role"):  # what stands on ../../base
        reached = [rule for rule in policy(documents).get("ingress", []) if rule.get("from") != [OURS]]
        if len(reached) != 1 or {"from": [OURS]} not in policy(documents)["ingress"]:
            yield "Ray's pods reach each other, and the operator reaches the dashboard; nobody else"


def check_binding(documents: Sequence[Document]) -> Iterator[str]:
    roles = {(one["metadata"]["name"], one["metadata"]["namespace"]): one for one in of(documents, "Role")}
    for one in of(documents, "RoleBinding"):
        space, ref = one["metadata"]["namespace"], one["roleRef"]
        if ref["kind"] != "Role" or (ref["name"], space) not in roles:
            yield f"{ref} is no Role of {space}"
        accounts = [(who["kind"], who["name"], who.get("namespace")) for who in one["subjects"]]
        if accounts != [("ServiceAccount", "ray-merge-nightly", space)]:
            yield f"{accounts} are not the nightly pod alone"
    for one in of(documents, "CronJob"):
        account = one["spec"]["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"]
        bound = {who["name"] for binding in of(documents, "RoleBinding") for who in binding["subjects"]}
        if account not in bound:
            yield f"the pod runs as {account}, rights have {sorted(bound)}"
    if of(documents, "ClusterRole") or of(documents, "ClusterRoleBinding"):
        yield "rights beyond the namespace"


def check_waiting(documents: Sequence[Document]) -> Iterator[str]:
    job, ray = cron(documents), template(documents)["spec"]
    longest = (1 + ray["backoffLimit"]) * ray["activeDeadlineSeconds"] + PENDING_SECONDS + START_SECONDS
    if not longest < job["activeDeadlineSeconds"] < DAY_SECONDS:
        yield f"the pod waits {job['activeDeadlineSeconds']} s, the RayJob may take {longest} s, and a day is a day"
    ignore, fail = job["podFailurePolicy"]["rules"]
    if ignore != {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}:
        yield f"an eviction is not the pod's fault: {ignore}"
    codes = {"containerName": "nightly", "operator": "In", "values": [1, 2, 4]}
    if fail != {"action": "FailJob", "onExitCodes": codes}:
        yield f"what another pod would find again ends the Job, 3 (not known) does not: {fail}"
    if job["template"]["spec"]["containers"][0]["name"] != codes["containerName"]:
        yield "the policy names another container"
    if not job.get("backoffLimit"):
        yield "a pod that lost the API server starts again"


def check_one_night(documents: Sequence[Document]) -> Iterator[str]:
    words = template(documents)["spec"]["entrypoint"].split()
    if words[words.index("--date") + 1 :][:1] != ["{date}"] if "--date" in words else True:
        yield "the job takes the day of its own clock"
    if "--refused-ok" not in words:
        yield "a recipe that is refused costs a second cluster"
    container = cron(documents)["template"]["spec"]["containers"][0]
    job = {one["name"]: one.get("valueFrom", {}).get("fieldRef", {}) for one in container["env"]}.get("JOB")
    if "--of-job=$(JOB)" not in container["command"] or job != {
        "fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"
    }:
        yield "a pod that starts again after midnight takes the next day"


def _set(
    place: Callable[[Sequence[Document]], Any], key: Any, value: Any
) -> Callable[[Sequence[Document]], None]:
    def change(documents: Sequence[Document]) -> None:
        place(documents)[key] = value

    return change


def _rule(documents: Sequence[Document]) -> Document:
    return policy(documents)["ingress"][1]


def _peer(documents: Sequence[Document]) -> Document:
    return _rule(documents)["from"][0]


def _binding(documents: Sequence[Document]) -> Document:
    return of(documents, "RoleBinding")[0]


def _policy(documents: Sequence[Document]) -> list[Document]:
    return cron(documents)["podFailurePolicy"]["rules"]


LINKS: Mapping[str, Link] = {
    "walls": Link(
        why="whoever reaches the Jobs API runs code with the pods' identity", overlay="nightly", check=check_walls,
        breakages={
            "every namespace": _set(_peer, "namespaceSelector", {}),
            "another namespace": _set(_peer, "namespaceSelector",
                                      {"matchLabels": {"kubernetes.io/metadata.name": "default"}}),
            "by expression": _set(lambda d: _peer(d)["namespaceSelector"], "matchExpressions",
                                  [{"key": "x", "operator": "DoesNotExist"}]),
            "an address": _set(_rule, "from", [{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
            "everybody": _set(_rule, "from", []),
            "every port": _set(_rule, "ports", []),
            "another port": _set(lambda d: _rule(d)["ports"][0], "port", 6379),
            "a range": _set(lambda d: _rule(d)["ports"][0], "endPort", 9000),
            "no operator": lambda d: policy(d)["ingress"].pop(1),
            "not each other": lambda d: policy(d)["ingress"].pop(0),
            "into the nightly pod": _set(lambda d: policy(d, "ray-merge-nightly"), "ingress", [{"from": [OURS]}]),
            "no pods": _set(policy, "podSelector", {"matchLabels": {"app": "ray"}}),
            "nothing is closed": _set(policy, "policyTypes", ["Egress"]),
        },
    ),
    "metrics": Link(
        why="Prometheus needs three ports, not the Jobs API", overlay="monitoring", check=check_walls,
        breakages={
            "the Jobs API": lambda d: policy(d, "ray-merge-metrics")["ingress"][0]["ports"].append({"port": 8265}),
            "every namespace": _set(lambda d: policy(d, "ray-merge-metrics")["ingress"][0]["from"][0],
                                    "namespaceSelector", {}),
        },
    ),
    "binding": Link(
        why="the pod may not create its RayJob, or others may", overlay="nightly", check=check_binding,
        breakages={
            "another account": _set(lambda d: _binding(d)["subjects"][0], "name", "ray-merge"),
            "another namespace": _set(lambda d: _binding(d)["subjects"][0], "namespace", "default"),
            "everybody": lambda d: _binding(d)["subjects"].append({"kind": "Group", "name": "system:authenticated"}),
            "no such role": _set(lambda d: _binding(d)["roleRef"], "name", "ray-merge"),
            "of the cluster": _set(lambda d: _binding(d)["roleRef"], "kind", "ClusterRole"),
            "the pod of another": _set(lambda d: cron(d)["template"]["spec"], "serviceAccountName", "ray-merge"),
        },
    ),
    "waiting": Link(
        why="two nights at once, or clusters that are built again for nothing", overlay="nightly", check=check_waiting,
        breakages={
            "the pod ends first": _set(cron, "activeDeadlineSeconds", 72000),
            "more than a day": _set(cron, "activeDeadlineSeconds", 90000),
            "three tries": lambda d: rewrite(d, "backoffLimit: 1", "backoffLimit: 2"),
            "a longer job": lambda d: rewrite(d, "activeDeadlineSeconds: 36000", "activeDeadlineSeconds: 40000"),
            "a deleted job again": _set(lambda d: _policy(d)[1]["onExitCodes"], "values", [1, 2]),
            "lost contact is final": _set(lambda d: _policy(d)[1]["onExitCodes"], "values", [1, 2, 3, 4]),
            "an eviction counts": _set(lambda d: _policy(d)[0], "action", "Count"),
            "in the wrong order": lambda d: _policy(d).reverse(),
            "no second pod": _set(cron, "backoffLimit", 0),
        },
    ),
    "one night": Link(
        why="a second cluster for the same work", overlay="nightly", check=check_one_night,
        breakages={
            "its own day": lambda d: rewrite(d, " --date {date}", ""),
            "a fixed day": lambda d: rewrite(d, "--date {date}", "--date 2026-01-31"),
            "a typo is retried": lambda d: rewrite(d, " --refused-ok", ""),
            "the clock of the pod": lambda d: cron(d)["template"]["spec"]["containers"][0]["command"].pop(),
            "no name": lambda d: cron(d)["template"]["spec"]["containers"][0]["env"].pop(0),
        },
    ),
}  # fmt: skip
