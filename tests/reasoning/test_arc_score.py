"""Votes over augmented copies of ARC tasks, and the two scores that the papers use."""

from pathlib import Path

import numpy as np
import pytest
import torch

from trl_hrm.reasoning import ARC_VOCAB, HrmGridConfig, HrmGridForSolving, HrmGridOutput
from trl_hrm.reasoning.arc_score import ArcCandidate, ArcVotes, evaluate_arc, score_arc
from trl_hrm.reasoning.data.arc import SIZE, arc_rows, augment_grid, crop, pad, plan_arc, puzzle_name
from trl_hrm.reasoning.grid_solving import crop_arc, pad_arc


FIXTURE = Path(__file__).parents[1] / "fixtures" / "arc"


@pytest.fixture(scope="module")
def rows():
    """Test rows: two tasks with three test inputs, and 20 copies of each."""
    plan = plan_arc([str(FIXTURE)])
    return [row for task in plan.tasks for row in arc_rows(task, "test", num_augmentations=20)]


def row(task, puzzle, solution, code=0, colours="0123456789"):
    return {
        "puzzle_id": puzzle_name(task, code, colours),
        "puzzle": pad(augment_grid(np.array(puzzle, np.uint8), code, colours)),
        "solution": pad(augment_grid(np.array(solution, np.uint8), code, colours)),
    }


def answers_of(rows):
    return np.stack([row["solution"] for row in rows])


def count(rows, answers, q=None):
    votes = ArcVotes()
    votes.add(rows, answers, np.zeros(len(rows)) if q is None else q)
    return votes


class TestVotes:
    def test_order(self):
        """The number of votes comes first, then the mean probability, and not its sum or its maximum."""
        rows = [row("a", [[1]], [[2]], 0, "0" + "".join(map(str, np.roll(range(1, 10), i)))) for i in range(6)]
        grids = [[[2]], [[2]], [[3]], [[3]], [[4]], [[5]]]
        answers = np.stack(
            [
                row("a", [[1]], grid, 0, "0" + "".join(map(str, np.roll(range(1, 10), i))))["solution"]
                for i, grid in enumerate(grids)
            ]
        )
        q = np.array([5, -5, 1, 1, -2, 9.0])  # means of the sigmoids: 0.5 for [[2]], 0.73 for [[3]]
        votes = count(rows, answers, q)
        ((test_input, ranked),) = votes.ranked().items()
        assert test_input == ("a", ((1,),))
        assert [candidate.grid for candidate in ranked] == [((3,),), ((2,),), ((5,),), ((4,),)]
        assert [candidate.votes for candidate in ranked] == [2, 2, 1, 1]
        assert [candidate.q for candidate in ranked] == pytest.approx([0.731059, 0.5, 0.999877, 0.119203], abs=1e-6)

    def test_equivariant_solver(self, rows):
        """A solver whose answers turn with the puzzle gives every copy the same vote: all copies of a test input agree."""

        def half_turn(puzzle):
            return pad(np.rot90(crop(puzzle), 2))

        turn = [row for row in rows if row["group"] == "turn"]
        answers = np.stack([half_turn(row["puzzle"]) for row in turn])
        votes = count(turn, answers)
        ranked = votes.ranked()
        assert len(ranked) == 2
        for candidates in ranked.values():
            (candidate,) = candidates
            assert candidate.votes == 21
        assert score_arc(ranked, turn, attempts=1).tasks_solved == 1

    def test_the_order_of_rows_and_parts_does_not_matter(self, rows):
        rng = np.random.default_rng(0)
        answers = rng.permutation(answers_of(rows))
        q = rng.normal(size=len(rows)).astype(np.float32)
        expected = count(rows, answers, q).ranked()
        order = rng.permutation(len(rows))
        votes = ArcVotes()
        for part in np.array_split(order, 3):
            votes.add([rows[i] for i in part], answers[part], q[part])
        assert votes.ranked() == expected

    def test_solutions_are_not_seen(self, rows):
        """The votes and their order do not depend on the solutions: not even without the column."""
        rng = np.random.default_rng(0)
        answers = rng.permutation(answers_of(rows))
        q = rng.normal(size=len(rows))
        shuffled = [row | {"solution": other["solution"]} for row, other in zip(rows, rows[::-1], strict=True)]
        without = [{name: row[name] for name in ("puzzle_id", "puzzle")} for row in rows]
        expected = count(rows, answers, q).ranked()
        assert count(shuffled, answers, q).ranked() == count(without, answers, q).ranked() == expected

    def test_answers_that_are_no_grid(self):
        """They are counted and have no vote. A test input without votes is not solved, and not left out of the score."""
        rows = [row("a", [[1]], [[2]]), row("b", [[1]], [[2]])]
        answers = answers_of(rows)
        answers[1] = 1
        votes = count(rows, answers)
        assert votes.empty_answers == 1
        score = score_arc(votes.ranked(), rows)
        assert (score.tasks_solved, score.unanswered, score.num_test_inputs) == (0.5, 1, 2)

    def test_cells_outside_of_the_answer_do_not_matter(self):
        """Padding cells are not trained, so an answer may have anything there."""
        rows = [row("a", [[1]], [[2]])]
        answers = answers_of(rows)
        answers[0, answers[0] == 0] = 7
        assert score_arc(count(rows, answers).ranked(), rows).tasks_solved == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q_halt": [np.nan]}, "row 0 is not a number"),
            ({"rows": [{"puzzle_id": "a|9|0123456789", "puzzle": pad(np.ones((1, 1), np.uint8))}]}, "expected `task`"),
            (
                {"rows": [{"puzzle_id": puzzle_name("a"), "puzzle": pad(np.ones((1, 1), np.uint8), 3, 3)}]},
                "`puzzle` of a row with the id a.* has no grid in its upper left corner",
            ),
            ({"q_halt": [0.0, 0.0]}, "zip"),
            ({"rows": []}, "zip"),
        ],
    )
    def test_bad_input(self, change, message):
        good = [row("a", [[1]], [[2]])]
        with pytest.raises(ValueError, match=message):
            ArcVotes().add(**{"rows": good, "answers": answers_of(good), "q_halt": [0.0]} | change)


class TestScore:
    def test_two_scores(self):
        """Task `a` has two test inputs, and one of them is solved: HRM does not count the task, TRM counts one half."""
        rows = [row("a", [[1]], [[2]]), row("a", [[3]], [[4]]), row("b", [[1]], [[2]])]
        answers = answers_of(rows)
        answers[1] = answers[0]
        score = score_arc(count(rows, answers).ranked(), rows)
        assert score.tasks_solved == 1 / 2
        assert score.mean_share_of_test_inputs == 3 / 4
        assert (score.num_tasks, score.num_test_inputs, score.unanswered) == (2, 3, 0)
        assert score.solved == {"a": [True, False], "b": [True]}

    @pytest.mark.parametrize(("attempts", "solved"), [(1, 0), (2, 0), (3, 1)])
    def test_attempts(self, attempts, solved):
        """The right answer is the third one."""
        rows = [row("a", [[1]], [[2]])]
        ranked = {("a", ((1,),)): [ArcCandidate(((value,),), 1, 0.5) for value in (7, 5, 2)]}
        assert score_arc(ranked, rows, attempts).tasks_solved == solved

    def test_the_size_must_be_right(self):
        rows = [row("a", [[1]], [[2]])]
        answers = np.stack([pad(np.array([[2, 2]], np.uint8))])
        assert score_arc(count(rows, answers).ranked(), rows).tasks_solved == 0

    def test_right_answers_solve_everything(self, rows):
        score = score_arc(count(rows, answers_of(rows)).ranked(), rows)
        assert (score.tasks_solved, score.mean_share_of_test_inputs) == (1, 1)
        assert (score.num_tasks, score.num_test_inputs) == (2, 3)

    def test_bad_input(self):
        rows = [row("a", [[1]], [[2]])]
        ranked = count(rows, answers_of(rows)).ranked()
        with pytest.raises(ValueError, match="`attempts` is 0"):
            score_arc(ranked, rows, 0)
        with pytest.raises(ValueError, match="`rows` is empty"):
            score_arc(ranked, [])
        with pytest.raises(
            ValueError, match="1 test inputs are only in the answers or only in the rows, such as 1x2 cells of task b"
        ):
            score_arc(ranked, [*rows, row("b", [[1, 1]], [[2]])])
        with pytest.raises(ValueError, match="task a have different solutions, the second one with the id a|1|"):
            score_arc(ranked, [*rows, row("a", [[1]], [[3]], 1)])


def test_ids_are_the_ids_of_the_vocabulary():
    assert [ARC_VOCAB.symbols[cell] for cell in pad(np.array([[0, 9]], np.uint8))[:4]] == ["0", "9", "<eos>", "<pad>"]


def test_solving_pads_and_crops_in_the_same_way():
    """`solve` has its own functions, because it is pushed with the model and must run without this package."""
    rng = np.random.default_rng(0)
    for size in ((1, 1), (3, 5), (30, 4), (4, 30), (30, 30)):
        grid = rng.integers(0, 10, size).astype(np.uint8)
        assert pad_arc((grid + 2).tolist(), SIZE, SIZE) == pad(grid).reshape(SIZE, SIZE).tolist()
        answer = np.where(rng.random((SIZE, SIZE)) < 0.8, 3, rng.integers(0, 12, (SIZE, SIZE))).astype(np.uint8)
        found = [[cell - 2 for cell in line] for line in crop_arc(answer.tolist())]
        assert found == crop(answer.ravel()).tolist()


class TestWithAModel:
    """From rows to a score. The logits of the fake model are the solutions, if it is given the right puzzle ids."""

    class Model(torch.nn.Module):
        device = torch.device("cpu")
        config = HrmGridConfig(vocab=ARC_VOCAB.to_dict(), height=SIZE, width=SIZE, halt_max_steps=2, num_puzzle_ids=99)

        def __init__(self, rows):
            super().__init__()
            self.puzzle_index = {name: i for i, name in enumerate(dict.fromkeys(row["puzzle_id"] for row in rows), 1)}
            self.known = {
                (row["puzzle"].tobytes(), self.puzzle_index[row["puzzle_id"]]): torch.tensor(row["solution"]).long()
                for row in rows
            }

        def forward(self, boards, puzzle_ids, z_H, z_L):
            wrong = torch.full((SIZE * SIZE,), 2)
            answers = [
                self.known.get((board.numpy().astype(np.uint8).tobytes(), index), wrong)
                for board, index in zip(boards, puzzle_ids.tolist(), strict=True)
            ]
            logits = torch.nn.functional.one_hot(torch.stack(answers), 12).float()
            return HrmGridOutput(logits=logits, q_halt_logits=torch.zeros(len(boards)), z_H=z_H, z_L=z_L)

    def test_own_ids_and_blank_id(self, rows, monkeypatch):
        """The parts are joined, and the blank id is passed on."""
        monkeypatch.setattr("trl_hrm.reasoning.arc_score.ROWS_PER_PART", 10)
        model = self.Model(rows)
        assert evaluate_arc(model, rows, attempts=1).tasks_solved == 1
        assert evaluate_arc(model, rows, use_blank_id=True).mean_share_of_test_inputs == 0

    def test_unknown_ids(self, rows):
        model = self.Model(rows)
        del model.puzzle_index[rows[0]["puzzle_id"]]
        with pytest.raises(ValueError, match="unknown to the model"):
            evaluate_arc(model, rows)

    def test_model_without_ids(self, rows):
        config = HrmGridConfig(
            vocab=ARC_VOCAB.to_dict(), height=SIZE, width=SIZE, hidden_size=32, num_attention_heads=2,
            intermediate_size=32, H_layers=1, L_layers=1,
        )  # fmt: skip
        with pytest.raises(ValueError, match="no embedding of puzzle ids"):
            evaluate_arc(HrmGridForSolving(config), rows)
