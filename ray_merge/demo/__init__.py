"""The offline demo: a real small model, four real tasks, adapters trained here once and then cached.

`prepare` makes the material, `score`, `score_adapter` and `normalised_mean` judge what was merged from it.
Importing this package imports neither torch nor transformers nor peft: the command line starts fast.
"""

from ray_merge.demo.score import Backbone, load_backbone, normalised, normalised_mean, score, score_adapter
from ray_merge.demo.suite import DemoSuite, TaskMaterial, base_folder, cache_key, prepare
from ray_merge.demo.tasks import TASKS, Task
from ray_merge.demo.train import Settings, train_adapter

__all__ = [
    "TASKS",
    "Backbone",
    "DemoSuite",
    "Settings",
    "Task",
    "TaskMaterial",
    "base_folder",
    "cache_key",
    "load_backbone",
    "normalised",
    "normalised_mean",
    "prepare",
    "score",
    "score_adapter",
    "train_adapter",
]
