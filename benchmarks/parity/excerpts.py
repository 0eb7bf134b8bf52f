"""Single functions of a public repository, for parity scripts whose peers cannot be imported whole.

Their modules import training stacks or call CUDA; what is compared is one function or one block of statements. It is
read from a clone at a commit, compiled and run, and never kept.
"""

from __future__ import annotations

import ast
import contextlib
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor


def source(repo: Path, commit: str, file: str) -> str:
    """The text of `file` at `commit`."""
    shown = subprocess.run(
        ["git", "-C", str(repo), "show", f"{commit}:{file}"], check=True, capture_output=True
    )
    return shown.stdout.decode()


def function(text: str, name: str, namespace: dict[str, Any], owner: str | None = None) -> Any:
    """The function called `name` (of the class `owner`), compiled with `namespace` as its globals."""
    body = ast.parse(text).body
    if owner is not None:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner)
    found = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    exec(compile(ast.Module([found], []), name, "exec"), namespace)
    return namespace[name]


def statements(text: str, first: str, stop: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run the lines from the one that starts with `first` up to the one that starts with `stop`; their names."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.strip().startswith(first))
    end = next(place for place, line in enumerate(lines) if place > start and line.strip().startswith(stop))
    exec(compile(textwrap.dedent("\n".join(lines[start:end])), first, "exec"), namespace)
    return namespace


@contextlib.contextmanager
def cuda_is_the_cpu() -> Iterator[None]:
    """`.cuda()` and `.to("cuda")` leave a tensor where it is."""
    cuda, to = Tensor.cuda, Tensor.to

    def stay(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if args and args[0] == "cuda" else to(self, *args, **kwargs)

    Tensor.cuda, Tensor.to = lambda self: self, stay
    try:
        yield
    finally:
        Tensor.cuda, Tensor.to = cuda, to
