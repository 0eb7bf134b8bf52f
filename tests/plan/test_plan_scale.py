"""A plan of many adapters looks at each header once and fits each kind of module once (benchmarks/plan_scale.py)."""

import importlib.util
import json
from pathlib import Path

import pytest

import ray_merge
from ray_merge import api, show
from ray_merge.fit import adapters as fitting
from ray_merge.storage import adapter as reading

LAYERS, ADAPTERS, MERGES = 3, 40, 150


@pytest.fixture(scope="module")
def plan_scale():
    path = Path(ray_merge.__file__).parents[1] / "benchmarks" / "plan_scale.py"
    spec = importlib.util.spec_from_file_location("plan_scale", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted(monkeypatch, module, name, calls):
    function = getattr(module, name)

    def count(*given, **named):
        calls.append(name)
        return function(*given, **named)

    monkeypatch.setattr(module, name, count)


@pytest.mark.parametrize(("kind", "most_fits"), [("same", 1), ("mixed", 3), ("apart", 10)])
def test_plans_of_many_adapters_share_what_they_have_in_common(
    plan_scale, tmp_path, monkeypatch, kind, most_fits
):
    recipe = plan_scale.make(tmp_path, adapters=ADAPTERS, merges=MERGES, layers=LAYERS, kind=kind)
    calls = []
    counted(monkeypatch, reading, "parse_header", calls)
    counted(monkeypatch, fitting, "_fit", calls)
    plan = api.plan(str(recipe))
    assert "parse_header" not in calls
    assert calls.count("_fit") <= most_fits
    assert (len(plan.merges), len(plan.adapters)) == (MERGES, ADAPTERS)
    facts = json.loads(json.dumps(show.plan_json(plan)))
    assert facts["units"] == len(plan.groups) * len(plan.shards)
    assert facts["estimate"]["hours"] > 0
    assert facts["estimate"]["write_bytes"] == MERGES * plan.checkpoint_bytes
    config = json.loads((Path(plan.adapters["a0007"].url) / "adapter_config.json").read_text())
    assert facts["adapters"]["a0007"]["ranks"] == [config["r"]]
    assert facts["adapters"]["a0007"]["scales"] == [2.0]
    assert {update.rank for update in plan.adapters["a0007"].factors.values()} == {config["r"]}
