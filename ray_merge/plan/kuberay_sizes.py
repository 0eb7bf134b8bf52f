"""How large the pods of a plan must be: memory, object store, disk, GPUs, and how long the job may take.

Pure arithmetic on a plan. Every size is one that the others follow from, because Ray's object store, its workers and
its daemons share the memory of one container, and their files share one volume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ray_merge.errors import Refusal
from ray_merge.plan.estimate import SECONDS_PER_HOUR, Cluster, estimate
from ray_merge.plan.plan import Plan

MIB = 2**20

WORKERS_PER_POD = 8
"""Without GPUs. Fewer pods fetch the adapters fewer times, and nodes with 8 free CPUs are common."""

CPUS_PER_GPU = 2
"""One feeds the GPU, one reads ahead and uploads."""

CUDA_BYTES = 2048 * MIB
"""Of the host's memory, for the libraries and the context of a process that uses a GPU (judged, not measured)."""

NODE_BYTES = 512 * MIB
"""Raylet, agents and log monitor of one pod (260 MB measured with Ray 2.60), twice."""

STORE_BYTES = 256 * MIB
"""Object store of a pod that hands nothing on: results are a few hundred bytes, and Ray wants 75 MB."""

VALUES_PER_STAGE = 4
"""Hidden states in a pod's store for each of its stages: an input and an output, of the chain that is computed and of
the one that waits."""

USABLE_PERCENT = 90
"""Of a container's memory. Ray kills workers at 95 %, and files that are read or written want a page cache."""

HEAD_BYTES = 4096 * MIB
"""Daemons of a head (620 MB measured with Ray 2.60) and the driver: the plan, receipts, phi; no tensor goes there."""

HEAD_BYTES_PER_WORKER = 32 * MIB
"""Calls under way and what the dashboard keeps of each worker."""

FILES_BYTES = 2048 * MIB
"""Logs of Ray, calibration data, tokenizers."""

OWN_DISK_BYTES = 1024 * MIB
"""What a container prints counts as its storage too, beside the volume."""

UNFINISHED_PER_WORKER = 2
"""Units with files on the disk: one is computed while the one before is uploaded."""

PENDING_SECONDS = 3600
"""For nodes to be bought and images to be pulled."""

START_SECONDS = 1800
"""For Ray to start, for hashes, for the throttling of a store; once more after a lost head."""

SLACK = 4
"""Times the estimate, which knows bytes and arithmetic at the rates of `--cluster` and no retries."""

STAGES_SECONDS = 12 * SECONDS_PER_HOUR
"""For moments and learning, which are not estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a RayJob asks of Kubernetes.

    Args:
        workers: processes that merge at the same time, in all pods together.
        pods: of workers.
        workers_per_pod: so that all fit.
        worker_bytes: of memory that one worker is planned to take.
        gpus: of one worker pod.
        cpus: of one worker pod.
        store_bytes: of one pod's object store.
        memory_bytes: limit of one worker pod.
        disk_bytes: of one worker pod's volume.
        head_cpus, head_memory_bytes, head_disk_bytes: of the head.
        deadline_seconds: from the start of the job, pending pods included.
    """

    workers: int
    pods: int
    workers_per_pod: int
    worker_bytes: int
    gpus: int
    cpus: int
    store_bytes: int
    memory_bytes: int
    disk_bytes: int
    head_cpus: int
    head_memory_bytes: int
    head_disk_bytes: int
    deadline_seconds: int


def pod_sizes(plan: Plan, cluster: Cluster, device: str) -> Sizes:
    """The pods of `plan`.

    Args:
        plan: with its moments laid out for `cluster.workers`.
        cluster: its workers are the most that are used.
        device: "cpu", or "cuda" for one GPU for each worker.

    Raises:
        Refusal: the device is of another kind.
    """
    if device not in ("cpu", "cuda"):
        raise Refusal(f"--device {device}: a pod sees its own GPUs only; use cpu or cuda with --emit-kuberay")
    stages = max((one.stages for one in plan.moments), default=0)
    workers = max(1, stages, min(cluster.workers, plan.n_units))
    alone = device == "cuda" or plan.recipe.placement.mode == "one_per_node"
    pods = workers if alone else math.ceil(workers / WORKERS_PER_POD)
    per_pod = math.ceil(workers / pods)
    worker_bytes = max([plan.peak_bytes, *(one.peak_bytes for one in plan.moments)])
    worker_bytes += CUDA_BYTES if device == "cuda" else 0
    handed = max((one.handed_bytes for one in plan.moments), default=0)
    store = _rounded(STORE_BYTES + VALUES_PER_STAGE * per_pod * handed)
    gpus = 1 if device == "cuda" else 0
    return Sizes(
        workers=workers,
        pods=pods,
        workers_per_pod=per_pod,
        worker_bytes=worker_bytes,
        gpus=gpus,
        cpus=CPUS_PER_GPU if gpus else per_pod,
        store_bytes=store,
        memory_bytes=container_bytes(per_pod * worker_bytes, store),
        disk_bytes=_rounded(_unfinished_bytes(plan) * per_pod + plan.adapter_bytes + store + FILES_BYTES),
        head_cpus=2 if workers <= 64 else 4,
        head_memory_bytes=_rounded(HEAD_BYTES + HEAD_BYTES_PER_WORKER * workers),
        head_disk_bytes=_rounded(plan.adapter_bytes + STORE_BYTES + FILES_BYTES),
        deadline_seconds=_deadline(plan, cluster, workers),
    )


def container_bytes(workers_bytes: int, store_bytes: int) -> int:
    """The memory limit of a pod whose workers and object store take so much.

    /dev/shm, where the store lies, counts as memory of the container.
    """
    return _rounded((workers_bytes + store_bytes + NODE_BYTES) * 100 // USABLE_PERCENT)


def _unfinished_bytes(plan: Plan) -> int:
    """Of one worker's files that are not uploaded yet: a shard of each merge that shares a pass."""
    largest = max((shard.n_bytes for shard in plan.shards), default=0)
    together = max((len(group) for group in plan.groups), default=0)
    return UNFINISHED_PER_WORKER * together * largest


def _deadline(plan: Plan, cluster: Cluster, workers: int) -> int:
    rates = Cluster(
        workers=workers,
        read_bytes_per_second=cluster.read_bytes_per_second,
        write_bytes_per_second=cluster.write_bytes_per_second,
        flops_per_second=cluster.flops_per_second,
    )
    working = SLACK * SECONDS_PER_HOUR * estimate(plan, rates).hours
    stages = STAGES_SECONDS if plan.moments else 0
    return 600 * math.ceil((PENDING_SECONDS + START_SECONDS + working + stages) / 600)


def _rounded(n_bytes: int) -> int:
    return 256 * MIB * math.ceil(n_bytes / (256 * MIB))
