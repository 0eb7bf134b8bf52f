"""Recipes of a night on a disk: tiny real models."""

from __future__ import annotations

import json

import torch

from ray_merge.nightly import Night
from ray_merge.storage.commit import MANIFEST
from tiny import llama_tensors, write_base, write_recipe_files

DAY, NEXT = "2026-01-31", "2026-02-01"


class Folder:
    """Recipes under `recipes`, results under `out/<date>/<recipe>`, two bases."""

    def __init__(self, root):
        self.root = root
        self.document = write_recipe_files(root)
        write_base(root / "other", llama_tensors(layers=2, dtype=torch.bfloat16))
        (root / "recipes").mkdir()

    def recipe(self, name, **change):
        output = str(self.root / "out/{date}" / name)
        path = self.root / "recipes" / f"{name}.yaml"
        path.write_text(json.dumps({**self.document, "output": output, **change}))
        return str(path)

    def night(self, date=DAY, **change):
        return Night(
            recipes=str(self.root / "recipes"),
            date=date,
            cache=self.root / "cache",
            **{"engine": "local", "workers": 1, **change},
        )

    def manifest(self, name, date=DAY, merge="m"):
        return self.root / "out" / date / name / merge / MANIFEST
