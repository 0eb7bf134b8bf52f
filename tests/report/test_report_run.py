"""`ray-merge report` of a real run: diagnostics, learned merges with preferences, scores, one unfinished merge."""

from __future__ import annotations

import json
import math
import uuid
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from browser import LAPTOP, PHONE, PROGRAMS, browser_page, find_browser
from outputs import Parsed, parse
from safetensors.torch import load_file

import ray_merge
from lessons import CLASSES, make_school
from ray_merge.cli import _exit_code
from ray_merge.report.markup import number, percent
from ray_merge.storage.commit import MANIFEST
from ray_merge.storage.store import open_store

TASKS = ("two", "three", "five")
STEPS = 4


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Four complete merges, scored, and one that lost its manifest."""
    folder = make_school(tmp_path_factory.mktemp("school"))
    for task in TASKS:
        rows = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
        labelled = [{**row, "label": index % CLASSES[task]} for index, row in enumerate(rows)]
        (folder / f"{task}.eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    recipe = {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "out_dtype": "bfloat16",
        "diagnostics": True,
        "calibration": {"max_length": 32, "batch_size": 4},
        "adapters": {
            task: {
                "path": str(folder / task),
                "data": str(folder / f"{task}.jsonl"),
                "eval": {"path": str(folder / f"{task}.eval.jsonl"), "metric": "accuracy"},
            }
            for task in TASKS
        },
        "merges": [
            {"name": "sum", "merge_method": "task_arithmetic", "export": "both"},
            {"name": "emr", "merge_method": "emr"},
            {"name": "left", "merge_method": "linear", "adapters": ["two", "three"]},
            {
                "name": "learned",
                "merge_method": "tara_b",
                "parameters": {"steps": STEPS, "batch_size": 4},
                "preferences": [{"two": 3, "three": 1, "five": 1}, {"two": 1, "three": 1, "five": 3}],
            },
        ],
    }
    ray_merge.run(recipe, engine="local", workers=2, cache_dir=folder / "cache")
    ray_merge.evaluate(recipe, engine="local", workers=2, cache_dir=folder / "cache", hits=True)
    (folder / "out/left" / MANIFEST).unlink()
    return folder / "out"


@pytest.fixture(scope="module")
def report(output) -> Path:
    return Path(ray_merge.report(str(output)).url)


@pytest.fixture(scope="module")
def page(report) -> Parsed:
    return parse(report)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.html"
    }


def learned_folders(output: Path) -> list[Path]:
    return sorted(path for path in (output / "learned").iterdir())


def test_it_lies_beside_the_scores_and_nothing_else_changes(output):
    before = files(output)
    first = ray_merge.report(str(output))
    data = Path(first.url).read_bytes()
    assert first.url == str(output / "ray_merge/report.html")
    assert first.n_bytes == len(data)
    ray_merge.report(str(output))
    assert Path(first.url).read_bytes() == data, "the same facts, the same bytes"
    assert files(output) == before


def test_every_part_of_a_complete_merge_is_there(page, output):
    sections = [text for level, text in page.headings if level == 2]
    assert sections == ["Totals", "Not complete", "Merges", "Scores", "Time", "Merges in detail"]
    names = [path.name for path in learned_folders(output)]
    merges = [text for level, text in page.headings if level == 3]
    assert merges == ["Preferences of learned", "emr", *(f"learned/{name}" for name in names), "sum"]
    parts = [text for level, text in page.headings if level == 4]
    plain = ["Layers", "Provenance"]
    assert parts == [*plain, *2 * ["Layers", "Learning", "Provenance"], *plain]
    for figure in ("Update norm", "Rounding loss", "Effective rank", "Interference"):
        assert sum(caption.startswith(f"{figure} encoder.layer") for caption in page.captions) == 4


def test_what_is_not_complete_is_named_and_nothing_more(page):
    assert page.text.count("1 merge(s) have no manifest") == 1
    assert page.named("li").count({}) >= 1
    assert not any(text == "left" for level, text in page.headings if level == 3)


def test_cells_are_those_of_the_table_of_sites(page, output):
    rows = pq.read_table(output / "sum/ray_merge/sites.parquet").to_pylist()
    own = [row for row in rows if row["export"] == "checkpoint"]
    for row in own:
        others = [value for at, value in enumerate(row["interference"] or []) if at % 4 and value is not None]
        wanted = [number(row["update_norm"]), percent(row["lost_share"]), number(row["erank_all"])]
        assert all(cell in page.cells for cell in wanted), row["site"]
        if others:
            assert number(math.fsum(others) / len(others)) in page.cells
    total = number(math.hypot(*(row["update_norm"] for row in own)))
    assert f"Whole update: norm {total}." in page.text
    worst = max(own, key=lambda row: row["lost_share"])
    assert f"at most {percent(worst['lost_share'])} of an update, at {worst['site']}" in page.text


def test_curves_are_those_of_phi(page, output):
    for folder in learned_folders(output):
        tensors = load_file(folder / "ray_merge/phi.safetensors")
        assert len(tensors["history.objective"]) == STEPS
        for name in ("objective", "values", "weights", "condition"):
            for value in tensors[f"history.{name}"].flatten().tolist():
                assert number(value) in page.cells
        first, last = (number(float(tensors["history.objective"][at])) for at in (0, -1))
        assert f"Objective, steps 0 to {STEPS - 1}: objective from {first} to {last}." in page.text


def test_scores_and_the_pareto_front_are_those_of_the_evaluation(page, output):
    document = json.loads((output / "ray_merge/evaluation.json").read_text())
    for model in document["means"]:
        assert model in page.text
        for row in document[model].values():
            shown = f"{number(row['value'])} ({number(row['normalised'])})"
            assert (shown if row["normalised"] is not None else number(row["value"])) in page.cells
    beaten = [point["dominated"] for point in document["pareto"]["learned"]["points"]]
    assert page.cells.count("beaten") == sum(beaten)
    assert page.cells.count("on the front") == len(beaten) - sum(beaten)


def test_times_are_those_of_the_receipts(page, output):
    receipts = [json.loads(path.read_text()) for path in output.rglob("receipts/*.json")]
    assert all(one["began"] > 1.7e9 for one in receipts)
    units = {(one["worker"], one["unit"], one["began"]) for one in receipts}
    drawn = [
        attributes
        for attributes in page.named("svg")
        if attributes.get("aria-labelledby") == "time0-t time0-d"
    ]
    assert len(drawn) == 1
    assert f"{len(units)} unit(s) by 1 worker(s)" in page.text
    hints = [text for text in page.texts if "object(s)," in text]
    assert len(hints) == len(units)


def test_where_it_came_from_is_there(page, output):
    for folder in ("sum", "emr"):
        manifest = json.loads((output / folder / MANIFEST).read_text())
        assert manifest["id"] in page.cells
        for one in manifest["inputs"]["adapters"]:
            assert one["files"]["adapter_model.safetensors"] in page.cells
        for one in manifest["files"]:
            assert one["sha256"] in page.cells


def test_it_is_built_for_who_does_not_see_it(page):
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.uncaptioned == 0
    assert len(page.captions) == len(page.named("table"))
    assert all(one.get("scope") in ("row", "col") for one in page.named("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    drawings = [one for one in page.named("svg") if one.get("aria-hidden") != "true"]
    assert drawings
    assert all(one["role"] == "img" for one in drawings)
    assert all(name in ids for one in drawings for name in (one["aria-labelledby"] or "").split())
    named = [attributes for tag, attributes in page.tags if tag == "section"]
    assert all(one["aria-labelledby"] in ids for one in named)
    assert page.named("html") == [{"lang": "en"}]


def test_it_asks_nobody_for_anything(page, report):
    text = report.read_text()
    assert all((one.get("href") or "").startswith("#") for one in page.named("a"))
    assert not any(
        name in attributes for _, attributes in page.tags for name in ("src", "srcset", "data", "action")
    )
    assert not page.named("link")
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.named("script")) == 1
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)


def test_the_command_prints_what_it_wrote(output, tmp_path, capsys):
    there = tmp_path / "new" / "r.html"
    assert _exit_code(["report", str(output), "--to", str(there), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["url"] == str(there)
    assert told["incomplete"] == ["left"]
    assert [one["steps"] for one in told["merges"]] == [None, STEPS, STEPS, None]
    assert told["bytes"] == there.stat().st_size
    assert _exit_code(["report", str(output)]) == 0
    assert "missing   left is not complete" in capsys.readouterr().out


@pytest.mark.s3
def test_the_same_report_lies_in_a_bucket(s3, output, report):
    url = f"{s3.url}/report-{uuid.uuid4().hex[:8]}"
    store = open_store(url)
    for name, data in files(output).items():
        if not name.startswith(".ray_merge/") and not name.endswith(".safetensors"):
            store.put_if_absent(name, data, {})
    for folder in learned_folders(output):
        name = f"learned/{folder.name}/ray_merge/phi.safetensors"
        store.put_if_absent(name, (output / name).read_bytes(), {})
    found = ray_merge.report(url)
    assert found.url == f"{url}/ray_merge/report.html"
    there = store.read("ray_merge/report.html").decode()
    assert there.replace(url, str(output)) == report.read_text()


def test_a_browser_shows_it_on_a_laptop_and_a_phone_by_day_and_by_night(report, tmp_path):
    program = find_browser()
    if program is None:
        pytest.skip(f"none of {', '.join(PROGRAMS)} is on PATH (apt-get install chromium)")
    with browser_page(program) as tab:
        colours = {}
        for size in (LAPTOP, PHONE):
            for dark in (False, True):
                tab.open(report, size, dark=dark)
                tab.run("document.getElementById('open-all').click()")
                assert tab.run("document.documentElement.scrollWidth") <= size[0], (
                    "only parts scroll sideways"
                )
                assert tab.run("[...document.querySelectorAll('details')].every(one => one.open)")
                colours[size, dark] = tab.run("getComputedStyle(document.body).backgroundColor")
                tab.screenshot(tmp_path / "page.png")
                assert (tmp_path / "page.png").stat().st_size > 50_000
        assert (
            colours[LAPTOP, False] == colours[PHONE, False] != colours[LAPTOP, True] == colours[PHONE, True]
        )
        tab.open(report, LAPTOP, fragment="#m1")
        assert tab.run("document.getElementById('m1').parentElement.open"), (
            "a link opens the part it leads to"
        )
        _walk_by_keyboard(tab, report)
        assert {url.partition("#")[0] for url in tab.requests} == {report.as_uri()}
        assert tab.complaints == []


def _walk_by_keyboard(tab, report):
    tab.open(report, LAPTOP)
    tab.press("Tab")
    assert tab.run("document.activeElement.className") == "skip"
    for _ in range(60):
        tab.press("Tab")
        if tab.run("document.activeElement.tagName") == "SUMMARY":
            break
    assert tab.run("document.activeElement.tagName") == "SUMMARY"
    before = tab.run("document.activeElement.parentElement.open")
    tab.press("Enter")
    assert tab.run("document.activeElement.parentElement.open") is not before
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
