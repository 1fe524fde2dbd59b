"""Inputs that are empty or match nothing, and runs in which every problem failed: an error, or at least a warning with counts."""

import json

import pytest

from trl_hrm import AnnotateConfig, annotate
from trl_hrm.cli import main
from trl_hrm.data.problems import read_problem_keys
from trl_hrm.data.sources import JsonLines, naming_dataset
from trl_hrm.search.engines.base import EngineError
from trl_hrm.search.engines.transformers import TransformersEngine

from .fakes import write_rows
from .helpers import save_checkpoint
from .search.policies import KNOWN


EMPTY = {"empty": "", "blank lines": "\n \n\n", "an empty array": "[]"}
ROWS = [{"prompt": f"{i} + 1?", "completions": ["a", "b"], "labels": [True, False]} for i in range(20)]
SETTINGS = "--engine transformers --prompt question --prompt_style plain --segmentation step_header".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=1024)


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, str]:
    """Paths of an input of each command, by name, and of one file of each kind in `EMPTY`."""
    monkeypatch.chdir(tmp_path)
    for name, content in EMPTY.items():
        (tmp_path / f"{name}.json").write_text(content)
    candidates = [
        {"prompt": f"q{i}", "answer": "2", "candidates": [f"a\n\n\\boxed{{{n}}}" for n in range(4)]} for i in range(3)
    ]
    return {
        "steps": write_rows(tmp_path / "steps.jsonl", ROWS),
        "problems": write_rows(tmp_path / "problems.jsonl", KNOWN),
        "candidates": write_rows(tmp_path / "candidates.jsonl", candidates),
        "others": write_rows(tmp_path / "others.jsonl", [{"problem": "zzz"}]),
    }


def test_an_empty_file_to_train_on(tmp_path):
    from datasets import load_dataset

    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").touch()
    with pytest.raises(
        ValueError, match="^rows: the dataset cannot be read, because a file is empty. Remove the file.$"
    ):
        with naming_dataset("rows"):
            load_dataset(str(tmp_path / "rows"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file(files, name):
    """An empty file of problems to exclude excluded nothing, and said nothing."""
    for read in (lambda names: read_problem_keys(names), lambda names: JsonLines(names).chunks()):
        for names in ([f"{name}.json"], [files["others"], f"{name}.json"]):
            with pytest.raises(
                ValueError, match=f"^{name}.json: no records found. Check the path, or remove the empty input.$"
            ):
                read(names)


COMMANDS = {
    "build": "build-stepwise {steps} --output_dir out",
    "builds of two": "build-stepwise {steps} {empty} --output_dir out",
    "build without records": "build-prm800k {empty} --output_dir out",
    "annotate": "annotate --problems {problems} --policy {policy} --output_dir out",
    "annotate without problems": "annotate --problems {empty} --policy {policy} --output_dir out",
    "judge": "judge {empty} --judge {policy} --engine transformers --output_dir out",
    "evaluate": "evaluate --problems {problems} --policy {policy} --n 1 --output_dir out",
    "step-search": "step-search --problems {problems} --policy {policy} --reward_model {model} --n 1 --output_dir out",
    "best-of-n": "best-of-n --candidates {empty} --reward_model {model} --output_dir out",
    "best-of-n with problems": "best-of-n --candidates {candidates} --problems {empty} --reward_model {model} --output_dir out",
    "select-raft": "select-raft --candidates {candidates} --num_candidates 4 --reward_model {model} --output_dir out",
    "select-raft without candidates": "select-raft --candidates {empty} --reward_model {model} --output_dir out",
    "score": "score {empty} --reward_model {model} --output out.jsonl",
    "benchmark": "benchmark {empty} --suite processbench --reward_model {model} --output_dir out",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", EMPTY)
def test_commands_refuse_empty_files(files, tmp_path, policy, checkpoint, capsys, command, name):
    """The file is the input or, if the command has another input, the problems to exclude. Nothing is written."""
    template = COMMANDS[command]
    words = [word.format(empty=f"{name}.json", policy=policy, model=checkpoint, **files) for word in template.split()]
    if "{empty}" not in template:
        words += ["--exclude", f"{name}.json"]
    if words[0] in ("annotate", "evaluate", "step-search"):
        words += SETTINGS
    assert main(words) == 1
    assert f"error: {name}.json: no records found" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*")) and not (tmp_path / "out.jsonl").exists()


def test_problems_to_exclude_that_no_row_has(tmp_path, files, policy, checkpoint, capsys):
    assert (
        main(["build-stepwise", files["steps"], "--output_dir", "a", "--exclude", files["others"], "--num_proc", "1"])
        == 0
    )
    assert (
        f"warning: no record was excluded: none has a problem of {files['others']}. Check" in capsys.readouterr().out
    )
    assert "no record was excluded" in json.load(open("a/build_report.json"))["warnings"][-1]
    words = ["select-raft", "--candidates", files["candidates"], "--num_candidates", "4", "--reward_model", checkpoint]
    assert main([*words, "--output_dir", "b", "--exclude", files["others"]]) == 0
    assert "no record was excluded" in capsys.readouterr().out
    words = ["annotate", "--problems", files["problems"], "--policy", policy, "--output_dir", "c", "--exclude"]
    assert main([*words, files["others"], *SETTINGS, "--dry_run"]) == 0
    assert "no record was excluded: none has one of the 1 problems to exclude" in capsys.readouterr().out
    excluded = write_rows(tmp_path / "excluded.jsonl", [*KNOWN[:1], {"problem": "0 + 1?"}])
    assert main([*words, excluded, *SETTINGS, "--dry_run"]) == 0
    assert main(["build-stepwise", files["steps"], "--output_dir", "d", "--exclude", excluded, "--num_proc", "1"]) == 0
    assert "no record was excluded" not in capsys.readouterr().out


def test_no_row_can_be_scored(tmp_path, checkpoint, capsys):
    """Rows without steps get no scores. If all are such rows, the file of scores would be empty of scores."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "p", "completions": []}] * 2)
    assert main(["score", path, "--reward_model", checkpoint, "--output", str(tmp_path / "out.jsonl")]) == 1
    error = capsys.readouterr().err
    assert "none of the 2 rows can be scored: 0 have more tokens than the 1024 positions" in error
    assert not (tmp_path / "out.jsonl").exists()


class TestEveryProblemFailed:
    """`annotate` ended with exit code 0 although no problem had a tree."""

    def words(self, problems, policy):
        return [
            "annotate",
            "--problems",
            problems,
            "--policy",
            policy,
            "--output_dir",
            "run",
            *SETTINGS,
            "--max_depth",
            "2",
        ]

    def test_failed_requests(self, files, policy, monkeypatch, capsys):
        """The run can be resumed."""

        async def fail(self, *args, **kwargs):
            raise EngineError("HTTP 500: out of memory.")

        words = [*self.words(files["problems"], policy), "--max_step_tokens", "20", "--num_children", "2"]
        with monkeypatch.context() as patch:
            patch.setattr(TransformersEngine, "sample", fail)
            assert main(words) == 1
        printed = capsys.readouterr()
        assert "problems: 4 error" in printed.out and "4 problems have failed requests" in printed.out
        [error] = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert error.startswith(
            "error: run: no problem could be searched. The first failed request, run/log-00000-of-00001.jsonl:5: "
        )
        assert error.endswith("HTTP 500: out of memory. Run the same command again to retry.")
        assert main(words) == 0
        assert "problems: 4 done" in capsys.readouterr().out

    def test_some_failed(self, files, policy, monkeypatch, capsys):
        sample = TransformersEngine.sample

        async def fail(self, prefix_ids, n, stop, max_tokens, seed, key=""):
            if "What is 0" in self.tokenizer.decode(prefix_ids):
                raise EngineError("HTTP 500: out of memory.")
            return await sample(self, prefix_ids, n, stop, max_tokens, seed, key)

        monkeypatch.setattr(TransformersEngine, "sample", fail)
        assert main([*self.words(files["problems"], policy), "--max_step_tokens", "20", "--num_children", "2"]) == 0
        assert "warning: 1 problems have failed requests" in capsys.readouterr().out

    def test_unreadable_answers(self, tmp_path, files, policy, capsys):
        problems = write_rows(tmp_path / "unreadable.jsonl", [{"problem": "q?", "answer": "\\frac{"}])
        assert main(self.words(problems, policy)) == 1
        assert "no problem could be searched. All reference answers are unreadable." in capsys.readouterr().err

    def test_in_python(self, tmp_path, files, policy):
        problems = write_rows(tmp_path / "unreadable.jsonl", [{"problem": "q?", "answer": "\\frac{"}])
        with pytest.raises(ValueError, match="no problem could be searched"):
            annotate(
                AnnotateConfig(
                    problems=problems,
                    policy=policy,
                    engine="transformers",
                    output_dir="run",
                    prompt="question",
                    prompt_style="plain",
                )
            )

    def test_a_shard_without_problems(self, files, policy, capsys):
        """With more shards than problems, some shards are empty."""
        assert main([*self.words(files["problems"], policy), "--shard", "0/64"]) == 0
        assert "Shard 0/64: 0 problems." in capsys.readouterr().out


def test_an_empty_stop_string(files, policy, capsys):
    """`--final_stops ""` means none. With others, it would end every sample at once."""
    words = [
        "annotate",
        "--problems",
        files["problems"],
        "--policy",
        policy,
        "--output_dir",
        "run",
        *SETTINGS,
        "--dry_run",
    ]
    assert main([*words, "--final_stops", ""]) == 0
    assert main([*words, "--final_stops", "# END!", ""]) == 1
    assert "`final_stops` contains an empty string" in capsys.readouterr().err
