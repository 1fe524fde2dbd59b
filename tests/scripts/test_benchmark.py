"""The command `benchmark`, run as users run it: its files, its table, and its errors."""

import json
import re
from pathlib import Path

import pytest

from trl_hrm import BenchmarkConfig, StepFormat, StepScorer
from trl_hrm.cli import main
from trl_hrm.scoring.reward_model_config import RewardModelConfig
from trl_hrm.scripts.benchmark import folder_name

from ..evaluation.benchmark_rows import (
    SayingScorer,
    knows,
    mistake_row,
    prm_row,
    process_row,
)
from ..fakes import write_rows
from ..helpers import save_checkpoint, tiny_model


@pytest.fixture
def planted(monkeypatch) -> SayingScorer:
    scorer = SayingScorer(knows, max_positions=200)
    monkeypatch.setattr(RewardModelConfig, "load_scorer", lambda config, *_: scorer)
    return scorer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def sources(tmp_path) -> dict[str, str]:
    classes = ("redundency", "confidence")
    return {
        "gsm8k": write_rows(tmp_path / "gsm8k.jsonl", [process_row(i, i % 4 - 1) for i in range(20)]),
        "math": write_rows(tmp_path / "math.jsonl", [process_row(i, i % 3 - 1, subset="math") for i in range(10)]),
        "prm": write_rows(tmp_path / "prm.jsonl", [prm_row(i, kind, [2]) for kind in classes for i in range(3)]),
        "bbm": write_rows(tmp_path / "sorting.jsonl", [mistake_row(i, [None, 0, 2][i % 3]) for i in range(6)]),
    }


def command(*words: str, model: str = "planted") -> list[str]:
    return ["benchmark", *words, "--reward_model", model]


def results_of(folder) -> tuple[dict, list[dict]]:
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    return json.loads((folder / "results.json").read_text()), rows


def test_all_suites_at_once(tmp_path, planted, sources, capsys):
    """Suites are recognised by the columns of a source, and a model that knows the truth is perfect in each."""
    suites = ["prmbench", "processbench", "bigbenchmistake"]
    output = tmp_path / "runs" / "all"
    words = command(*sources.values(), "--suite", *suites, "--output_dir", str(output))
    assert main(words) == 0
    results, rows = results_of(output)
    assert results["kind"] == "benchmark"
    assert results["reward_model"]["model"] == "planted" and results["reward_model"]["spans"] == [1]
    assert results["settings"] == {"threshold": 0.5, "validation_size": 0.2} and results["seed"] == 42
    assert {"trl_hrm", "transformers"} <= results["versions"].keys() and "T" in results["date"]
    assert list(results["suites"]) == suites
    found = results["suites"]["processbench"]
    assert found["sources"] == [sources["gsm8k"], sources["math"]]
    assert list(found["subsets"]) == ["gsm8k", "math"]
    assert found["averages"]["unweighted"]["f1"] == 1 and found["counts"]["num_scored"] == 30
    assert found["seconds"] > 0
    found = results["suites"]["prmbench"]
    assert found["averages"]["overall"]["prm_score"] == 1 and list(found["averages"]) == ["overall"]
    assert found["counts"]["error_steps_past_the_end"] == 0
    assert results["suites"]["bigbenchmistake"]["subsets"]["sorting"]["f1"] == 1
    assert len(rows) == 30 + 6 + 3 + 6 == len(planted.asked)
    assert all(re.fullmatch("[0-9a-f]{32}", row["solution"]) for row in rows)
    assert rows[0] == {
        "solution": rows[0]["solution"],
        "suite": "prmbench",
        "subset": "redundency",
        "id": "prm_test_p1_0",
        "where": f"{sources['prm']}:1",
        "labels": [1, 0, 1],
        "scores": [0.9, 0.1, 0.9],
    }
    printed = capsys.readouterr().out
    for part in ("processbench: 30 solutions", "= unweighted", "= overall", "100.0", "30 of 30"):
        assert part in printed


def test_a_real_model(tmp_path, checkpoint, sources):
    """The scores in the file are the Python class's scores, with the options of the command."""
    output = tmp_path / "out"
    words = command(sources["gsm8k"], "--suite", "processbench", "--output_dir", str(output), model=checkpoint)
    assert main([*words, "--spans", "1", "2", "--threshold", "0.4", "--validation_size", "0"]) == 0
    results, rows = results_of(output)
    scorer = StepScorer.from_pretrained(checkpoint)
    for number in (0, 13):
        row = process_row(number, number % 4 - 1)
        expected = scorer.score([row["problem"]], [[row["steps"]]], spans=(1, 2))[0][0]
        assert rows[number]["scores"] == pytest.approx(expected, abs=1e-5)
    found = results["suites"]["processbench"]
    assert (found["threshold"], found["tuned"]) == (0.4, None)
    by_hand = [
        next((i for i, score in enumerate(row["scores"]) if score < 0.4), -1)
        == (row["labels"].index(0) if 0 in row["labels"] else -1)
        for row in rows
    ]
    assert found["subsets"]["gsm8k"]["accuracy"] == pytest.approx(sum(by_hand) / 20)


def test_same_command_same_bytes(tmp_path, planted, sources):
    """Everything except the date and the seconds is equal."""
    found = []
    for name in ("a", "b"):
        output = tmp_path / name
        assert main(command(sources["prm"], "--suite", "prmbench", "--output_dir", str(output))) == 0
        results, _ = results_of(output)
        del results["date"], results["suites"]["prmbench"]["seconds"]
        found.append((json.dumps(results), (output / "scores.jsonl").read_bytes()))
    assert found[0] == found[1]


def test_the_seed_reaches_the_results(tmp_path, planted):
    path = write_rows(tmp_path / "rows.jsonl", [prm_row(i, "confidence", [1, 2][: 1 + i % 2]) for i in range(12)])
    found = []
    for i, seed in enumerate(("1", "1", "2")):
        words = command(path, "--suite", "prmbench", "--threshold", "0.95", "--output_dir", str(tmp_path / str(i)))
        assert main([*words, "--seed", seed]) == 0
        results, _ = results_of(tmp_path / str(i))
        assert results["seed"] == int(seed)
        found.append(results["suites"]["prmbench"] | {"seconds": 0})
    assert found[0] == found[1] != found[2]


def test_too_long_rows_are_listed(tmp_path, planted, capsys):
    long = process_row(7, 1) | {"steps": ["ok " * 300, "bad"]}
    path = write_rows(tmp_path / "gsm8k.jsonl", [process_row(1, 0), long, process_row(2, -1)])
    output = tmp_path / "out"
    assert main(command(path, "--suite", "processbench", "--output_dir", str(output))) == 0
    results, rows = results_of(output)
    found = results["suites"]["processbench"]
    assert found["counts"] == {"num_solutions": 3, "num_scored": 2, "num_too_long": 1}
    assert found["too_long"] == [{"subset": "gsm8k", "id": "gsm8k-7", "where": f"{path}:2"}]
    assert rows[1]["scores"] is None and rows[1]["labels"] == [1, 0]
    assert found["averages"]["unweighted"]["f1"] == 1
    assert f"too long: {path}:2" in capsys.readouterr().out


def test_ignored_oddities_are_printed(tmp_path, planted, sources, capsys):
    path = write_rows(tmp_path / "odd.jsonl", [prm_row(1, "confidence", [2, 9]), prm_row(2, "confidence", [3, 4])])
    assert main(command(path, "--suite", "prmbench")) == 0
    assert "counted: 2 error steps past the end" in capsys.readouterr().out
    assert main(command(sources["prm"], "--suite", "prmbench")) == 0
    assert "counted: " not in capsys.readouterr().out


def test_faulty_rows_are_printed_and_listed_in_the_results(tmp_path, planted, capsys):
    """A blank step is scored. Skipped rows are printed and counted, and the results list each with its line."""
    rows = [process_row(i, i % 2 - 1) for i in range(6)]
    rows[2]["steps"][1] = ""
    rows[4]["label"] = 9
    path = write_rows(tmp_path / "gsm8k.jsonl", rows)
    output = tmp_path / "out"
    words = command(path, "--suite", "processbench", "--output_dir", str(output))
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"warning: 1 row dropped (bad label): {path}:5" in printed
    assert f"warning: 1 row kept (blank step): {path}:3" in printed
    results, scores = results_of(output)
    found = results["suites"]["processbench"]
    assert found["faults"] == {"left_out": {"bad_label": [f"{path}:5"]}, "kept": {"blank_step": [f"{path}:3"]}}
    assert found["counts"]["rows_left_out_bad_label"] == 1 and found["counts"]["num_scored"] == 5
    assert len(scores) == 5 and len(scores[2]["scores"]) == 3
    assert main([*words, "--overwrite", "--strict"]) == 1
    assert "gsm8k.jsonl:3: step 1 of 'gsm8k-2' is ''" in capsys.readouterr().err


def test_blank_steps_with_a_real_model(tmp_path, checkpoint):
    """As in the real `dyck_languages`, every step has a score, even a blank one."""
    row = mistake_row(1, 2) | {"steps": ["ok 1", "", "bad 2"]}
    path = write_rows(tmp_path / "dyck.jsonl", [row, mistake_row(2, None)])
    output = tmp_path / "out"
    words = command(path, "--suite", "bigbenchmistake", "--output_dir", str(output), model=checkpoint)
    assert main([*words, "--spans", "1", "2"]) == 0
    results, scores = results_of(output)
    assert [len(one["scores"]) for one in scores] == [3, 3] and scores[0]["labels"] == [1, 1, 0]
    assert results["suites"]["bigbenchmistake"]["counts"]["rows_kept_blank_step"] == 1


def test_other_columns_that_count_from_1(tmp_path, planted):
    rows = [{"q": f"{i}?", "chain": process_row(i, i % 3)["steps"], "first": i % 3 + 1} for i in range(9)]
    rows += [{"q": f"{i}?", "chain": process_row(i, -1)["steps"], "first": 0} for i in range(9, 12)]
    path = write_rows(tmp_path / "mine.jsonl", rows)
    output = tmp_path / "out"
    words = command(path, "--suite", "processbench", "--output_dir", str(output), "--first_step", "1")
    assert main([*words, "--columns", "problem=q", "steps=chain", "label=first"]) == 0
    results, _ = results_of(output)
    assert results["suites"]["processbench"]["subsets"]["mine"]["f1"] == 1
    assert results["settings"]["columns"] == ["problem=q", "steps=chain", "label=first"]
    assert results["settings"]["first_step"] == 1


def test_without_an_output_only_the_table(tmp_path, planted, sources, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(command(sources["gsm8k"], "--suite", "processbench")) == 0
    assert sorted(tmp_path.rglob("*")) == before
    table = capsys.readouterr().out.splitlines()
    assert any(line.startswith("gsm8k") and "100.0" in line for line in table)


def test_earlier_results_are_kept_without_overwrite(tmp_path, planted, sources, capsys):
    """The error must come before the long scoring starts."""
    output = tmp_path / "out"
    words = command(sources["gsm8k"], "--suite", "processbench", "--output_dir", str(output))
    assert main(words) == 0
    first = (output / "results.json").read_bytes()
    asked = len(planted.asked)
    assert main(words) == 1
    assert "results.json exists" in capsys.readouterr().err
    assert (output / "results.json").read_bytes() == first and len(planted.asked) == asked
    assert main([*words, "--overwrite", "--threshold", "0.95", "--suite", "processbench", "processbench"]) == 0
    assert len(planted.asked) == 2 * asked  # a suite given twice runs once
    assert results_of(output)[0]["settings"]["threshold"] == 0.95


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("{gsm8k}", "--suite", "prmbench"),
            "gsm8k.jsonl:1: .*suites",
        ),
        (("{gsm8k}", "--suite", "prmbench", "processbench"), "suite prmbench"),
        (
            ("{gsm8k}", "{gsm8k}", "--suite", "processbench"),
            "gsm8k.jsonl: .*twice",
        ),
        (("missing.jsonl", "--suite", "processbench"), "missing.jsonl"),
        (("{gsm8k}", "--suite", "processbench", "--threshold", "2"), "`threshold` is 2.0"),
        (("{gsm8k}", "--suite", "processbench", "--validation_size", "1"), "`validation_size` is 1.0"),
        (("{gsm8k}", "--suite", "processbench", "--overwrite"), "`overwrite` .*`output_dir`"),
    ],
)
def test_bad_input(planted, sources, capsys, words, message):
    """The error must come before the model is loaded."""
    assert main(command(*(word.format(**sources) for word in words))) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error)
    assert planted.asked == []


class TestSeveralModels:
    @pytest.fixture
    def models(self, checkpoint, tmp_path) -> list[str]:
        return [checkpoint, save_checkpoint(tmp_path / "other", seed=5)]

    def test_each_is_scored_as_alone_and_they_are_compared(self, tmp_path, sources, models, capsys):
        """The command of the README: options first, the data as an option."""
        suites = ["--suite", "processbench", "prmbench"]
        data = ["--data", sources["gsm8k"], sources["math"], f"{sources['prm']}"]
        out = tmp_path / "out"
        assert main(["benchmark", "--reward_model", *models, *suites, *data, "--output_dir", str(out)]) == 0
        printed = capsys.readouterr().out
        assert sorted(path.name for path in out.iterdir()) == sorted(["comparison.md", *map(folder_name, models)])
        for model in models:
            alone = tmp_path / f"alone-{folder_name(model)}"
            assert main(["benchmark", *data[1:], *suites, "--reward_model", model, "--output_dir", str(alone)]) == 0
            one, other = results_of(out / folder_name(model)), results_of(alone)
            assert one[1] == other[1] and one[0]["reward_model"] == other[0]["reward_model"]
            process = one[0]["suites"]["processbench"]["averages"]["unweighted"]
            [line] = [line for line in (out / "comparison.md").read_text().splitlines() if Path(model).name in line]
            assert line.split(" | ")[1] == f"{100 * process['f1']:.1f}"
            assert printed.count(f"{100 * process['low']:.1f}–{100 * process['high']:.1f}") >= 2
        folders = [
            f"{folder}/" for folder in out.iterdir() if folder.is_dir()
        ]  # as docs/evaluation.md: runs/compared/*/
        assert main(["report", *folders, "--output", str(tmp_path / "report.html")]) == 0

    def test_a_model_that_does_not_fit_is_found_before_any_is_scored(self, tmp_path, sources, models, planted, capsys):
        base = tmp_path / "base"
        tiny_model(StepFormat(head="lm")).save_pretrained(base)
        StepFormat().save(base)
        words = ["--suite", "processbench", "--data", sources["gsm8k"], "--output_dir", str(tmp_path / "out")]
        assert main(["benchmark", "--reward_model", models[0], str(base), *words]) == 1
        assert "the weights do not fit" in capsys.readouterr().err
        assert not planted.asked and not (tmp_path / "out").exists()

    def test_a_tokenizer_that_does_not_fit_is_found_before_any_is_scored(self, tmp_path, sources, planted, capsys):
        """The folder of the second model has a head that fits, but a tokenizer without the separator."""
        other = StepFormat(step_separator="<extra_0>", tokenization="string")
        models = [save_checkpoint(tmp_path / "good"), save_checkpoint(tmp_path / "bad")]
        other.save(models[1])
        words = ["--suite", "processbench", "--data", sources["gsm8k"], "--output_dir", str(tmp_path / "out")]
        assert main(["benchmark", "--reward_model", *models, *words]) == 1
        assert "'<extra_0>' is not a token" in capsys.readouterr().err
        assert not planted.asked and not (tmp_path / "out").exists()

    def test_an_earlier_comparison_is_kept_without_overwrite(self, tmp_path, sources, models, planted, capsys):
        out = tmp_path / "out"
        words = ["--suite", "processbench", "--data", sources["gsm8k"], "--output_dir", str(out)]
        assert main(["benchmark", "--reward_model", *models, *words]) == 0
        first, asked = (out / "comparison.md").read_text(), len(planted.asked)
        others = [save_checkpoint(tmp_path / name) for name in ("third", "fourth")]
        assert main(["benchmark", "--reward_model", *others, *words]) == 1
        assert "comparison.md exists" in capsys.readouterr().err
        assert (out / "comparison.md").read_text() == first and len(planted.asked) == asked
        assert main(["benchmark", "--reward_model", *others, *words, "--overwrite"]) == 0
        assert "third" in (out / "comparison.md").read_text()

    def test_options_of_some_models(self, tmp_path):
        """The options of judges apply to the judges, and a revision to models on the Hub."""
        shared = {"data": ["x"], "suite": ["processbench"]}
        config = BenchmarkConfig(reward_model=["GenPRM/GenPRM-1.5B", "me/hrm"], judge_samples=2, **shared)
        assert [(one.judge_template, one.judge_samples) for one in config.scoring_configs()] == [
            ("genprm", 2),
            (None, None),
        ]
        with pytest.raises(ValueError, match="`judge_samples` has no effect"):
            BenchmarkConfig(reward_model=["me/hrm", "me/prm"], judge_samples=2, **shared)
        with pytest.raises(ValueError, match="`judge_samples` has no effect"):
            RewardModelConfig(reward_model="GenPRM/GenPRM-1.5B", step_format="pure-prm", judge_samples=2)
        config = BenchmarkConfig(reward_model=["me/hrm", "me/prm"], reward_model_revision="v1", **shared)
        assert [one.reward_model_revision for one in config.scoring_configs()] == ["v1", "v1"]
        with pytest.raises(ValueError, match="`reward_model` is the local folder"):
            BenchmarkConfig(reward_model=["me/hrm", str(tmp_path)], reward_model_revision="v1", **shared)

    def test_models_with_the_same_folder_are_refused(self, sources, models, capsys):
        words = ["--suite", "processbench", "--data", sources["gsm8k"]]
        assert main(["benchmark", "--reward_model", models[0], models[0], *words]) == 1
        assert "in the folder" in capsys.readouterr().err
