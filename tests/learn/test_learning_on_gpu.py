"""phi and moments of a GPU are those of the CPU, up to rounding. Skips where there is no GPU."""

import pytest
import torch
from safetensors.torch import load_file

import ray_merge
from lessons import learned_phi, lesson, make_school

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)

ALL = ("two", "three", "five")
PLAIN = {"steps": 4, "batch_size": 4, "learning_rate": 0.02, "samples": 0}


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    return make_school(tmp_path_factory.mktemp("school"))


def run(recipe, folder, device):
    ray_merge.run(
        recipe,
        engine="local",
        workers=1,
        output=str(folder / device),
        cache_dir=folder / "cache",
        device=device,
    )
    return folder / device


def weights(folder):
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def on_both(school, folder, method, parameters, **more):
    recipe = lesson(school, folder, method, ALL, parameters={**PLAIN, **parameters}, **more)
    return [run(recipe, folder, device) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(
    ("method", "objective"),
    [("tara_a", "entropy"), ("tara_b", "agreement"), ("adamerging", "agreement"), ("nsc", None)],
)
def test_phi_in_float64(school, tmp_path, method, objective, stages):
    parameters = {"objective": objective} if objective else {"layers": "all"}
    cpu, cuda = map(learned_phi, on_both(school, tmp_path, method, parameters, stages=stages))
    assert any(bool((one != one.flatten()[0]).any()) for one in cpu.values()) or method in (
        "adamerging",
        "nsc",
    )
    for site, one in cpu.items():
        torch.testing.assert_close(cuda[site], one, rtol=0, atol=1e-8)


def test_the_merged_checkpoint(school, tmp_path):
    cpu, cuda = (weights(folder / "m") for folder in on_both(school, tmp_path, "tara_b", {}))
    assert len(cpu) > 60
    for name, one in cpu.items():
        torch.testing.assert_close(cuda[name], one, rtol=0, atol=1e-7)


def test_bfloat16_autocast_goes_the_same_way(school, tmp_path):
    parameters = {"objective": "agreement", "precision": "bfloat16"}
    exact, half = (
        learned_phi(
            run(
                lesson(
                    school,
                    tmp_path,
                    "tara_a",
                    ALL,
                    dtype="float32",
                    parameters={**PLAIN, **parameters, "precision": precision},
                ),
                tmp_path / precision,
                "cuda",
            )
        )
        for precision in ("float32", "bfloat16")
    )
    moved = torch.cat([(one - 0.4).flatten() for one in exact.values()]).double()
    other = torch.cat([(half[site] - 0.4).flatten() for site in exact]).double()
    assert bool(torch.isfinite(other).all())
    assert torch.nn.functional.cosine_similarity(moved, other, dim=0) > 0.9


def test_moments(school, tmp_path):
    recipe = lesson(school, tmp_path, "regmean", ALL)
    cpu, cuda = (weights(run(recipe, tmp_path, device) / "m") for device in ("cpu", "cuda"))
    base = weights(school / "base")
    for name, one in cpu.items():
        torch.testing.assert_close(cuda[name], one, rtol=1e-4, atol=1e-5)
    assert sum(bool((one.float() != base[name]).any()) for name, one in cpu.items()) >= 8
