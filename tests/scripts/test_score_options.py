"""`--scorer`: what runs the reward model, and which options go with it."""

import argparse
import json
import re

import pytest

from trl_hrm import StepFormat, StepScorer
from trl_hrm.cli import main
from trl_hrm.scripts.score_options import add_score_arguments, describe_scoring, load_scorer

from ..helpers import save_checkpoint, tiny_model, tiny_tokenizer
from ..scoring.pooling_server import PoolingServer
from ..search.serving import ENVIRONMENT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def server(checkpoint):
    with PoolingServer(tiny_model(), tiny_tokenizer(), name=checkpoint) as server:
        yield server


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_score_arguments(parser)
    return parser.parse_args(words)


URL = "http://127.0.0.1:1"
OPTIONS = {
    "batch_size": ("4", ["transformers"]),
    "max_length": ("512", ["transformers"]),
    "dtype": ("bfloat16", ["transformers", "vllm"]),
    "scorer_args": ('{"max_model_len": 64}', ["vllm"]),
    "served_model_name": ("prm", [URL]),
}


@pytest.mark.parametrize("scorer", ["transformers", "vllm", URL])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_another_scorer(scorer, option):
    """An option that does nothing looks as if it had done something, also in the report."""
    value, scorers = OPTIONS[option]
    args = parse("--scorer", scorer, f"--{option}", value)
    if scorer in scorers:
        assert str(describe_scoring(args)[option]) == value
    else:
        message = f"--{option} goes with --scorer .*, and --scorer is {re.escape(scorer)}. Leave it out."
        with pytest.raises(ValueError, match=message):
            load_scorer("nowhere", args)


def test_defaults_of_transformers(checkpoint):
    scorer = load_scorer(checkpoint, parse())
    assert isinstance(scorer, StepScorer)
    assert (scorer.batch_size, scorer.max_length, str(scorer.model.dtype)) == (8, 2048, "torch.float32")
    scorer = load_scorer(checkpoint, parse("--batch_size", "2", "--max_length", "64", "--dtype", "bfloat16"))
    assert (scorer.batch_size, scorer.max_length, str(scorer.model.dtype)) == (2, 64, "torch.bfloat16")


@pytest.mark.parametrize("kind", ["transformers", "URL"])
def test_a_format_of_its_own(checkpoint, server, kind, tmp_path):
    """For a model that was saved without one. The format of the checkpoint would be taken in silence."""
    StepFormat(step_separator="; ").save(tmp_path)
    options = ["--scorer", server.url if kind == "URL" else kind, "--step_format", str(tmp_path / "step_format.json")]
    assert load_scorer(checkpoint, parse(*options)).step_format.step_separator == "; "
    assert load_scorer(checkpoint, parse(*options[:2])).step_format == StepFormat()


def test_description():
    """It is published with datasets: complete, but without addresses and tokens."""
    assert describe_scoring(parse("--spans", "1", "2")) == {
        "scorer": "transformers",
        "dtype": "float32",
        "max_length": 2048,
        "batch_size": 8,
        "spans": [1, 2],
        "combine": "max",
    }
    engine_args = '{"hf_token": "hf_secret", "max_model_len": 64}'
    found = describe_scoring(parse("--scorer", "vllm", "--scorer_args", engine_args, "--combine", "mean"))
    assert found["scorer_args"] == '{"max_model_len": 64}' and found["combine"] == "mean"
    found = describe_scoring(parse("--scorer", "http://10.0.0.3:8000", "--step_format", "format.json"))
    assert found == {"scorer": "URL", "step_format": "format.json", "spans": [1], "combine": "max"}


def test_unknown_scorers():
    with pytest.raises(ValueError, match="--scorer is 'vlm', expected transformers, vllm, or the address"):
        load_scorer("nowhere", parse("--scorer", "vlm"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1]", "[1] is no JSON object, such as"),
        ("max_model_len=64", "max_model_len=64 is no JSON object, such as"),
        ('{"dtype": "bfloat16"}', "dtype is --dtype. Leave it out"),
        ('{"runner": "generate"}', 'runner is always "pooling". Leave it out'),
    ],
)
def test_arguments_of_the_engine(value, message, capsys):
    """A dtype there would win over that of the report, and another runner would be a traceback."""
    with pytest.raises(SystemExit):
        parse("--scorer", "vllm", "--scorer_args", value)
    assert message in capsys.readouterr().err


def rows_of(tmp_path, command: list[str]) -> list[dict]:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"prompt": "1+2?", "completions": ["so 3", "thus 3"]},
        {"prompt": "x?", "completions": ["x", "y", "x y"], "parents": [-1, 0, 0]},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", "--input", str(source), "--output", str(output), *command]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def assert_same(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert len(found) == len(expected) == 2
    for row, other in zip(found, expected, strict=True):
        assert row["scores"] == pytest.approx(other["scores"], abs=tolerance)
        assert {**row, "scores": 0} == {**other, "scores": 0}


def test_score_with_a_server(checkpoint, server, tmp_path):
    command = ["--model", checkpoint, "--spans", "1", "2"]
    expected = rows_of(tmp_path, command)
    server.sequences.clear()
    assert_same(rows_of(tmp_path, [*command, "--scorer", server.url]), expected, 1e-5)
    assert len(server.sequences) > 4
    server.model = "prm"
    found = rows_of(tmp_path, [*command, "--scorer", server.url, "--served_model_name", "prm"])
    assert_same(found, expected, 1e-5)


def test_errors_of_a_server(checkpoint, server, tmp_path, capsys):
    """One line, no traceback, nothing written."""
    server.model = "policy"
    (tmp_path / "in.jsonl").write_text('{"prompt": "p", "completions": ["a"]}\n')
    command = ["score", "--model", checkpoint, "--input", str(tmp_path / "in.jsonl"), "--scorer", server.url]
    assert main([*command, "--output", str(tmp_path / "out.jsonl")]) == 1
    assert re.match(r"error: http://\S+ does not serve .*, but 'policy'.*\n$", capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()


def test_select_raft_with_a_server(checkpoint, server, tmp_path, monkeypatch):
    """The same candidates are chosen, those too long for the server are counted, and the report tells no address."""
    monkeypatch.chdir(tmp_path)
    completions = ["add 1\n\nso 3", "add 2\n\nso 4", "sub 1\n\nthus y", "so " * 600]
    rows = [{"prompt": f"{i}+2?", "completion": text} for i in range(3) for text in completions]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = "select-raft --candidates in.jsonl --segmentation blank_line --test_size 0 --spans 1 2 --reward_model"
    reports = []
    for folder, more in (("a", []), ("b", ["--scorer", server.url])):
        assert main([*command.split(), checkpoint, "--output_dir", folder, *more]) == 0
        reports.append(json.loads((tmp_path / folder / "build_report.json").read_text()))
    assert reports[0]["dropped"] == reports[1]["dropped"] and reports[0]["dropped"]["too_long_to_judge"] == 3
    assert "--scorer URL" in reports[1]["command"] and "--scorer transformers" in reports[0]["command"]
    assert "127.0.0.1" not in json.dumps(reports[1])
    import pyarrow.parquet as pq

    tables = [pq.read_table(next((tmp_path / folder / "data").iterdir())).to_pylist() for folder in "ab"]
    for row, other in zip(*tables, strict=True):
        assert row["completion"] == other["completion"] and row["score"] == pytest.approx(other["score"], abs=1e-5)


@pytest.mark.slow
def test_score_with_vllm(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="needs vLLM; `make test-slow` installs it")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    StepFormat(step_separator="; ").save(tmp_path)
    command = ["--model", checkpoint, "--spans", "1", "2", "--step_format", str(tmp_path / "step_format.json")]
    options = {"max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    found = rows_of(tmp_path, [*command, "--scorer", "vllm", "--scorer_args", json.dumps(options)])
    assert_same(found, rows_of(tmp_path, command), 1e-4)
