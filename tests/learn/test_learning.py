"""Learned phi against plain autograd of the whole model in float64, and what a run does with it."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ray_merge
from lessons import CLASSES, Reference, divergences, entropies, learned_phi, lesson, make_school, ratios
from ray_merge.errors import RecipeError, RunFailed
from ray_merge.recipe import expand, load_recipe

ALL = ("two", "three", "five")
STEPS = 4
PLAIN = {
    "steps": STEPS,
    "batch_size": 4,
    "learning_rate": 0.02,
    "weight_decay": 0.01,
    "samples": 0,
    "init": 0.4,
}


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    return make_school(tmp_path_factory.mktemp("school"))


def run(recipe, tmp_path, **more):
    return ray_merge.run(recipe, engine="local", cache_dir=tmp_path / "cache", **more)


def optimise(model, values_at, combine, steps=STEPS, *, holds=False):
    """AdamW as the recipe has it; returns the combined values before each step."""
    leaves = list(model.phi.values())
    optimiser = torch.optim.AdamW(leaves, lr=PLAIN["learning_rate"], weight_decay=PLAIN["weight_decay"])
    curve = []
    for step in range(steps):
        loss = combine(values_at(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for site, leaf in model.phi.items() if holds else ():
            own = [place for place, pair in enumerate(model.factors[site]) if pair is not None]
            if leaf.grad is not None:
                leaf.data[own] -= leaf.data[own].mean() - PLAIN["init"]
        curve.append(float(loss.detach()))
    return curve


def batches(model, names=ALL, steps=STEPS):
    return {name: model.batches(name, steps, PLAIN["batch_size"]) for name in names}


def same(output, model, tolerance=1e-8):
    found = learned_phi(output)
    assert sorted(found) == sorted(model.phi)
    for site, leaf in model.phi.items():
        assert found[site].shape == leaf.shape
        torch.testing.assert_close(found[site], leaf.detach(), rtol=0, atol=tolerance)


CASES = [
    ("tara_a", 1, "entropy"),
    ("tara_b", 3, "entropy"),
    ("adamerging", 3, "entropy"),
    ("tara_b", 1, "agreement"),
    ("tara_a", 3, "agreement"),
]


@pytest.mark.parametrize(("method", "stages", "objective"), CASES)
def test_phi_is_that_of_autograd_on_the_whole_model(school, tmp_path, method, stages, objective):
    compares, smooth = objective == "agreement", method != "adamerging"
    how = {"diversity": 0.0 if compares else 0.5, "normalise": True}
    parameters = {**PLAIN, "objective": objective, "diversity": how["diversity"], "normalize_entropy": True}
    if smooth:
        preference = {"two": 1.0, "three": 2.0, "five": 1.0}
        parameters |= {"scalarisation": "tchebycheff", "alpha": 0.1, "preference": preference}
    run(lesson(school, tmp_path / "out", method, ALL, stages=stages, parameters=parameters), tmp_path)
    model = Reference(school, method, ALL)
    given = batches(model)
    own = _own(school, given) if compares else None
    anchors = torch.tensor([0.0] * 3 if compares else _anchors(school, how), dtype=torch.float64)
    rho = torch.tensor([0.25, 0.5, 0.25] if smooth else [1 / 3] * 3, dtype=torch.float64)

    def values_at(step):
        return divergences(model, ALL, given, step, own) if own else entropies(model, ALL, given, step, **how)

    def combine(values):
        gaps = rho * (torch.stack(values) - anchors)
        return 0.1 * torch.logsumexp(gaps / 0.1, 0) if smooth else gaps.sum()

    curve = optimise(model, values_at, combine)
    same(tmp_path / "out", model)
    if smooth:  # constants do not matter to a plain sum
        history = load_file(tmp_path / "out" / "m" / "ray_merge" / "phi.safetensors")["history.objective"]
        torch.testing.assert_close(history, torch.tensor(curve, dtype=torch.float64), rtol=0, atol=1e-8)


def _own(school, given):
    """What each adapter predicts alone, log p, on every batch."""
    found = {}
    for name in ALL:
        alone = Reference(school, "adamerging", [name], init=1.0)
        alone.use_head(name)
        with torch.no_grad():
            found[name] = [alone.model(**batch).logits.log_softmax(-1) for batch in given[name]]
    return found


def _anchors(school, how):
    """Each adapter alone, at its full size, on the first batches."""
    found = []
    for name in ALL:
        alone = Reference(school, "adamerging", [name], init=1.0)
        given = alone.batches(name, 3, PLAIN["batch_size"])
        with torch.no_grad():
            values = [float(entropies(alone, [name], {name: given}, step, **how)[0]) for step in range(3)]
        found.append(sum(values) / len(values))
    return found


NULL_SPACES = [("last_quarter", [3], True), ("1-2", [1, 2], False), ("all", [0, 1, 2, 3], True)]


@pytest.mark.parametrize(("layers", "blocks", "holds"), NULL_SPACES)
def test_nsc_is_that_of_an_explicit_null_space_projector(school, tmp_path, layers, blocks, holds):
    names = ("two", "three", "one") if layers != "1-2" else ALL  # a regression has no part in an entropy
    parameters = {**PLAIN, "layers": layers, "hold_sum": holds}
    run(lesson(school, tmp_path / "out", "nsc", names, stages=2, parameters=parameters), tmp_path)
    model = Reference(school, "nsc", names)
    given = batches(model, names)
    optimise(
        model,
        lambda step: ratios(model, names, given, step, blocks),
        lambda values: torch.stack(values).mean(),
        holds=holds,
    )
    same(tmp_path / "out", model)


def test_without_a_step_it_is_task_arithmetic(school, tmp_path):
    learned = lesson(school, tmp_path / "out", "tara_b", ALL, parameters={**PLAIN, "steps": 0})
    learned["merges"] += [
        {"name": "a", "merge_method": "tara_a", "adapters": list(ALL), "parameters": {"steps": 0}},
        {
            "name": "t",
            "merge_method": "task_arithmetic",
            "adapters": list(ALL),
            "parameters": {"lambda": 0.4},
        },
    ]
    run(learned, tmp_path)
    merged = {name: _weights(tmp_path / "out" / name) for name in ("m", "a", "t")}
    for name in ("m", "a"):
        for key, value in merged["t"].items():
            torch.testing.assert_close(merged[name][key], value, rtol=0, atol=1e-6)


def _weights(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_micro_batches_of_an_entropy_without_diversity_change_nothing(school, tmp_path):
    plain = {**PLAIN, "objective": "entropy", "diversity": 0.0}
    run(lesson(school, tmp_path / "whole", "tara_a", ALL, parameters=plain), tmp_path)
    run(
        lesson(school, tmp_path / "cut", "tara_a", ALL, parameters={**plain, "micro_batch_size": 1}), tmp_path
    )
    whole, cut = learned_phi(tmp_path / "whole"), learned_phi(tmp_path / "cut")
    for site, value in whole.items():
        torch.testing.assert_close(cut[site], value, rtol=0, atol=1e-12)


def test_bounds_and_sharing_hold(school, tmp_path):
    parameters = {**PLAIN, "learning_rate": 0.5, "low": 0.3, "high": 0.6, "sharing": "model"}
    run(lesson(school, tmp_path / "out", "adamerging", ALL, parameters=parameters), tmp_path)
    found = learned_phi(tmp_path / "out")
    first = next(iter(found.values()))
    assert all(torch.equal(one, first) for one in found.values())
    assert 0.3 in first.tolist()
    assert all(0.3 <= value <= 0.6 for value in first.tolist())


def test_the_penalty_on_rank_pulls_phi_apart(school, tmp_path):
    for name, weight in (("without", 0.0), ("with", 50.0)):
        parameters = {**PLAIN, "effective_rank": weight}
        run(lesson(school, tmp_path / name, "tara_a", ALL, parameters=parameters), tmp_path)
    plain, pulled = learned_phi(tmp_path / "without"), learned_phi(tmp_path / "with")
    assert any(not torch.allclose(plain[site], pulled[site], atol=1e-3) for site in plain)


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(school, tmp_path):
    recipe = lesson(
        school, tmp_path / "out", "tara_b", ALL, stages=2, parameters={**PLAIN, "commit_every": 2}
    )
    run(recipe, tmp_path, output=str(tmp_path / "whole"))

    def stop(event):
        if event.kind == "learn" and event.units[0] == 3:
            raise Stop

    with pytest.raises(Stop):
        run(recipe, tmp_path, progress=stop)
    states = sorted(path.name for path in (tmp_path / "out" / ".ray_merge" / "learn").rglob("*.safetensors"))
    assert states == ["step-000002.safetensors"]
    steps = []
    run(
        recipe,
        tmp_path,
        progress=lambda event: steps.append(event.units[0]) if event.kind == "learn" else None,
    )
    assert steps == [2, 3, 4] or steps == [3, 4]
    one, two = (
        (tmp_path / name / "m" / "ray_merge" / "phi.safetensors").read_bytes() for name in ("whole", "out")
    )
    assert one == two
    steps.clear()
    run(
        recipe,
        tmp_path,
        progress=lambda event: steps.append(event.units[0]) if event.kind == "learn" else None,
    )
    assert steps == []


def test_a_damaged_state_does_not_count(school, tmp_path):
    recipe = lesson(school, tmp_path / "out", "adamerging", ALL, parameters={**PLAIN, "commit_every": 1})
    run(recipe, tmp_path, output=str(tmp_path / "whole"))
    with pytest.raises(Stop):
        run(recipe, tmp_path, progress=_stop_at(3))
    last = max((tmp_path / "out" / ".ray_merge" / "learn").rglob("*.safetensors"))
    raw = bytearray(last.read_bytes())
    raw[-3] ^= 1
    last.chmod(0o644)
    last.write_bytes(raw)
    with pytest.raises(RunFailed, match=f"{last.name} holds another state"):
        run(recipe, tmp_path)
    last.unlink()
    run(recipe, tmp_path)
    assert all(
        torch.equal(v, learned_phi(tmp_path / "out")[k]) for k, v in learned_phi(tmp_path / "whole").items()
    )


def _stop_at(step):
    def stop(event):
        if event.kind == "learn" and event.units[0] == step:
            raise Stop

    return stop


def test_a_loss_that_is_no_number_stops_and_keeps_what_was_committed(school, tmp_path):
    parameters = {**PLAIN, "learning_rate": 1e300, "commit_every": 1, "steps": 6}
    with pytest.raises(
        RunFailed, match=r"step \d of 6: the loss is nan.* the phi of step \d is kept; use a smaller"
    ):
        run(lesson(school, tmp_path / "out", "tara_a", ALL, parameters=parameters), tmp_path)
    states = list((tmp_path / "out" / ".ray_merge" / "learn").rglob("*.safetensors"))
    assert states
    assert not (tmp_path / "out" / "m").exists()


@pytest.mark.parametrize("method", ["tara_a", "tara_b", "adamerging"])
def test_a_regression_in_an_entropy_is_refused_with_the_method_that_takes_it(school, tmp_path, method):
    recipe = lesson(school, tmp_path / "out", method, ("two", "one"), parameters=PLAIN)
    with pytest.raises(RecipeError, match="nsc"):
        run(recipe, tmp_path)
    assert not (tmp_path / "out").exists()


def test_anchors_are_shared_by_preferences(school, tmp_path):
    recipe = lesson(school, tmp_path / "out", "tara_a", ALL, parameters={**PLAIN, "objective": "entropy"})
    recipe["merges"][0]["preferences"] = [
        {"two": 0.8, "three": 0.1, "five": 0.1},
        {"two": 0.1, "three": 0.1, "five": 0.8},
    ]
    run(recipe, tmp_path)
    anchors = sorted((tmp_path / "out" / ".ray_merge" / "anchors").iterdir())
    assert [json.loads(path.read_text())["task"] for path in anchors].count("two") == 1
    assert len(anchors) == 3
    folders = sorted(
        path.parent.parent.name for path in (tmp_path / "out" / "m").rglob("ray_merge/phi.safetensors")
    )
    assert folders == ["two=0.1,three=0.1,five=0.8", "two=0.8,three=0.1,five=0.1"]
    for name in folders:
        text = (tmp_path / "out" / "m" / name / "ray_merge" / "recipe.yaml").read_text()
        (again,) = expand(*load_recipe("recipe.yaml", text))
        assert again.name == f"m/{name}"


def test_the_exported_adapter_is_the_checkpoint(school, tmp_path):
    recipe = lesson(school, tmp_path / "out", "tara_b", ALL, parameters=PLAIN)
    recipe["merges"][0]["export"] = "both"
    run(recipe, tmp_path)
    folder = tmp_path / "out" / "m"
    base = load_file(school / "base" / "model.safetensors")
    adapter, merged = load_file(folder / "adapter" / "adapter_model.safetensors"), _weights(folder)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    for key, A in adapter.items():
        if not key.endswith("lora_A.weight"):
            continue
        B = adapter[key.replace("lora_A", "lora_B")]
        site = key.removeprefix("base_model.model.").removeprefix("bert.").removesuffix(".lora_A.weight")
        scale = config["alpha_pattern"].get(key, config["lora_alpha"] / config["r"])
        assert A.shape[0] <= min(B.shape[0], sum((2, 4, 3)))
        assert math.isfinite(scale)
        torch.testing.assert_close(
            base[f"{site}.weight"].double() + (B @ A).double(),
            merged[f"{site}.weight"].double(),
            rtol=0,
            atol=2e-6,
        )


def test_it_verifies(school, tmp_path):
    recipe = lesson(school, tmp_path / "out", "tara_a", ALL, parameters=PLAIN)
    run(recipe, tmp_path)
    (one,) = ray_merge.verify(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    assert not one.unprobed
    assert Path(tmp_path / "out" / "m").exists()
    assert CLASSES


def test_the_plan_says_what_learning_takes(school, tmp_path):
    planned = ray_merge.plan(lesson(school, tmp_path / "out", "tara_a", ALL, stages=2, parameters=PLAIN))
    (facts,) = planned.moments
    assert (facts.kind, facts.class_name, facts.stages) == ("learn", "BertForSequenceClassification", 2)
