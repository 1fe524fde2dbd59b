"""`--reward_model_engine`: what runs the reward model, and which options are compatible."""

import json
import re

import pytest

from trl_hrm import StepFormat, StepScorer
from trl_hrm.cli import main
from trl_hrm.scoring.reward_model_config import RewardModelConfig

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


URL = "http://127.0.0.1:1"
OPTIONS = {
    "reward_model_batch_size": (4, ["transformers"]),
    "reward_model_max_length": (512, ["transformers"]),
    "reward_model_dtype": ("bfloat16", ["transformers", "vllm"]),
    "reward_model_args": ({"max_model_len": 64}, ["vllm"]),
    "served_model_name": ("prm", [URL]),
}


@pytest.mark.parametrize("engine", ["transformers", "vllm", URL])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_another_engine(engine, option):
    """An ignored option would seem to have worked, and the report would even list it."""
    value, engines = OPTIONS[option]
    given = {"reward_model": "nowhere", "reward_model_engine": engine, option: value}
    if engine in engines:
        described = RewardModelConfig(**given).describe_scoring()
        name = option.removeprefix("reward_model_").replace("args", "scorer_args")
        assert described[name] == (json.dumps(value) if isinstance(value, dict) else value)
    else:
        message = f"`{option}` .*`reward_model_engine` is {re.escape(engine)}"
        with pytest.raises(ValueError, match=message):
            RewardModelConfig(**given)


def test_defaults_of_transformers(checkpoint):
    scorer = RewardModelConfig(reward_model=checkpoint).load_scorer()
    assert isinstance(scorer, StepScorer)
    assert (scorer.batch_size, scorer.max_length, str(scorer.model.dtype)) == (8, 2048, "torch.float32")
    config = RewardModelConfig(
        reward_model=checkpoint,
        reward_model_batch_size=2,
        reward_model_max_length=64,
        reward_model_dtype="bfloat16",
    )
    scorer = config.load_scorer()
    assert (scorer.batch_size, scorer.max_length, str(scorer.model.dtype)) == (2, 64, "torch.bfloat16")


@pytest.mark.parametrize("kind", ["transformers", "URL"])
def test_an_explicit_step_format(checkpoint, server, kind, tmp_path):
    """`step_format` is for models saved without one. Ignoring it in favour of the checkpoint's would go unnoticed."""
    StepFormat(step_separator="; ").save(tmp_path)
    given = {"reward_model": checkpoint, "reward_model_engine": server.url if kind == "URL" else kind}
    own = RewardModelConfig(**given, step_format=tmp_path / "step_format.json")
    assert own.load_scorer().step_format.step_separator == "; "
    assert RewardModelConfig(**given).load_scorer().step_format == StepFormat()
    with pytest.raises(FileNotFoundError):
        RewardModelConfig(**given, step_format="nowhere.json")


def test_description(tmp_path):
    """The description is published with datasets: it must be complete, without addresses or tokens."""

    def describe(**given):
        return RewardModelConfig(reward_model="me/model", **given).describe_scoring()

    assert describe(spans=[1, 2]) == {
        "scorer": "transformers",
        "dtype": "float32",
        "max_length": 2048,
        "batch_size": 8,
        "spans": [1, 2],
        "combine": "max",
    }
    engine_args = '{"hf_token": "hf_secret", "max_model_len": 64}'
    found = describe(reward_model_engine="vllm", reward_model_args=engine_args, spans=[1, 2], combine="mean")
    assert found["scorer_args"] == '{"max_model_len": 64}' and found["combine"] == "mean"
    StepFormat().save(tmp_path)
    own = str(tmp_path / "step_format.json")
    found = describe(reward_model_engine="http://10.0.0.3:8000", step_format=own)
    assert found == {"scorer": "URL", "step_format": own, "spans": [1], "combine": "max"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward_model_engine": "vlm"}, "`reward_model_engine` is 'vlm'"),
        ({"reward_model_args": "[1]"}, "`reward_model_args` is [1]"),
        ({"reward_model_args": "max_model_len=64"}, "`reward_model_args` is 'max_model_len=64'"),
        ({"reward_model_args": {"dtype": "bfloat16"}}, "reward_model_dtype"),
        (
            {"reward_model_args": '{"runner": "generate"}'},
            "runner",
        ),
        ({"spans": [2]}, "`spans` is [2]"),
        ({"combine": "mean"}, "`combine` is mean"),
    ],
)
def test_settings_that_cannot_work(given, message):
    """A dtype in the arguments would contradict the report, and a different runner would end in a traceback."""
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardModelConfig(**{"reward_model": "nowhere", "reward_model_engine": "vllm", **given})


def rows_of(tmp_path, command: list[str]) -> list[dict]:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"prompt": "1+2?", "completions": ["so 3", "thus 3"]},
        {"prompt": "x?", "completions": ["x", "y", "x y"], "parents": [-1, 0, 0]},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", str(source), "--output", str(output), *command]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def assert_same(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert len(found) == len(expected) == 2
    for row, other in zip(found, expected, strict=True):
        assert row["scores"] == pytest.approx(other["scores"], abs=tolerance)
        assert {**row, "scores": 0} == {**other, "scores": 0}


def test_score_with_a_server(checkpoint, server, tmp_path):
    command = ["--reward_model", checkpoint, "--spans", "1", "2"]
    expected = rows_of(tmp_path, command)
    server.sequences.clear()
    assert_same(rows_of(tmp_path, [*command, "--reward_model_engine", server.url]), expected, 1e-5)
    assert len(server.sequences) > 4
    server.model = "prm"
    found = rows_of(tmp_path, [*command, "--reward_model_engine", server.url, "--served_model_name", "prm"])
    assert_same(found, expected, 1e-5)


def test_errors_of_a_server(checkpoint, server, tmp_path, capsys):
    """The user gets one line without a traceback, and nothing is written."""
    server.model = "policy"
    (tmp_path / "in.jsonl").write_text('{"prompt": "p", "completions": ["a"]}\n')
    command = ["score", str(tmp_path / "in.jsonl"), "--reward_model", checkpoint, "--reward_model_engine", server.url]
    assert main([*command, "--output", str(tmp_path / "out.jsonl")]) == 1
    assert re.match(r"error: http://\S+ does not serve .*, but 'policy'.*\n$", capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()


def test_select_raft_with_a_server(checkpoint, server, tmp_path, monkeypatch):
    """Same choices as without a server. Candidates too long for it are counted, and the report has no address."""
    monkeypatch.chdir(tmp_path)
    completions = ["add 1\n\nso 3", "add 2\n\nso 4", "sub 1\n\nthus y", "so " * 600]
    rows = [{"prompt": f"{i}+2?", "completion": text} for i in range(3) for text in completions]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = "select-raft --candidates in.jsonl --segmentation blank_line --test_size 0 --spans 1 2 --reward_model"
    reports = []
    for folder, more in (("a", []), ("b", ["--reward_model_engine", server.url])):
        assert main([*command.split(), checkpoint, "--output_dir", folder, *more]) == 0
        reports.append(json.loads((tmp_path / folder / "build_report.json").read_text()))
    assert reports[0]["dropped"] == reports[1]["dropped"] and reports[0]["dropped"]["too_long_to_judge"] == 3
    assert (
        "--reward_model_engine URL" in reports[1]["command"]
        and "--reward_model_engine transformers" in reports[0]["command"]
    )
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
    command = ["--reward_model", checkpoint, "--spans", "1", "2", "--step_format", str(tmp_path / "step_format.json")]
    options = {"max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    found = rows_of(tmp_path, [*command, "--reward_model_engine", "vllm", "--reward_model_args", json.dumps(options)])
    assert_same(found, rows_of(tmp_path, command), 1e-4)
