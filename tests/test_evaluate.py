"""`ray-merge evaluate` on tiny models, against transformers and PEFT run by hand on the same rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel

import ray_merge
from ray_merge.algebra.metrics import accuracy, f1_macro, pearson
from ray_merge.cli import _exit_code
from ray_merge.errors import OutputConflict, RecipeError, Refusal
from zoo import lora, tiny_bert

LABELS = {"a": 2, "b": 3, "score": 1}
METRICS = {"a": "accuracy", "b": "f1", "score": "pearson"}
FUNCTIONS = {"a": accuracy, "b": f1_macro, "score": pearson}
ROWS = 30


def rows_of(task: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(ord(task[0]))
    made = []
    for index in range(ROWS):
        ids = torch.randint(1, 64, (2 + index % 3,), generator=generator).tolist()
        label = float(torch.randn((), generator=generator)) if task == "score" else index % LABELS[task]
        made.append({"input_ids": ids, "label": label})
    return made


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def classifier(base: Path, task: str) -> Any:
    torch.manual_seed(len(task))
    return BertForSequenceClassification.from_pretrained(base, num_labels=LABELS[task]).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base without a head, three adapters with one, their rows, and two merges; a third one was never made."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = tiny_bert(folder / "base")
    for seed, task in enumerate(LABELS):
        model = classifier(base, task)
        # Strong enough to change answers, which small random updates of a random model do not.
        lora(model, folder / task, ["value", "output.dense"], seed=seed, alpha=60, task_type="SEQ_CLS")
        write_rows(folder / f"{task}.jsonl", rows_of(task))
    made = ray_merge.run(recipe_of(folder), engine="local", cache_dir=folder / "cache")
    assert [one.name for one in made.merges] == ["pair", "exported"]
    return folder


def recipe_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "calibration": {"batch_size": 4},
        "adapters": {
            task: {
                "path": str(folder / task),
                "eval": {"path": str(folder / f"{task}.jsonl"), "metric": METRICS[task]},
            }
            for task in LABELS
        },
        "merges": [
            {"name": "pair", "merge_method": "task_arithmetic", "adapters": ["a", "b"]},
            {"name": "exported", "merge_method": "task_arithmetic", "export": "adapter"},
        ],
        **more,
    }


def with_missing(folder: Path) -> dict[str, Any]:
    recipe = recipe_of(folder)
    return {**recipe, "merges": [*recipe["merges"], {"name": "never", "merge_method": "linear"}]}


def score(folder: Path, recipe: dict[str, Any] | None = None, **more: Any) -> Any:
    given = recipe_of(folder) if recipe is None else recipe
    return ray_merge.evaluate(given, engine="local", workers=2, cache_dir=folder / "cache", **more)


@torch.no_grad()
def logits(model: Any, task: str) -> Tensor:
    """(N, C), rows of one length together: nothing is padded."""
    return torch.stack(by_length(rows_of(task), lambda ids: model(ids).logits))


def by_length(rows: list[dict[str, Any]], forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What a model makes of each row."""
    made: dict[int, Tensor] = {}
    for length in {len(row["input_ids"]) for row in rows}:
        some = [index for index, row in enumerate(rows) if len(row["input_ids"]) == length]
        made |= dict(
            zip(some, forward(torch.tensor([rows[index]["input_ids"] for index in some])), strict=True)
        )
    return [made[index] for index in range(len(rows))]


def by_hand(model: Any, task: str) -> float:
    answers = logits(model, task)
    labels = torch.tensor([row["label"] for row in rows_of(task)])
    return FUNCTIONS[task](answers[:, 0] if task == "score" else answers.argmax(dim=1), labels)


def with_head(folder: Path, base: Path, task: str) -> Any:
    """A body with the head of a task as a merge publishes it."""
    return ray_merge.load_head(classifier(base, task), folder / f"out/exported/heads/{task}.safetensors")


@pytest.fixture(scope="module")
def document(folder) -> dict[str, Any]:
    result = score(folder, hits=True, held_out=["score"])
    assert not result.missing
    assert not result.failed
    assert json.loads(Path(result.url).read_text()) == result.document
    return dict(result.document)


@pytest.mark.parametrize("task", LABELS)
def test_base_single_and_merges_score_as_in_transformers_and_peft(folder, document, task):
    single = PeftModel.from_pretrained(classifier(folder / "base", task), folder / task).eval()
    exported = PeftModel.from_pretrained(
        with_head(folder, folder / "base", task), folder / "out/exported/adapter"
    )
    wanted = {
        "base": by_hand(with_head(folder, folder / "base", task), task),
        f"single/{task}": by_hand(single, task),
        "exported": by_hand(exported.eval(), task),
        "pair": by_hand(with_head(folder, folder / "out/pair", task), task),
    }
    for model, value in wanted.items():
        row = document[model][task]
        assert row["metric"] == METRICS[task]
        assert row["value"] == pytest.approx(value, abs=1e-6 if task == "score" else 1e-12), model
        assert row["n"] == ROWS
        reference = wanted[f"single/{task}"]
        normalised = pytest.approx(100 * value / reference, rel=1e-4) if reference > 0 else None
        assert row["normalised"] == normalised
    assert len({round(one, 4) for one in wanted.values()}) > 2, "the case cannot tell the models apart"


def test_means_leave_out_what_was_held_out(document):
    assert document["held_out"] == ["score"]
    assert set(document["pair"]) == {"a", "b", "score"}
    own = [document["pair"][task]["normalised"] for task in ("a", "b")]
    assert document["means"]["pair"] == pytest.approx(sum(own) / 2)
    assert document["means"]["single/a"] == 100.0


def test_joint_hits_pool_the_labels_of_the_classifiers(folder, document):
    heads = {task: with_head(folder, folder / "out/pair", task) for task in ("a", "b")}
    found = document["hits"]["pair"]
    assert found["labels"] == 5
    for task, offset in (("a", 0), ("b", 2)):
        shares = torch.cat([logits(heads[one], task).softmax(dim=1) for one in ("a", "b")], dim=1)
        order = shares.argsort(dim=1, descending=True)
        right = torch.tensor([row["label"] for row in rows_of(task)]) + offset
        for k in (1, 3, 5):
            wanted = (order[:, :k] == right[:, None]).any(dim=1).double().mean()
            assert found["tasks"][task][f"hits@{k}"] == pytest.approx(float(wanted))
    assert found["mean"]["hits@5"] == 1.0
    assert found["mean"]["hits@1"] < found["mean"]["hits@3"] < 1.0
    assert "single/a" not in document["hits"]


def test_a_merge_that_is_not_complete_and_a_command_that_fails_end_in_one(folder, tmp_path, capfd):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(with_missing(folder)))
    arguments = [
        "evaluate",
        str(path),
        "--engine",
        "local",
        "--limit",
        "2",
        "--cache-dir",
        str(folder / "cache"),
    ]
    arguments += ["--only", "pair", "--only", "never"]
    command = "test -f {path}/config.json && echo seen {name}; test {name} = other"
    assert _exit_code([*arguments, "--command", command]) == 1
    out, err = capfd.readouterr()
    assert "never is not complete" in out
    assert "a accuracy" in out
    assert "f1 (macro)" in out
    last = err.splitlines()[-1]
    assert "1 merge(s) are not complete and were left out (never): run the recipe to finish them" in last
    assert "the command failed for 1 merge(s) (exit code of pair 1)" in last
    written = json.loads((folder / "out/ray_merge/evaluation.json").read_text())
    assert written["missing"] == ["never"]
    assert "never" not in written
    assert set(written["pair"]) == {"a", "b"}, "score is not held out, so nobody without it is scored on it"
    told = written["command"]["pair"]
    assert (told["exit_code"], told["stdout_tail"]) == (1, "seen pair\n")
    assert told["command"].startswith(f"test -f {folder}/out/pair/config.json")


def test_without_labelled_data_a_command_still_runs(folder):
    recipe = recipe_of(folder)
    for source in recipe["adapters"].values():
        del source["eval"]
    result = score(folder, recipe, only=["pair"], command="echo {name}")
    assert result.document["command"]["pair"]["stdout_tail"] == "pair\n"
    with pytest.raises(RecipeError, match=r"no adapter of the selected merges has eval.*add eval: \{path"):
        score(folder, recipe)


def changed(folder: Path, task: str, **evaluation: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(recipe_of(folder))
    recipe["adapters"][task]["eval"].update(evaluation)
    return recipe


def labelled(folder: Path, name: str, label: Any) -> str:
    return str(write_rows(folder / f"{name}.jsonl", [{"input_ids": [1, 2], "label": label}]))


@pytest.mark.parametrize(
    ("task", "evaluation", "message"),
    [
        (
            "a",
            {"metric": "pearson"},
            "metric pearson does not fit its head, which gives one class .*accuracy or",
        ),
        ("score", {"metric": "mcc"}, "does not fit its head, which gives one number .*pearson or spearman"),
        ("b", {"metric": "perplexity"}, "metric perplexity does not fit"),
        (
            "a",
            {"label": "labels"},
            r"adapters\.a\.eval: .* has no column 'labels'; it has .*did you mean 'label'",
        ),
        ("a", {"path": "/nowhere.jsonl"}, r"adapters\.a\.eval: /nowhere.jsonl does not exist"),
        ("b", {"path": 3}, r"adapters\.b\.eval: .*column 'label' holds 3, .* gives a class from 0 to 2"),
        ("b", {"path": 0.5}, r"holds 0\.5, but the task's head gives a class"),
        ("score", {"path": "high"}, "holds 'high', but the task's head gives a finite number"),
        ("a", {"path": None}, "column 'label' is None, expected a number or text"),
    ],
)
def test_bad_data_are_refused_before_anything_runs(folder, task, evaluation, message):
    if "path" in evaluation and not str(evaluation["path"]).startswith("/"):
        evaluation = {"path": labelled(folder, "bad", evaluation["path"])}
    recipe = changed(folder, task, **evaluation)
    with pytest.raises(Refusal, match=message):
        ray_merge.evaluate(recipe, address="no-such-cluster:1", cache_dir=folder / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": ["scor"]}, "--held-out scor: no such adapter.*'score'"),
        ({"held_out": ["a"]}, r"--held-out a: none of the 2 merge\(s\) is without a"),
        ({"command": "lm_eval"}, r"holds neither \{path\} nor \{name\}"),
        ({"command": "ls {path}"}, "merge 'exported' is exported as an adapter"),
    ],
)
def test_options_that_mean_nothing_are_refused(folder, options, message):
    with pytest.raises(Refusal, match=message):
        score(folder, **options)


def test_a_text_head_classifies_by_cosines(folder):
    model = BertModel.from_pretrained(folder / "base")
    lora(model, folder / "image", ["value"], seed=5, alpha=60, task_type="FEATURE_EXTRACTION")
    texts_CD = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    save_file({"texts": texts_CD}, folder / "texts.safetensors")
    recipe = recipe_of(folder, merges=[])
    recipe["adapters"] = {
        "image": {
            "path": str(folder / "image"),
            "head": {"path": str(folder / "texts.safetensors"), "logit_scale": 100.0},
            "eval": {"path": str(folder / "b.jsonl"), "metric": "accuracy"},
        }
    }
    found = score(folder, recipe).document
    base = BertModel.from_pretrained(folder / "base").eval()
    single = PeftModel.from_pretrained(BertModel.from_pretrained(folder / "base"), folder / "image").eval()
    for name, one in (("base", base), ("single/image", single)):
        with torch.no_grad():
            embeds = torch.stack(by_length(rows_of("b"), lambda ids, one=one: one(ids).pooler_output))
        cosines = torch.cosine_similarity(embeds[:, None], texts_CD[None], dim=-1)
        labels = torch.tensor([row["label"] for row in rows_of("b")])
        assert found[name]["image"]["value"] == pytest.approx(accuracy(cosines.argmax(dim=1), labels)), name


def test_hits_need_two_classifiers(folder):
    recipe = recipe_of(folder)
    del recipe["adapters"]["b"]["eval"]
    with pytest.raises(Refusal, match="--hits joins the labels of several classification tasks"):
        score(folder, recipe, hits=True)


def test_labels_may_be_spelled_and_a_merge_may_not_be_called_base(folder):
    path = write_rows(folder / "spelled.jsonl", [{"input_ids": [1, 2], "label": one} for one in ("0", "1.0")])
    recipe = {**changed(folder, "a", path=str(path)), "merges": []}
    recipe["adapters"] = {"a": recipe["adapters"]["a"]}
    assert score(folder, recipe).document["base"]["a"]["n"] == 2
    recipe = recipe_of(folder, merges=[{"name": "base", "merge_method": "linear"}])
    with pytest.raises(RecipeError, match="a merge cannot be named 'base': "):
        score(folder, recipe)


def test_another_merge_in_the_place_of_one_is_refused(folder):
    recipe = recipe_of(folder)
    recipe["merges"][0]["parameters"] = {"lambda": 0.5}
    with pytest.raises(OutputConflict, match="holds merge id"):
        score(folder, recipe)


def test_a_head_that_is_nowhere_is_refused(folder):
    lora(BertModel.from_pretrained(folder / "base"), folder / "bare", ["query"], seed=9)
    recipe = recipe_of(folder, merges=[])
    recipe["adapters"]["bare"] = {
        "path": str(folder / "bare"),
        "task": "classification",
        "eval": {"path": str(folder / "a.jsonl"), "metric": "accuracy"},
    }
    with pytest.raises(RecipeError, match=r"adapters\.bare: neither .*/bare nor the base holds classifier"):
        score(folder, recipe)
