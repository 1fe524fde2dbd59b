"""Read lines: line numbers must match an editor's, for all line ends and chunk borders."""

import gzip
import json
import math
import pickle
import tempfile

import pytest
from datasets import Dataset, DatasetDict

from trl_hrm.data import sources
from trl_hrm.data.sources import DatasetRows, JsonLines, load_rows, loaded_dataset, parse_columns, rename_columns


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 16)


def read(files) -> list[tuple[str, dict]]:
    lines = JsonLines(files)
    found = [(where, address, record) for chunk in lines.chunks() for where, address, record in lines.read(chunk)]
    assert list(lines.pick(address for _, address, _ in reversed(found))) == [(w, r) for w, _, r in reversed(found)]
    return [(where, record) for where, _, record in found]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
def test_line_numbers(tmp_path, small_chunks, end, last):
    """U+2028 and U+0085 end a line for `str.splitlines`, but not in JSON Lines. Blank lines count."""
    values = [{"a": "x"}, None, {"a": "y\u2028\u0085\x0bz" * 5}, {}, None, None, {"a": "é" * 40}]
    file = tmp_path / "rows.jsonl"
    text = end.join("" if value is None else json.dumps(value, ensure_ascii=False) for value in values)
    file.write_bytes(("\ufeff" + text + (end if last else "")).encode())
    assert read([file]) == [(f"{file}:{i}", value) for i, value in enumerate(values, 1) if value is not None]


def test_several_files_and_chunks(tmp_path, small_chunks):
    files = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for file in files:
        file.write_text("".join(f'{{"i": {i}}}\n' for i in range(50)))
    assert len(JsonLines(files).chunks()) > 20
    assert read(files) == [(f"{file}:{i + 1}", {"i": i}) for file in files for i in range(50)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "tru', "invalid JSON (Unterminated string"),
        (b'{"a": 1}{"a": 2}', "invalid JSON (Extra data"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b"[1, 2]", "found a JSON list"),
        (b'{"a": "\\uD83D"}', "half of a surrogate pair"),
        (b'{"a": 1, "b": 2, "a": 1}', "cannot read the JSON (the key 'a' occurs twice in an object)"),
        (b'{"a": [{"b": 1, "b": 2}]}', "the key 'b' occurs twice in an object). Remove or rename"),
    ],
)
def test_faults_are_named(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n\n' + line)
    with pytest.raises(ValueError) as error:
        read([file])
    assert str(error.value).startswith(f"{file}:3: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        (b'{"a": 1}\n{"a": 2, "b": "tru', "It may be truncated"),
        (b'{"a": 1}\n{"a": 2,', "It may be truncated"),
        (b'{\n  "a": 1\n}\n', "jq -c . FILE"),
        (b'{\n  "data": [\n {"a": 1}\n ]\n}\n', r"jq -c '.data\[\]' FILE"),
        (b'{"version": 2, "data": [{"a": 1}, {"a": 2}]}\n', "a list of 2 objects under `data`"),
        (b'{"a": 1}{"a": 2}\n', "Put each object on a separate line"),
        (b'{"a": 1},\n{"a": 2}\n', "Put each object on a separate line"),
        (b'{"a": 1}\r{"a": 2}\r', "Put each object on a separate line"),
        (b"{'a': 1}\n", "This is the format of Python's `print`"),
        (b'{"a": None}\n', "This is the format of Python's `print`"),
        (b'{"a": nan}\n', "This is the format of Python's `print`"),
        (b'{"a": True}\n', "This is the format of Python's `print`"),
        (b"a,b\n1,2\n", "one JSON object per line"),
        ('{"a": "é"}\n'.encode("latin-1"), "iconv -f latin1"),
        ('{"a": 1}\n'.encode("utf-16"), "iconv -f utf-16"),
        ('{"a": 1}\n'.encode("utf-16-le"), "iconv -f utf-16"),
        ('[{"a": "é"}]'.encode("latin-1"), "iconv -f latin1"),
        (b'[{"a": 1}, {"a":', "row 1: invalid JSON .* The file ends within this row"),
        (b'[{"a": 1}, ', "ends within its JSON array, after 1 rows"),
        (b'[{"a": 1}] [{"a": 2}]', "found text after the end of the JSON array"),
        (b'[{"a": 1} {"a": 2}]', "row 1: invalid JSON: found '{\"a\": 2}]' after the previous row"),
        (b'[{"a": 1}, 7]', "row 1: found a JSON int"),
        (b'[{"a": 1}, {"a": 2, "a": 3}]', r"row 1: cannot read the JSON \(the key 'a' occurs twice in an object\)"),
        (b'[{"a": 1}, {"a": None}]', "row 1: invalid JSON .* This is the format of Python's `print`"),
        (b"PAR1....", r"found a Parquet file.*from_parquet\(FILE\).to_json"),
        (b"prompt,completion\n1+2?,3\n", r"invalid JSON .*A CSV file has no lists: read it with `csv.DictReader`"),
        (b"<!DOCTYPE html>", "found HTML or XML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-12], "cannot decompress the gzip file"),
        (b"\x1f\x8b" + b"x" * 30, "cannot decompress the gzip file"),
    ],
)
def test_the_message_names_the_remedy(tmp_path, data, remedy):
    """If a complete file were called truncated, the user would download it again in vain."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=remedy) as error:
        read([file])
    assert str(error.value).startswith(str(file))
    assert ("truncated" in str(error.value)) == ("truncated" in remedy or "ends" in remedy or "decompress" in remedy)


def test_nan_is_read_as_python_writes_it(tmp_path):
    """`json.dumps` and pandas write NaN. Each reader decides what it means."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": NaN}\n')
    ((_, record),) = read([file])
    assert math.isnan(record["a"])


ROWS = [{"a": "x\u2028é"}, {"b": [1, {"c": None}]}, {}, {"a": '"]},{[', "n": 1.5e-7}, {"long": "y" * 300}]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("start", ["", "\ufeff", " \n"])
def test_arrays(tmp_path, monkeypatch, small_chunks, block, indent, start):
    """Indented or not, and wherever a block ends. Rows count from 0."""
    monkeypatch.setattr(sources, "ARRAY_BLOCK", block)
    file = tmp_path / "rows.json"
    file.write_text(start + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n")
    assert read([file]) == [(f"{file}, row {i}", row) for i, row in enumerate(ROWS)]


def test_an_empty_array_has_no_rows(tmp_path):
    (tmp_path / "rows.json").write_text(" [ ]\n")
    with pytest.raises(ValueError, match="rows.json: no records found"):
        read([tmp_path / "rows.json"])


def test_compressed_files_keep_their_lines(tmp_path, small_chunks):
    """Plain, compressed and array files can be mixed, each with its own line numbers."""
    lines = "\n\n".join(json.dumps(row) for row in ROWS) + "\n"
    files = [tmp_path / name for name in ("plain.jsonl", "lines.jsonl.gz", "array.json.gz")]
    files[0].write_text(lines)
    files[1].write_bytes(gzip.compress(lines.encode()))
    files[2].write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode()))
    expected = [(f"{file}:{2 * i + 1}", row) for file in files[:2] for i, row in enumerate(ROWS)]
    assert read(files) == expected + [(f"{files[2]}, row {i}", row) for i, row in enumerate(ROWS)]


def test_plain_copies_do_not_stay(tmp_path, monkeypatch):
    """Temporary copies of every benchmark would fill the disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "rows.json").write_text("[{}]")
    source = JsonLines([tmp_path / "rows.json"])
    assert len(list((tmp_path / "temporary").rglob("*.jsonl"))) == 1
    copy = pickle.loads(pickle.dumps(source))  # as sent to a process
    del copy
    assert len(list(source.read(source.chunks()[0]))) == 1
    del source
    assert not list((tmp_path / "temporary").iterdir())


class TestColumns:
    def test_new_names(self):
        record = {"q": "x", "nested": {"a": {"b": 1}, "l": [{"c": 2}]}, "a.b": 3, "answer": "own"}
        assert rename_columns(record, {}) is record
        assert rename_columns(record, {"problem": "q"}) == {"problem": "x"} | {k: record[k] for k in list(record)[1:]}
        found = rename_columns(record, {"one": "nested.a.b", "two": "nested.l.0.c", "three": "a.b"})
        assert (found["one"], found["two"], found["three"]) == (1, 2, 3) and "a.b" not in found
        assert rename_columns({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1}

    def test_row_without_the_column_does_not_use_another(self):
        """The row's own `answer` may be a whole solution."""
        assert rename_columns({"answer": "own"}, {"answer": "gold"}) == {}

    def test_a_column_that_is_not_there(self, tmp_path):
        file = tmp_path / "rows.jsonl"
        file.write_text('\n{"q": 1, "info": {"gold": 2}}\n')
        with pytest.raises(ValueError, match=r"rows.jsonl:2: .*Q, info.god.*q, info.gold\."):
            JsonLines([file], {"problem": "Q", "answer": "info.god"})
        with pytest.raises(ValueError, match="dataset row 0: --columns names Q"):
            DatasetRows(Dataset.from_list([{"q": 1}]), {"problem": "Q"})

    def test_words(self):
        assert parse_columns(["a=b", "c=d.e"]) == {"a": "b", "c": "d.e"} and parse_columns(None) == {}
        for words, message in (
            (["a"], "found 'a', expected NAME=COLUMN"),
            (["a=b", "a=c"], "a is given twice, as b and c"),
        ):
            with pytest.raises(ValueError, match=message):
                parse_columns(words)

    def test_types_of_a_dataset_follow(self):
        rows = DatasetRows(
            Dataset.from_dict({"steps": [["a"]], "year": [1]}), {"completions": "steps", "when": "year"}
        )
        assert list(rows.types()) == ["when"]
        assert [record for _, _, record in rows.read(rows.chunks()[0])] == [{"completions": ["a"], "when": 1}]


def test_whole_surrogate_pairs_are_fine(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": "\\ud83d\\ude00", "b": "\\\\udx"}')
    assert read([file]) == [(f"{file}:1", {"a": "😀", "b": "\\udx"})]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: file not found"):
        JsonLines([tmp_path / "none.jsonl"])


def test_directories_of_save_to_disk(tmp_path):
    """`load_dataset` refuses them, with the advice to call a function that has no option on the command line."""
    rows = Dataset.from_dict({"a": [1, 2, 3, 4]})
    rows.save_to_disk(tmp_path / "rows")
    DatasetDict(math=rows, code=rows.select([3])).save_to_disk(tmp_path / "splits")
    (tmp_path / "rows" / "cache-0.arrow").write_bytes(b"")  # as written by `map`
    for name, split, expected in (
        ("rows", "train", [1, 2, 3, 4]),
        ("rows", "train[1:3]", [2, 3]),
        ("splits", "math[:50%]+code", [1, 2, 4]),
    ):
        with loaded_dataset(str(tmp_path / name), split) as found:
            assert list(found["a"]) == expected
    assert {name: len(found) for name, found in load_rows(str(tmp_path / "splits")).items()} == {"math": 4, "code": 1}
    with pytest.raises(ValueError, match=r"rows: .*Unknown split \"test\".*\['train'\]"):
        load_rows(str(tmp_path / "rows"), split="test")
    with pytest.raises(ValueError, match="rows: .*no configurations. Remove 'hrm'"):
        load_rows(str(tmp_path / "rows"), "hrm")


def test_dataset_rows(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 2)
    rows = DatasetRows(Dataset.from_dict({"prompt": list("abc"), "year": [1, 2, 3]}))
    found = [(where, address, record) for chunk in rows.chunks() for where, address, record in rows.read(chunk)]
    assert [where for where, _, _ in found] == ["dataset row 0", "dataset row 1", "dataset row 2"]
    assert [record for _, _, record in found] == [{"prompt": text, "year": i} for i, text in enumerate("abc", 1)]
    assert list(rows.pick([found[2][1]])) == [("dataset row 2", {"prompt": "c", "year": 3})]
    assert list(rows.types()) == ["year"]


def test_a_folder_that_does_not_exist(tmp_path, monkeypatch):
    """Without a connection, the message of `datasets` is about the Hub only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data" / "mine").mkdir(parents=True)

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'data/min' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        FileNotFoundError, match=r"data/min is not a folder.* cannot be reached. Did you mean data/mine\?"
    ):
        load_rows("data/min")
