"""Means over seeds, their intervals, and the verdicts from these intervals."""

import pytest

from trl_hrm.demo.over_seeds import Spread, interval, judge, judge_all, paired, signed, spread, told
from trl_hrm.pages.numbers import points_between


class TestSpread:
    def test_three_values_by_hand(self):
        """Mean 2, standard deviation 1, t(2) = 4.303. A normal quantile would give less than half the width."""
        found = spread([1.0, 2.0, 3.0])
        assert found.mean == 2
        assert found.high - 2 == 2 - found.low == pytest.approx(4.303 / 3**0.5)

    @pytest.mark.parametrize("number, quantile", [(6, 2.571), (10, 2.262), (31, 2.042), (400, 2.042)])
    def test_the_quantile_has_one_degree_less_than_values(self, number, quantile):
        """With the wrong degrees of freedom, all intervals would be slightly too narrow."""
        values = [0.0, 1.0] * (number // 2) + [0.5] * (number % 2)
        found = spread(values)
        variance = sum((value - 0.5) ** 2 for value in values) / (number - 1)
        assert found.high - found.mean == pytest.approx(quantile * (variance / number) ** 0.5)

    @pytest.mark.parametrize("values", [[0.5], [0.1, 0.9]])
    def test_few_seeds_have_no_interval(self, values):
        found = spread(values)
        assert not found.is_settled and found.low is None and found.mean == 0.5

    @pytest.mark.parametrize("values", [[0.5] * 3, [1.0] * 6, [0.0] * 4, [0.3 - 0.1, 0.2, 0.2]])
    def test_equal_values_have_no_interval(self, values):
        """An interval of zero width would settle every claim."""
        found = spread(values)
        assert not found.is_settled and found.low is found.high is None and judge(found) == "open"
        assert judge(Spread(tuple(values), values[0], values[0], values[0])) == "open"  # as stored by earlier versions


class TestPaired:
    def test_pairs_by_seed_and_not_by_place(self):
        """Paired by position, the differences would be 1, 0 and -1, also with mean 0: only the interval would be wrong."""
        found = paired([0, 1, 2], [1.0, 2.0, 3.0], [2, 1, 0], [2.0, 1.0, 0.0])
        assert found.values == (1.0, 1.0, 1.0) and found.mean == 1

    def test_seeds_of_one_alone_are_left_out(self):
        assert paired([0, 1, 7], [1.0, 2.0, 9.0], [1, 0, 8], [1.0, 1.0, 0.0]).values == (0.0, 1.0)

    def test_no_seed_in_common(self):
        with pytest.raises(ValueError, match=r"seeds \[0\] and \[1\]"):
            paired([0], [1.0], [1], [1.0])


class TestJudge:
    @pytest.mark.parametrize(
        "low, high, answer", [(0.01, 0.2, "held"), (-0.1, 0.2, "open"), (-0.3, -0.1, "not held"), (0.0, 0.2, "open")]
    )
    def test_by_the_interval(self, low, high, answer):
        assert judge(Spread((0.0,) * 3, 0.05, low, high)) == answer

    def test_few_seeds_settle_nothing(self):
        """Measurements with two seeds may come with intervals, but these are too unreliable to use."""
        assert judge(Spread((0.5, 0.5), 0.5, 0.4, 0.6)) == judge(spread([0.5])) == "open"

    @pytest.mark.parametrize(
        "answers, answer",
        [(["held", "held"], "held"), (["held", "open"], "open"), (["open", "not held"], "not held")],
    )
    def test_of_several_parts(self, answers, answer):
        assert judge_all(answers) == answer


class TestWords:
    def test_signs(self):
        assert [signed(value) for value in (1.25, -1.26, -0.001)] == ["+1.2", "−1.3", "+0.0"]

    def test_described(self):
        assert told(Spread((0.1,) * 3, 0.2, -0.05, 0.45)) == "+20.0 points (95 % interval over 3 seeds −5.0 to +45.0)"
        assert told(spread([-0.1, -0.1])) == "−10.0 points (2 seeds)"
        assert told(spread([0.5]), 1, "", 2) == "+0.50 (1 seed)"
        assert interval(spread([0.5])) == "–"

    def test_an_interval_below_0_does_not_look_as_if_it_contains_0(self):
        assert interval(Spread((-0.1,) * 3, -0.1, -0.2, -0.0001)) == "−20.0 to −0.0"
        assert interval(Spread((-0.1,) * 3, -0.1, -0.2, 0.0001)) == "−20.0 to +0.0"
        assert interval(Spread((-0.1,) * 3, -0.1, -0.2, -0.0)) == "−20.0 to +0.0"
        assert points_between(-0.2, -0.0001) == "−20.0 to −0.0"
        assert points_between(-0.2, -0.0) == "−20.0 to 0.0"
