"""`trl-hrm solve`: boards of a file, what is said about the answers, and input that does not fit."""

import json
from contextlib import nullcontext

import pytest
import torch

from trl_hrm import SolveConfig, solve
from trl_hrm.reasoning import MAZE_VOCAB, HrmGridConfig, HrmGridForSolving, sudoku_vocab
from trl_hrm.reasoning.grid_solving import read_boards
from trl_hrm.scripts.reason import MARK
from trl_hrm.scripts.solve import read_puzzles


SOLVED = ["1234", "3412", "2143", "4321"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that repeats the puzzle: the only information that reaches the answer is the symbol of the same cell."""
    torch.manual_seed(0)
    config = HrmGridConfig.preset(
        "one_pass", vocab=sudoku_vocab(4), height=4, width=4, hidden_size=16, num_attention_heads=2, H_layers=1, L_layers=0
    )  # fmt: skip
    model = HrmGridForSolving(config)
    with torch.no_grad():
        for parameter in model.H_module.parameters():
            parameter.zero_()
        model.z_H_init.zero_()
        model.embed_tokens.weight.copy_(torch.eye(6, 16))
        model.lm_head.weight.copy_(torch.eye(6, 16))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path):
    def write(text, name="puzzles.txt"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_blocks_and_lines(model, write):
    # a board of one line after a block, spaces in a row, and no line break at the end
    file = write("12 34\n34 12\n\n2143\n4321\n1.3.\n.4.2\n\n\n" + "".join(SOLVED))
    with pytest.raises(ValueError, match=rf"{file}:1: .* 2 x 4 cells"):
        solve(SolveConfig(model=str(model), file=file))
    file = write("1234\n34 12\n2143\n4321\n\n" + "".join(SOLVED) + "\n" + "".join(SOLVED))
    found = solve(SolveConfig(model=str(model), file=file))
    assert [puzzle.where for puzzle in found.puzzles] == [f"{file}:1", f"{file}:6", f"{file}:7"]
    assert [puzzle.rows for puzzle in found.puzzles] == [SOLVED] * 3
    assert [solution.answer for solution in found.solutions] == [SOLVED] * 3
    assert "3 of 3 answers are valid solutions." in str(found)


def test_invalid_answers_are_reported(model, write):
    # the answer of the fake model to a blank is a blank, so the board is not solved
    found = solve(SolveConfig(model=str(model), file=write("1234\n3412\n2143\n432.")))
    assert found.solutions[0].valid is False
    assert "This answer is wrong: a row, column or box does not have each digit once." in str(found)
    assert "0 of 1 answers are valid solutions." in str(found)


def test_rows_of_mazes_keep_their_spaces():
    config = HrmGridConfig(vocab=MAZE_VOCAB, height=3, width=5, hidden_size=8, num_attention_heads=1)
    text = "#####\n#S G#\n#####\n\n######S G######\n"
    found = read_puzzles(text, "mazes.txt", config)
    assert [puzzle.rows for puzzle in found] == [["#####", "#S G#", "#####"]] * 2
    assert [puzzle.where for puzzle in found] == ["mazes.txt:1", "mazes.txt:5"]


def test_output_has_every_segment(model, write, tmp_path):
    output = tmp_path / "answers.jsonl"
    file = write("\n".join(SOLVED))
    solve(SolveConfig(model=str(model), file=file, segments=3, output=str(output)))
    [row] = map(json.loads, output.read_text().splitlines())
    assert row["source"] == f"{file}:1"
    assert row["puzzle"] == row["answer"] == SOLVED
    assert len(row["segments"]) == len(row["q_halt"]) == 3
    solve(SolveConfig(model=str(model), file=file, output=str(output)))  # replaces an earlier run
    output.write_text("notes")
    with pytest.raises(FileExistsError, match="has no answers"):
        solve(SolveConfig(model=str(model), file=file, output=str(output)))
    assert output.read_text() == "notes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1234\n34x2\n2143\n4321", r":1: .*row 2, column 3 is 'x'"),
        ("\n\n1234\n341\n2143\n4321", r":3: .*row 2 has 3 cells"),
        ("1234\n3412\n2143\n4321\n1234", r":1: .*5 x 4 cells"),
        (".1.1\n....\n....\n....", r":1: .*the digit 1 is given twice in row 1"),
        ("\n \n", "found no boards"),
    ],
)
def test_bad_boards(model, write, text, message):
    file = write(text)
    with pytest.raises(ValueError, match=message) as error:
        solve(SolveConfig(model=str(model), file=file))
    assert str(error.value).startswith(file)


@pytest.mark.parametrize(
    ("maze", "message"),
    [
        ("S  #G", None),
        ("S   #", "0 cells with 'G', expected 1"),
        ("SS G#", "2 cells with 'S', expected 1"),
        ("SooG#", "2 cells with 'o', expected 0"),
    ],
)
def test_mazes_need_a_start_and_a_goal(maze, message):
    """The model would answer such a maze like any other, and the answer would look like a path."""
    config = HrmGridConfig.preset("loop", vocab=MAZE_VOCAB, height=1, width=5, hidden_size=16, num_attention_heads=2)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        read_boards(maze.splitlines(), config)


def test_unusable_device(model, write):
    """PyTorch's own errors would be reported as a bug of this package."""
    with pytest.raises(ValueError, match="`device` is 'gpu0', which cannot be used: .* Set it to auto or cpu"):
        solve(SolveConfig(model=str(model), file=write("\n".join(SOLVED)), device="gpu0"))


def test_seed_without_effect():
    with pytest.raises(ValueError, match="`seed` has no effect"):
        SolveConfig(model="m", file="f", seed=3)
    SolveConfig(model="m", file="f", seed=3, votes=2)


def test_folder_of_a_study(model, write, tmp_path):
    # the command is used with the folder of `trl-hrm reason`, whose model is in a folder
    run = tmp_path / "run"
    run.mkdir()
    (run / MARK).write_text("{}")  # the first file of a study
    file = write("\n".join(SOLVED))
    with pytest.raises(ValueError, match="not finished"):
        solve(SolveConfig(model=str(run), file=file))
    (run / "results.json").write_text("{}")  # of a study with only `one_pass`, which is finished
    with pytest.raises(ValueError, match="has no model, because none of its systems is recurrent"):
        solve(SolveConfig(model=str(run), file=file))
    (run / "model").symlink_to(model)
    assert solve(SolveConfig(model=str(run), file=file)).solutions[0].answer == SOLVED


def test_other_models_are_refused(write, tmp_path):
    # transformers only warns, and would initialize all weights
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2', expected 'hrm_grid'"):
        solve(SolveConfig(model=str(tmp_path), file=write("1")))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hrm_grid", "auto_map": True}))
    with pytest.raises(ValueError, match="config.json is damaged"):
        solve(SolveConfig(model=str(tmp_path), file=write("1")))


def test_missing_model(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        solve(SolveConfig(model=str(tmp_path / "none"), file=write("1")))
