"""The command `quickstart`: the first thing that a new user runs."""

import json
import random
import re

import pytest

from trl_hrm import HRMRewardTrainer, StepTree
from trl_hrm.cli import main
from trl_hrm.scripts.quickstart import NUM_HELD_OUT, QuickstartConfig, random_problem, solution_tree

from ..helpers import code_block


def test_labels_follow_from_the_texts():
    """A plain reading of the steps gives the labels: 1 for a right sum, 0 for the first wrong one, then none."""
    rng = random.Random(0)
    num_wrong = 0
    for _ in range(50):
        tree = solution_tree(*random_problem(rng), 8, rng)
        numbers = re.findall(r"\d", tree.prompt)
        for step in range(len(tree.labels)):
            path, is_wrong = tree.path(step), False
            for place, i in enumerate(path):
                left, result = tree.completions[i].split(" = ")
                first, _, operand = left.split()
                expected = numbers[0] if place == 0 else tree.completions[path[place - 1]][-1]
                assert first == expected and operand == numbers[place + 1]
                label, is_right = tree.labels[i], eval_sum(left) == int(result)
                assert label == (None if is_wrong else float(is_right))
                is_wrong = is_wrong or not is_right
            num_wrong += is_wrong
    assert num_wrong > 100


def eval_sum(text: str) -> int:
    first, operator, second = text.split()
    return int(first) + (int(second) if operator == "+" else -int(second))


def test_an_interrupted_second_run_leaves_no_untrained_model(tmp_path, monkeypatch, capsys):
    """The first run's step format next to new random weights would look like a trained model."""
    monkeypatch.chdir(tmp_path)
    assert main("quickstart --max_steps 2 --output_dir model".split()) == 0
    monkeypatch.setattr(HRMRewardTrainer, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main("quickstart --max_steps 2 --output_dir model".split()) == 130
    assert main("score model/solutions.jsonl --reward_model model".split()) == 1
    assert "step_format.json" in capsys.readouterr().err


@pytest.mark.parametrize("max_steps", [3, pytest.param(800, marks=pytest.mark.slow)])
def test_it_finds_the_wrong_step(tmp_path, monkeypatch, capsys, max_steps):
    """
    What the README says of its first command, with the scores of the command that it names next. After a few steps, the scores mean nothing,
    but the count and the commands must be right.
    """
    assert QuickstartConfig().max_steps == 800
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--max_steps", str(max_steps)]) == 0
    out = capsys.readouterr().out
    num_equal, total = map(int, re.search(r"step in (\d+) of (\d+) solutions", out).groups())
    assert total == NUM_HELD_OUT
    if max_steps == 800:
        assert num_equal >= 0.95 * total
    command = re.search(r"Next: trl-hrm (score .*)", out)[1].split()
    assert main([*command, "--output", "scored.jsonl"]) == 0
    rows = [json.loads(line) for line in open("scored.jsonl", encoding="utf-8")]
    right = 0
    for row in rows:
        wrong = [i for i, step in enumerate(row["completions"]) if eval_sum(step.split(" = ")[0]) != int(step[-1])]
        low = [i for i, score in enumerate(row["scores"]) if score < 0.5]
        right += wrong[:1] == low[:1]
    assert right == num_equal
    assert rows[0]["labels"] == StepTree.from_row(rows[0]).labels
    names: dict = {}
    exec(code_block("README.md", "StepScorer.from_pretrained"), names)
    [[scores]] = names["scores"]
    if max_steps == 800:
        assert [score > 0.5 for score in scores] == [True, False, True, True]
    assert len(scores) == 4 and all(0 < score < 1 for score in scores)


def test_bad_settings(capsys):
    assert main(["quickstart", "--max_steps", "0"]) == 1
    assert "`max_steps` is 0" in capsys.readouterr().err


@pytest.mark.parametrize("color", [False, True])
def test_colors_are_for_terminals(color):
    """Red for a low score, green for a high one, nothing for a step without one; control characters never reach the terminal."""
    from trl_hrm.scripts.score import format_scores

    tree = StepTree("a\x1b[31m?", ["x", "y", "z"], [None] * 3, [-1, 0, 1])
    lines = format_scores(tree, [0.01, 0.99, None], color).splitlines()
    assert "\x1b" not in lines[0] and lines[3] == "      -  z"
    assert lines[1] == ("  \x1b[38;5;160m0.010  x\x1b[0m" if color else "  0.010  x")
    assert lines[2] == ("  \x1b[38;5;34m0.990  y\x1b[0m" if color else "  0.990  y")
