"""Hand-written results of runs, and the text of their report page."""

import copy
import json
import re
from functools import cache
from html import unescape

from trl_hrm.evaluation.report import make_pictures, render_report
from trl_hrm.evaluation.reward_hacking import undecided_by
from trl_hrm.evaluation.saved_results import has_bins, problem_groups, read_results
from trl_hrm.pages.pictures import Picture


PNG = b"\x89PNG\r\n\x1a\n"
MIN = "best_of_n/min"


def point(n, accuracy, spread=0.04):
    return {"n": n, "accuracy": accuracy, "low": max(accuracy - spread, 0.0), "high": min(accuracy + spread, 1.0)}


def curve(*accuracies):
    return [point(2**i, accuracy) for i, accuracy in enumerate(accuracies)]


def gap_of(points, low, high):
    """Return the gap of a curve, with the interval of its loss."""
    undecided = undecided_by([one["accuracy"] for one in points])
    if undecided is not None:
        missing = dict.fromkeys(("gap", "best_n", "loss", "from_n", "low", "high"))
        return missing | {"largest_n": points[-1]["n"], "undecided": undecided}
    best = max(points, key=lambda one: one["accuracy"])
    smaller = max(points[:-1], key=lambda one: one["accuracy"])
    return {
        "gap": best["accuracy"] - points[-1]["accuracy"],
        "best_n": best["n"],
        "largest_n": points[-1]["n"],
        "loss": smaller["accuracy"] - points[-1]["accuracy"],
        "from_n": smaller["n"],
        "low": low,
        "high": high,
        "undecided": None,
    }


HACKED = curve(0.61, 0.8125, 0.75, 0.5)
FINE = curve(0.61, 0.7, 0.8, 0.9)


def selection(points=HACKED, low=0.21, high=0.41, **changes):
    """Return results as written by `trl-hrm best-of-n`."""
    curves = {
        MIN: points,
        "weighted_vote/min": curve(0.61, 0.66, 0.72, 0.77),
        "majority_vote": curve(0.61, 0.61, 0.7, 0.75),
        "pass_at_n": curve(0.61, 0.8, 0.9, 0.97),
    }
    bins = [
        {"low": 0.0, "high": 0.5, "count": 30, "mean_score": 0.25, "share_right": 0.5},
        {"low": 0.5, "high": 1.0, "count": 10, "mean_score": 0.9, "share_right": 0.6},
    ]
    return {
        "strategy": "best_of_n",
        "reward_model": {"model": "outputs/tiny-hrm", "scorer": "transformers"},
        "policy": None,
        "settings": {"aggregate": ["min"], "extractors": ["boxed"], "num_draws": 200},
        "versions": {"trl_hrm": "0.1.0", "torch": "2.13.0"},
        "seed": 42,
        "date": "2026-11-21T12:00:00+00:00",
        "num_problems": 3,
        "counts": {"problems_without_answer": 7, "candidates_without_answer": 12345, "not_graded": 1},
        "n": [1, 2, 4, 8],
        "curves": curves,
        "hacking_gap": {MIN: gap_of(points, low, high)},
        "calibration": {"aggregate": "min", "bins": bins},
        "estimate": {"method": "subsets", "min_candidates": 8, "max_candidates": 16, "num_draws": 200},
        "cost": {
            "policy": None,
            "scorer": {"seconds": 12.5, "num_calls": 3, "num_steps": 6789, "num_tokens": 123456},
            "rest_seconds": 0.75,
        },
        **changes,
    }


def candidate(scores, correct, answer="3"):
    return {
        "text": "One.",
        "steps": ["One."],
        "answer": answer,
        "correct": correct,
        "finish": None,
        "scores": scores,
        "num_tokens": None,
    }


def problem(name="What is 1 + 2?", candidates=()):
    return {"problem_id": name, "problem": name, "answer": "3", "candidates": list(candidates)}


PROBLEMS = [
    problem("a", [candidate([0.9, 0.2], True), candidate([0.7], False), candidate(None, True)]),
    problem("b", [candidate([0.5], None), candidate([0.4], None, answer=None)]),
    problem("c", [candidate([0.95, 0.99], True)]),
]


def write(folder, results, rows=PROBLEMS, name="candidates.jsonl"):
    """Write results and rows, with the number of rows in the results."""
    folder.mkdir(parents=True, exist_ok=True)
    results = copy.deepcopy(results)
    if rows is not None and "num_problems" in results:
        results["num_problems"] = len(rows)
    for suite, found in results["suites"].items() if "suites" in results else ():
        found["counts"]["num_solutions"] = sum(row["suite"] == suite for row in rows)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if rows is not None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def benchmark(**changes):
    """Return results as written by `trl-hrm benchmark`."""
    values = {
        "f1": 0.4375,
        "error_accuracy": 0.35,
        "correct_accuracy": None,
        "num_with_error": 1200,
        "low": 0.3,
        "high": 0.5,
    }
    suite = {
        "sources": ["math.json"],
        "metric": "f1",
        "main": "unweighted",
        "threshold": 0.5,
        "subsets": {"math": values},
        "averages": {"unweighted": {"f1": 0.4376, "low": 0.31, "high": 0.52}},
        "tuned": {
            **{"threshold": 0.25, "validation": 0.5, "rest": 0.46, "rest_untuned": 0.43},
            **{"num_validation": 20, "num_rest": 80},
        },
        "steps": {"num_steps": 4, "auroc": 0.876, "ece": 0.123},
        "counts": {"num_solutions": 2, "num_scored": 1, "num_too_long": 1},
        "too_long": [],
        "seconds": 1.5,
    }
    return {
        "kind": "benchmark",
        "reward_model": {"model": "outputs/tiny-hrm"},
        "settings": {"threshold": 0.5, "validation_size": 0.2},
        "suites": {"processbench": suite},
        "seed": 42,
        "versions": {"trl_hrm": "0.1.0"},
        "date": "2026-11-21T12:00:00+00:00",
        **changes,
    }


STEP_ROWS = [
    {"suite": "processbench", "subset": "math", "id": "1", "labels": [1, 0, None], "scores": [0.9, 0.1, 0.6]},
    {"suite": "processbench", "subset": "math", "id": "2", "labels": [1], "scores": None},
]


def page_of(folders):
    return make_page(tuple(folders))


@cache
def make_page(folders):
    """Make the page of the same folders only once, because drawing pictures is slow."""
    results = read_results(folders)
    return render_report(results, make_pictures(results))


BLANK = Picture("blank", "", "", {"light": b"", "dark": b""})


def bare_page(folders):
    """Return the page without pictures."""
    results = read_results(folders)
    pictures = {
        "accuracy": [BLANK] * len(problem_groups(results)),
        "curves": [],
        "calibration": [BLANK] * any(map(has_bins, results)),
        "scores": [],
    }
    return render_report(results, pictures)


def words_of(folders):
    """Return the visible text of a page as one line."""
    page = bare_page(folders)
    return " ".join(re.sub(r"<[^>]*>", " ", unescape(re.split("<body[^>]*>", page)[1]).replace("\xa0", " ")).split())
