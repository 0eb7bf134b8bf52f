"""OpenAPI schemas of custom resource definitions as strict JSON schemas: a field that is not there is an error."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]
Key = tuple[str, str]
"""apiVersion and kind."""


def crd_folder() -> Path | None:
    """$RAY_MERGE_CRDS, a folder of CRDs as YAML: KubeRay's, and Kueue's and Prometheus' where they are there."""
    given = os.environ.get("RAY_MERGE_CRDS")
    return Path(given) if given else None


@functools.cache
def schemas(folder: Path) -> dict[Key, Schema]:
    """The strict schema of every version that the folder's CRDs serve."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        for crd in yaml.load_all(path.read_text(), yaml.CSafeLoader):
            spec = crd["spec"]
            for version in spec["versions"]:
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                found[key] = strict(version["schema"]["openAPIV3Schema"])
    return found


def strict(schema: Schema) -> Schema:
    """The schema with every object closed, and Kubernetes' own words in JSON Schema's."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {name: strict(one) for name, one in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            result[word] = strict(schema[word])
    return result


def complaints(schema: Schema, document: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a document, each with its place."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        yield f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
