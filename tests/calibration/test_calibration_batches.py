import dataclasses
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from calibration_cases import BERT, VIT, bare_base, json_lines, load, make_base, parquet

from ray_merge.calibration import labels_of
from ray_merge.calibration.batches import content_sha256
from ray_merge.errors import Refusal
from ray_merge.recipe.model import Evaluation
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import Stores, open_store


@pytest.fixture
def bert(tmp_path):
    return bare_base(tmp_path / "bert", BERT)


@pytest.fixture
def vit(tmp_path):
    """Images of 3 x 2 x 2; no embedding of tokens."""
    from safetensors.torch import save_file

    bare_base(tmp_path / "vit", VIT)
    save_file({"vit.layernorm.weight": torch.ones(8)}, tmp_path / "vit" / "model.safetensors")
    return read_checkpoint(open_store(str(tmp_path / "vit")))


def refusal(base, path, **settings):
    with pytest.raises(Refusal) as caught:
        load(base, path, **settings)
    return str(caught.value)


def ids_file(folder, **columns):
    return json_lines(
        folder / "ids.jsonl",
        [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    )


def test_ready_token_ids_need_no_tokenizer(bert, tmp_path):
    path = ids_file(tmp_path, input_ids=[[4, 5, 6], [7]], label=["x", None])
    (batch,) = load(bert, path).batches
    assert batch.input_ids.tolist() == [[7, 0, 0], [4, 5, 6]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.token_type_ids is None
    assert {batch.input_ids.dtype, batch.attention_mask.dtype} == {torch.int64}


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int64()), pa.list_(pa.uint8()), pa.large_list(pa.int32()), pa.list_(pa.int16(), 3)],
    ids=str,
)
def test_token_ids_of_every_integer_type_are_the_same(bert, tmp_path, kind):
    rows = [[4, 5, 6], [6, 5, 4]]
    found = load(bert, parquet(tmp_path / "a.parquet", {"input_ids": pa.array(rows, kind)}))
    assert found.batches[0].input_ids.tolist() == rows
    assert found.sha256 == load(bert, ids_file(tmp_path, input_ids=rows)).sha256


def test_padding_in_the_data_is_dropped_on_both_sides_and_holes_stay_masked(bert, tmp_path):
    path = ids_file(
        tmp_path,
        input_ids=[[0, 0, 4, 5], [6, 7, 8, 0], [4, 9, 5, 0]],
        attention_mask=[[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 0]],
        token_type_ids=[[0, 0, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]],
    )
    found = load(bert, path)
    (batch,) = found.batches
    assert batch.input_ids.tolist() == [[4, 5, 0], [6, 7, 8], [4, 9, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 1]]
    assert batch.token_type_ids.tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 1]]
    assert (found.rows, found.tokens) == (3, 7)


def test_ready_token_ids_are_cut_at_max_length_and_refused_beyond_the_model(bert, tmp_path):
    path = ids_file(tmp_path, input_ids=[[4], list(range(4, 13))])
    assert load(bert, path, max_length=8).tokens == 9
    assert "line 2: 9 tokens (calibration.max_length = 9), but" in refusal(bert, path, max_length=9)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"input_ids": [99]}, "token id 99 at position 0, allowed are 0 to 15 in "),
        ({"input_ids": [1, -1]}, "token id -1 at position 1, allowed are 0 to 15 in "),
        ({"input_ids": [2**70]}, "input_ids is values of type object, expected a list of whole numbers"),
        ({"input_ids": [2**63]}, "token id 9223372036854775808 at position 0"),
        ({"input_ids": []}, "input_ids is empty; remove the row"),
        ({"input_ids": None}, "input_ids is None, expected a list of whole numbers"),
        ({"input_ids": 3}, "input_ids is 3, expected"),
        ({"input_ids": "one"}, "input_ids is 'one', expected"),
        ({"input_ids": [1.5]}, "input_ids is values of type float64, expected"),
        ({"input_ids": [True]}, "input_ids is values of type bool, expected"),
        ({"input_ids": ["a"]}, "input_ids is values of type <U1, expected"),
        ({"input_ids": [[1], [2]]}, "input_ids has shape (2, 1), expected"),
        ({"input_ids": [[1], [2, 3]]}, "input_ids is ragged, expected"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask has 1 values and input_ids has 2"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "attention_mask holds 2, expected 0 (padding) or 1"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "attention_mask is all 0; remove the row"),
        ({"input_ids": [1, 2], "token_type_ids": [0, 2]}, "token type 2 at position 1, allowed are 0 to 1 in "),
        ({"input_ids": [1, 2], "token_type_ids": [0, None]}, "token_type_ids is values of type object"),
    ],
)  # fmt: skip
def test_token_ids_that_the_base_cannot_take_are_refused_with_their_row(bert, tmp_path, columns, words):
    good = {name: [1] for name in columns}
    message = refusal(bert, json_lines(tmp_path / "ids.jsonl", [good, columns]))
    assert message.startswith(f"adapters.mnli.data: {tmp_path}/ids.jsonl: line 2: ")
    assert words in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "input_ids": [1]}, "has both 'text' and 'input_ids'; write data: {path: ..., text: [text]}"),
        ({"text": "a", "pixel_values": [1]}, "has both 'text' and 'pixel_values'"),
        ({"sentence": "a", "label": 1}, "no column 'text', 'input_ids' or 'pixel_values'; it has 'sentence', 'label'"),
        ({"pixel_values": [[[1.0]]]}, "it is an image (pixel_values), but "),
    ],
)  # fmt: skip
def test_columns_that_do_not_say_what_is_meant_are_refused(bert, tmp_path, row, words):
    assert words in refusal(bert, json_lines(tmp_path / "a.jsonl", [row]))


def test_a_named_text_column_is_nearest_to_what_was_meant(bert, tmp_path):
    path = json_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    assert "has no column 'qestion'; it has 'question', 'answer'; did you mean 'question'?" in refusal(
        bert, path, text="qestion"
    )


def test_images_come_nested_or_flat(vit, tmp_path):
    images = np.arange(36, dtype=np.float32).reshape(3, 3, 2, 2)
    nested = parquet(tmp_path / "a.parquet", {"pixel_values": images.tolist()})
    flat = parquet(tmp_path / "b.parquet", {"pixel_values": images.reshape(3, 12).tolist()})
    whole = json_lines(
        tmp_path / "c.jsonl", [{"pixel_values": image.astype(int).tolist()} for image in images]
    )
    found = [load(vit, path, batch_size=2) for path in (nested, flat, whole)]
    assert [batch.pixel_values.shape for batch in found[0].batches] == [(2, 3, 2, 2), (1, 3, 2, 2)]
    np.testing.assert_array_equal(torch.cat([batch.pixel_values for batch in found[0].batches]), images)
    assert len({one.sha256 for one in found}) == 1
    assert (found[0].rows, found[0].tokens, found[0].batches[0].input_ids) == (3, 0, None)
    assert found[0].batches[0].pixel_values.dtype == torch.float32


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((3, 2, 3)).tolist(), "pixel_values has shape (3, 2, 3), expected (3, 2, 2) or as many numbers"),
        (np.zeros(13).tolist(), "pixel_values has shape (13,), expected (3, 2, 2)"),
        ([], "pixel_values has shape (0,), expected"),
        ([0.0] * 11 + [float("nan")], "pixel_values holds NaN or Inf; remove the row"),
        ([0.0] * 11 + [1e300], "pixel_values holds NaN or Inf"),
        ([0.0] * 11 + [None], "pixel_values is values of type object, expected numbers"),
        (["a"], "pixel_values is values of type <U1, expected numbers"),
        ([[1.0], [1.0, 2.0]], "pixel_values is ragged, expected numbers"),
    ],
)  # fmt: skip
def test_images_of_another_shape_are_refused_with_their_row(vit, tmp_path, pixels, words):
    path = json_lines(tmp_path / "a.jsonl", [{"pixel_values": [0.5] * 12}, {"pixel_values": pixels}])
    message = refusal(vit, path)
    assert "a.jsonl: line 2: " in message
    assert words in message


def test_images_without_a_shape_in_the_config_must_be_alike(tmp_path):
    base = bare_base(tmp_path / "b", {"model_type": "unheard_of", "vocab_size": 0})
    base = dataclasses.replace(base, tensors={})
    path = json_lines(tmp_path / "a.jsonl", [{"pixel_values": np.zeros((1, 2, 2)).tolist()}] * 2)
    assert load(base, path).batches[0].pixel_values.shape == (2, 1, 2, 2)
    json_lines(path, [{"pixel_values": np.zeros((1, 2, n)).tolist()} for n in (2, 3)])
    assert "line 2: pixel_values has shape (1, 2, 3), those before it (1, 2, 2)" in refusal(base, path)
    json_lines(path, [{"pixel_values": [1.0, 2.0]}])
    assert "has shape (2,), expected three axes, C x H x W" in refusal(base, path)


def test_tokens_for_a_model_of_images_are_refused(vit, tmp_path):
    assert "it holds tokens, but " in refusal(vit, ids_file(tmp_path, input_ids=[[1]]))


def test_batches_are_ordered_by_length_and_name_the_rows_they_came_from(bert, tmp_path):
    lengths = [5, 1, 3, 3, 2, 8, 1]
    path = ids_file(tmp_path, input_ids=[[row + 1] * n for row, n in enumerate(lengths)])
    found = load(bert, path, batch_size=3)
    assert found.row_numbers == (1, 6, 4, 2, 3, 0, 5)
    assert [tuple(batch.input_ids.shape) for batch in found.batches] == [(3, 2), (3, 5), (1, 8)]
    firsts = [int(row[0]) - 1 for batch in found.batches for row in batch.input_ids]
    assert tuple(firsts) == found.row_numbers
    assert found.tokens == sum(lengths) == sum(int(batch.attention_mask.sum()) for batch in found.batches)


def test_a_sample_depends_on_seed_and_task_and_on_nothing_else(bert, tmp_path):
    path = ids_file(tmp_path, input_ids=[[row % 16, row // 16] for row in range(200)])
    first = load(bert, path, samples=20)
    assert first.rows == len(set(first.row_numbers)) == 20
    assert load(bert, path, samples=20) is not first
    assert load(bert, path, samples=20).sha256 == first.sha256
    others = [
        load(bert, path, samples=20, seed=1),
        load(bert, path, samples=20, task="stsb"),
        load(bert, path, samples=19),
    ]
    assert len({first.sha256, *(one.sha256 for one in others)}) == 4
    assert load(bert, path, samples=500).rows == 200
    assert max(load(bert, path, samples=20, limit=30).row_numbers) < 30


def test_the_digest_sees_every_tensor_and_where_batches_end(bert, tmp_path):
    path = ids_file(
        tmp_path, input_ids=[[1, 2], [3, 4]], attention_mask=[[1, 1], [1, 1]], token_type_ids=[[0, 0], [0, 1]]
    )
    found = load(bert, path)
    assert content_sha256(found.batches) == found.sha256
    (batch,) = found.batches
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        changed = getattr(batch, name).clone()
        changed[1, 0] += 1
        assert content_sha256([dataclasses.replace(batch, **{name: changed})]) != found.sha256
        assert content_sha256([dataclasses.replace(batch, **{name: None})]) != found.sha256
    assert load(bert, path, batch_size=1).sha256 != found.sha256


def test_labels_of_the_same_file_line_up_with_the_inputs(bert, tmp_path):
    path = ids_file(tmp_path, input_ids=[[n] * n for n in (5, 2, 7, 1)], label=[50, 20, 70, 10])
    found = load(bert, path)
    labels = labels_of(Evaluation(path=str(path), metric="accuracy"), found.row_numbers, "mnli", Stores())
    assert (
        [int(row[0]) * 10 for batch in found.batches for row in batch.input_ids] == labels == [10, 20, 50, 70]
    )


def test_planning_loads_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "pyarrow", "ray")
    code = f"import sys, ray_merge.calibration; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_batches_are_the_same_on_every_machine(bert, tmp_path):
    path = ids_file(tmp_path, input_ids=[[row % 16, row // 16] for row in range(200)])
    digest = load(bert, path, samples=20).sha256
    assert digest == "601e450bdf7faf8c97dbb47471ddfcf106b15f8f45ec061026b4e1bf37100b44"


def test_a_text_base_gives_the_same_digest_whatever_the_format(tmp_path):
    base = make_base(tmp_path / "b")
    rows = ["one two", "three", "four five six"]
    (tmp_path / "a.txt").write_text("\n".join(rows))
    paths = [
        tmp_path / "a.txt",
        parquet(tmp_path / "a.parquet", {"text": rows}),
        json_lines(tmp_path / "a.jsonl", [{"text": row} for row in rows]),
    ]
    assert len({load(base, path).sha256 for path in paths}) == 1
