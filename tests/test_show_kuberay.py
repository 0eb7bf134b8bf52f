"""`ray-merge plan --emit-kuberay` from a store (fsspec's memory) to YAML."""

import json
import uuid
from pathlib import Path

import fsspec
import pytest
import yaml

from ray_merge.cli import main
from tiny import write_recipe_files


@pytest.fixture
def recipe(tmp_path):
    """The URL of a recipe whose base and adapters lie on the same store."""
    store, root = fsspec.filesystem("memory"), f"kuberay-{uuid.uuid4().hex}"
    document = write_recipe_files(tmp_path)
    for path in sorted(Path(tmp_path).rglob("*")):
        if path.is_file():
            store.pipe(f"/{root}/{path.relative_to(tmp_path)}", path.read_bytes())
    text = json.dumps(document).replace(str(tmp_path), f"memory://{root}")
    store.pipe(f"/{root}/recipe.yaml", text.encode())
    yield f"memory://{root}/recipe.yaml"
    store.rm(f"/{root}", recursive=True)


def plan(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    return stop.value.code, *capsys.readouterr()


def test_a_recipe_becomes_a_job(capsys, recipe):
    options = ("--cluster", "workers=3", "--image", "r/ray-merge:7", "--namespace", "team", "--queue", "ml")
    code, out, err = plan(capsys, recipe, "--emit-kuberay", *options, "--only", "m", "--memory", "1GB")
    assert (code, err) == (0, "")
    assert out.startswith("# Made by: ray-merge plan memory://")
    assert "Deadline: " in out
    job = yaml.safe_load(out)
    assert job["metadata"]["namespace"] == "team"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ml"
    assert job["spec"]["entrypoint"] == f"python jobs/merge.py {recipe} --workers 3 --only m --memory 1GB"
    assert out.count("image: r/ray-merge:7") == 2
    assert "&id" not in out


def test_an_adapter_that_changed_gives_another_name(capsys, recipe):
    def name():
        return yaml.safe_load(plan(capsys, recipe, "--emit-kuberay")[1])["metadata"]["name"]

    before = name()
    assert before == name()
    store = fsspec.filesystem("memory")
    config = f"/{recipe.removeprefix('memory://').rpartition('/')[0]}/a/adapter_config.json"
    store.pipe(config, store.cat(config).replace(b'"lora_alpha": 4', b'"lora_alpha": 8'))
    assert name() != before


def test_without_options_it_is_the_image_of_this_version(capsys, recipe):
    code, out, _ = plan(capsys, recipe, "--emit-kuberay")
    assert code == 0
    assert out.count("image: ray-merge:0.1.0") == 2
    assert "namespace: ray-merge" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "x:1"], "--image describes a RayJob; add --emit-kuberay, or leave it out"),
        (["--queue", "q"], "--queue describes a RayJob"),
        (["--emit-kuberay", "--json"], "prints YAML; leave out --json"),
        (["--emit-kuberay", "--device", "tpu"], "--device tpu"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, recipe, words, message):
    code, out, err = plan(capsys, recipe, *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_recipe_on_this_machine_is_refused(capsys, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(write_recipe_files(tmp_path)))
    code, out, err = plan(capsys, str(path), "--emit-kuberay")
    assert (code, out) == (2, "")
    assert "a path of this machine that no pod can read" in err.splitlines()[-1]
