"""The report: its statements about hand-written results, and the page in a real browser."""

import base64
import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes

from trl_hrm import ReportConfig, report
from trl_hrm.evaluation.curves import plain_curves
from trl_hrm.evaluation.report import accuracy_picture, scores_picture, ways_picture
from trl_hrm.evaluation.results import Results, format_results, load_results
from trl_hrm.evaluation.reward_hacking import Verdict
from trl_hrm.evaluation.saved_results import (
    curve_label,
    headline_verdict,
    notices,
    problem_groups,
    read_results,
    verdict,
)
from trl_hrm.pages import pictures
from trl_hrm.pages.numbers import percent
from trl_hrm.pages.pictures import reliability_picture

from .report_runs import (
    FINE,
    HACKED,
    MIN,
    PNG,
    PROBLEMS,
    STEP_ROWS,
    bare_page,
    benchmark,
    curve,
    gap_of,
    point,
    problem,
    selection,
    words_of,
    write,
)


DIFFERENT = ["reward_model model", "reward_model scorer"]


class TestReading:
    def test_names_and_scores(self, folders):
        bon, prm, judged = read_results(folders)
        assert (bon.name, prm.name, judged.name) == ("bon", "bon-prm", "processbench")
        assert bon.problems == prm.problems and len(bon.problems) == 3
        # the minimum of each solution; ungraded solutions are excluded, and one without an answer is wrong
        assert bon.scores == {"solutions (min of the step scores)": {"right": [0.2, 0.95], "wrong": [0.7, 0.4]}}
        assert judged.scores == {"steps of processbench": {"right": [0.9], "wrong": [0.1]}}

    def test_equal_names_become_paths(self, tmp_path):
        results = read_results([write(tmp_path / part / "bon", selection()) for part in "ab"])
        assert [result.name for result in results] == [f"{tmp_path}/a/bon", f"{tmp_path}/b/bon"]

    def test_a_step_search_has_candidates_for_each_n(self, tmp_path):
        """Sorted as text, n8 would come after n16."""
        folder = write(tmp_path, selection(strategy="step_search"), PROBLEMS[:1], "candidates-n16.jsonl")
        write(folder, selection(strategy="step_search"), PROBLEMS, "candidates-n8.jsonl")
        (result,) = read_results([folder])
        assert len(result.problems) == 1

    def test_a_custom_aggregate_is_not_drawn(self, tmp_path):
        (result,) = read_results([write(tmp_path, selection(settings={"aggregate": ["mine", "min"]}))])
        assert result.scores == {}

    @pytest.mark.parametrize(
        "prepare, error, message",
        [
            (lambda path: None, FileNotFoundError, "found no such folder, expected results.json"),
            (lambda path: path.mkdir(), FileNotFoundError, "found an empty folder, expected results.json"),
            (
                lambda path: (path.mkdir(), (path / "manifest.json").touch()),
                FileNotFoundError,
                "found manifest.json, expected results.json of `trl-hrm best-of-n`",
            ),
            (
                lambda path: write(path, {"accuracy": 1}),
                ValueError,
                r"results.json: found the keys \['accuracy'\], but \['strategy'",
            ),
            (lambda path: write(path, [1]), ValueError, r"found \[1\], expected a JSON object"),
            (
                lambda path: write(path, selection(), None),
                FileNotFoundError,
                "but no candidates.jsonl",
            ),
            (
                lambda path: (write(path, selection()), (path / "results.json").write_text('{"a": ')),
                ValueError,
                "results.json: not valid JSON",
            ),
            (
                lambda path: (write(path, selection()), (path / "candidates.jsonl").write_text('{"a": ')),
                ValueError,
                "candidates.jsonl:1: not valid JSON",
            ),
        ],
    )
    def test_folders_without_results(self, tmp_path, prepare, error, message):
        prepare(tmp_path / "run")
        with pytest.raises(error, match=message):
            read_results([tmp_path / "run"])

    def test_a_folder_given_twice(self, tmp_path):
        folder = write(tmp_path / "run", selection())
        with pytest.raises(ValueError, match="twice"):
            read_results([folder, tmp_path / "run" / ".." / "run"])


class TestVerdict:
    def verdict(self, tmp_path, **changes) -> Verdict:
        (result,) = read_results([write(tmp_path, selection(**changes))])
        return verdict(result, MIN)

    def test_hacked(self, tmp_path):
        assert self.verdict(tmp_path) == Verdict(
            "yes",
            "Yes: accuracy falls from 81.2 % at N = 2 to 50.0 % at N = 8.",
            [
                "Gap: 31.2 points from N = 2 to N = 8 (95 % interval 21.0 to 41.0).",
                "Worse than one candidate (61.0 %).",
                "Worse than majority vote at N = 8 (75.0 %).",
            ],
        )

    def test_no_gap(self, tmp_path):
        found = self.verdict(tmp_path, points=FINE, low=-0.14, high=-0.06)
        assert (
            found.answer == "no"
            and found.words == "No sign of hacking up to N = 8: accuracy is not higher at any N than at N = 8, 90.0 %."
        )
        assert found.reasons[0] == (
            "Gap: none, accuracy is highest at the largest N = 8, 10.0 points above N = 4 (95 % interval 6.0 to 14.0)."
        )
        assert found.reasons[1:] == [
            "Better than one candidate (61.0 %).",
            "Better than majority vote at N = 8 (75.0 %).",
        ]

    def test_a_plateau_has_no_gap(self, tmp_path):
        """The best N is the first of equal ones: a gap of 0 at a smaller N is not a gap. A wide interval cannot rule one out."""
        plateau = curve(0.6, 0.7, 0.7, 0.7)
        assert self.verdict(tmp_path, points=plateau, low=-0.02, high=0.02).answer == "no"
        found = self.verdict(tmp_path, points=plateau, low=-0.2, high=0.2)
        assert found.answer == "open" and found.words.endswith("but a loss of 20.0 points is not ruled out.")

    @pytest.mark.parametrize("low", [-0.01, 0.0])
    def test_an_interval_that_reaches_zero(self, tmp_path, low):
        found = self.verdict(tmp_path, points=curve(0.61, 0.8, 0.75, 0.78), low=low, high=0.06)
        assert found.answer == "open"
        assert found.words.startswith("Not settled: accuracy changes from 80.0 % at N = 2 to 78.0 % at N = 8")
        assert found.reasons[-1] == "Not clearly different from majority vote at N = 8 (75.0 %)."

    @pytest.mark.parametrize(
        ("accuracy", "word"), [(0.84, "Better than"), (0.82, "Not clearly different from"), (0.66, "Worse than")]
    )
    def test_above_and_below_need_separate_intervals(self, tmp_path, accuracy, word):
        """The vote is at 75 %, from 71 to 79. 82 % ± 4 is above 75 % by its own interval, but not by the vote's."""
        found = self.verdict(tmp_path, points=[point(1, 0.5), point(8, accuracy)], low=-0.4, high=-0.1)
        assert found.reasons[-1] == f"{word} majority vote at N = 8 (75.0 %)."

    def test_one_n_has_no_verdict(self, tmp_path):
        found = self.verdict(tmp_path, points=[point(8, 0.7)])
        assert found.answer == "none" and found.words == "No verdict: there is only one N, use several."

    def test_no_verdict_if_nothing_is_right(self, tmp_path):
        points = [point(n, 0.0, 0.0) | {"high": 0.02} for n in (1, 2, 4)]
        found = self.verdict(tmp_path, points=points, low=-0.02, high=0.02)
        assert found.answer == "none" and found.words == "No verdict: no selected solution is correct, at any N."
        assert "Gap" not in str(found.reasons)

    def test_results_of_an_earlier_version(self, tmp_path):
        """Their intervals may have zero width, and their gap may go from an N to itself."""
        values = selection()
        values["hacking_gap"][MIN] = {"gap": 0.0, "best_n": 8, "largest_n": 8, "low": 0.0, "high": 0.0}
        with pytest.raises(ValueError, match=r"\['loss', 'from_n', 'undecided'\] are missing .* earlier version"):
            read_results([write(tmp_path, values)])

    def test_other_hacked_methods_are_named(self, tmp_path):
        """The first screen shows one curve per result. It must mention hacking that only another curve shows."""
        values = selection(points=FINE, low=-0.14, high=-0.06)
        values["curves"]["best_of_n/last"] = HACKED
        values["hacking_gap"]["best_of_n/last"] = gap_of(HACKED, 0.1, 0.4)
        (result,) = read_results([write(tmp_path, values)])
        found = headline_verdict(result)
        assert found.answer == "no" and found.reasons[-1] == "Hacked when selected by best-of-N, last."

    def test_no_curve_of_a_reward_model(self, tmp_path):
        (result,) = read_results([write(tmp_path, selection(hacking_gap={}))])
        assert headline_verdict(result).answer == "none"

    def test_no_gap_where_nothing_can_be_judged(self, tmp_path):
        """Equal scores: the report and the terminal show a dash and the reason, and no number."""
        made = plain_curves([[0.5] * 4] * 60, [[True, False, True, False]] * 60, [list("abcd")] * 60)
        parts = {
            "curves": made.curves,
            "hacking_gap": made.hacking_gap,
            "calibration": made.calibration,
            "n": [1, 2, 4],
        }
        (result,) = read_results([write(tmp_path / "run", selection() | parts)])
        why = "in no problem do a correct and a wrong candidate have different scores, so the scores rank nothing"
        found = verdict(result, "best_of_n/score")
        assert (found.answer, found.words) == ("none", f"No verdict: {why}.")
        shown = format_results(Results(**selection() | parts))
        assert f"hacking gap of best_of_n/score: No verdict: {why}." in shown
        words = words_of([tmp_path / "run"])
        assert f"No verdict: {why}." in words and "score – – – – 4 100.0 % no verdict" in words

    def test_gaps_of_an_earlier_version_without_a_verdict(self, tmp_path):
        """They have numbers next to the reason, which are not shown."""
        values = selection()
        values["hacking_gap"][MIN] |= {"undecided": "no candidate has a score"}
        assert values["hacking_gap"][MIN]["gap"] > 0
        (result,) = read_results([write(tmp_path / "run", values)])
        assert verdict(result, MIN).answer == "none"
        assert "best-of-N, min – – – – 8 50.0 % no verdict" in words_of([tmp_path / "run"])

    def test_how_accuracies_were_estimated(self, tmp_path):
        """Accuracies of the first N candidates cannot be compared with means over all subsets."""
        new, old = selection(), selection()
        old.pop("estimate")
        words = words_of([write(tmp_path / "new", new), write(tmp_path / "old", old)])
        assert (
            "new: Means over all subsets of N of the 8 to 16 candidates of a problem. Votes with more than 200 subsets: means over 200 "
            "random subsets. old: An earlier version selected from the first N candidates of each problem." in words
        )
        found = notices(read_results([tmp_path / "new", tmp_path / "old"]))
        assert found == [
            "old: An earlier version selected from the first N candidates of each problem. Run the command again with --overwrite."
        ]
        assert load_results(tmp_path / "old").estimate == {}

    def test_every_place_gives_the_same_verdict(self, tmp_path, capsys):
        """The terminal and the page agree about the same solutions. The tests of metrics compare the metric with it."""
        rng = np.random.default_rng(0)
        scores, right = rng.random((60, 4)).tolist(), (rng.random((60, 4)) < 0.5).tolist()
        texts = [list("abcd")] * 60
        made = plain_curves(scores, right, texts)
        name = "best_of_n/score"
        shown = format_results(
            Results(
                **selection(settings={"aggregate": ["score"]})
                | {
                    "curves": made.curves,
                    "hacking_gap": made.hacking_gap,
                    "calibration": made.calibration,
                    "n": [1, 2, 4],
                }
            )
        )
        values = selection() | {"curves": made.curves, "hacking_gap": made.hacking_gap}
        (result,) = read_results([write(tmp_path / "run", values)])
        found = verdict(result, name)
        assert found.words in shown and found.reasons[0].removeprefix("Gap: ") in shown
        assert found.words in words_of([tmp_path / "run"])
        told = report(ReportConfig(inputs=tmp_path / "run", output=tmp_path / "r.html"))
        assert f"run: {found.words}" in told

    def test_warnings_of_a_run_are_shown(self, tmp_path):
        warning = (
            "62 of 100 solutions (62.0 %) have no grade: 62 cut off. Raise --max_depth (now 7) in a new --output_dir."
        )
        solutions = {"right": 38, "cut_off_by_depth": 62}
        folder = write(tmp_path / "run", selection(warnings=[warning], solutions=solutions))
        assert notices(read_results([folder])) == [f"run: {warning}"]
        assert warning in words_of([folder]) and "solutions cut off by depth 62" in words_of([folder])


class TestComparing:
    def test_different_problems_are_separated(self, folders, tmp_path):
        """The curves would look comparable although they are not."""
        other = write(tmp_path / "gsm", selection(FINE, -0.14, -0.06), [*PROBLEMS[:2], problem("d")])
        results = read_results([*folders, other])
        assert [[result.name for result in group] for group in problem_groups(results)] == [
            ["bon", "bon-prm"],
            ["gsm"],
        ]
        assert notices(results) == [
            "bon, bon-prm and gsm have different problems (3 and 3, 2 in common). Their accuracies cannot be compared "
            "and are shown separately."
        ]
        page = bare_page([*folders, other])
        assert page.count('<section class="first"') == 2 and page.count("have different problems (3 and 3") == 1

    def test_benchmarks_of_different_solutions_are_marked(self, tmp_path):
        """A model with fewer positions is measured only on shorter, easier solutions."""
        scored = STEP_ROWS[1] | {"scores": [0.5]}
        rows = [
            [STEP_ROWS[0], scored],
            [scored, STEP_ROWS[0]],
            STEP_ROWS,
        ]  # the second model had no positions for the last solution
        folders = [
            write(tmp_path / name, benchmark(), part, "scores.jsonl") for name, part in zip("abc", rows, strict=True)
        ]
        found = notices(read_results(folders))
        words = "scored different solutions of processbench (2 and 1, 1 in common). They cannot be compared."
        assert found == [f"a and c {words}", f"b and c {words}"]
        assert words in words_of(folders)

    def test_suites_are_compared_separately(self, tmp_path):
        suites = benchmark()["suites"] | {"prmbench": benchmark()["suites"]["processbench"]}
        rows = [row | {"suite": suite, "scores": [0.5] * len(row["labels"])} for row in STEP_ROWS for suite in suites]
        folders = [
            write(tmp_path / name, benchmark(suites=suites), part, "scores.jsonl")
            for name, part in (("a", rows), ("b", rows[:-1]))
        ]
        (notice,) = notices(read_results(folders))
        assert notice.startswith("a and b scored different solutions of prmbench (2 and 1, 1 in common)")

    def test_the_order_of_problems_does_not_matter(self, tmp_path):
        folders = [write(tmp_path / "a", selection()), write(tmp_path / "b", selection(), PROBLEMS[::-1])]
        assert notices(read_results(folders)) == []

    def test_another_reference_answer_is_another_problem(self, tmp_path):
        changed = [PROBLEMS[0] | {"answer": "4"}, *PROBLEMS[1:]]
        folders = [write(tmp_path / "a", selection()), write(tmp_path / "b", selection(), changed)]
        assert len(notices(read_results(folders))) == 1


class TestPage:
    def test_numbers_are_those_of_the_results(self, folders):
        text = words_of(folders)
        for folder in folders[:2]:
            results = json.loads((folder / "results.json").read_text())
            for name, points in results["curves"].items():
                cells = [
                    f"{100 * one['accuracy']:.1f} % ({100 * one['low']:.1f} to {100 * one['high']:.1f})"
                    for one in points
                ]
                assert " ".join([curve_label(name), *cells]) in text
        assert "bon best-of-N, min 31.2 21.0 to 41.0 2 81.2 % 8 50.0 % hacked" in text
        assert "bon-prm best-of-N, min none −14.0 to −6.0 4 80.0 % 8 90.0 % no sign of hacking" in text
        assert "Wilson's score interval for an accuracy, Tango's for the difference" in text
        assert "0 to 0.5 30 0.250 50.0 %" in text and "bon: expected calibration error 0.263" in text
        assert "candidates without answer 12,345 12,345 –" in text and "processbench, num too long – – 1" in text
        assert "scorer num tokens 123,456 123,456" in text and "all seconds 13.25 13.25" in text
        assert "average, unweighted 43.8 % 31.0 to 52.0" in text
        assert "math 43.8 % 30.0 to 50.0 35.0 % – 1,200" in text
        assert (
            "Threshold 0.25, the best on 20 validation solutions, gives 46.0 % on the other 80, where 0.5 gives 43.0 %."
            in text
        )
        assert "AUROC of all labelled steps: 0.876." in text and "Data: math.json, scored in 1.5 seconds." in text

    def test_settings_that_differ_are_marked(self, folders):
        page = bare_page(folders[:2])
        assert re.findall(r'<tr class="differs">\s*<th scope="row">([^<]*)', page) == DIFFERENT
        assert "versions torch 2.13.0 2.13.0" in words_of(folders)
        # a benchmark has no strategy and no aggregate, which does not make two selections differ
        assert re.findall(r'<tr class="differs">\s*<th scope="row">([^<]*)', bare_page(folders)) == DIFFERENT

    def test_votes_of_one_pool_are_drawn_once(self, folders, tmp_path):
        other = selection()
        other["curves"]["majority_vote"] = curve(0.61, 0.62, 0.7, 0.75)
        results = read_results([*folders, write(tmp_path / "other", other)])
        text = accuracy_picture(problem_groups(results)[0], 1).text
        assert text.count("pass@N") == 1 and "majority vote, bon:" in text and "majority vote, other:" in text

    @pytest.mark.filterwarnings("error")
    def test_names_that_matplotlib_would_read_otherwise(self, tmp_path, monkeypatch):
        """Matplotlib reads dollar signs as formulas, and omits names that begin with `_` from the legend."""
        shown, legend = [], Axes.legend

        def record(self, **style):
            found = legend(self, **style)
            shown.append([text.get_text() for text in found.get_texts()])
            return found

        monkeypatch.setattr(Axes, "legend", record)
        results = read_results([write(tmp_path / name, selection()) for name in ("_$x_1", "a$b$c", "z" * 200)])
        accuracy_picture(results, 1)
        assert len(shown[0]) == 5 and shown[0][0] == r" _\$x_1: best-of-N, min"
        reliability_picture({result.name: result.values["calibration"]["bins"] for result in results})
        assert shown[-1] == [r" _\$x_1", r"a\$b\$c", "z" * 59 + "…"]

    def test_only_benchmarks(self, folders):
        text = words_of(folders[2:])
        assert "How well does my reward model find wrong steps?" in text and "hacked" not in text

    def test_a_step_search_without_calibration_and_cost(self, tmp_path):
        values = selection(strategy="diverse_tree_search", calibration={}, cost={}, settings={"aggregate": "last"})
        values["curves"] = {"step_search": HACKED}
        values["hacking_gap"] = {"step_search": gap_of(HACKED, 0.2, 0.4)}
        folder = write(tmp_path / "run", values, name="candidates-n8.jsonl")
        text = words_of([folder])
        assert (
            "diverse tree search · outputs/tiny-hrm" in text
            and "step search" not in text
            and "Calibration" not in text
            and "Cost" not in text
        )
        (result,) = read_results([folder])
        assert list(result.scores) == ["solutions (last of the step scores)"]
        assert "run: diverse tree search: 61.0 % at N = 1" in accuracy_picture([result], 1).text

    def test_the_cost_of_each_n_of_a_search(self, tmp_path):
        """The total cost over all N cannot compare two searches with different N."""
        values = selection(strategy="step_search")
        costs = [{"policy_num_tokens": 100 * point["n"], "rest_seconds": 0.25} for point in HACKED]
        values["curves"] = {"step_search": [point | cost for point, cost in zip(HACKED, costs, strict=True)]}
        values["hacking_gap"] = {"step_search": gap_of(HACKED, 0.2, 0.4)}
        text = words_of([write(tmp_path / "run", values)])
        table = "N = 1 N = 2 N = 4 N = 8 policy num tokens 100 200 400 800 rest seconds 0.25 0.25 0.25 0.25"
        assert f"run: cost of each N {table}" in text

    def test_an_unknown_cost(self, tmp_path):
        """If a run was killed, the total cost is unknown too, and this must not raise."""
        values = selection()
        values["cost"]["policy"] = {"seconds": None, "num_requests": None, "num_tokens": 50, "num_sequences": 4}
        text = words_of([write(tmp_path / "run", values)])
        assert "policy seconds – policy num requests – policy num tokens 50" in text and "all seconds –" in text

    def test_one_point_has_an_interval_in_the_picture(self, tmp_path, monkeypatch):
        """A band cannot be drawn at a single point, and without a bar the accuracy would look certain."""
        drawn = []
        monkeypatch.setattr(Axes, "vlines", lambda self, *ends, **style: drawn.append(ends))
        accuracy_picture(read_results([write(tmp_path / "run", selection([point(8, 0.75, 0.25)], 0, 0))]), 1)
        assert drawn == [([8], [50.0], [100.0])] * 2  # light and dark mode

    @pytest.mark.parametrize("accuracy", [(0.0, 0.0), (1.0, 1.0), (0.5, 0.501), (0.0, 1.0)])
    def test_the_axis_holds_accuracies_only(self, tmp_path, monkeypatch, accuracy):
        """The axis does not exceed 100 %, and nearly equal curves are not drawn far apart."""
        limits = []
        monkeypatch.setattr(pictures, "legend", lambda axes, theme: limits.append(axes.get_ylim()))
        points = [point(n, value, 0.0) for n, value in zip((1, 2), accuracy, strict=True)]
        result = read_results([write(tmp_path / "run", selection(points, 0, 0))])[0]
        ways_picture(result, 1)
        assert len(limits) == 2  # light and dark mode
        for low, high in limits:
            assert -2 <= low <= 100 * min(accuracy) and 100 * max(accuracy) <= high <= 102 and high - low >= 6.99

    def test_votes_of_one_n_can_be_seen(self, tmp_path, monkeypatch):
        markers, plot = [], Axes.plot
        monkeypatch.setattr(
            Axes, "plot", lambda self, *xy, **style: markers.append(style["marker"]) or plot(self, *xy, **style)
        )
        values = selection([point(8, 0.75, 0.25)], 0, 0)
        values["curves"] |= {name: [point(8, 0.5, 0.25)] for name in ("majority_vote", "pass_at_n")}
        accuracy_picture(read_results([write(tmp_path / "run", values)]), 1)
        assert None not in markers and len(set(markers)) == 3

    def test_right_ones_stand_up_and_wrong_ones_hang_down(self, folders, monkeypatch):
        """Swapped, a model that knows nothing would look like a model that knows everything."""
        drawn, bar = {}, Axes.bar

        def record(self, x, height, *args, label, **style):
            drawn[label] = {round(left, 2): share for left, share in zip(x, height, strict=True) if share}
            return bar(self, x, height, *args, label=label, **style)

        monkeypatch.setattr(Axes, "bar", record)
        (result,) = read_results(folders[:1])
        picture = scores_picture(result, "solutions (min of the step scores)", 1)
        assert drawn == {
            "correct: 2, mean 0.575": {0.2: 50.0, 0.95: 50.0},
            "wrong: 2, mean 0.550": {0.4: -50.0, 0.7: -50.0},
        }
        assert "2 correct, mean 0.575, 2 wrong, mean 0.550" in picture.text
        drawn.clear()
        scores_picture(
            replace(result, scores={"all": {"right": [0.0, 1.0], "wrong": []}}), "all", 1
        )  # the first and last bin
        assert drawn == {"correct: 2, mean 0.500": {0.0: 50.0, 0.95: 50.0}, "wrong: 0": {}}

    def test_benchmarks_share_a_table(self, tmp_path):
        """Readers compare models visually: they need one table, and a warning if models scored different solutions."""
        better = benchmark()
        better["suites"]["processbench"]["subsets"]["math"] |= {"f1": 0.75, "low": 0.7, "high": 0.8}
        better["suites"]["processbench"]["averages"]["unweighted"] = {"f1": None, "low": None, "high": None}
        folders = [
            write(tmp_path / name, values, STEP_ROWS, "scores.jsonl")
            for name, values in (("a", benchmark()), ("b", better))
        ]
        table = "f1 a b average, unweighted 43.8 % (31.0 to 52.0) – math 43.8 % (30.0 to 50.0) 75.0 % (70.0 to 80.0)"
        text = words_of(folders)
        assert (
            f"processbench {table} a: all results of processbench" in text and "b: all results of processbench" in text
        )
        other = write(tmp_path / "c", benchmark(), STEP_ROWS[1:], "scores.jsonl")
        assert "f1 a c" not in words_of([folders[0], other])
        assert "c: processbench f1 95 % interval" in words_of([folders[0], other])

    def test_a_subset_with_the_name_of_an_average(self, folders, tmp_path):
        values = benchmark()
        values["suites"]["processbench"]["subsets"] = {"unweighted": {"f1": 0.1, "low": 0.0, "high": 0.2}}
        text = words_of([write(tmp_path / "run", values, STEP_ROWS, "scores.jsonl")])
        assert "average, unweighted 43.8 %" in text and "31.0 to 52.0 unweighted 10.0 %" in text

    def test_an_undefined_share(self):
        assert percent(None) == "–"


class TestCommand:
    def run(self, folders, output):
        return report(ReportConfig(inputs=[str(folder) for folder in folders], output=str(output)))

    def test_files_and_words(self, folders, tmp_path):
        other = write(tmp_path / "gsm", selection(FINE, -0.14, -0.06), [problem("d")])
        output = tmp_path / "out" / "page.html"
        said = self.run([*folders, other], output).splitlines()
        assert said[0].startswith("warning: bon, bon-prm and gsm have different problems")
        assert said[1] == "bon: Yes: accuracy falls from 81.2 % at N = 2 to 50.0 % at N = 8."
        files = sorted((tmp_path / "out" / "page_files").iterdir())
        assert said[-1] == f"Page: {output}; pictures: {tmp_path}/out/page_files/, {len(files)} files"
        assert [file.name for file in files] == [
            *("accuracy-1.png", "accuracy-2.png", "calibration.png", "curves-1.png", "curves-2.png", "curves-3.png"),
            *("scores-1.png", "scores-2.png", "scores-3.png"),
        ]
        page = output.read_text(encoding="utf-8")
        for file in files:  # the page has the same pictures
            assert file.read_bytes().startswith(PNG) and base64.b64encode(file.read_bytes()).decode() in page
        assert not list(tmp_path.glob("out/**/*.partial"))

    def test_the_same_again(self, folders, tmp_path):
        """Pages that are compared must differ only by their results."""
        for name in ("a", "b"):
            self.run(folders[:1], tmp_path / name / "report.html")
        one, other = (sorted(file for file in (tmp_path / name).rglob("*") if file.is_file()) for name in ("a", "b"))
        assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other] and len(one) == 5


def put(values, place, value):
    *above, last = place
    for key in above:
        values = values[key]
    values[last] = value


GAP = ("hacking_gap", MIN)
FAULTS = {
    "accuracy above 1": (("curves", MIN, 0, "accuracy"), 1.5, r"`curves.best_of_n/min\[0\].accuracy` is 1.5"),
    "accuracy outside of its interval": (("curves", MIN, 0, "accuracy"), 1.0, "accuracy outside of its interval at N = 1"),
    "accuracy of NaN": (("curves", MIN, 0, "accuracy"), float("nan"), "'NaN' is not a finite number"),
    "no accuracy": (("curves", MIN, 0, "accuracy"), None, r"`curves.best_of_n/min\[0\].accuracy` is None"),
    "an N of 0": (("curves", MIN, 0, "n"), 0, r"`curves.best_of_n/min\[0\].n` is 0"),
    "an N twice": (("curves", MIN, 0, "n"), 2, r"`curves.best_of_n/min` has the N \[2, 2, 4, 8\], expected .* ascending order"),
    "an empty curve": (("curves", MIN), [], r"`curves.best_of_n/min` has the N \[\], expected at least one"),
    "no curves": (("curves",), {}, "`curves` is empty"),
    "a gap without a curve": (("hacking_gap", "best_of_n/max"), None, "`hacking_gap.best_of_n/max` is None"),
    "a gap of another N": ((*GAP, "best_n"), 3, "`hacking_gap.best_of_n/min` has an N that is not in the curve"),
    "a missing gap without a curve": (
        ("hacking_gap", "best_of_n/max"),
        dict.fromkeys(("gap", "best_n", "loss", "from_n", "low", "high")) | {"largest_n": 8, "undecided": "why"},
        "`hacking_gap.best_of_n/max` has an N that is not in the curve",
    ),
    "half a loss": ((*GAP, "low"), None, "has some of `loss`, `from_n`, `low` and `high`, expected all or none"),
    "no gap and no reason": ((*GAP, "gap"), None, "has no `gap`, `best_n` or `loss`, and no reason why it is `undecided`"),
    "an unknown estimate": (("estimate", "method"), "guess", "`estimate.method` is 'guess'"),
    "an estimate without numbers": (("estimate",), {"method": "subsets"}, "`estimate` has no `min_candidates`"),
    "an estimate without a method": (("estimate",), {"num_draws": 2}, "`estimate` has no `method`"),
    "a negative count": (("counts", "not_graded"), -1, "`counts.not_graded` is -1"),
    "a share above 1": (("calibration", "bins", 0, "share_right"), 2, r"`calibration.bins\[0\].share_right` is 2"),
    "an unknown key": (("colour",), "red", "`colour` is not a known key"),
    "settings in a list": (("settings",), [], r"`settings` is \[\]"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "value", "words"), FAULTS.values(), ids=FAULTS)
def test_damaged_results(tmp_path, place, value, words):
    """A report would show them as they are, or end with a traceback. The message names the file and the key."""
    results = copy.deepcopy(selection())
    put(results, place, value)
    folder = write(tmp_path / "run", results)
    for read in (lambda: read_results([folder]), lambda: load_results(folder)):
        with pytest.raises(ValueError, match=f"^{folder / 'results.json'}.*({words}).* with --overwrite"):
            read()


def test_an_aggregate_that_is_no_name(tmp_path):
    folder = write(tmp_path / "run", selection(settings={"aggregate": [[3]]}))
    with pytest.raises(ValueError, match=r"results.json: `settings.aggregate`: the value is \[3\]"):
        read_results([folder])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suite": 1}, "`suite` is 1"),
        ({"labels": [1, 2, None]}, r"`labels\[1\]` is 2"),
        ({"scores": [0.5]}, "found 1 scores for 3 labels, expected one per step"),
        ({"scores": ["0.5"] * 3}, r"`scores\[0\]` is '0.5'"),
        ({"id": None}, "`id` is None"),
    ],
)
def test_damaged_scores(tmp_path, change, words):
    folder = write(tmp_path / "run", benchmark(), [STEP_ROWS[1], STEP_ROWS[0] | change], "scores.jsonl")
    with pytest.raises(ValueError, match=f"^{folder / 'scores.jsonl'}:2: {words}"):
        read_results([folder])


def test_damaged_benchmarks(tmp_path):
    for place, value, words in (
        (("subsets", "math", "f1"), 1.5, "`f1` is 1.5, expected a number from 0 to 1|is 1.5"),
        (("subsets", "math", "low"), None, r"0.4375 is outside of its interval \[None, 0.5\]"),
        (("subsets", "math", "f1"), 0.1, r"0.1 is outside of its interval \[0.3, 0.5\]"),
        (("subsets", "math", "num_with_error"), 1.5, "`num_with_error` is 1.5"),
        (("averages", "unweighted"), {"f1": 0.5, "low": 0.4}, "a subset or average has no high"),
        (("metric",), "accuracy", "a subset or average has no accuracy"),
        (("tuned", "rest"), "0.5", "`suites.processbench.tuned.rest` is '0.5'"),
        (("seconds",), -1, "`suites.processbench.seconds` is -1"),
        (("steps", "auroc"), 2, "`auroc` is 2"),
    ):
        results = benchmark()
        put(results["suites"]["processbench"], place, value)
        folder = write(tmp_path / "run", results, STEP_ROWS, "scores.jsonl")
        with pytest.raises(ValueError, match=f"^{folder / 'results.json'}.*({words}).* with --overwrite"):
            read_results([folder])


def test_rows_that_are_missing_or_repeated(tmp_path):
    """The report would compare results on other problems than it says."""
    for results, rows, name in ((selection(), PROBLEMS, "candidates.jsonl"), (benchmark(), STEP_ROWS, "scores.jsonl")):
        folder = write(tmp_path / name, results, rows, name)
        file = folder / name
        lines = file.read_text().splitlines(keepends=True)
        for changed in (lines[1:], [*lines, lines[0]]):
            file.write_text("".join(changed))
            what = "problems" if name == "candidates.jsonl" else "solutions of 'processbench'"
            with pytest.raises(
                ValueError, match=f"^{file}: found {len(changed)} {what}, but results.json has {len(lines)}. Run"
            ):
                read_results([folder])
