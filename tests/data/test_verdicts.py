"""Labels and columns of votes, against hand-written examples and a slow reference."""

import random
from fractions import Fraction

import pytest

from trl_hrm.data.verdicts import Verdict, read_verdicts
from trl_hrm.intervals import wilson_interval

from ..fakes import write_rows


def verdict(*votes, steps=4):
    return Verdict("p", tuple(f"n{i}" for i in range(steps)), votes)


@pytest.mark.parametrize(
    ("votes", "first_error", "labels"),
    [
        ((-1, -1, -1), -1, [1, 1, 1, 1]),
        ((2, 2, 2), 2, [1, 1, 0, None]),
        ((0, 0, None), 0, [0, None, None, None]),
        ((2, 2, -1), 2, [1, 1, 1 / 3, None]),  # one vote reaches the last step, but the verdict has ended
        ((-1, -1, 1), -1, [1, 2 / 3, 1, 1]),
        ((1, 3, 3), 3, [1, 2 / 3, 1, 0]),
        # undecided: the label of the earliest place among the most frequent ones is the last one
        ((1, 2), None, [1, 0.5, None, None]),
        ((-1, 1), None, [1, 0.5, None, None]),
        ((3, 3, -1, -1, 0), None, [0.8, 1, 1, 0.5]),
        ((None, None), None, [None] * 4),
        ((None, -1), -1, [1, 1, 1, 1]),
    ],
)
def test_labels(votes, first_error, labels):
    found = verdict(*votes)
    assert found.first_error == first_error
    assert found.labels() == labels


def plain_labels(votes, num_steps):
    """Follow each vote step by step: it passes steps until the one that it names, and then stops."""
    readable = [vote for vote in votes if vote is not None]
    counts = {vote: readable.count(vote) for vote in readable}
    tops = [vote for vote in counts if counts[vote] == max(counts.values())]
    ends = [vote for vote in tops if vote != -1]
    passed, stopped = [0] * num_steps, [0] * num_steps
    for vote in readable:
        for step in range(num_steps):
            if step == vote:
                stopped[step] += 1
                break
            passed[step] += 1
    labels = []
    for step in range(num_steps):
        reached = passed[step] + stopped[step]
        is_open = not ends or step <= min(ends)
        labels.append(float(Fraction(passed[step], reached)) if reached and is_open else None)
    return labels


def test_labels_equal_a_slow_reference():
    rng = random.Random(0)
    for _ in range(500):
        steps = rng.randrange(1, 6)
        votes = [rng.choice([None, *range(-1, steps)]) for _ in range(rng.randrange(0, 8))]
        assert verdict(*votes, steps=steps).labels() == plain_labels(votes, steps), votes


def test_columns():
    found = verdict(2, 2, None, -1).columns()
    assert found == {
        "problem_id": "p",
        "node_ids": ["n0", "n1", "n2", "n3"],
        "judge_votes": [2, 2, None, -1],
        "judge_first_error": 2,
        "judge_agreement": 2 / 3,
        "judge_low": wilson_interval(2, 3)[0],
        "judge_high": wilson_interval(2, 3)[1],
    }
    assert [verdict(1, 2).columns()[f"judge_{name}"] for name in ("first_error", "agreement", "low")] == [None] * 3


def test_read_verdicts(tmp_path):
    folder = tmp_path / "judges" / "judge"
    folder.mkdir(parents=True)
    for name, option in (("judge", "` to the end"), ("other", " --name other` to the end")):
        with pytest.raises(FileNotFoundError, match=f"Run `trl-hrm judge {tmp_path}{option}"):
            list(read_verdicts(tmp_path, name))
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [1.0, None]} | verdict(0, None, steps=2).columns()
    write_rows(folder / "verdicts.jsonl", [row])
    assert list(read_verdicts(tmp_path)) == [verdict(0, None, steps=2)]
    for change, message in (({"judge_votes": [2]}, "vote 2 for 2 steps"), ({"node_ids": []}, "for 0 steps")):
        write_rows(folder / "verdicts.jsonl", [row, row | change])
        with pytest.raises(ValueError, match=rf"verdicts\.jsonl:2: .*{message}"):
            list(read_verdicts(tmp_path))
