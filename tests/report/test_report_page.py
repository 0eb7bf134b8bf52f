"""Reports of outputs that are large, damaged, hostile or hardly there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from browser import LAPTOP, browser_page, find_browser
from outputs import parquet, parse, phi_file, receipt, site_names, write_merge, write_scores

import ray_merge
from ray_merge.errors import Refusal
from ray_merge.report.markup import NOTHING

EVIL = "<img src=x onerror=alert(1)>\"'&</td></script><script>hacked=1</script>\u202e\ud800\x00"


def report(output, **more):
    return ray_merge.report(str(output), **more)


def shown(output):
    return parse(report(output).url)


def test_names_stay_text_wherever_they_come_from(tmp_path):
    write_merge(
        tmp_path / "out",
        "m",
        sites=parquet([f"model.layers.0.{EVIL}".replace("\ud800", ""), "head"], lost_share=[0.5, 0.1]),
        phi=phi_file([EVIL, "b"], objective=((2,), [1.0, 2.0]), values=((2, 2), [1.0] * 4)),
        receipts=[receipt("u<b>", "w<b>", 1e9, **{"<i>": 1.0})],
        inputs={
            "method": EVIL,
            "parameters": {EVIL: EVIL},
            "adapters": [{"name": EVIL, "files": {EVIL: EVIL}}],
            "base": {EVIL: EVIL},
        },
    )
    point = {"merge": EVIL, "preference": {EVIL: 1.0}, "scores": {EVIL: 0.5, "b": 0.1}, "dominated": False}
    write_scores(
        tmp_path / "out",
        {"base": {EVIL: 0.1}, EVIL: {EVIL: 0.5}, "other": {EVIL: 0.4}},
        pareto={EVIL: {"metrics": {EVIL: EVIL, "b": "f1"}, "points": [point, point]}},
        notes=[EVIL],
        missing=[EVIL],
    )
    url = report(tmp_path / "out").url
    page = parse(url)
    assert page.named("img") == []
    assert page.named("b") != [], "our own"
    assert len(page.named("script")) == 1
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    text = "<img src=x onerror=alert(1)>\"'&</td></script><script>hacked=1</script>"
    assert page.text.count(text) > 15
    assert "\u202e" not in page.text
    assert "\x00" not in page.text
    program = find_browser()
    if program is not None:
        with browser_page(program) as tab:
            tab.open(tmp_path / "out/ray_merge/report.html", LAPTOP)
            assert tab.run("typeof hacked") == "undefined"
            assert tab.complaints == []


def test_what_is_not_a_number_is_not_known(tmp_path):
    nan, infinite = math.nan, math.inf
    sites = parquet(
        site_names(5), update_norm=[1.0, nan, infinite, None, 3.0], lost_share=[nan] * 5,
        interference=[[0.0, 0.5, nan, 0.0], [], [1.0], None, [0.0, None, None, 0.0]],
    )  # fmt: skip
    phi = phi_file(
        ["a", "b"],
        objective=((3,), [1.0, nan, 2.0]),
        values=((3, 2), [1.0, nan, infinite, 1.0, 1.0, -infinite]),
        condition=((3,), [infinite, infinite, infinite]),
        misalignment=((2, 2), [0.0, nan, nan, 0.0]),
    )
    write_merge(
        tmp_path / "out", "m", sites=sites, phi=phi, receipts=[receipt("u", "w", nan, read=nan, merge=2.0)]
    )
    write_scores(tmp_path / "out", {"base": {"t": 0.5}})
    page = shown(tmp_path / "out")
    norms = next(one for one in page.captions if one.startswith("Update norm"))
    assert "1.00 to 3.00" in norms
    assert not any(one.startswith("Rounding loss") for one in page.captions)
    assert "Not known: rounding loss and effective rank" in page.text
    assert "7 value(s) are not finite" in page.text
    assert "nan" not in page.text.lower().replace("provenance", "")
    paths = "".join(one.get("d") or "" for one in page.named("path"))
    assert "nan" not in paths
    assert "inf" not in paths
    assert "0.500" in page.cells
    assert NOTHING in page.cells


def test_columns_and_files_that_are_missing_take_only_their_own_part_away(tmp_path):
    out = tmp_path / "out"
    write_merge(out, "old", sites=parquet(site_names(5), lost_share=None, export=None))
    write_merge(out, "bad", sites=b"no parquet", phi=b"no safetensors")
    nothing = write_merge(out, "nothing")
    (nothing / "ray_merge/sites.parquet").unlink()
    (nothing / "ray_merge/recipe.yaml").unlink()
    broken = write_merge(out, "broken")
    (broken / "ray_merge/MANIFEST.json").write_text("{")
    write_scores(out, {"base": {"t": 0.5}})
    (out / "ray_merge/evaluation.json").write_text("[]")
    result = report(out)
    found = {one["name"]: one["problems"] for one in result.document["merges"]}
    assert found["old"] == []
    assert [problem.split(" ")[0] for problem in found["bad"]] == [
        "ray_merge/sites.parquet",
        "ray_merge/phi.safetensors",
    ]
    assert found["nothing"] == ["ray_merge/sites.parquet is not there", "ray_merge/recipe.yaml is not there"]
    assert len(result.document["damaged"]) == 2
    page = parse(result.url)
    assert "broken/ray_merge/MANIFEST.json is not valid JSON" in page.text
    assert "ray_merge/evaluation.json has no means" in page.text
    assert sum(one.startswith("Update norm") for one in page.captions) == 1


def test_numbers_that_no_run_can_write_take_only_their_own_part_away(tmp_path):
    receipts = [receipt("u", "w", 100.0, read=1.0, merge=1e308, upload=1e308)]
    folder = write_merge(tmp_path / "out", "m", receipts=receipts)
    path = folder / "ray_merge/MANIFEST.json"
    manifest = json.loads(path.read_text())
    manifest["files"] += [{"name": name, "bytes": size} for name, size in (("huge", 10**400), ("less", -1))]
    path.write_text(json.dumps(manifest))
    result = report(tmp_path / "out")
    assert result.document["merges"][0]["problems"] == [
        "ray_merge/MANIFEST.json names 2 file(s) without a size"
    ]
    page = parse(result.url)
    assert sum(cell.startswith("1.00 s (100") for cell in page.cells) == 2  # the worker and all, of reading


def test_receipts_of_before_have_seconds_and_no_place_in_time(tmp_path):
    folder = write_merge(tmp_path / "out", "m", receipts=[receipt("u", "w", 0.0, read=1.0, merge=2.0)])
    (path,) = (folder / "ray_merge/receipts").iterdir()
    document = json.loads(path.read_text())
    del document["began"]
    path.write_text(json.dumps(document))
    page = shown(tmp_path / "out")
    assert "1 of 1 unit(s) do not say when they began" in page.text
    assert "3.00 s" in page.cells
    assert not any(one.get("aria-labelledby") == "time0-t time0-d" for one in page.named("svg"))


def test_without_a_complete_merge_it_says_so(tmp_path):
    write_merge(tmp_path / "out", "m", complete=False, receipts=[receipt("u", "w", 1e9, read=1.0)])
    page = shown(tmp_path / "out")
    assert "No merge is complete." in page.text
    assert "1 unit(s) by 1 worker(s)" in page.text


def test_several_outputs_below_one_folder_are_one_report(tmp_path):
    for day, score in (("2026-01-01", 0.25), ("2026-01-02", 0.75)):
        write_merge(tmp_path / day, "m")
        write_scores(tmp_path / day, {"base": {"t": 0.1}, "m": {"t": score}})
    page = shown(tmp_path)
    titles = [text for level, text in page.headings if level == 2]
    assert "Scores of 2026-01-01" in titles
    assert "Scores of 2026-01-02" in titles
    assert [cell for cell in page.cells if cell in ("25.0", "75.0")][:2] == ["25.0", "75.0"]


def test_a_large_output_is_a_page_all_the_same(tmp_path):
    blocks, experts = 60, 40
    sites = [f"model.layers.{b}.mlp.experts.{e}.{m}_proj" for b in range(blocks) for e in range(experts)
             for m in ("up", "gate", "down")]  # fmt: skip
    for name in ("one", "two"):
        write_merge(tmp_path / "out", name, sites=parquet(sites), receipts=[
            receipt(f"{name}{index}", f"host{index % 60}:1", 1e9 + index, read=1.5) for index in range(500)
        ])  # fmt: skip
    result = report(tmp_path / "out")
    page = parse(result.url)
    assert len(sites) == 7200
    assert result.n_bytes < 400_000
    assert sum(one.startswith("Update norm") for one in page.captions) == 2
    assert "mlp.experts.*.up_proj" in page.text
    assert f"at most {experts}" in page.text
    assert "80 more rows are not drawn" in page.text


def test_many_merges_stay_within_their_bounds(tmp_path):
    data = parquet(site_names(400))
    steps, tasks = 300, [f"t{index}" for index in range(12)]
    curve = [math.sin(index) for index in range(steps * len(tasks))]
    phi = phi_file(
        tasks, objective=((steps,), curve[:steps]), values=((steps, 12), curve), weights=((steps, 12), curve)
    )
    for index in range(200):
        write_merge(tmp_path / "out", f"m{index}", sites=data, phi=phi)
    write_scores(tmp_path / "out", {f"m{index}": {task: 0.5 for task in tasks} for index in range(200)})
    result = report(tmp_path / "out")
    assert len(result.document["merges"]) == 200
    assert result.n_bytes < 8_000_000
    text = Path(result.url).read_text()
    assert text.count("The 8 tasks whose last values are largest are drawn, 4 are not.") == 200
    assert "<details open" not in text
    assert [one["name"] for one in result.document["merges"]][9:11] == ["m9", "m10"]


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"holds no merge .* name a recipe's output"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_is_reported_elsewhere_and_stays_as_it_is(tmp_path):
    folder = write_merge(tmp_path / "out", "m/lambda=0.5")
    before = sorted(folder.rglob("*"))
    with pytest.raises(Refusal, match=r"is a merge, which stays as it is; .*--to FILE\.html"):
        report(folder)
    for inside in ("r.html", "ray_merge/r.html", "new/r.html"):
        with pytest.raises(Refusal, match="lies in the merge"):
            report(tmp_path / "out", to=folder / inside)
    assert sorted(folder.rglob("*")) == before
    result = report(folder, to=tmp_path / "r.html")
    assert [one["name"] for one in result.document["merges"]] == ["m/lambda=0.5"]
    assert (tmp_path / "r.html").is_file()


def test_only_reports_are_replaced(tmp_path):
    write_merge(tmp_path / "out", "m")
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html>\nmy own page")
    with pytest.raises(Refusal, match="is there and is no report of ray-merge"):
        report(tmp_path / "out", to=mine)
    assert mine.read_text().endswith("my own page")
    with pytest.raises(Refusal, match=r"is no name of an HTML file; let it end in \.html"):
        report(tmp_path / "out", to=tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match="names no bucket"):
        report(tmp_path / "out", to="s3://r.html")
    for _ in range(2):
        report(tmp_path / "out", to=tmp_path / "again.html")


def test_a_relative_name_is_one_of_this_folder(tmp_path, monkeypatch):
    write_merge(tmp_path / "out", "m")
    monkeypatch.chdir(tmp_path)
    assert report("out", to="r.html").url == str(tmp_path / "r.html")
