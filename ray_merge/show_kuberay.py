"""`ray-merge plan RECIPE --emit-kuberay`: the RayJob of a recipe, as YAML on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from ray_merge import api
from ray_merge.errors import Refusal
from ray_merge.plan.estimate import Cluster
from ray_merge.plan.kuberay import Target, emit, refuse_local


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """Options of `plan` that only a RayJob has; None where they were not given."""

    image: str | None = None
    namespace: str | None = None
    queue: str | None = None
    device: str | None = None

    def refuse(self) -> None:
        """Refuse options that would have no effect.

        Raises:
            Refusal: one was given.
        """
        given = [f"--{word}" for word in self.__slots__ if getattr(self, word) is not None]
        if given:
            raise Refusal(f"{given[0]} describes a RayJob; add --emit-kuberay, or leave it out")


def rayjob(
    recipe: str,
    options: JobOptions,
    cluster: Cluster,
    *,
    output: str | None,
    only: Sequence[str],
    memory: str | None,
) -> None:
    """Print the RayJob that runs a recipe as it is planned here.

    Args:
        recipe: its URL.
        options: of the RayJob.
        cluster: how many workers at most, and their rates.
        output: in place of the recipe's own.
        only: names or globs of merges.
        memory: ceiling per worker.

    Raises:
        Refusal: the recipe cannot be run, or not by pods.
    """
    plan = api.plan(recipe, output=output, only=only, memory=memory, workers=cluster.workers)
    refuse_local(recipe, plan.recipe)
    if plan.moments and memory is None:
        # Without a ceiling the driver cuts stages by the memory of the machine that it happens to run on.
        raise Refusal(
            "--emit-kuberay: merges of this recipe need moments or learning, whose stages are cut to a ceiling; "
            "give --memory SIZE for one worker, such as 8GB"
        )
    _, places = api.outlook(recipe, output=output, only=only)
    words = [word for name in only for word in ("--only", name)]
    for option, value in (("--output", output), ("--memory", memory)):
        words += [option, value] if value is not None else []
    target = Target(
        recipe=recipe,
        image=options.image or f"ray-merge:{version('ray-merge')}",
        namespace=options.namespace or "ray-merge",
        queue=options.queue,
        device=options.device or "cpu",
        options=words,
        merges=[f"{place.merge_id} {place.url}" for place in places],
    )
    print(emit(plan, cluster, target), end="")
