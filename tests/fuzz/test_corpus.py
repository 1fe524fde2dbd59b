"""Inputs that once ended in a traceback, a hang or a wrong result, each with the message that it must give."""

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from .fuzzer import run_command
from .targets import ANNOTATE, MODEL, PARTED, TRAIN, Target, check_dataset, words


STEPS = b'{"prompt": "1+2?", "completions": ["so 3"], "labels": [true]%s}\n'
BUILD = "build-stepwise steps.jsonl --output_dir OUT --test_size 0.0"
DEEP = b"[" * 100_000 + b"]" * 100_000
DIGITS = b"9" * 5000
HALF = b"\\ud800"


class Case(NamedTuple):
    """A file, what is written to it, a command, and a pattern of its error message. Without a pattern, the command must succeed."""

    file: str
    content: bytes | Callable[[Path], None]
    command: str
    message: str | None


def extra(text: bytes) -> bytes:
    """Return two lines of JSON, the second with one more key."""
    return STEPS % b"" + STEPS.replace(b"1+2", b"1+3") % (b', "extra": ' + text)


def parquet(**columns: pa.Array) -> Callable[[Path], None]:
    """Return a function that writes a dataset of steps with more columns."""
    table = {"prompt": ["1+2?"], "completions": [["so 3"]], "labels": [[1.0]], **columns}
    return lambda path: pq.write_table(pa.table(table), path)


def card(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(f"---\n{text}\n---\n", encoding="utf-8")


def tokenizer_settings(**settings: object) -> Callable[[Path], None]:
    """Return a function that writes the settings of a tokenizer."""
    given = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"} | settings
    return lambda path: path.write_text(json.dumps(given), encoding="utf-8")


def large_row(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b'{"prompt": "')
        file.seek(40 << 20)  # a hole, which needs no space on disk
        file.write(b'"}\n')


FOLDER = BUILD.replace("steps.jsonl", "rows")
SCORE = f"score steps.jsonl {MODEL} --output scores.jsonl"
SOLVE = "solve grid puzzles.txt --output answers.jsonl"
REWARD = f"reward --model_name_or_path model --dataset_name rows {TRAIN}"
CASES = {
    # JSON of users
    "nested JSON": Case("steps.jsonl", extra(DEEP), BUILD, r"steps.jsonl:2: cannot read the JSON \(nested too deeply\)"),
    "nested JSON in an array": Case("array.json", b"[" + DEEP + b"]", BUILD.replace("steps.jsonl", "array.json"), "array.json, row 0: cannot"),
    "many digits": Case("steps.jsonl", extra(DIGITS), BUILD, "steps.jsonl:2: cannot read the JSON .an integer has more than 4,300"),
    "many digits in an array": Case("array.json", b"[" + DIGITS + b"]", BUILD.replace("steps.jsonl", "array.json"), "array.json, row 0: cannot read"),
    "large integer": Case("steps.jsonl", extra(b"1" * 30), BUILD, "steps.jsonl:2: the column `extra` has values"),
    "half a surrogate pair": Case("steps.jsonl", extra(b'"' + HALF + b'"'), BUILD, "steps.jsonl:2: a string has half of a"),
    "half a pair in a key": Case("steps.jsonl", extra(b'{"' + HALF + b'": 1}'), BUILD, "steps.jsonl:2: a string has half of a"),
    "half a pair in UTF-8": Case("steps.jsonl", extra(b'"\xed\xa0\x80"'), BUILD, "steps.jsonl:2: the text is not valid UTF-8"),
    "NUL bytes": Case("steps.jsonl", STEPS % b"" + b"\0" * 50, BUILD, "steps.jsonl:2: invalid JSON"),
    "escaped NUL": Case("steps.jsonl", extra(b'"\\u0000"'), BUILD, None),
    "infinite label": Case("steps.jsonl", STEPS.replace(b"true", b"1e999") % b"", BUILD, r"`labels\[0\]` is inf"),
    "label NaN": Case("steps.jsonl", STEPS.replace(b"true", b"NaN") % b"", BUILD, r"`labels\[0\]` is nan"),
    "large row": Case("steps.jsonl", large_row, BUILD, "steps.jsonl:1: the row has more than 32 MB"),
    "row of empty lists": Case("steps.jsonl", extra(b"[" + b"[]," * (5 << 20) + b"0]"), BUILD + " --view prm", "`extra` has values of"),
    "UTF-16": Case("steps.jsonl", ("\ufeff" + (STEPS % b"").decode()).encode("utf-16-le"), BUILD, "look like UTF-16"),
    "UTF-32": Case("steps.jsonl", (STEPS % b"").decode().encode("utf-32"), BUILD, "look like UTF-16 or UTF-32"),
    "concatenated files with marks": Case("steps.jsonl", b"\xef\xbb\xbf" + STEPS % b"" + b"\xef\xbb\xbf" + STEPS % b"", BUILD, None),
    "empty file": Case("steps.jsonl", b"", BUILD, "steps.jsonl: no records found"),
    "different types": Case("steps.jsonl", STEPS.replace(b"1+2", b"1+4") % b', "extra": 1' + extra(b'"a"'), BUILD, "the column `extra` has values of different"),
    "empty objects": Case("steps.jsonl", extra(b"{}"), BUILD, "`extra` has only empty objects"),
    "control characters": Case("steps.jsonl", b'{"\\u001b[31m": 1}\n', BUILD, "found .*u?x?1b"),
    # other kinds of files
    "truncated gzip": Case("steps.jsonl", gzip.compress(STEPS % b"" * 100)[:-20], BUILD, "steps.jsonl: cannot decompress"),
    "gzip files in one": Case("steps.jsonl", gzip.compress(STEPS % b"") * 2, BUILD, None),
    "gzip with garbage": Case("steps.jsonl", gzip.compress(STEPS % b"") + b"garbage", BUILD, "steps.jsonl: cannot decompress"),
    "gzip bomb": Case("steps.jsonl", gzip.compress(b"\n" * (40 << 20), 9), BUILD, "expands to more than 200 times"),
    "gzip bomb of an array": Case("steps.jsonl", gzip.compress(b"[" + b"0," * (40 << 20), 9), BUILD, "steps.jsonl, row 0: found a JSON int"),
    "folder": Case("steps.jsonl", Path.mkdir, BUILD, "steps.jsonl: found a folder"),
    "pipe": Case("steps.jsonl", os.mkfifo, BUILD, "steps.jsonl: found a pipe or a device"),
    "device": Case("steps.jsonl", lambda path: path.symlink_to("/dev/zero"), BUILD, "steps.jsonl: found a pipe or a device"),
    "pipe in process substitution": Case("pipe", os.mkfifo, BUILD.replace("steps.jsonl", "pipe"), "pipe: found a pipe or a device"),
    "settings from a device": Case("a.yaml", lambda path: path.symlink_to("/dev/zero"), f"{BUILD} --config a.yaml", "found a pipe or a dev"),
    "settings of 2 MB": Case("a.yaml", b"#" * (2 << 20), f"{BUILD} --config a.yaml", "a.yaml: the file has more than 1 MB"),
    "link to itself": Case("steps.jsonl", lambda path: path.symlink_to("steps.jsonl"), BUILD, "steps.jsonl"),
    "prompt in another encoding": Case("prompt.txt", b"\xff {question}", f"{ANNOTATE} --output_dir OUT --prompt prompt.txt", "prompt.txt: not valid UTF-8"),
    # datasets
    "timestamps": Case("rows/train.parquet", parquet(at=pa.array([0], pa.timestamp("ns", "UTC"))), FOLDER, None),
    "a date after the year 9999": Case("rows/train.parquet", parquet(at=pa.array([2**62], pa.timestamp("us"))), FOLDER, "rows, dataset row 0: a value"),
    "maps": Case("rows/train.parquet", parquet(at=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8()))), FOLDER, "rows: .*map"),
    "truncated Parquet": Case("rows/train.parquet", b"PAR1", FOLDER, "rows: the dataset cannot be read"),
    "Parquet without rows": Case("rows/train.parquet", lambda path: pq.write_table(pa.table({"a": pa.array([], pa.int8())}), path), FOLDER, "rows: the dataset"),
    "training on truncated Parquet": Case("rows/train.parquet", b"PAR1", REWARD, "rows: the dataset cannot be read"),
    "training on nothing": Case("a", b"", REWARD.replace("rows", "missing"), "missing"),
    "training with bad settings": Case("a.yaml", b"a: [\n", f"{REWARD} --config a.yaml", "a.yaml:2: not valid YAML"),
    "training with a list": Case("a.yaml", b"learning_rate: [1]\n", f"{REWARD} --config a.yaml", r"a.yaml: `learning_rate` is \[1\]. It must be a number"),
    "dataset script": Case("rows/rows.py", b"", FOLDER, "rows: the dataset cannot be read .*rows.py"),
    "damaged card": Case("rows/README.md", card("a: ["), FOLDER, "rows: the dataset cannot be read"),
    "nested card": Case("rows/README.md", card("dataset_info: " + "[" * 5000), FOLDER, "rows: the dataset cannot be read"),
    "card with a wrong type": Case("rows/README.md", card("dataset_info:\n  features: 7"), FOLDER, "rows: the dataset cannot be read"),
    "damaged weights of a grid model": Case("grid/model.safetensors", b"\0" * 8, SOLVE, r"grid: the weights file is damaged \(Error while"),
    "missing weights of a grid model": Case("grid/model.safetensors", lambda path: save_file({"a": torch.zeros(1)}, path), SOLVE, "grid: .* weights are missing or have another shape"),
    "damaged configuration of a grid model": Case("grid/config.json", b"{", SOLVE, "grid"),
    "padding token that is a letter": Case("policy/tokenizer_config.json", tokenizer_settings(pad_token="a"), f"{ANNOTATE} --output_dir OUT", "policy: a special token of the tokenizer is part of ordinary tokens"),
    "length of a tokenizer": Case("model/tokenizer_config.json", tokenizer_settings(model_max_length="a"), SCORE, "model: `model_max_length` of the tokenizer is 'a'"),
    # options
    "option under its own name": Case("a", b"", f"{PARTED} --output_dir OUT --candidates_split a", "`candidates_split` is 'a', but has no effect because candidates.jsonl is a file"),
    "damaged zip": Case("rows/train.zip", b"PK\x03\x04x", FOLDER, "rows: the dataset cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_past_failures(name, inputs, tmp_path):
    case = CASES[name]
    for path in inputs.iterdir():
        if path.name in case.command:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    file = tmp_path / case.file
    file.unlink(missing_ok=True)
    file.write_bytes(case.content) if isinstance(case.content, bytes) else case.content(file)
    target = Target(case.command, case.file, check_dataset)
    outcome = run_command(target, words(case.command), [file.name, file.parent.name, "extra", ""], tmp_path)
    if case.message is None:
        assert outcome.kind == "ok", outcome.details
    else:
        assert outcome.kind == "error" and re.search(case.message, outcome.details), outcome


def test_a_file_that_changes_while_it_is_read(inputs, tmp_path):
    """A file that becomes shorter must not hang the reader, and a file that becomes longer must not be read in part."""
    from trl_hrm.data.sources import JsonLines, all_rows

    for change in (lambda path: os.truncate(path, 10), lambda path: path.open("a").write("{}\n")):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"a": 1}) + "\n" + json.dumps({"a": 2}) + "\n")
        rows = all_rows(JsonLines([str(path)]))
        next(rows)
        change(path)
        with pytest.raises(ValueError, match="rows.jsonl: the file has changed"):
            list(rows)
