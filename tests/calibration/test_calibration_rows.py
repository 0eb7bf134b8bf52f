import hashlib
import json
import re

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from calibration_cases import json_lines, open_rows, parquet, values

from ray_merge.calibration import data_identity, labels_of, line_rows
from ray_merge.calibration.rows import sample_rows
from ray_merge.errors import RecipeError, StoreError
from ray_merge.recipe import DataSource
from ray_merge.recipe.model import Evaluation
from ray_merge.storage.digest import DigestCache
from ray_merge.storage.store import Stores

SAMPLE = [171, 418, 431, 502, 808, 988]
TEXTS = ["one", 'two, "three"', "four\u00e9", "  five", "six"]


def refusal(path, columns=("text",), limit=None):
    with pytest.raises(RecipeError) as caught:
        values(path, list(columns), limit)
    return str(caught.value)


def write(folder, name):
    """TEXTS in the format that the name says."""
    path = folder / name
    if name.endswith(".parquet"):
        return parquet(path, {"text": TEXTS, "label": range(5)}, row_group_size=2)
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return json_lines(path, [{"text": text, "label": i} for i, text in enumerate(TEXTS)])
    lines = {
        "txt": "\r\n\n".join(TEXTS),
        "csv": '\ufefftext,label\none,1\n"two, ""three""",2\nfour\u00e9,\n  five,4\nsix,5',
    }
    path.write_bytes(lines[name.rpartition(".")[2]].encode())
    return path


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.ndjson", "a.json", "a.txt", "a.csv", "B.PARQUET"]
)
def test_every_format_gives_the_same_texts_in_file_order(tmp_path, name):
    path = write(tmp_path, name.lower()).rename(tmp_path / name)
    assert values(path, ["text"]) == [[text] for text in TEXTS]
    assert values(path, ["text"], limit=3) == [[text] for text in TEXTS[:3]]
    rows = open_rows(path)
    assert [row.values["text"] for row in rows.take([1, 4], ["text"])] == [TEXTS[1], TEXTS[4]]
    assert "text" in rows.columns


def test_a_file_a_folder_and_a_glob_name_data_and_row_numbers_are_each_files_own(tmp_path):
    for index, name in enumerate(
        ("x/b.jsonl", "x/a.jsonl", "x/deep/c.jsonl", "x/.hidden/d.jsonl", "x/[e].jsonl")
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        json_lines(tmp_path / name, [{"text": f"{index}{row}"} for row in range(2)])
    (tmp_path / "x" / "_SUCCESS").write_text("")
    (tmp_path / "x" / "README.md").write_text("no data")
    found = {
        pattern: [row[0] for row in values(tmp_path / pattern, ["text"])]
        for pattern in ("x", "x/", "x/*.jsonl", "x/[ab].jsonl", "*/deep/?.jsonl", "x/[e].jsonl", "x/b.jsonl")
    }
    assert found["x"] == found["x/"] == ["40", "41", "10", "11", "00", "01", "20", "21"]
    assert found["x/*.jsonl"] == ["40", "41", "10", "11", "00", "01"]
    assert found["x/[ab].jsonl"] == ["10", "11", "00", "01"]
    assert found["*/deep/?.jsonl"] == ["20", "21"]
    assert found["x/[e].jsonl"] == ["40", "41"]  # a file of that very name goes before the pattern
    assert values(tmp_path / "x", ["text"], limit=3) == [["40"], ["41"], ["10"]]
    places = [row.place for row in open_rows(tmp_path / "x").take([1, 2], ["text"])]
    assert [place.removeprefix(f"here: {tmp_path}/x/") for place in places] == [
        "[e].jsonl: line 2",
        "a.jsonl: line 1",
    ]


def test_relative_paths_and_file_urls_are_read(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    write(tmp_path / "a b", "x.txt")
    monkeypatch.chdir(tmp_path / "a b")
    for path in ("x.txt", ".", "*.txt", f"file://{tmp_path}/a%20b/x.txt", "../a b"):
        assert len(values(path, ["text"])) == 5, path


def test_remote_files_are_read_by_range(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("a.parquet", "a.jsonl", "a.txt", "a.csv"):
        memory.pipe(f"/calibration_rows/{name}", write(tmp_path, name).read_bytes())
        assert values(f"memory://calibration_rows/{name}", ["text"]) == [[text] for text in TEXTS]
    assert len(values("memory://calibration_rows/*.txt", ["text"])) == 5


def test_lines_longer_than_a_block_and_cut_by_blocks_are_whole(tmp_path, monkeypatch):
    texts = ["x" * 50, "y", "z" * 17, "", "w" * 33]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    for block in (1, 7, 16, 18, 1000):
        monkeypatch.setattr(line_rows, "BLOCK_BYTES", block)
        rows = list(open_rows(tmp_path / "a.txt").take(range(4), ["text"]))
        assert [row.values["text"] for row in rows] == [text for text in texts if text]
        assert rows[3].place.endswith("line 5")
    monkeypatch.setattr(line_rows, "MAX_LINE_BYTES", 40)
    monkeypatch.setattr(line_rows, "BLOCK_BYTES", 16)
    assert "line 1 is longer than 40 bytes" in refusal(tmp_path / "a.txt")


def test_a_broken_label_column_does_not_matter(tmp_path):
    path = parquet(
        tmp_path / "a.parquet", {"label": [7] * 1000, "text": ["one"] * 1000}, compression="snappy"
    )
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    assert len(values(path, ["text"])) == 1000
    assert "cannot be read" in refusal(path, ["label"])
    mixed = json_lines(
        tmp_path / "a.jsonl", [{"text": "one", "label": 3}, {"text": "two", "label": [None]}, {"text": "six"}]
    )
    assert values(mixed, ["text"]) == [["one"], ["two"], ["six"]]


def test_only_what_is_asked_for_is_read_of_a_parquet_file(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).bytes(400_000)
    texts = [noise[i * 4000 : i * 4000 + 4000].hex() for i in range(100)]
    path = parquet(
        tmp_path / "a.parquet", {"text": texts, "other": texts}, row_group_size=10, compression="none"
    )
    read = []
    rows = open_rows(path)
    store = rows._tables[0][0].store
    whole = type(store).read
    monkeypatch.setattr(type(store), "read", lambda *a: read.append(len(whole(*a))) or whole(*a))
    assert [row.values["text"] for row in rows.take([41, 43], ["text"])] == [texts[41], texts[43]]
    assert sum(read) < path.stat().st_size / 15  # one column of one row group of ten


FIXED = pa.list_(pa.list_(pa.list_(pa.float32(), 2), 3), 2)
NESTED = pa.list_(pa.list_(pa.list_(pa.float32())))
LARGE = pa.large_list(pa.large_list(pa.large_list(pa.float64())))


@pytest.mark.parametrize("kind", [FIXED, NESTED, LARGE], ids=str)
def test_nested_lists_of_parquet_become_arrays(tmp_path, kind):
    want = np.arange(36, dtype=np.float32).reshape(3, 2, 3, 2)
    path = parquet(tmp_path / "a.parquet", {"pixel_values": pa.array(want.tolist(), kind)}, row_group_size=2)
    found = [row[0] for row in values(path, ["pixel_values"])]
    assert [array.shape for array in found] == [(2, 3, 2)] * 3
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([[1.0], [1.0, 2.0]], "row 2: the lists in column 'x' have different lengths"),
        ([[1.0], None], "row 2: the lists in column 'x' have different lengths"),
        ([[1.0], [None]], "row 2: column 'x' holds null"),
    ],
)
def test_ragged_lists_and_nulls_in_them_are_refused(tmp_path, row, words):
    path = parquet(tmp_path / "a.parquet", {"x": pa.array([[[1.0]], row], pa.list_(pa.list_(pa.float32())))})
    assert words in refusal(path, ["x"])


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.parquet", b"PAR1 no", "a.parquet is no parquet file"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is no JSON object"),
        ("a.jsonl", b"[1]\n", "line 1 is [1], no JSON object; write one object per line"),
        ("a.json", b'[\n{"text": "a"}\n]', "line 1 is no JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON object (nested too deeply)"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"txt": "a"}',
            "line 3 has no column 'text'; it has 'txt'; did you mean 'txt'?",
        ),
        ("a.jsonl", b'{"q": 1, "r": 2}', "has no column 'text'; it has 'q', 'r'; name its columns"),
        ("a.txt", b"ok\n\xff\xfe", "line 2 is not UTF-8 text"),
        ("a.csv", b'text\n"open', "is no csv file"),
        ("a.csv", b"text,label\na,b,c\n", "row 1 has 3 cells under 2 column names"),
        ("a.csv", b"\xff\xfe", "is not UTF-8 text"),
        ("a.txt", b" \n\r\n\xef\xbb\xbf\n", "holds no rows"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.txt.gz", b"x", "is no data file that is read here: its name ends in '.gz', known are .parquet"),
        ("data", b"x", "its name has no ending"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    message = refusal(tmp_path / name)
    assert message.startswith(f"here: {tmp_path}/{name}")
    assert words in message


def test_missing_mixed_and_empty_data_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (
        tmp_path / "none.parquet",
        tmp_path / "empty",
        tmp_path / "*.parquet",
        "memory://no_such_bucket_x",
    ):
        assert "does not exist or holds no data file (.parquet, .jsonl" in refusal(path)
    write(tmp_path, "a.txt")
    write(tmp_path, "b.csv")
    assert "holds txt (a.txt) and csv (b.csv); name one kind by a glob such as folder/*.txt" in refusal(
        tmp_path
    )
    assert "holds no rows" in refusal(parquet(tmp_path / "c.parquet", {"text": pa.array([], pa.string())}))


def test_a_later_file_without_the_column_is_named(tmp_path):
    parquet(tmp_path / "a.parquet", {"text": ["one"]})
    parquet(tmp_path / "b.parquet", {"sentence": ["two"]})
    assert re.search(r"b\.parquet has no column 'text'; it has 'sentence'", refusal(tmp_path))


def test_a_file_that_shrank_since_it_was_seen_is_a_store_error(tmp_path):
    path = write(tmp_path, "a.jsonl")
    rows = open_rows(path)
    path.write_bytes(b"{}")
    with pytest.raises(StoreError):
        list(rows.take([4], ["text"]))


def test_samples_are_the_same_everywhere_and_differ_by_seed_and_task():
    assert sample_rows(5, 5, 0, "a") == sample_rows(5, 9, 1, "b") == [0, 1, 2, 3, 4]
    assert sample_rows(1000, 6, 0, "mnli") == SAMPLE  # on every machine: written down once
    others = [sample_rows(1000, 6, 1, "mnli"), sample_rows(1000, 6, 0, "stsb")]
    assert SAMPLE not in others
    assert others[0] != others[1]
    big = sample_rows(10**12, 1000, 0, "a")
    assert len(set(big)) == 1000
    assert big == sorted(big)


def test_every_row_is_as_likely_as_any_other():
    counts = np.zeros(10)
    for seed in range(4000):
        counts[sample_rows(10, 3, seed, "a")] += 1
    assert abs(counts - 1200).max() < 5 * np.sqrt(1200 * 0.7)


def test_the_identity_of_data_is_their_content_and_what_is_taken_of_them(tmp_path):
    digests, stores = DigestCache(tmp_path / "digests"), Stores()

    def identity(**source):
        return data_identity(DataSource(**source), stores, digests)

    path = write(tmp_path, "a.jsonl")
    first = identity(path=str(path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert first == {"format": "jsonl", "files": [f"sha256:{sha256}"], "text": None, "limit": None}
    assert json.loads(json.dumps(first)) == first
    assert identity(path=str(path.rename(tmp_path / "moved.jsonl"))) == first
    assert identity(path=f"{tmp_path}/moved.jsonl", limit=3) != first
    assert identity(path=f"{tmp_path}/moved.jsonl", text="text") != first
    memory = fsspec.filesystem("memory")
    memory.pipe("/calibration_identity/a.jsonl", path.parent.joinpath("moved.jsonl").read_bytes())
    remote = identity(path="memory://calibration_identity/a.jsonl")
    assert remote == identity(path="memory://calibration_identity")
    memory.pipe("/calibration_identity/a.jsonl", b'{"text": "other"}')
    assert identity(path="memory://calibration_identity") != remote
    with pytest.raises(RecipeError, match=r"data: .*none\.txt does not exist"):
        identity(path=str(tmp_path / "none.txt"))


def test_labels_are_read_for_given_rows_in_their_order(tmp_path):
    path = parquet(
        tmp_path / "a.parquet", {"text": TEXTS, "label": [3, 1, 4, 1, 5], "name": ["a", "b", None, "d", "e"]}
    )
    evaluation = Evaluation(path=str(path), metric="accuracy")
    assert labels_of(evaluation, [4, 0, 2, 0], "mnli", Stores()) == [5, 3, 4, 3]
    named = evaluation.model_copy(update={"label": "name"})
    assert labels_of(named, [1, 0], "mnli", Stores()) == ["b", "a"]
    with pytest.raises(RecipeError, match=r"adapters\.mnli\.eval: .*row 3: column 'name' is None"):
        labels_of(named, [2], "mnli", Stores())
    with pytest.raises(RecipeError, match="has 5 rows, row 6 was asked for"):
        labels_of(evaluation, [5], "mnli", Stores())
    with pytest.raises(
        RecipeError, match="has no column 'lable'; it has 'text', 'label', 'name'; did you mean 'label'"
    ):
        labels_of(evaluation.model_copy(update={"label": "lable"}), [0], "mnli", Stores())
