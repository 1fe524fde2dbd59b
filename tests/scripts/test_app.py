"""`trl-hrm app`: exact scores in the page, messages for what cannot be scored, and the whole page in a browser without network."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from copy import copy
from html import unescape

import numpy as np
import pytest
import torch

from trl_hrm.cli import main
from trl_hrm.scoring.aggregate import AGGREGATES, aggregate
from trl_hrm.scoring.candidate_scores import score_spans
from trl_hrm.scoring.generative_scorer import GenerativeScorer
from trl_hrm.scoring.scorer import StepScorer
from trl_hrm.scoring.scoring_config import ScoringConfig
from trl_hrm.scripts.app import (
    EXAMPLE,
    AppConfig,
    LoadedModel,
    app,
    load_models,
    model_names,
    read_examples,
    solution_html,
)
from trl_hrm.search.steps import RULES

from ..fakes import guarded, write_rows
from ..helpers import save_checkpoint


STEPS = ["1 + 2 = 3.", "3 + 3 = $7$.", "Wait, 3 + 3 = 6.", "So $\\frac{12}{2}$."]
SOLUTION = "\n\n".join(STEPS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two reward models with different random weights. The second has 64 positions."""
    root = tmp_path_factory.mktemp("app")
    return [
        save_checkpoint(root / "one"),
        save_checkpoint(root / "two", seed=1, max_position_embeddings=64),
    ]


@pytest.fixture(scope="module")
def models(folders) -> list[LoadedModel]:
    return load_models(AppConfig(reward_model=folders))


def scored(page: str) -> list[tuple[float, dict[int, float]]]:
    """Return the score of each step and model of a page, and its scores over spans."""
    found = []
    for score, rest in re.findall(r'<div class="chip"[^>]*data-score="([^"]*)"(.*?)</div>', page, re.DOTALL):
        spans = re.findall(r'<small data-span="(\d+)" data-score="([^"]*)"', rest)
        found.append((float(score), {int(length): float(value) for length, value in spans}))
    return found


def totals(page: str) -> list[list[float]]:
    """Return the scores of the solution by each model."""
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", page, re.DOTALL)
    return [[float(value) for value in re.findall(r'<td data-score="([^"]*)"', row)] for row in rows]


def notices(page: str) -> list[str]:
    return [unescape(text) for text in re.findall(r'<p class="notice" role="alert">(.*?)</p>', page)]


class TestSpans:
    @pytest.mark.parametrize(
        ("spans", "combine"),
        [
            ((1,), "max"),
            *((spans, combine) for spans in ((1, 2), (1, 2, 3), (1, "thought")) for combine in ("max", "mean")),
        ],
    )
    def test_combined_scores_are_those_of_the_scorer(self, models, spans, combine):
        scorer = models[0].scorer
        found = score_spans(scorer, "1 + 2?", STEPS, ScoringConfig(list(spans), combine))
        [[expected]] = scorer.score(["1 + 2?"], [[STEPS]], spans=spans, combine=combine)
        reduce = max if combine == "max" else lambda values: sum(values) / len(values)
        assert [reduce(list(one.values())) for one in found] == pytest.approx(expected, rel=0, abs=1e-15)
        assert [one[1] for one in found] == pytest.approx(scorer.score(["1 + 2?"], [[STEPS]])[0][0], abs=1e-6)

    def test_a_merged_pair_is_scored_as_one_step(self, models):
        scorer = models[0].scorer
        found = score_spans(scorer, "1 + 2?", STEPS, ScoringConfig([1, 2]))
        assert [sorted(one) for one in found] == [[1], [1, 2], [1, 2], [1, 2]]
        for i in range(1, len(STEPS)):
            path = [*STEPS[: i - 1], scorer.step_format.merge(STEPS[i - 1 : i + 1])]
            assert found[i][2] == pytest.approx(scorer.score(["1 + 2?"], [[path]])[0][0][-1], abs=1e-6)


def test_a_port_that_is_in_use(folders, monkeypatch):
    """It is noticed before the models are loaded, which takes long."""
    monkeypatch.setattr("trl_hrm.scripts.app.load_models", lambda config: pytest.fail("loaded"))
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(OSError, match=f"Port {port} of 127.0.0.1 cannot be used .* Choose another `port`"):
            app(AppConfig(reward_model=folders[:1], port=port))


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_an_address_of_ipv6(folders, monkeypatch):
    """The check of the port took it for an unknown name."""
    monkeypatch.setattr("trl_hrm.scripts.app.load_models", lambda config: sys.exit("loaded"))
    with socket.socket(socket.AF_INET6) as free:
        try:
            free.bind(("::1", 0))
        except OSError:
            pytest.skip("no address ::1 on this machine")
        port = free.getsockname()[1]
    for host in ("::1", "[::1]"):
        with pytest.raises(SystemExit, match="loaded"):
            app(AppConfig(reward_model=folders[:1], host=host, port=port))


class TestPage:
    def test_exact_scores(self, models):
        page = solution_html(models[:1], " 1 + 2?\n", f"\n{SOLUTION}\n", RULES["blank_line"])
        [[expected]] = models[0].scorer.score(["1 + 2?"], [[STEPS]])
        assert scored(page) == [(score, {}) for score in expected]
        assert totals(page) == [[aggregate(expected, name) for name in AGGREGATES]]
        assert re.findall(r'<th scope="col">(.*?)</th>', page)[1:-1] == list(AGGREGATES)
        first = next((i for i, score in enumerate(expected, 1) if score < 0.5), "none")
        assert f"<td>{first}</td></tr>" in page and notices(page) == []
        assert [f"{score:.2f}" for score in expected] == re.findall(r"<b>([\d.]+)</b>", page)
        assert "<mfrac>" in page and ">one</th>" in page.replace("\n", "")

    def test_merged_spans(self, folders):
        models = load_models(AppConfig(reward_model=folders[:1], spans=[1, 2], combine="mean"))
        page = solution_html(models, "1 + 2?", SOLUTION, RULES["blank_line"])
        [[expected]] = models[0].scorer.score(["1 + 2?"], [[STEPS]], spans=[1, 2], combine="mean")
        spans = score_spans(models[0].scorer, "1 + 2?", STEPS, ScoringConfig([1, 2], "mean"))
        assert scored(page) == list(zip(expected, [{}, *spans[1:]], strict=True))  # the first step has only one score
        assert re.findall(r">\s*(this step|steps \S+) <span>", page)[:4] == [
            "this step",
            "steps 1–2",
            "this step",
            "steps 2–3",
        ]

    def test_models_side_by_side(self, models):
        page = solution_html(models, "1 + 2?", SOLUTION, RULES["blank_line"])
        by_model = [one.scorer.score(["1 + 2?"], [[STEPS]])[0][0] for one in models]
        assert by_model[0] != by_model[1]
        assert [score for score, _ in scored(page)] == [
            score for pair in zip(*by_model, strict=True) for score in pair
        ]
        assert totals(page) == [[aggregate(scores, name) for name in AGGREGATES] for scores in by_model]
        assert re.findall(r'<i class="letter">(.)</i>', page) == ["A", "B"] * (len(STEPS) + 1)

    def test_letters_of_models_that_cannot_score(self, models):
        """The letters must agree with the list of models above, also if the first model cannot score this solution."""
        page = solution_html([models[1], models[0], models[0]], "1 + 2?", "1 + 2 = 3.\n\n" * 15, RULES["blank_line"])
        assert "positions" in notices(page)[0]
        assert re.findall(r'<i class="letter">(.)</i>', page) == ["B", "C"] * 16

    @pytest.mark.parametrize(
        "fault",
        [
            ValueError("the step 'az' ends with 'z;'"),
            OSError("the server failed"),
            torch.OutOfMemoryError("no memory"),
        ],
    )
    def test_a_model_that_fails_does_not_hide_the_others(self, models, fault, monkeypatch):
        def fail(*args):
            raise fault

        broken = LoadedModel(models[1].config, copy(models[1].scorer))
        monkeypatch.setattr(broken.scorer, "score_trees", fail)
        page = solution_html([broken, models[0]], "1 + 2?", SOLUTION, RULES["blank_line"])
        assert notices(page) == [f"two: {fault}"]
        assert [score for score, _ in scored(page)] == models[0].scorer.score(["1 + 2?"], [[STEPS]])[0][0]

    def test_a_problem_and_a_solution_have_a_maximum_size(self, models, monkeypatch):
        monkeypatch.setattr("trl_hrm.scripts.app.MAX_CHARACTERS", 20)
        monkeypatch.setattr("trl_hrm.scripts.app.MAX_STEPS", 3)
        page = solution_html(models[:1], "p" * 15, "s" * 6, RULES["blank_line"])
        assert notices(page) == ["The problem and the solution have 21 characters. They can have at most 20."]
        page = solution_html(models[:1], "p", "a\n\nb\n\nc\n\nd", RULES["blank_line"])
        assert notices(page) == ["The solution has 4 steps. It can have at most 3."]
        assert not scored(page)

    def test_steps_of_each_rule(self, models, folders):
        config = AppConfig(reward_model=folders, segmentation="regex", step_pattern=";")
        text = "# Step 1\na; b.\nc\n\n# Step 2\nd so. e"
        found = {}
        for name in ("blank_line", "line", "step_header", "sentence", "regex"):
            page = solution_html(models[:1], "q", text, config.rule(name))
            found[name] = [
                step.strip() for step in re.findall(r'<li .*?<div class="text">(.*?)</div>', page, re.DOTALL)
            ]
        assert found == {
            "blank_line": ["# Step 1\na; b.\nc", "# Step 2\nd so. e"],
            "line": ["# Step 1", "a; b.", "c", "# Step 2", "d so. e"],
            "step_header": ["# Step 1\na; b.\nc", "# Step 2\nd so. e"],
            "sentence": ["# Step 1\na; b.", "c\n\n# Step 2\nd so.", "e"],
            "regex": ["# Step 1\na;", "b.\nc\n\n# Step 2\nd so. e"],
        }

    def test_what_cannot_be_scored(self, models):
        rule = RULES["blank_line"]
        for problem, solution, words in (
            ("", SOLUTION, ["The problem is empty"]),
            ("q", " \n", ["The solution has no steps"]),
            ("", "", ["The problem is empty", "The solution has no steps"]),
            ("q", "a" * 300_000, ["The problem and the solution have 300,001 characters"]),
            ("q", "a\ud800b", ["not valid Unicode"]),
            ("q", "<think>Hm.", ["no steps", "Thinking is not scored"]),
        ):
            page = solution_html(models, problem, solution, rule)
            assert len(notices(page)) == len(words), notices(page)
            assert all(word in text for word, text in zip(words, notices(page), strict=True))
            assert scored(page) == [] and "<ol" not in page
        page = solution_html(models, "q", "<think>Hm.</think>1 + 2 = 3.", rule)
        assert len(scored(page)) == 2 and notices(page)[0].startswith("Thinking is not scored")

    def test_too_long_for_one_of_two_models(self, models):
        """The other one still scores it."""
        page = solution_html(models, "q", "\n\n".join(STEPS * 5), RULES["blank_line"])
        assert len(scored(page)) == 20 and len(totals(page)) == 1
        [notice] = notices(page)
        assert re.fullmatch(r"two: the solution has [\d,]+ tokens, but the model has 64 positions. Shorten .*", notice)

    def test_an_error_of_a_model_is_shown(self, models):
        scorer = copy(models[0].scorer)
        scorer._forward = lambda trees, progress: [np.full(len(tree.steps), np.nan) for tree in trees]
        page = solution_html(
            [LoadedModel(models[0].config, scorer), models[1]], "q", "1 + 2 = 3.", RULES["blank_line"]
        )
        [notice] = notices(page)
        assert (
            notice.startswith("one: prompt 'q': the reward model returned [nan] for 1 steps.")
            and len(scored(page)) == 1
        )

    def test_a_judge_without_verdict(self):
        class Judge(GenerativeScorer):
            def __init__(self):
                self.max_positions = None

            def path_lengths(self, problem, steps, parents):
                return dict.fromkeys(range(-1, len(steps)), 1)

            def score_trees(self, trees, *args, **kwargs):
                return [[0.25, None, 1.0, 0.75] for _ in trees]

        config = AppConfig(reward_model=["me/judge"], judge_template="instruct").scoring_configs()[0]
        page = solution_html([LoadedModel(config, Judge())], "q", SOLUTION, RULES["blank_line"])
        assert [score for score, _ in scored(page)] == [0.25, 1.0, 0.75] and totals(page) == [[]]
        assert notices(page) == ["me/judge: the judge gave no readable verdict on 1 steps."]

    def test_texts_are_escaped(self, models):
        evil = "</div><script>alert(1)</script><img src=x onerror=alert(2)>\u202e $\\text{<script>}$"
        page = solution_html(models[:1], evil, evil, RULES["blank_line"])
        assert "<script" not in page and "<img" not in page and "\u202e" not in page
        assert page.count("&lt;script&gt;alert(1)") == 2 and len(scored(page)) == 1


class TestExamples:
    def test_default(self, folders):
        assert read_examples(AppConfig(reward_model=folders)) == [EXAMPLE]
        assert EXAMPLE[1].count("\n\n") == 3

    def test_file(self, folders, tmp_path):
        write_rows(
            tmp_path / "rows.jsonl", [{"q": "1?", "completions": ["a", "b"]}, {"q": "2?", "completions": ["c"]}]
        )
        settings = {"reward_model": folders, "examples": str(tmp_path / "rows.jsonl"), "columns": {"prompt": "q"}}
        assert read_examples(AppConfig(**settings)) == [("1?", "a\n\nb"), ("2?", "c")]
        messages = [[{"role": "assistant", "content": text}] for text in "ab"]
        write_rows(tmp_path / "rows.jsonl", [{"q": "1?", "completion": "a\n\nb\n"}])
        assert read_examples(AppConfig(**settings)) == [("1?", "a\n\nb\n")]
        write_rows(tmp_path / "rows.jsonl", [{"q": [{"role": "user", "content": "1?"}], "completions": messages}])
        assert read_examples(AppConfig(**settings)) == [("1?", "a\n\nb")]

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"prompt": "q", "completions": "a"}, "rows.jsonl:2.*expected an object with `prompt`"),
            ({"prompt": "q", "completions": ["a", "b"], "parents": [-1, -1]}, "rows.jsonl:2.*this tree branches"),
            ({"completions": ["a"]}, "rows.jsonl:2"),
            ({"completion": "a"}, "rows.jsonl:2.*`prompt`"),
            ({"prompt": "q", "completions": ["a\n", "b"]}, "rows.jsonl:2.*remove white space around the steps"),
            ({"prompt": "q", "completions": ["a\n\nb"]}, "rows.jsonl:2: the rule blank_line splits these steps"),
        ],
    )
    def test_invalid_rows(self, folders, tmp_path, row, message):
        write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completions": ["a"]}, row])
        with pytest.raises(ValueError, match=message):
            read_examples(AppConfig(reward_model=folders, examples=str(tmp_path / "rows.jsonl")))

    def test_empty_file(self, folders, tmp_path):
        (tmp_path / "rows.jsonl").touch()
        with pytest.raises(ValueError, match="no records found"):
            read_examples(AppConfig(reward_model=folders, examples=str(tmp_path / "rows.jsonl")))


def test_names(folders, tmp_path):
    def names(*paths):
        configs = AppConfig(reward_model=list(paths)).scoring_configs()
        return model_names([LoadedModel(config, None) for config in configs])

    assert names(*folders) == ["one", "two"]
    other = tmp_path / "one"
    shutil.copytree(folders[0], other)
    assert names(folders[0], str(other), "me/one") == [folders[0], str(other), "me/one"]


def test_gradio_is_missing(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--reward_model", *folders]) == 1
    assert 'pip install "trl-hrm[app]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"columns": {"prompt": "q"}}, "`columns` has no effect without `examples`"),
        ({"port": 0}, "`port` is 0"),
        ({"reward_model": [f"me/{i}" for i in range(27)]}, "27 models. The page shows at most 26"),
        ({"segmentation": "regex"}, "must be used together"),
        ({"served_model_name": "x", "reward_model_engine": "http://localhost:1"}, "is the name of one model"),
    ],
)
def test_config(folders, settings, message):
    with pytest.raises(ValueError, match=message):
        AppConfig(**{"reward_model": folders} | settings)


@pytest.mark.slow
def test_in_a_browser(folders, browser, tmp_path):
    """Type, click and read what a user would, and compare it with the scorer. Neither the server nor the page uses the network."""
    pytest.importorskip("gradio")
    write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"What is {i}?", "completions": [f"{i} = {i}.", "So."]} for i in range(2)]
    )
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = guarded(tmp_path, offline=False)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], *sys.path])
    words = ["--reward_model", *folders, "--spans", "1", "2", "--port", str(port), "--examples", "rows.jsonl"]
    command = [sys.executable, "-m", "trl_hrm.cli", "app", *words]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = next((line for line in server.stdout if line.startswith("Open")), None)
        assert line == f"Open http://127.0.0.1:{port}/. Press Ctrl-C to stop.\n", server.stderr.read()
        browser.show(1280, 900)
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait_for("document.querySelector('#score') !== null")
        assert browser.texts(".app-head code") == ["one", "two"]
        assert browser.texts(".solution .hint")

        def read(action, *arguments):
            """Return the steps, and the score of each step by each model."""
            browser.evaluate("document.querySelector('.solution').remove()")
            action(*arguments)
            browser.wait_for("document.querySelector('.solution') !== null")
            chips = "[...document.querySelectorAll('.chip')].map(chip => Number(chip.dataset.score))"
            return browser.texts("li .text"), browser.evaluate(chips)

        def expected(problem, steps):
            scores = [
                StepScorer.from_pretrained(one).score([problem], [[steps]], spans=(1, 2))[0][0] for one in folders
            ]
            return [score for pair in zip(*scores, strict=True) for score in pair]

        def fill(name, text):
            browser.evaluate(f"document.querySelector('#{name} textarea').select()")
            browser.type(text)

        while not browser.texts(".notice"):  # a click before the page is ready has no effect
            browser.click("#score")
            time.sleep(0.5)
        assert [text.split(".")[0] for text in browser.texts(".notice")] == [
            "The problem is empty",
            "The solution has no steps",
        ]
        fill("problem", "1 + 2?")
        fill("solution", "1 + 2 = 3.\n\nSo <b>3</b> & $x$.")
        steps = ["1 + 2 = 3.", "So <b>3</b> & $x$."]
        assert read(browser.click, "#score") == (["1 + 2 = 3.", "So <b>3</b> & x."], expected("1 + 2?", steps))
        assert browser.evaluate("document.querySelectorAll('.solution math').length") == 1
        shown = browser.texts(".chip small:last-child span")
        spans = [
            score_spans(StepScorer.from_pretrained(one), "1 + 2?", steps, ScoringConfig([1, 2])) for one in folders
        ]
        assert shown == [f"{one[1][2]:.2f}" for one in spans]
        for number in (0, 1, 0):  # after the last one, the first
            steps = [f"{number} = {number}.", "So."]
            assert read(browser.click, "#example") == (steps, expected(f"What is {number}?", steps))
        assert browser.errors == []
        assert {request.split("/")[2] for request in browser.requests if not request.startswith("data:")} == {
            f"127.0.0.1:{port}"
        }
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
        assert "Stopped. Run the same command again to start over." in server.stderr.read()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        server.stderr.close()
    assert (tmp_path / "attempts").read_text() == ""
