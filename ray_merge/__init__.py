"""Merge many LoRA adapters into large base models, as a batch job on Ray.

The public names; everything else is private. They are imported on first use, so that `import ray_merge` costs
nothing and a driver that only plans never loads torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_merge.algebra.delta import Delta
    from ray_merge.algebra.moments import Moments
    from ray_merge.algebra.osrm import osrm_project
    from ray_merge.api import methods, plan, run
    from ray_merge.emr import load_emr
    from ray_merge.errors import RayMergeError, Refusal, RunFailed
    from ray_merge.evaluate import evaluate
    from ray_merge.gc import gc
    from ray_merge.heads import load_head
    from ray_merge.inspect import inspect
    from ray_merge.methods.merge_factors import merge_factors
    from ray_merge.moments import calibrate
    from ray_merge.osrm import init_adapters
    from ray_merge.report import report
    from ray_merge.spec import Factor
    from ray_merge.verify import verify

_HOME = {
    "Delta": "ray_merge.algebra.delta",
    "Factor": "ray_merge.spec",
    "Moments": "ray_merge.algebra.moments",
    "RayMergeError": "ray_merge.errors",
    "Refusal": "ray_merge.errors",
    "RunFailed": "ray_merge.errors",
    "calibrate": "ray_merge.moments",
    "evaluate": "ray_merge.evaluate",
    "gc": "ray_merge.gc",
    "init_adapters": "ray_merge.osrm",
    "inspect": "ray_merge.inspect",
    "load_emr": "ray_merge.emr",
    "load_head": "ray_merge.heads",
    "merge_factors": "ray_merge.methods.merge_factors",
    "methods": "ray_merge.api",
    "osrm_project": "ray_merge.algebra.osrm",
    "plan": "ray_merge.api",
    "report": "ray_merge.report",
    "run": "ray_merge.api",
    "verify": "ray_merge.verify",
}


class _Package(ModuleType):
    """This package, whose public functions win over its modules of the same name (`plan`, `methods`, ...).

    Python sets a package's attribute to a submodule as soon as anything imports it; `ray_merge.plan(recipe)`
    would then depend on what was imported before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'ray_merge' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)


sys.modules[__name__].__class__ = _Package


__all__ = [
    "Delta",
    "Factor",
    "Moments",
    "RayMergeError",
    "Refusal",
    "RunFailed",
    "calibrate",
    "evaluate",
    "gc",
    "init_adapters",
    "inspect",
    "load_emr",
    "load_head",
    "merge_factors",
    "methods",
    "osrm_project",
    "plan",
    "report",
    "run",
    "verify",
]
