"""Commands with a judge (`--judge_template`), with a tiny language model: scores, cost, and resuming from its log."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_hrm import ScoreConfig, StepSearchConfig
from trl_hrm.cli import main
from trl_hrm.scoring.reward_model_config import RewardModelConfig
from trl_hrm.search.engines.transformers import TransformersEngine
from trl_hrm.tiny_model import make_tiny_model

from ..evaluation.benchmark_rows import process_row
from ..fakes import write_rows


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    """Folder of a random language model with a chat template, which ends a response at the first vowel or space."""
    folder = tmp_path_factory.mktemp("judge")
    texts = ["What is the sum? ok bad after 1.2 ", "So Yes", "So No"]
    make_tiny_model(texts * 3, folder, kind="causal", vocab_size=300, num_layers=1, max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}:"
    tokenizer.save_pretrained(folder)
    template = {"user": "{problem} {step}", "stop": list("aeiou "), "closing": "\nSo ", "max_tokens": 200}
    (folder / "template.json").write_text(json.dumps(template))
    return str(folder)


@pytest.fixture
def options(judge) -> list[str]:
    return ["--reward_model", judge, "--judge_template", f"{judge}/template.json", "--judge_samples", "2"]


@pytest.fixture
def no_sampling(monkeypatch):
    async def sample(*args):
        raise AssertionError("a response of the log was sampled again")

    return lambda: monkeypatch.setattr(TransformersEngine, "sample", sample)


def lines_of(log) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()[1:]]


def plain_score(folder: str, problem: str, step: str, samples: list[dict]) -> float:
    """Return the mean probability of Yes against No after the responses of the log: the slow reference."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for sample in samples:
        if sample["finish"] == "length":
            assert sample["p_yes"] is None
            continue
        # a token can continue after the stop string
        text = re.split("[aeiou ]", sample["text"])[0] + "\nSo "
        yes, no = (tokenizer.encode(text + word) for word in ("Yes", "No"))
        same = 0
        while yes[same] == no[same]:
            same += 1
        ids = tokenizer.encode(f"[{problem} {step}]:") + yes[:same]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        found.append(logits[[yes[same], no[same]]].softmax(-1)[0].item())
    return math.fsum(found) / len(found)


def test_benchmark(tmp_path, judge, options, no_sampling, capsys):
    """Scores equal a plain loop, the cost equals the sums over the log, and a second run pays nothing."""
    rows = [process_row(i, i % 4 - 1) for i in range(4)]
    source, output = write_rows(tmp_path / "gsm8k.jsonl", rows), tmp_path / "run"
    words = ["benchmark", source, "--suite", "processbench", *options, "--output_dir", str(output)]
    assert main(words) == 0
    results = json.loads((output / "results.json").read_text())
    lines = lines_of(output / "judgements.jsonl")
    by_step = {(line["problem"], line["step"]): line["samples"] for line in lines}
    scored = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    for row, one in zip(rows, scored, strict=True):
        expected = [
            plain_score(judge, row["problem"], step, by_step[row["problem"], i])
            for i, step in enumerate(row["steps"], 1)
        ]
        assert one["scores"] == pytest.approx(expected, abs=1e-5)
    cost = results["suites"]["processbench"]["cost"]
    samples = [sample for line in lines for sample in line["samples"]]
    assert (cost["judge_prompts"], cost["judge_samples"]) == (12, 24) == (len(lines), len(samples))
    assert cost["judge_generated_tokens"] == sum(sample["num_tokens"] for sample in samples)
    assert cost["judge_unreadable"] == sum(sample["p_yes"] is None for sample in samples)
    described = results["reward_model"]
    assert (described["judge_samples"], described["judge_seed"], described["dtype"]) == (2, 42, "auto")
    assert "judge: 12 prompts, 24 responses (0 from the log)" in capsys.readouterr().out
    (output / "results.json").unlink()  # stopped before the end
    no_sampling()
    assert main(words) == 0
    again = json.loads((output / "results.json").read_text())
    assert [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()] == scored
    new = again["suites"]["processbench"]["cost"]
    assert new["judge_reused_samples"] == 24 and new["seconds"] == pytest.approx(cost["seconds"])
    assert main([*words, "--overwrite", "--judge_seed", "1"]) == 1  # samples again, in a new log
    assert "sampled again" in capsys.readouterr().err


def test_log_of_another_model_is_refused(tmp_path, judge, options, capsys):
    source, output = write_rows(tmp_path / "gsm8k.jsonl", [process_row(0, -1)]), tmp_path / "run"
    words = ["benchmark", source, "--suite", "processbench", *options, "--output_dir", str(output)]
    assert main(words) == 0
    (output / "results.json").unlink()
    before = (output / "judgements.jsonl").read_bytes()
    assert main([*words, "--judge_temperature", "0.2"]) == 1
    assert "temperature was 0.7 and is 0.2" in capsys.readouterr().err
    assert (output / "judgements.jsonl").read_bytes() == before


def test_score_and_best_of_n(tmp_path, judge, options, no_sampling, capsys):
    rows = [{"prompt": "What is 1?", "completions": ["ok", "bad 1"]}, {"prompt": "What is 2?", "completions": ["ok"]}]
    source, log = write_rows(tmp_path / "solutions.jsonl", rows), tmp_path / "log.jsonl"
    words = ["score", source, *options, "--judge_log", str(log), "--output", str(tmp_path / "scores.jsonl")]
    assert main(words) == 0
    assert "judge: 3 prompts, 6 responses (0 from the log)" in capsys.readouterr().out
    scores = [json.loads(line)["scores"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    by_step = {(line["problem"], line["step"]): line["samples"] for line in lines_of(log)}
    assert scores[0][1] == pytest.approx(plain_score(judge, "What is 1?", "bad 1", by_step["What is 1?", 2]), abs=1e-5)

    candidates = [
        {"prompt": row["prompt"], "answer": "1", "candidates": [row["completions"], ["so", "# Answer\n\n1"]]}
        for row in rows
    ]
    source, output = write_rows(tmp_path / "candidates.jsonl", candidates), tmp_path / "bon"
    words = ["best-of-n", "--candidates", source, *options, "--output_dir", str(output), "--aggregate", "min"]
    assert main(words) == 0
    results = json.loads((output / "results.json").read_text())
    lines = lines_of(output / "judgements-00000-of-00001.jsonl")
    cost = results["cost"]["scorer"]
    assert cost["judge_prompts"] == len(lines) and cost["judge_samples"] == 2 * len(lines)
    assert f"judge: {len(lines)} prompts" in capsys.readouterr().out
    no_sampling()
    assert main([*words, "--overwrite"]) == 0
    again = json.loads((output / "results.json").read_text())
    assert again["curves"] == results["curves"]
    assert again["cost"]["scorer"]["judge_reused_samples"] == cost["judge_samples"]


def test_judge_without_verdicts(tmp_path, judge, capsys):
    """Every command says that solutions have no scores, and why."""
    template = tmp_path / "never.json"
    template.write_text(json.dumps({"user": "{problem} {step} Verdict: Yes No", "max_tokens": 3}))
    words = ["--reward_model", judge, "--judge_template", str(template), "--judge_samples", "2"]
    rows = [{"prompt": "What is 1?", "completions": ["ok", "bad 1"]}, {"prompt": "What is 2?", "completions": []}]
    source, output = write_rows(tmp_path / "solutions.jsonl", rows), tmp_path / "scores.jsonl"
    assert main(["score", source, *words, "--output", str(output)]) == 0
    assert json.loads(output.read_text().splitlines()[0])["scores"] == [None, None]
    printed = capsys.readouterr().out
    assert f"1 row with steps without scores (no readable verdict of the judge): {source}:1" in printed
    rows = [{"prompt": "What is 1?", "answer": "1", "candidates": [["ok", "# Answer\n\n1"], ["so", "# Answer\n\n2"]]}]
    source = write_rows(tmp_path / "candidates.jsonl", rows)
    assert main(["best-of-n", "--candidates", source, *words, "--output_dir", str(tmp_path / "bon")]) == 0
    assert "warning: 2 of 2 candidates have no score, because the judge" in capsys.readouterr().out
    assert main(["select-raft", "--candidates", source, *words, "--output_dir", str(tmp_path / "raft")]) == 1
    assert "(100.0 %) without a readable verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"judge_samples": 2}, "`judge_samples` has no effect without `judge_template`"),
        ({"judge_log": "x"}, "`judge_log` has no effect without `judge_template`"),
        ({"judge_template": "poem"}, "template is 'poem'"),
        ({"judge_template": "first_error_reference"}, "which shows the reference answer"),
        ({"judge_template": "instruct", "spans": [1, 2]}, "steps are not merged"),
        ({"judge_template": "instruct", "step_format": "x"}, "does not apply to a judge"),
        (
            {"judge_template": "instruct", "reward_model_max_length": 8},
            "`reward_model_max_length` does not apply to a judge",
        ),
        ({"judge_template": "instruct", "judge_temperature": 0.0}, "all responses would be the same"),
        ({"judge_template": "instruct", "served_model_name": "x"}, "only applies to engine URL"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(ValueError, match=message):
        RewardModelConfig(reward_model="nowhere", **given)


def test_step_search_has_no_judge():
    with pytest.raises(ValueError, match="does not work with a step search"):
        StepSearchConfig(reward_model="a", policy="b", problems="c", judge_template="instruct")


def test_model_without_chat_template(tmp_path, capsys):
    make_tiny_model(["What is 1?"] * 3, tmp_path / "model", kind="causal", vocab_size=280, num_layers=1)
    source = write_rows(tmp_path / "solutions.jsonl", [{"prompt": "What is 1?", "completions": ["ok"]}])
    with pytest.raises(ValueError, match="no chat template"):
        ScoreConfig(input=source, reward_model=str(tmp_path / "model"), judge_template="instruct").load_scorer()
