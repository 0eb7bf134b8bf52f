import json
import re
from pathlib import Path

import fsspec
import pytest
from calibration_cases import BERT, VIT, bare_base, json_lines, load, make_base

from ray_merge.calibration.limits import limits_of
from ray_merge.errors import RecipeError, Refusal
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import open_store

ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 16,
    "max_position_embeddings": 8,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}


def ids(found):
    return [batch.input_ids.tolist() for batch in found.batches]


def texts(folder, *some):
    return json_lines(folder / "data.jsonl", [{"text": text} for text in some])


def refusal(base, path, **settings):
    with pytest.raises(Refusal) as caught:
        load(base, path, **settings)
    return str(caught.value)


def test_texts_become_tokens_of_the_bases_own_tokenizer_padded_on_the_right(tmp_path):
    found = load(
        make_base(tmp_path / "b"), texts(tmp_path, "one two three", "four", "six unheard"), batch_size=2
    )
    assert ids(found) == [[[1, 7, 2, 0], [1, 9, 3, 2]], [[1, 4, 5, 6, 2]]]
    first, second = found.batches
    assert first.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert second.token_type_ids.tolist() == [[0] * 5]
    assert (found.rows, found.tokens, found.row_numbers) == (3, 12, (1, 2, 0))
    assert first.pixel_values is None


@pytest.mark.parametrize(("max_length", "cut"), [(3, 2), (4, 2), (5, 1), (6, 0)])
def test_inputs_that_are_cut_are_counted(tmp_path, max_length, cut):
    base = make_base(tmp_path / "b")
    path = texts(tmp_path, "one", "one two three", "one two three four")  # and two special tokens
    assert load(base, path, max_length=max_length).cut == cut
    ready = [
        {"input_ids": [1, *range(4, 4 + count), 2, 0], "attention_mask": [1] * (count + 2) + [0]}
        for count in (1, 3, 4)
    ]
    rows = json_lines(tmp_path / "ids.jsonl", ready)
    assert load(base, rows, max_length=max_length).cut == cut


def test_pairs_are_pairs_and_their_second_text_has_its_own_type(tmp_path):
    rows = [{"text": "one", "text_b": "two three", "q": "four", "label": 1}]
    base, path = make_base(tmp_path / "b"), json_lines(tmp_path / "data.jsonl", rows)
    (both,) = load(base, path).batches
    assert (both.input_ids.tolist(), both.token_type_ids.tolist()) == (
        [[1, 4, 2, 5, 6, 2]],
        [[0, 0, 0, 1, 1, 1]],
    )
    assert ids(load(base, path, text="text")) == [[[1, 4, 2]]]
    assert ids(load(base, path, text=["q", "text"])) == [[[1, 7, 2, 4, 2]]]


def test_texts_are_cut_at_max_length(tmp_path):
    base = make_base(tmp_path / "b")
    assert ids(load(base, texts(tmp_path, "one two three four five six seven"), max_length=4)) == [
        [[1, 4, 5, 2]]
    ]
    pair = json_lines(tmp_path / "p.jsonl", [{"text": "one", "text_b": "two three four five six seven"}])
    assert ids(load(base, pair, max_length=6)) == [[[1, 4, 2, 5, 6, 2]]]
    assert "max_length = 1" in refusal(base, pair, max_length=1)


def test_a_text_longer_than_the_model_is_refused_only_where_it_really_is(tmp_path):
    base = make_base(tmp_path / "b")
    fits = texts(tmp_path, "one two three four five six")
    assert load(base, fits).tokens == 8
    message = refusal(base, texts(tmp_path, "one", "one two three four five six seven"))
    assert re.fullmatch(
        r"adapters\.mnli\.data: .*data\.jsonl: line 2: 9 tokens \(calibration\.max_length = 256\), but "
        r".*/b takes at most 8 \(max_position_embeddings = 8\); set calibration\.max_length to 8 or less",
        message,
    )
    assert load(base, tmp_path / "data.jsonl", max_length=8).tokens == 3 + 8


def test_positions_that_roberta_reserves_are_not_for_tokens(tmp_path):
    base = make_base(tmp_path / "b", ROBERTA, model_input_names=["input_ids", "attention_mask"])
    assert load(base, texts(tmp_path, "one two three four")).tokens == 6
    message = refusal(base, texts(tmp_path, "one two three four five"))
    assert "7 tokens" in message
    assert "takes at most 6 (max_position_embeddings = 8, of which 2 are reserved)" in message


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (BERT, (16, 8, 2, None, 0)),
        (ROBERTA, (16, 6, 1, None, 1)),
        ({"model_type": "gpt2", "vocab_size": 16, "n_positions": 5, "eos_token_id": 9}, (16, 5, None, None, 9)),
        ({"model_type": "llama", "eos_token_id": [7, 8], "pad_token_id": -1}, (16, 2048, None, None, 7)),
        ({"model_type": "llama", "eos_token_id": 16, "pad_token_id": None}, (16, 2048, None, None, 0)),
        (VIT, (16, None, None, (3, 2, 2), 0)),
        ({"model_type": "vit", "image_size": [2, 4], "num_channels": 1}, (16, None, None, (1, 2, 4), 0)),
        ({"model_type": "unheard_of", "max_position_embeddings": True, "image_size": "8"}, (16, None, None, None, 0)),
        (
            {
                "model_type": "clip",
                "text_config": {"model_type": "clip_text_model", "vocab_size": 12, "pad_token_id": 1},
                "vision_config": {"model_type": "clip_vision_model", "image_size": 4},
            },
            (12, 77, None, (3, 4, 4), 1),
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_bounds_of_a_base_are_those_of_its_config_or_of_its_embedding(tmp_path, config, want):
    # The files are a Llama's of 16 tokens: what a config leaves open is taken from them.
    limits = limits_of(bare_base(tmp_path / "b", config))
    assert (limits.vocabulary, limits.positions, limits.token_types, limits.image, limits.pad_id) == want


def test_ids_that_the_base_lacks_are_refused_with_their_number(tmp_path):
    base = make_base(tmp_path / "b", {**BERT, "vocab_size": 9})
    message = refusal(base, texts(tmp_path, "one two", "one eight"))
    assert "line 2: token id 11 at position 2, allowed are 0 to 8 in " in message
    assert message.endswith("is its tokenizer another model's?")


def test_a_pad_token_that_the_embedding_lacks_is_not_used(tmp_path):
    base = make_base(tmp_path / "b", {**BERT, "vocab_size": 9, "pad_token_id": 3}, pad_token="eight")
    assert ids(load(base, texts(tmp_path, "one two", "one"))) == [[[1, 4, 2, 0], [1, 4, 5, 2]]]
    other = make_base(tmp_path / "c", BERT, pad_token="eight")
    assert ids(load(other, texts(tmp_path, "one two", "one"))) == [[[1, 4, 2, 11], [1, 4, 5, 2]]]


def test_an_empty_text_is_an_input_where_it_gives_a_token(tmp_path):
    path = texts(tmp_path, "one", "")
    assert load(make_base(tmp_path / "b"), path).tokens == 5
    message = refusal(make_base(tmp_path / "c", special=False), path)
    assert "line 2: the text is empty and gives no token; remove the row" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"text": None},
            "line 2: column 'text' is null, expected text; remove the row, or name another column",
        ),
        ({"text": 7}, "line 2: column 'text' is 7 (int), expected text"),
        ({"text": ["a"]}, "line 2: column 'text' is ['a'] (list), expected text"),
        ({"label": "a"}, "line 2 has no column 'text'; it has 'label'"),
    ],
)
def test_what_is_no_text_is_refused_with_its_row(tmp_path, row, words):
    base, path = make_base(tmp_path / "b"), json_lines(tmp_path / "data.jsonl", [{"text": "one"}, row])
    assert words in refusal(base, path)


def test_a_base_without_a_tokenizer_is_refused_with_both_ways_out(tmp_path):
    base, path = bare_base(tmp_path / "b", BERT), texts(tmp_path, "one")
    message = refusal(base, path)
    assert message.startswith(
        f"adapters.mnli.data: the data are texts, and {tmp_path}/b holds no tokenizer; "
    )
    assert message.endswith(
        "put the tokenizer's files into the base's folder, or give data with a column input_ids"
    )
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    broken = read_checkpoint(open_store(str(tmp_path / "b")))
    assert "cannot load the tokenizer in" in refusal(broken, path)


def test_no_code_of_the_bases_folder_is_run(tmp_path):
    base = make_base(tmp_path / "b", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    (tmp_path / "b" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    assert ids(load(base, texts(tmp_path, "one"))) == [[[1, 4, 2]]]
    assert not (tmp_path / "ran").exists()


def test_a_remote_bases_tokenizer_goes_through_the_node_cache(tmp_path):
    make_base(tmp_path / "b")
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "b").iterdir():
        memory.pipe(f"/calibration_base/{file.name}", file.read_bytes())
    base = read_checkpoint(open_store("memory://calibration_base"))
    found = load_remote(base, texts(tmp_path, "one two"), tmp_path / "cache")
    assert ids(found) == [[[1, 4, 5, 2]]]
    kept = {json.loads(path.read_text())["path"] for path in (tmp_path / "cache").glob("base/*/entry.json")}
    assert kept == {"config.json", "tokenizer.json", "tokenizer_config.json"}  # and no weights


def load_remote(base, path, cache):
    from ray_merge.calibration import load_batches
    from ray_merge.recipe import Calibration, DataSource
    from ray_merge.storage.store import Stores

    return load_batches(DataSource(path=str(path)), Calibration(), "mnli", base, Path(cache), Stores())


def test_texts_for_a_model_of_images_are_refused(tmp_path):
    base = make_base(tmp_path / "b", VIT)
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"it holds tokens, but .* takes images of"):
        load(without_embedding(tmp_path / "b"), texts(tmp_path, "one"))
    assert base.config["model_type"] == "vit"


def without_embedding(folder):
    import torch
    from safetensors.torch import save_file

    save_file({"vit.layernorm.weight": torch.ones(8)}, folder / "model.safetensors")
    return read_checkpoint(open_store(str(folder)))
