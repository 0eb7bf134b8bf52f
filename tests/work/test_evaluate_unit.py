"""The worker of `evaluate`: its shelf of models, and what it makes of logits, against plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from ray_merge.calibration.tokens import Tokenizer
from ray_merge.models.stage_calls import StageOutput
from ray_merge.recipe import DataSource
from ray_merge.recipe.model import Evaluation
from ray_merge.spec import Adapter
from ray_merge.work.evaluate_answers import LOGIT_BYTES, continued, groups, negative_log_likelihood, says
from ray_merge.work.evaluate_heads import Heads, chained, pooled, remembered
from ray_merge.work.evaluate_job import ScoredTask, head_alone, without_head
from ray_merge.work.evaluate_rows import _wanted
from ray_merge.work.evaluate_unit import Shelf
from tiny import entry


class Loads:
    """Notes what is loaded; each load is a thing of its own."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str) -> Any:
        def load() -> Any:
            self.names.append(name)
            return object()

        return load


def test_a_shelf_keeps_the_models_that_were_used_last():
    loads, shelf = Loads(), Shelf(2)
    for name in ("a", "b", "a", "c", "a", "b"):
        with shelf.take((name, "X"), loads(name)):
            pass
    assert loads.names == ["a", "b", "c", "b"]


def test_two_users_of_one_model_get_one_each_and_room_is_kept():
    loads, shelf = Loads(), Shelf(2)
    with shelf.take(("a", "X"), loads("a")) as one, shelf.take(("a", "X"), loads("a")) as other:
        assert one is not other
    with shelf.take(("b", "X"), loads("b")), shelf.take(("a", "X"), loads("a")):
        pass
    assert loads.names == ["a", "a", "b"]
    with shelf.take(("a", "Y"), loads("a of another class")):
        pass
    assert loads.names[-1] == "a of another class"


def test_a_model_that_cannot_be_loaded_takes_no_room():
    shelf = Shelf(1)

    def fails() -> Any:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), shelf.take(("a", "X"), fails):
        pass
    with shelf.take(("a", "X"), lambda: "loaded") as held:  # type: ignore[arg-type, return-value]
        assert held == "loaded"


VOCABULARY = 6


def batch_of(rows: list[list[int]]) -> dict[str, Any]:
    longest = max(map(len, rows))
    ids, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def counting(batch: Any) -> torch.Tensor:
    """A model that goes on with the number of tokens so far plus the last of them, modulo the vocabulary."""
    ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
    assert bool(mask.any(dim=0).all()), "a column of padding alone"
    return functional.one_hot((ids + mask.cumsum(dim=1)) % VOCABULARY, VOCABULARY).float()


def by_hand(row: list[int], n_tokens: int, end: int) -> list[int]:
    row, n_before = list(row), len(row)
    while len(row) < n_before + n_tokens and (following := (row[-1] + len(row)) % VOCABULARY) != end:
        row.append(following)
    return row[n_before:]


def test_rows_of_any_length_go_on_as_each_alone():
    rows, n_tokens = [[1], [2, 5, 1], [3, 3], [4, 1, 5, 2]], [3, 5, 1, 4]
    batch = batch_of(rows)
    before = batch["input_ids"].copy()
    for end in range(VOCABULARY):
        said = continued(counting, batch, n_tokens, frozenset({end}))
        assert said == [by_hand(row, n, end) for row, n in zip(rows, n_tokens, strict=True)]
    assert (batch["input_ids"] == before).all()


def test_the_likelihood_of_texts_is_torch_s_and_padding_counts_nothing():
    rows = [[1, 2, 3, 4], [5], [2, 2, 1]]
    logits = torch.randn(3, 4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    nats, tokens = negative_log_likelihood(logits, batch_of(rows))
    wanted = sum(
        float(functional.cross_entropy(one[: len(row) - 1].double(), torch.tensor(row[1:]), reduction="sum"))
        for one, row in zip(logits, rows, strict=True)
        if len(row) > 1
    )
    assert tokens == 5
    assert nats == pytest.approx(wanted, rel=1e-12)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Byte-level BPE without a blank in front: "12" is one token, and " 12" two."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    made.train_from_iterator(["12\n12\n12\nyes\nyes\n", "a yes, a no; yes"], trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=made), None)


def answer(bpe: Tokenizer, label: str | int, text: str) -> bool:
    """What a model that says `text` and then full stops gets for it, token by token."""
    ids = bpe.call(text + " ." * 9)["input_ids"]
    size = len(bpe.call)

    def scripted(batch: Any) -> torch.Tensor:
        n_said = batch["attention_mask"].sum() - 2  # behind a prompt of two tokens
        return functional.one_hot(torch.tensor(ids[n_said]), size).float().expand(1, int(n_said) + 2, size)

    wanted = _wanted(label, bpe, "here")
    (said,) = continued(scripted, batch_of([[1, 2]]), [wanted.n_tokens], frozenset())
    assert len(said) == wanted.n_tokens
    return says(said, wanted.text, bpe.call.decode)


def test_blanks_change_tokens_here(bpe):
    counts = [len(bpe.call(text)["input_ids"]) for text in ("12", " 12", "123", "yes", " yes")]
    assert counts == [1, 2, 2, 1, 1]


@pytest.mark.parametrize("label", ["12", " 12 ", 12])
@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("12", True), (" 12", True), ("\n12", True), ("12.", True), ("12, 3", True), (" 12 3", True), ("12\n", True),
        ("123", False), ("12a", False), ("1 2", False), ("1", False), ("312", False), ("no 12", False),
    ],
)  # fmt: skip
def test_an_answer_is_right_that_begins_with_the_label_and_ends_its_word(bpe, label, text, right):
    assert answer(bpe, label, text) == right


def test_no_answer_is_no_label(bpe):
    assert not says([], "12", bpe.call.decode)


@pytest.mark.parametrize(
    ("label", "text", "right"),
    [("yes", " yes.", True), ("yes", "yesa", False), ("yes no", "yes no", True), ("a.", "a.b", True),
     ("\u00e9t\u00e9", " \u00e9t\u00e9", True), ("\u00e9", "\u00e9t\u00e9", False)],
)  # fmt: skip
def test_labels_of_several_tokens(bpe, label, text, right):
    assert answer(bpe, label, text) == right


def test_groups_hold_every_row_once_and_are_cut_to_their_longest():
    rows = [[1] * length for length in (1, 2, 2, 5, 7)]
    vocabulary = LOGIT_BYTES // (4 * 7 * 2)  # two rows of the longest
    found = list(groups(batch_of(rows), vocabulary))
    assert [some["input_ids"].shape for _, some in found] == [(2, 2), (2, 5), (1, 7)]
    assert [row for span, _ in found for row in range(5)[span]] == [0, 1, 2, 3, 4]
    assert len(list(groups(batch_of(rows), vocabulary * 100))) == 5


def test_a_change_is_made_once_and_changes_follow_each_other():
    made: list[str] = []

    def double(name: str, weight: torch.Tensor) -> torch.Tensor:
        made.append(name)
        return weight * 2 if name == "w" else weight

    def add(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight + 1 if name in ("w", "head") else weight

    both = chained(remembered(double), add)
    assert both is not None
    one = torch.ones(())
    assert [float(both(name, one)) for name in ("w", "w", "head")] == [3.0, 3.0, 2.0]
    assert both("other", one) is one
    assert made.count("w") == 1
    assert chained(None, add) is add
    assert chained(double, None) is double
    assert chained(None, None) is None


def test_an_adapter_is_its_body_and_its_head():
    head, table = entry("classifier.weight"), entry("embed.weight", 8)
    head = type(head)(head.name, head.dtype, head.shape, head.file, 100, 104)
    adapter = Adapter(
        name="a", url="/a", config={}, factors={"q": None}, modules={}, layouts={}, heads=(head,), tables=frozenset(),
        replaced={"score.weight": head, "embed.weight": table}, tokens={}, same=(), ignored={}, names="", file="f",
        file_bytes=1, file_version="1",
    )  # fmt: skip
    body, alone = without_head(adapter), head_alone(adapter)
    assert (list(body.factors), body.heads, list(body.replaced)) == (["q"], (), ["embed.weight"])
    assert (list(alone.factors), alone.heads, list(alone.replaced)) == ([], (head,), ["score.weight"])


def task_with_head(name: str, n_outputs: int, *layers: str) -> ScoredTask:
    heads = tuple(entry(f"{layer}.{leaf}") for layer in layers for leaf in ("weight", "bias"))
    adapter = Adapter(
        name=name, url="/a", config={}, factors={}, modules={}, layouts={}, heads=heads, tables=frozenset(),
        replaced={}, tokens={}, same=(), ignored={}, names="", file="f", file_bytes=1, file_version="1",
    )  # fmt: skip
    return ScoredTask(
        name=name, evaluation=Evaluation(path="/d.jsonl", metric="accuracy"), source=DataSource(path="/d.jsonl"),
        class_name="X", n_blocks=1, answer="classification", n_outputs=n_outputs, label_ids={}, adapter=adapter,
    )  # fmt: skip


@pytest.mark.parametrize(("layers", "passes"), [(("score",), 1), (("score", "score.dense"), 2)])
def test_heads_of_one_layer_answer_in_one_pass_and_others_one_by_one(layers, passes):
    generator = torch.Generator().manual_seed(0)
    x_BH = torch.randn(4, 5, generator=generator)
    weights = {"a": torch.randn(2, 5, generator=generator), "b": torch.randn(3, 5, generator=generator)}
    tasks = [task_with_head(name, len(weight), *layers) for name, weight in weights.items()]
    ran: list[int] = []

    def change(name: str) -> Any:
        return lambda parameter, weight: weights[name] if parameter == "score.weight" else weight

    def forward(altered: Any) -> StageOutput:
        ran.append(1)
        return StageOutput(logits=x_BH @ altered("score.weight", torch.full((2, 5), torch.nan)).T)

    answers = Heads(tasks, None, {name: change(name) for name in weights}, {}).answers(forward)
    assert len(ran) == passes
    for name, weight in weights.items():
        assert torch.allclose(answers[name], x_BH @ weight.T, atol=1e-6)
    shares_BP = pooled({name: one.double() for name, one in answers.items()}, tasks)
    assert shares_BP.shape == (4, 5)
    assert torch.allclose(shares_BP[:, :2].sum(dim=1), torch.ones(4).double())
