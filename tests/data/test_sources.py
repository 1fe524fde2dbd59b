"""Reading lines: numbers that an editor shows, whatever the line ends and wherever a chunk ends."""

import json

import pytest
from datasets import Dataset

from trl_hrm.data import sources
from trl_hrm.data.sources import DatasetRows, JsonLines


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
    """U+2028 and U+0085 end a line for `str.splitlines`, not for JSON Lines; blank lines count."""
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
        (b'{"prompt": "tru', "the line is not valid JSON (Unterminated string"),
        (b'{"a": 1}{"a": 2}', "the line is not valid JSON (Extra data"),
        (b'{"a": "\xff"}', "the line is not valid JSON ('utf-8' codec can't decode"),
        (b"[1, 2]", "found a JSON list, expected one JSON object per line"),
        (b'{"a": "\\uD83D"}', "half of a surrogate pair"),
    ],
)
def test_faults_are_named(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n\n' + line)
    with pytest.raises(ValueError) as error:
        read([file])
    assert str(error.value).startswith(f"{file}:3: ")
    assert message in str(error.value)


def test_whole_surrogate_pairs_are_fine(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": "\\ud83d\\ude00", "b": "\\\\udx"}')
    assert read([file]) == [(f"{file}:1", {"a": "😀", "b": "\\udx"})]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: there is no such file"):
        JsonLines([tmp_path / "none.jsonl"])


def test_dataset_rows(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 2)
    rows = DatasetRows(Dataset.from_dict({"prompt": list("abc"), "year": [1, 2, 3]}))
    found = [(where, address, record) for chunk in rows.chunks() for where, address, record in rows.read(chunk)]
    assert [where for where, _, _ in found] == ["dataset row 0", "dataset row 1", "dataset row 2"]
    assert [record for _, _, record in found] == [{"prompt": text, "year": i} for i, text in enumerate("abc", 1)]
    assert list(rows.pick([found[2][1]])) == [("dataset row 2", {"prompt": "c", "year": 3})]
    assert list(rows.types()) == ["year"]
