"""The manifests of cluster/ as a person would apply them, and RayJobs that `plan --emit-kuberay` prints."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ray_merge.nightly.rayjob import job_of
from ray_merge.plan import Plan
from ray_merge.plan.estimate import Cluster
from ray_merge.plan.kuberay import Target, rayjob
from ray_merge.plan.kuberay_sizes import pod_sizes
from ray_merge.plan.moments import StageFacts
from tiny import plan_of, write_recipe_files

CLUSTER = Path(__file__).parents[2] / "cluster"
OVERLAYS = sorted(path.parent.name for path in CLUSTER.glob("kuberay/overlays/*/kustomization.yaml"))

Document = dict[str, Any]


def kubectl() -> str | None:
    """The program, of the system or of this environment."""
    return shutil.which("kubectl") or shutil.which("kubectl", path=str(Path(sys.executable).parent))


def _built(overlay: str) -> str:
    command = [kubectl() or "kubectl", "kustomize", str(CLUSTER / "kuberay" / "overlays" / overlay)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@functools.cache
def overlay_documents(overlay: str) -> list[Document]:
    """What `kubectl apply -k` would send, and what the nightly pod makes of it; made once, so copy to change."""
    documents = list(yaml.load_all(_built(overlay), yaml.CSafeLoader))
    templates = [d["data"]["rayjob.yaml"] for d in documents if "rayjob.yaml" in d.get("data", {})]
    return documents + [job_of(yaml.safe_load(text), "2026-11-26", "ray-merge") for text in templates]


@functools.cache
def _plan() -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe_files(Path(folder))
        ties = {"name": "sweep", "merge_method": "ties", "sweep": {"lambda": [0.5, 1, 2]}}
        recipe["merges"].append({**ties, "parameters": {"scope": "tensor"}})
        return plan_of(recipe)


LEARNING = StageFacts(
    kind="learn", class_name="X", tasks=8, parts=8, stages=32, peak_bytes=4 * 10**9, handed_bytes=5 * 10**8
)
"""An 8B model in as many stages as it has blocks."""

EMITTED = {
    "learning": (Cluster(workers=32), Target(recipe="s3://b/tara.yaml", image="ray-merge:0.1.0")),
    "cpu": (Cluster(), Target(recipe="s3://b/one.yaml", image="ray-merge:0.1.0")),
    "many": (Cluster(workers=100), Target(recipe="gs://b/My Recipe (v2).yml", image="r/ray-merge:0.1.0")),
    "gpu": (Cluster(workers=2), Target(recipe="s3://b/one.yaml", image="ray-merge:0.1.0", device="cuda")),
    "queue": (
        Cluster(),
        Target(
            recipe="s3://b/x.yaml",
            image="ray-merge:0.1.0",
            namespace="team",
            queue="ml",
            options=("--only", "a*"),
        ),
    ),
}


def emitted(name: str) -> Document:
    """One of `EMITTED` as a document."""
    cluster, target = EMITTED[name]
    plan = replace(_plan(), moments=(LEARNING,)) if name == "learning" else _plan()
    return json.loads(json.dumps(rayjob(pod_sizes(plan, cluster, target.device), cluster, target)))


@functools.cache
def everything() -> list[tuple[str, Document]]:
    """(where, document) of all overlays and of what is emitted."""
    return [(overlay, one) for overlay in OVERLAYS for one in overlay_documents(overlay)] + [
        (f"emitted {name}", emitted(name)) for name in EMITTED
    ]
