"""Evaluation of grid puzzles: what counts as right, strategies that see no labels, and intervals over puzzles and seeds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trl_hrm.reasoning.evaluate import (
    Estimate,
    GridPredictions,
    by_group,
    cell_accuracy,
    choose_by_q,
    estimate,
    exact,
    first_halt,
    fixed,
    predict,
)


class CountingModel(torch.nn.Module):
    """
    Fake model of 1x3 boards with 5 symbols. After segment s, the answer of each cell is `(puzzle + s + 10 * id) mod 5`, and the halting
    logit is s minus the first symbol of the puzzle.
    """

    def __init__(self, num_puzzle_ids=1):
        super().__init__()
        self.config = SimpleNamespace(
            halt_max_steps=2, height=1, width=3, seq_len=3, vocab_size=5, num_puzzle_ids=num_puzzle_ids
        )
        self.device = torch.device("cpu")
        self.batch_sizes = []

    def forward(self, input_ids, puzzle_ids=None, z_H=None, z_L=None):
        assert not self.training and torch.is_inference_mode_enabled()
        self.batch_sizes.append(len(input_ids))
        z_H = torch.zeros(len(input_ids)) if z_H is None else z_H
        z_H = z_H + 1
        shift = 0 if puzzle_ids is None else puzzle_ids[:, None]
        answers = (input_ids + z_H[:, None].long() + shift) % 5
        return SimpleNamespace(
            logits=torch.nn.functional.one_hot(answers, 5).float(),
            q_halt_logits=z_H - input_ids[:, 0],
            z_H=z_H,
            z_L=z_L,
        )


ROWS = [{"puzzle": [1, 2, 3]}, {"puzzle": [2, 0, 4]}, {"puzzle": [4, 4, 4]}]


def predictions(answers, q_halt):
    return GridPredictions(np.array(answers, np.uint8), np.array(q_halt, np.float32))


class TestPredict:
    def test_states_are_carried_and_the_batch_size_does_not_matter(self):
        # catches states that leak into the next batch, and states that are reset in each segment
        model = CountingModel()
        found = predict(model, ROWS, segments=3, batch_size=2)
        assert model.batch_sizes == [2, 2, 2, 1, 1, 1]
        boards = np.array([row["puzzle"] for row in ROWS])
        for segment in range(3):
            assert (found.answers[segment] == (boards + segment + 1) % 5).all()
        assert found.q_halt.tolist() == [[0, -1, -3], [1, 0, -2], [2, 1, -1]]
        assert found.answers.dtype == np.uint8 and found.q_halt.dtype == np.float32
        assert (predict(CountingModel(), ROWS, segments=3).answers == found.answers).all()

    def test_default_segments_and_mode(self):
        model = CountingModel().train()
        assert predict(model, ROWS).answers.shape == (2, 3, 3)
        assert model.training

    def test_labels_are_not_read(self):
        # an oracle: rows whose solutions cannot be read at all give the same answers
        class Row(dict):
            def __getitem__(self, name):
                assert name != "solution"
                return super().__getitem__(name)

        rows = [Row(row, solution=[1, 1, 1]) for row in ROWS]
        assert (predict(CountingModel(), rows).answers == predict(CountingModel(), ROWS).answers).all()

    def test_puzzle_ids(self):
        rows = [row | {"puzzle_id": name} for row, name in zip(ROWS, "bab", strict=True)]
        index = {"a": 1, "b": 2}
        found = predict(CountingModel(3), rows, segments=1, puzzle_index=index)
        assert found.answers[0, :, 0].tolist() == [(1 + 1 + 2) % 5, (2 + 1 + 1) % 5, (4 + 1 + 2) % 5]
        with pytest.raises(ValueError, match="1 puzzle ids are unknown to the model, such as 'b'"):
            predict(CountingModel(3), rows, puzzle_index={"a": 1})
        with pytest.raises(ValueError, match="puzzle_index"):
            predict(CountingModel(3), rows)

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([], {}, "`rows` is empty"),
            ([{"puzzle": [1, 2]}], {}, "Row 0 has a puzzle of 2 cells"),
            ([ROWS[0], {"puzzle": [1, 2, 5]}], {}, "Row 1 has symbol ids from 1 to 5"),
            ([ROWS[0], {"puzzle": [1, 2, -1]}], {}, "Row 1 has symbol ids from -1 to 2"),
            ([ROWS[0], {"puzzle": [1, 2, 2.5]}], {}, "of the type float64. Expected integers"),
            (ROWS, {"segments": 0}, "`segments` is 0"),
            (ROWS, {"batch_size": 0}, "`batch_size` is 0"),
        ],
    )
    def test_bad_input(self, rows, options, message):
        with pytest.raises(ValueError, match=message):
            predict(CountingModel(), rows, **options)


class TestAccuracy:
    def test_padding_never_counts(self):
        # a board that is "right" because of its padding, or wrong because of what the model writes there
        solutions = np.array([[2, 3, 0, 0], [2, 3, 4, 5]], np.uint8)
        answers = np.array([[[2, 3, 7, 9], [2, 3, 4, 0]], [[2, 4, 0, 0], [2, 3, 4, 5]]], np.uint8)
        assert exact(answers, solutions).tolist() == [[True, False], [False, True]]
        assert cell_accuracy(answers, solutions).tolist() == [[1.0, 0.75], [0.5, 1.0]]

    def test_a_solution_of_padding_is_refused(self):
        # without labels, "all cells are right" would be true
        with pytest.raises(ValueError, match="row 1 has only padding cells"):
            exact(np.ones((2, 2), np.uint8), np.array([[1, 0], [0, 0]]))

    def test_shapes(self):
        with pytest.raises(ValueError, match="shape"):
            exact(np.ones((2, 3), np.uint8), np.ones((3, 3), np.uint8))


class TestStrategies:
    found = predictions(
        [[[1, 1], [1, 2], [1, 3]], [[2, 1], [2, 2], [2, 3]], [[3, 1], [3, 2], [3, 3]]],
        [[-1, 0.5, -3], [0.1, 2, -1], [-2, 2, -2]],
    )

    @pytest.mark.parametrize(
        ("strategy", "segments"), [(fixed, [3, 3, 3]), (first_halt, [2, 1, 3]), (choose_by_q, [2, 2, 2])]
    )
    def test_chosen_segment(self, strategy, segments):
        # ties: puzzle 1 has the same logit in segments 2 and 3; puzzle 2 never halts
        answers, found = strategy(self.found)
        assert found.tolist() == segments
        assert answers.tolist() == [[segment, puzzle + 1] for puzzle, segment in enumerate(segments)]

    def test_fixed_number(self):
        assert fixed(self.found, 1)[0].tolist() == [[1, 1], [1, 2], [1, 3]]
        for segments in (0, 4):
            with pytest.raises(ValueError, match=f"`segments` is {segments}"):
                fixed(self.found, segments)

    def test_limit(self):
        assert choose_by_q(self.found.up_to(1))[1].tolist() == [1, 1, 1]


class TestIntervals:
    def test_one_seed_is_wilson(self):
        found = estimate(np.array([[0, 1, 1, 1]]))
        assert found.mean == 0.75
        assert (found.low, found.high) == pytest.approx((0.300642, 0.954413), abs=1e-6)

    def test_seeds_widen_the_interval(self):
        # 2 seeds of 10 puzzles: 0.5 and 0.9. Half-width over seeds: 12.706 * 0.2 = 2.54, so all of [0, 1]
        values = np.zeros((2, 10))
        values[0, :5] = values[1, :9] = 1
        found = estimate(values)
        assert found == Estimate(pytest.approx(0.7), 0.0, 1.0, (0.5, 0.9))
        # 3 seeds: 0.5, 0.6, 0.7 of 10 puzzles
        values = np.array([[1] * 5 + [0] * 5, [1] * 6 + [0] * 4, [1] * 7 + [0] * 3])
        found = estimate(values)
        half = 4.303 * 0.1 / 3**0.5
        alone = estimate(values.mean(0, keepdims=True))
        assert found.mean - found.low == pytest.approx(np.hypot(alone.mean - alone.low, half))

    def test_all_or_none_has_width(self):
        # a bootstrap would say "100 % +- 0" after 20 puzzles
        assert estimate(np.ones((3, 20))).low == pytest.approx(1 - 3.8416 / 23.8416, abs=1e-3)
        assert estimate(np.zeros((3, 20))).high == pytest.approx(3.8416 / 23.8416, abs=1e-3)

    def test_verdicts(self):
        better = np.ones((3, 50))
        assert estimate(better, is_difference=True).above() == "holds"
        assert estimate(-better, is_difference=True).above() == "does not hold"
        assert estimate(0 * better, is_difference=True).above() == "open"
        # "loses at most 5 points": a loss of 0 is settled with 200 puzzles, not with 50
        assert estimate(0 * better, is_difference=True).above(-0.05) == "open"
        assert estimate(np.zeros((3, 200)), is_difference=True).above(-0.05) == "holds"
        # two seeds settle nothing, however large the difference is
        assert estimate(better[:2], is_difference=True).above() == "open"

    def test_coverage(self):
        # an interval that ignores one of the two sources of variance covers far less than 95 %
        rng = np.random.default_rng(0)
        covered = 0
        for _ in range(300):
            puzzles, seeds = rng.normal(0, 1, 60), rng.normal(0, 0.7, 3)
            values = puzzles + seeds[:, None] + rng.normal(0, 1, (3, 60)) > 0
            found = estimate(values)
            covered += found.low <= 0.5 <= found.high
        assert covered >= 275

    def test_by_group(self):
        values = np.array([[1, 0, 1, 1], [1, 1, 0, 1]])
        found = by_group(values, [5, 3, 3, 5])
        assert {group: one.mean for group, one in found.items()} == {3: 0.5, 5: 1.0}
        assert found[3].seeds == (0.5, 0.5)
