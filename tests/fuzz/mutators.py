"""Seeded mutations of files: bytes, text, JSON, YAML, Parquet and safetensors."""

import copy
import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml


DEEP = 100_000
RAW = "@@raw@@"  # stands for JSON text that `json.dumps` would not write
RAW_JSON = [
    "NaN",
    "-Infinity",
    "1e999",
    "-1e999",
    "9" * 5000,
    "-0",
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
    '{"a": 1, "a": 2}',
    '"\\ud800"',
    '{"\\udfff": 1}',
    '"\\u0000"',
    "01",
    "'text'",
    "",
]
VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63) - 1, "", " ", "\n", "1", "nan", "true", "a",
    "\0", "\x1b[31mred\x1b[0m", "\u202e", "\ufeff", "é" * 3, "x" * 100_000, "{{ 1 }}", "<script>alert(1)</script>", "../..", "/dev/null",
    [], [[]], [None], ["a"], [0], [1.5, "a"], list(range(50)), {}, {"a": 1}, {"": None}, [{}], {"a": {"b": [1]}},
]  # fmt: skip
BYTES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"[",
    b"]",
    b"\\",
    b"\x1b[2J",
    b"\xed\xa0\x80",
]
YAML = [
    "\t- a",
    "a: [",
    "a: *missing",
    "a: !!python/object/apply:os.system ['true']",
    "a: 2024-13-45",
    "a: !!binary x",
    "? [a, b]\n: 1",
    "<<: {a: 1}",
    "--- \n...\n---",
    "a: &a [*a]",
    "a: " + "9" * 5000,
    "a: " + "[" * 5000,
    "a: .nan",
    "a: \x07",
    "1: 2",
    "".join(f"x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 9)}]\n" if i else "x1: &x1 [a, a]\n" for i in range(9)),
]


def mutate(data: bytes, name: str, rng: random.Random) -> bytes:
    """Return a mutation of the content of a file. Its kind depends on the suffix of the name."""
    formats: dict[str, Callable[[bytes, random.Random], bytes]] = {
        ".json": mutate_json,
        ".jsonl": mutate_json,
        ".parquet": mutate_parquet,
        ".yaml": mutate_yaml,
        ".md": mutate_yaml,
        ".safetensors": mutate_safetensors,
    }
    of_format = next((mutator for suffix, mutator in formats.items() if name.endswith(suffix)), mutate_bytes)
    mutated = data
    while mutated == data:
        mutated = (mutate_bytes if rng.random() < 0.25 else of_format)(data, rng)
    return mutated


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat or replace bytes."""
    place = rng.randrange(len(data) + 1)
    end = min(len(data), place + rng.choice([1, 4, 40, 400]))
    kind = rng.choice(["flip", "cut", "truncate", "insert", "front", "repeat", "zero", "empty", "garbage", "blank"])
    if kind == "flip" and place < len(data):
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if kind == "cut":
        return data[:place] + data[end:]
    if kind == "truncate":
        return data[:place]
    if kind == "insert":
        return data[:place] + rng.choice(BYTES) + data[place:]
    if kind == "front":
        return rng.choice(BYTES) + data
    if kind == "repeat":
        return data[:end] + data[place:]
    if kind == "zero":
        return data[:place] + bytes(end - place) + data[end:]
    if kind == "garbage":
        return rng.randbytes(200)
    return b" \n" if kind == "blank" else b""


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change one value of one record, or the lines."""
    try:
        value = json.loads(data)
        return _json_bytes(change(value, rng), rng, indent=rng.choice([None, 2]))
    except ValueError:
        lines = data.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    kind = rng.random()
    if kind < 0.1:
        lines.insert(number, lines[rng.randrange(len(lines))])
    elif kind < 0.15:
        del lines[number]
    elif kind < 0.2:
        rng.shuffle(lines)
    else:
        lines[number] = _json_bytes(change(json.loads(lines[number]), rng), rng) + b"\n"
    return b"".join(lines)


def change(value: Any, rng: random.Random) -> Any:
    """Return a nested value with one change at a random place."""
    value = copy.deepcopy(value)
    parents = [inner for inner in _containers(value) if inner]
    if not parents or rng.random() < 0.03:
        return rng.choice([*VALUES, RAW])
    parent = rng.choice(parents)
    key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    kind = rng.choice(["value", "value", "value", "raw", "delete", "rename", "wrap", "repeat", "swap", "add", "text"])
    if kind == "value":
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[rng.choice(["", "a", "\0", "\x1b[31m", "x" * 1000, key.upper()])] = parent.pop(key)
    elif kind == "wrap":
        parent[key] = rng.choice([[parent[key]], {"a": parent[key]}, [parent[key]] * 2])
    elif kind == "repeat" and isinstance(parent, list):
        parent *= rng.choice([2, 20])
    elif kind == "swap":
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    elif kind == "add" and isinstance(parent, dict):
        parent[rng.choice(["a", "labels", "prompt", "score", ""])] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "text" and isinstance(parent[key], str):
        place = rng.randrange(len(parent[key]) + 1)
        parent[key] = parent[key][:place] + str(rng.choice(VALUES[12:29])) + parent[key][place:]
    else:
        parent[key] = RAW
    return value


def _containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [value] if isinstance(value, dict | list) else []
    return found + [container for one in inner for container in _containers(one)]


def _json_bytes(value: Any, rng: random.Random, **options: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, **options)
    return text.replace(f'"{RAW}"', rng.choice(RAW_JSON)).encode(errors="surrogatepass")


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """Change one setting, or add a line that is hard to read."""
    if data.startswith(b"---") or rng.random() < 0.5:  # a card
        lines = data.splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(YAML).encode() + b"\n")
        return b"".join(lines)
    return yaml.safe_dump(change(yaml.safe_load(data), rng), allow_unicode=True).encode()


def mutate_parquet(data: bytes, rng: random.Random) -> bytes:
    """Change a value, a column or the rows."""
    table = pq.read_table(io.BytesIO(data))
    column = rng.randrange(table.num_columns)
    field, size = table.schema.field(column), table.num_rows
    kind = rng.choice(["value", "value", "value", "type", "drop", "rename", "empty", "repeat", "reverse", "add"])
    if kind == "value":
        values = table[column].to_pylist()
        place = rng.randrange(size)
        old = values[place]
        choices = [None, 0, 1, -1, 2, 0.5, float("nan"), float("inf"), -7, 10**6, "", "a\0b", "\x1b[31m"]
        if isinstance(old, list) and old and rng.random() < 0.7:
            values[place] = [*old[:-1], rng.choice(choices)] if rng.random() < 0.7 else old[:-1]
        else:
            values[place] = rng.choice([*choices, [], [None]])
        try:
            array = pa.array(values, field.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            array = pa.array([str(value) for value in values])
        table = table.set_column(column, field.name, array)
    elif kind == "type":
        array = rng.choice(
            [
                pa.nulls(size),
                pa.array([1.5] * size),
                pa.array(["a"] * size),
                pa.array([b"a"] * size),
                pa.array([True] * size),
                pa.array([[1]] * size),
                pa.array([{"a": 1}] * size),
                pa.array([0] * size, pa.timestamp("us", tz="UTC")),
                pa.array([2**63] * size, pa.uint64()),
            ]
        )
        table = table.set_column(column, field.name, array)
    elif kind == "drop":
        table = table.remove_column(column)
    elif kind == "rename":
        table = table.rename_columns([f"{name}{'x' * (i == column)}" for i, name in enumerate(table.column_names)])
    elif kind == "empty":
        table = table.slice(0, 0)
    elif kind == "repeat":
        table = pa.concat_tables([table] * 3)
    elif kind == "reverse":
        table = table.take(list(range(size))[::-1])
    else:
        table = table.append_column("added", pa.array([0] * size, pa.date32()))
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header, or the length of the header."""
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.2:
        return struct.pack("<Q", rng.choice([0, length - 1, length + 1, 2**40, 2**64 - 1])) + data[8:]
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.choice(["drop", "rename", "dtype", "shape", "offsets", "json"])
    if kind == "drop":
        del header[name]
    elif kind == "rename":
        header[f"x.{name}"] = header.pop(name)
    elif kind == "dtype":
        header[name]["dtype"] = rng.choice(["I32", "F64", "BOOL", "X", None])
    elif kind == "shape":
        header[name]["shape"] = rng.choice([[], [0], [-1], header[name]["shape"][::-1], [2**62, 4]])
    elif kind == "offsets":
        header[name]["data_offsets"] = rng.choice([[0, 4], [4, 0], [0, len(data)], []])
    else:
        header = change(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
