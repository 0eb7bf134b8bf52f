"""The merges of scenarios, and the further inputs that some of them need.

`RECIPES` are drawn from by seed. `FURTHER` are asked for by name: objects that go up in parts, moments of data, and
coefficients that are learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

PLAIN = ["a0", "a1"]
"""Adapters without DoRA, for methods that work on factors."""

RECIPES: dict[str, list[dict[str, Any]]] = {
    "sums": [
        {"name": "sum", "merge_method": "task_arithmetic", "parameters": {"lambda": 0.4}},
        {"name": "dare", "merge_method": "dare_linear", "parameters": {"density": 0.5}},
    ],
    "ties": [
        {"name": "ties", "merge_method": "ties", "parameters": {"scope": "tensor"}},
        {
            "name": "core",
            "merge_method": "ties",
            "parameters": {"scope": "tensor", "space": "core"},
            "adapters": PLAIN,
            "export": "both",
        },
    ],
    "sweep": [
        {"name": "scale", "merge_method": "task_arithmetic", "sweep": {"lambda": [0.2, 0.6]}},
        {
            "name": "knots",
            "merge_method": "knots_ties",
            "parameters": {"scope": "tensor"},
            "adapters": PLAIN,
            "export": "adapter",
        },
    ],
    "model": [
        {"name": "whole", "merge_method": "ties", "parameters": {"scope": "model", "density": 0.3}},
        {"name": "emr", "merge_method": "emr", "adapters": PLAIN},
    ],
}
"""Two merges or more in each; `model` selects over all sites first and writes one file for each adapter."""

LESSON = {"steps": 3, "batch_size": 4, "commit_every": 1}

FURTHER: dict[str, list[dict[str, Any]]] = {
    "parts": [{"name": "sum", "merge_method": "task_arithmetic", "parameters": {"lambda": 0.4}}],
    "moments": [
        {"name": "regmean", "merge_method": "regmean"},
        {"name": "fisher", "merge_method": "fisher", "parameters": {"labels": "sampled"}},
    ],
    "learned": [
        {"name": "nsc", "merge_method": "nsc", "parameters": LESSON},
        {
            "name": "tara",
            "merge_method": "tara_a",
            "parameters": {**LESSON, "objective": "entropy", "tokens": 1},
        },
    ],
}
"""`learned` commits a state after every step, and the anchors that `entropy` needs."""

WITH_STATE = ("moments", "learned")
"""Recipes that leave something in the store beside their merges, which later runs reuse."""

PART_BYTES = 5 * 2**20
"""The least part that S3 and SeaweedFS take."""

LARGE_VOCABULARY = 48 * 1024
"""Times 32 floats: two tables of 6 MiB, each one object of two parts."""


def recipe_of(name: str, root: str, here: Path, output: str) -> dict[str, Any]:
    """One of RECIPES or FURTHER.

    Args:
        name: of the recipe.
        root: folder or URL of the inputs.
        here: the folder on this machine on whose base the adapters were made.
        output: where its merges go.
    """
    paths = {f"a{index}": f"{root}/adapters/a{index}" for index in range(3)}
    document: dict[str, Any] = {
        "base_model": f"{root}/{'large' if name == 'parts' else 'base'}",
        "output": output,
        "max_shard_size": "60KB",
        "adapters": paths,
        "merges": RECIPES.get(name) or FURTHER[name],
    }
    if name == "parts":
        # Only its vocabulary is larger, and no adapter touches that.
        document["base_model_names"] = [str(here / "base")]
    if name in WITH_STATE:
        document["stages"] = 2
        document["adapters"] = {
            one: {"path": paths[one], "data": f"{root}/data/{one}.jsonl", "task": "classification"}
            for one in PLAIN
        }
    return document


def settings_of(name: str) -> Callable[[], None]:
    """What a process that runs that recipe has to do first."""
    return upload_in_parts if name == "parts" else lambda: None


def upload_in_parts() -> None:
    """Longer objects than PART_BYTES go up in parts from now on, as those above 64 MiB do on AWS.

    No user can ask for that elsewhere, since no other store's conditional completion is to be relied on: SeaweedFS
    may let several writers win. So no scenario has two that write at once.
    """
    from ray_merge.storage.s3 import open_s3

    open_s3.__kwdefaults__.update(multipart_bytes=PART_BYTES, part_bytes=PART_BYTES)


def write_rows(folder: Path) -> None:
    """Twelve unlabelled rows of tokens for each adapter without DoRA."""
    folder.mkdir()
    for name in PLAIN:
        draw = Random(name)
        rows = [[draw.randrange(1, 64) for _ in range(3 + index % 6)] for index in range(12)]
        text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
