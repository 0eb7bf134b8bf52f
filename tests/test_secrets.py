"""Credentials are in nothing that is printed, logged (at DEBUG too) or written, whether they are good or bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from ray_merge.cli import main
from ray_merge.errors import MAX_SENTENCE, Refusal, redacted, sentence, shown
from ray_merge.storage.store import open_store, redact
from s3_server import SECRET_KEY
from zoo import llama_adapters, tiny_llama

PASSWORD = "geheim/pass+word0"
TOKENS = {"HF_TOKEN": "hf_geheimgeheimgeheim", "HUGGING_FACE_HUB_TOKEN": "hf_geheim2"}
SECRETS = (SECRET_KEY, "geheim", "pass+word0", "wrong-key")

CLI = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
from ray_merge.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama(folder / "base", layers=2)
    llama_adapters(folder / "base", folder / "adapters", 2)
    return folder


def recipe(inputs: str | Path, output: str | Path) -> dict:
    return {
        "base_model": f"{inputs}/base",
        "output": str(output),
        "adapters": {name: f"{inputs}/adapters/{name}" for name in ("a0", "a1")},
        "merges": [{"name": "m", "merge_method": "task_arithmetic", "export": "both"}],
    }


@pytest.fixture(scope="module")
def remote(s3, inputs) -> str:
    url = f"{s3.url}/inputs-{uuid.uuid4().hex[:8]}"
    store = open_store(url)
    for path in inputs.rglob("*"):
        if path.is_file():
            store.put_if_absent(str(path.relative_to(inputs)), path.read_bytes(), {})
    return url


def command(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line with every logger at DEBUG, and a folder of its own for all that it writes."""
    (tmp_path / "tmp").mkdir(exist_ok=True)
    places = {
        "TMPDIR": str(tmp_path / "tmp"),
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    return subprocess.run(
        [sys.executable, "-c", CLI, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "S3FS_LOGGING_LEVEL": "DEBUG", **TOKENS, **places, **environment},
        check=False,
    )


def leaks(text: str) -> list[str]:
    return [line[:200] for line in text.splitlines() if any(secret in line for secret in SECRETS)]


def files_with_secrets(folder: Path) -> list[str]:
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in SECRETS)
    ]


@pytest.mark.s3
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_good_credentials_are_in_nothing_that_is_printed_logged_or_written(s3, remote, tmp_path, engine):
    output = f"{s3.url}/out-{uuid.uuid4().hex[:8]}"
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(remote, output)))
    cache = ("--cache-dir", str(tmp_path / "cache"))
    calls = [["run", "recipe.json", "--engine", engine, "--json", *cache]]
    if engine == "local":
        calls += [
            ["verify", output, "--json", *cache],
            ["plan", "recipe.json", "--json"],
            ["gc", output, "--json"],
        ]
    for call in calls:
        done = command(tmp_path, *call)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "DEBUG:" in done.stderr
        assert leaks(done.stdout + done.stderr) == []
    store = open_store(output)
    names = [info.path for info in store.list()]
    assert "m/ray_merge/MANIFEST.json" in names
    for name in names:
        stored = store.read(name) + json.dumps(dict(store.metadata(name))).encode()
        assert [secret for secret in SECRETS if secret.encode() in stored] == [], name
    assert files_with_secrets(tmp_path) == []


@pytest.mark.s3
@pytest.mark.parametrize("bad", ["key", "token", "endpoint"])
def test_bad_credentials_are_refused_and_not_shown(s3, remote, tmp_path, bad):
    (tmp_path / "recipe.json").write_text(
        json.dumps(recipe(remote, f"{s3.url}/never-{uuid.uuid4().hex[:8]}"))
    )
    environment = {
        "key": {"AWS_SECRET_ACCESS_KEY": "wrong-key"},
        "token": {"AWS_SESSION_TOKEN": "geheim-session"},
        "endpoint": {"AWS_ENDPOINT_URL": s3.endpoint.replace("://", "://user:geheim@")},
    }[bad]
    done = command(tmp_path, "run", "recipe.json", "--engine", "local", "--json", **environment)
    assert done.returncode in (1, 2)
    assert done.stderr.strip().rpartition("\n")[2].startswith("ray-merge: ")
    assert leaks(done.stdout + done.stderr) == []
    assert files_with_secrets(tmp_path) == []


FIELDS = {
    "base_model": lambda r, url: r.update(base_model=url),
    "output": lambda r, url: r.update(output=url),
    "output with {id}": lambda r, url: r.update(output=url + "/{id}"),
    "store": lambda r, url: r.update(store=url, merges=[{"name": "m", "merge_method": "regmean"}]),
    "adapter": lambda r, url: r["adapters"].update(a0=url),
    "data": lambda r, url: (
        r["adapters"].update(a0={"path": r["adapters"]["a0"], "data": url}),
        r.update(merges=[{"name": "m", "merge_method": "regmean", "adapters": ["a0"]}]),
    ),
    "value of the wrong type": lambda r, url: r["adapters"].update(a0=[url]),
    "unknown key": lambda r, url: r.update({url: 1}),
    "name": lambda r, url: r["merges"][0].update(name=url),
    "method": lambda r, url: r["merges"][0].update(merge_method=url),
}
URLS = (
    f"s3://AKIAGEHEIM:{PASSWORD}@bucket/x",
    "s3://user:geheim@bucket/x",
    "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=geheim&X-Amz-Date=1",
    "hf://user:geheim@org/name",
    "gs://user:geheim@bucket/x",
)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("field", FIELDS)
def test_a_password_in_a_url_of_a_recipe_is_refused_and_not_shown(inputs, tmp_path, capfd, field, url):
    document = recipe(inputs, tmp_path / "out")
    FIELDS[field](document, url)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    for call in (
        ["plan", str(path)],
        ["run", str(path), "--engine", "local", "--cache-dir", str(tmp_path / "c")],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(call)
        printed = "".join(capfd.readouterr())
        if call[0] == "run":
            assert stopped.value.code == 2, printed
        assert leaks(printed) == []
    path.unlink()
    assert files_with_secrets(tmp_path) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "call",
    [
        ["plan", "URL/recipe.yaml"], ["verify", "URL"], ["gc", "URL"], ["inspect", "URL"], ["inspect", "URL", "--json"],
        ["run", "RECIPE", "--output", "URL"], ["run", "RECIPE", "--only", "URL"], ["run", "RECIPE", "--date", "URL"],
    ],
)  # fmt: skip
def test_a_password_in_an_argument_is_refused_and_not_shown(inputs, tmp_path, capfd, call, url):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(inputs, tmp_path / "out")))
    words = [word.replace("URL", url).replace("RECIPE", str(path)) for word in call]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = "".join(capfd.readouterr())
    assert stopped.value.code == (0 if call[-2] == "--date" and not stopped.value.code else 2), printed
    assert leaks(printed) == []


@pytest.mark.parametrize("place", ["s3://{}@bucket/x", "hf://{}@org/name", "http://{}@127.0.0.1:80/x"])
@pytest.mark.parametrize("secret", ["user:geheim", f"AKIA:{PASSWORD}", "user:ge@heim", ":geheim"])
def test_messages_lose_credentials_wherever_they_are_quoted(place, secret):
    url = place.format(secret)
    for text in (
        redacted(f"cannot read '{url}' now"),
        sentence(f"{url}\nand {url}"),
        str(Refusal(url)),
        shown(url),
        shown({"a": [url + "/" + "x" * 200]}),
        redact(url),
    ):
        assert "geheim" not in text
        assert "heim" not in text
    with pytest.raises(Refusal):
        open_store(url)


@pytest.mark.parametrize(
    "text",
    [
        "hf://gpt2@main/x", "hf://org/name@v1.0", "http://127.0.0.1:8333/a@b", "s3://bucket/part-?.jsonl",
        "mail a@b.c", "s3://b/a:b@c", "x" * MAX_SENTENCE,
    ],
)  # fmt: skip
def test_what_holds_no_credentials_is_told_as_it_is(text):
    assert sentence(text) == text


def test_a_longer_text_cannot_hide_a_password_at_the_cut():
    for length in range(1150, 1210):
        assert "geheim" not in sentence("x" * length + " s3://user:geheim@bucket " + "y" * 3000)
