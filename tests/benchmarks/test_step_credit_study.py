"""The study of step credits: measurements by hand, differences and hacking gaps of planted curves, and a short run of the study."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from trl_hrm import StepFormat, StepReward, StepScorer
from trl_hrm.demo.world import Problem, judge
from trl_hrm.search.engines.base import Sample
from trl_hrm.step_credit import CREDITS

from ..fakes import byte_level
from ..helpers import tiny_model


RIGHT = "a:4+3=2\n\nb:2*2=4\n\nc:4-3=1\n\nd:1*3=3\n\n# Answer\n3"
CORRECTED = "a:4+3=2\n\nb:1*2=2\n\nWait,b:2*2=4\n\nc:4-3=1\n\nd:1*3=3\n\n# Answer\n3"
UNCORRECTED = "a:4+3=2\n\nb:1*2=2\n\nc:2-3=4\n\nd:4*3=2\n\n# Answer\n2"
SPURIOUS = "a:4+3=2\n\nWait,a:4+3=2\n\nb:2*2=4\n\nc:4-3=1\n\nd:1*3=3\n\n# Answer\n3"
CUT_OFF = "a:4+3=2\n\nb:2*2=4"
ONE_STEP = "# Answer\n3"  # rejected by the guard for too few steps
OTHER = "a:0+2=2\n\nb:2*2=4\n\nc:4+2=1\n\nd:1*3=3\n\n# Answer\n3"


@pytest.fixture(scope="module")
def scripts():
    """The scripts `step_credit_study` and `evidence`, which import their neighbours."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("step_credit_study"), importlib.import_module("evidence")
    sys.path.pop(0)


@pytest.fixture(scope="module")
def study(scripts):
    return scripts[0]


class PerfectScorer(StepScorer):
    """Reward model without errors: the score is 1 if the step is on track, otherwise 0."""

    def score(self, prompts, candidates, **settings):
        return [
            [[float(one.on_track) for one in judge(Problem.parse(prompt), steps)] for steps in solutions]
            for prompt, solutions in zip(prompts, candidates, strict=True)
        ]


def perfect_reward() -> StepReward:
    tokenizer = byte_level()
    return StepReward(PerfectScorer(tiny_model(vocab_size=len(tokenizer)), tokenizer, StepFormat()))


class TestMeasure:
    def test_by_hand(self, study, tmp_path, monkeypatch):
        """16 planted solutions of two problems. With a perfect reward model, process reward and checker's reward are equal."""
        file = tmp_path / "test.jsonl"
        problems = ["Start with 4. a+3 b*2 c-3 d*3. Work modulo 5.", "Start with 0. a+2 b*2 c+2 d*3. Work modulo 5."]
        file.write_text("".join(json.dumps({"problem": text, "answer": "3"}) + "\n" for text in problems))
        held_out = study.HeldOut(None, perfect_reward(), str(file))
        planted = [RIGHT, RIGHT, RIGHT, CORRECTED, UNCORRECTED, SPURIOUS, CUT_OFF, ONE_STEP] + 8 * [OTHER]
        finish = ["length" if text == CUT_OFF else "eos" for text in planted[:-1]] + [
            "length"
        ]  # the last one has an answer
        samples = [Sample([0] * len(text), text, reason) for text, reason in zip(planted, finish, strict=True)]
        rows = [row for row in held_out.problems for _ in range(study.NUM_SAMPLES)]
        monkeypatch.setattr(held_out, "sample", lambda model: list(zip(rows, samples, strict=True)))
        found = held_out.measure(None)
        assert found["right"] == [6 / 8, 1.0]  # all but UNCORRECTED and CUT_OFF
        assert found["process"] == [5 / 8, 1.0]  # all steps on track, but ONE_STEP is rejected
        assert found["checker"] == np.mean(found["process"]) == 13 / 16
        assert found["num_steps"] == (3 * 5 + 6 + 5 + 6 + 2 + 1 + 8 * 5) / 16
        assert found["num_tokens"] == sum(map(len, planted)) / 16
        assert found["slips"] == pytest.approx(2 / (3 * 4 + 4 + 4 + 4 + 2 + 8 * 4))
        assert found["corrected"] == 1 / 2 and found["spurious"] == pytest.approx(1 / 56)
        assert found["waits"] == 2 / 16
        assert found["invalid"] == 0
        assert found["unfinished"] == 2 / 16
        assert found["guarded"] == 1 / 16
        assert found["example"] == RIGHT

    @pytest.mark.parametrize(
        "step, expected",
        [
            ("b:2*2=4", True),
            ("b:1*2=2", True),  # a wrong value, but the operation of the problem
            ("Wait,b:2*2=4", True),
            ("b:2*2=3", False),
            ("b:2*3=1", False),
            ("b:2+2=4", False),
            ("b:2*2=4 ", False),
            ("# Answer\n3", False),
        ],
    )
    def test_operations(self, study, step, expected):
        problem = Problem.parse("Start with 4. a+3 b*2 c-3 d*3. Work modulo 5.")
        assert study.is_operation(problem, step) is expected

    def test_outcome_reward(self, study):
        completions = [RIGHT, UNCORRECTED, CUT_OFF, CORRECTED]
        assert study.accuracy(completions=completions, answer=4 * ["3"], prompts=[]) == [1.0, 0.0, 0.0, 1.0]


def curve_of(accuracies, process, steps=(0, 5, 10)):
    """Return a curve whose problems all have the given accuracies and process rewards."""
    return [
        {"step": step, "right": [right] * 40, "process": [reward] * 40}
        for step, right, reward in zip(steps, accuracies, process, strict=True)
    ]


class TestComparisons:
    def test_accuracies(self, study):
        """The mean over training is the area under the curve: (0.2 + 0.6) / 2 for 5 steps, (0.6 + 1) / 2 for 15."""
        curves = [
            curve_of([0.2, 0.6, 1.0], [0, 0, 0], steps=(0, 5, 20)),
            curve_of([0.2, 0.2, 0.2], [0, 0, 0], (0, 5, 20)),
        ]
        assert study.accuracies(curves, "last").tolist() == [40 * [1.0], 40 * [0.2]]
        assert study.accuracies(curves, "training") == pytest.approx(np.array([40 * [0.7], 40 * [0.2]]))

    def test_settled(self, study):
        """Both intervals must be on the same side of 0: the one over problems and the one over seeds."""
        rng = np.random.default_rng(0)
        base = rng.random((3, 200)) * 0.2 + 0.4
        better = base + np.array([[0.2], [0.21], [0.22]])
        assert study.compare(better, base).direction == "above"
        assert study.compare(base, better).direction == "below"
        assert study.compare(base, better).mean == pytest.approx(-0.21)
        # The same mean, but one seed decides
        uneven = base + np.array([[0.0], [0.03], [0.6]])
        assert study.compare(uneven, base).low > 0 and study.compare(uneven, base).direction == ""
        # The same in all seeds, but few problems decide
        few = np.zeros((3, 40))
        few[:, 0] = 1.0
        assert study.compare(few, np.array([[0.0], [0.001], [0.002]]) + np.zeros((3, 40))).direction == ""
        assert study.compare(better[:2], base[:2]).direction == ""  # two seeds have no interval

    @pytest.mark.parametrize(
        "accuracies, process, answer",
        [
            ((0.6, 0.9, 0.4), (0.3, 0.4, 0.8), "yes"),
            ((0.6, 0.9, 0.4), (0.3, 0.4, 0.1), "no"),  # not rewarded for it
            ((0.6, 0.8, 0.95), (0.3, 0.4, 0.8), "no"),
            ((0.6, 0.9, 0.89), (0.3, 0.4, 0.8), "open"),
        ],
    )
    def test_hacking(self, study, accuracies, process, answer):
        found = study.hacking([curve_of(accuracies, process)] * 3)
        assert found["answer"] == answer
        best = int(np.argmax(accuracies[:-1]))
        assert found["loss"] == pytest.approx(accuracies[best] - accuracies[-1])
        assert found["from_step"] == (0, 5, 10)[best]
        assert found["rise"] == pytest.approx(process[-1] - process[best])

    def test_every_pair(self, study):
        """Each step credit against outcome only and against one reward per completion, with the same outcome reward."""
        assert set(study.TITLES) == set(CREDITS)
        assert len(study.ARMS) == 1 + 2 * len(CREDITS)
        pairs = [pair for group in study.COMPARISONS.values() for pair in group]
        assert len(pairs) == len(set(pairs)) == 2 * len(CREDITS) + 2 * (len(CREDITS) - 1)
        for ours, theirs in pairs:
            first, second = study.ARMS[ours], study.ARMS[theirs]
            assert second.credit is None or (second.credit == "outcome" and first.has_outcome == second.has_outcome)
            assert first.credit not in (None, second.credit)

    def test_verdicts(self, study):
        """A difference in the wrong direction or an unsettled one must not be shown as an improvement."""
        before = [0.5, 0.5, 0.5]
        planted = {
            "outcome_only": [(0.5, 0.7, 0.8), (0.5, 0.7, 0.79), (0.5, 0.7, 0.81)],
            "outcome+outcome": [(0.5, 0.7, 0.8), (0.5, 0.7, 0.80), (0.5, 0.7, 0.80)],
            "outcome+min_form": [(0.5, 0.7, 0.99), (0.5, 0.7, 0.99), (0.5, 0.7, 0.98)],
            "min_form": [(0.5, 0.7, 0.2), (0.5, 0.7, 0.21), (0.5, 0.7, 0.19)],
        }
        curves = {name: [curve_of(one, before) for one in runs] for name, runs in planted.items()}
        table, _, verdicts = study.comparison(curves)
        assert (
            "- outcome and process against outcome only, at the end: higher: min_form; not settled: scalar\n"
            in verdicts
        )
        assert "- outcome and process, step credits against scalar, at the end: higher: min_form\n" in verdicts
        assert "- process only against outcome only, at the end: lower: min_form\n" in verdicts
        assert "process only, step credits" not in verdicts  # one side is missing
        # 19, 20 and 17 points at the end. Over training a quarter of it: half a trapezoid of 5 of the 10 steps
        row = next(line for line in table.splitlines() if line.startswith("| outcome + min_form − outcome only |"))
        assert "| +18.7 (" in row and "| +4.7 (" in row


def test_the_section_is_kept(scripts):
    """`benchmarks/evidence.py` writes the page again without it otherwise."""
    study, evidence = scripts
    assert study.HEADING in [f"## {title}" for title in evidence.KEPT]


@pytest.fixture(scope="module")
def short(study, tmp_path_factory):
    """A short run: three arms, two seeds. Returns its results and its folder."""
    folder = tmp_path_factory.mktemp("study")
    docs = folder / "docs"
    (docs / "images").mkdir(parents=True)
    (docs / "evidence.md").write_text("# Evidence\n\n## What would need a GPU\n\nMuch.\n", encoding="utf-8")
    options = [
        "--output_dir",
        str(folder / "out"),
        "--docs",
        str(docs),
        "--arms",
        "outcome_only",
        "outcome+min_form",
        "outcome",
    ]
    sizes = [
        "--seeds",
        "0",
        "1",
        "--max_steps",
        "20",
        "--policy_steps",
        "700",
        "--reward_steps",
        "100",
        "--num_test",
        "40",
    ]
    args = study.make_parser().parse_args([*options, *sizes])
    study.main(args)
    return json.loads((folder / "out" / "results.json").read_text("utf-8")), folder, args


@pytest.mark.slow
class TestShortRun:
    def test_curves(self, study, short):
        """All arms start from the same policy, and are measured at the same steps."""
        results = short[0]
        assert list(results["curves"]) == ["outcome_only", "outcome+min_form", "outcome"]
        for curves in results["curves"].values():
            assert len(curves) == 2
            for curve in curves:
                assert [point["step"] for point in curve] == [0, 2, 4, 8, 12, 16, 20]
                assert curve[0]["right"] == results["before"]["right"]
                assert "greedy" in curve[-1] and all(len(point["process"]) == 40 for point in curve)
        ends = [curve[-1]["right"] for curves in results["curves"].values() for curve in curves]
        assert len({tuple(end) for end in ends}) == 6  # no arm or seed was run twice

    def test_training_helps(self, study, short):
        """With an outcome reward, accuracy rises. Without it, the process reward does."""
        results = short[0]
        before = np.array([results["before"]["right"]] * 2)
        for name in ("outcome_only", "outcome+min_form"):
            difference = study.compare(study.accuracies(results["curves"][name], "last"), before)
            assert difference.low > 0.05, name
        for curve in results["curves"]["outcome"]:
            assert np.mean(curve[-1]["process"]) > np.mean(curve[0]["process"]) + 0.02

    def test_section(self, study, short):
        """The page has the section before its last one. Its tables have a row per arm, with the numbers of the results."""
        results, folder, _ = short
        page = (folder / "docs" / "evidence.md").read_text("utf-8")
        assert page.index(study.HEADING) < page.index("## What would need a GPU")
        assert (folder / "docs" / study.PICTURE).read_bytes().startswith(b"\x89PNG")
        for name, curves in results["curves"].items():
            shares = [100 * np.mean(curve[-1]["right"]) for curve in curves]
            assert (
                f"| {study.ARMS[name].title} | {np.mean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f}) |"
                in page
            )

    def test_resume(self, study, short, capsys):
        """The same command repeats nothing and writes the same results."""
        results, folder, args = short
        study.main(args)
        again = json.loads((folder / "out" / "results.json").read_text("utf-8"))
        assert again == results
