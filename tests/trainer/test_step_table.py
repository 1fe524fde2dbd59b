"""Completions with coloured steps: exact cells, pages without markup of their data, and what trackio and W&B get."""

import re
import sys
from html import unescape
from types import SimpleNamespace

import pytest

from tests.browser import Browser, find_chromium
from tests.fakes import Tracker
from trl_hrm.rewards import ScoredCompletion
from trl_hrm.trainer.step_table import coloured_steps, log_steps_page, steps_page, tint


SCORED = ScoredCompletion(
    ["1 + 1 = 2.\n\n2 + 2 = 5.\n\nSo 5."], [[(0, 10), (12, 22), (24, 29)]], [0.9, 0.125, 0.5], 0.125
)
REJECTED = ScoredCompletion(["5."], [[(0, 2)]], None, -0.5, ["too_few_steps", "control_text"])
UNKNOWN = ScoredCompletion(["5."], [[(0, 2)]])
EMPTY = ScoredCompletion([""], [[]], None, 0.0, ["too_few_steps"])


def logs_of(*rows, prompts=None, rewards=None):
    columns = {"accuracy": [1.0] * len(rows)} if rewards is None else rewards
    prompts = ["1 + 1?"] * len(rows) if prompts is None else prompts
    return {"prompt": prompts, "rewards": columns, "advantages": [0.25] * len(rows), "steps": list(rows)}


def texts(page: str) -> list[str]:
    """Return the text of the body between tags."""
    return [
        unescape(text).strip()
        for text in re.split(r"<[^>]*>", page.split("<body")[1].split(">", 1)[1])
        if text.strip()
    ]


class TestCells:
    def test_steps(self):
        assert coloured_steps(SCORED) == "🟦🟧⬜\n🟦 0.90 1 + 1 = 2.\n🟧 0.12 2 + 2 = 5.\n⬜ 0.50 So 5."
        assert coloured_steps(SCORED, [0.4, -1.25, 0.0]) == (
            "🟦🟧⬜\n🟦 0.90 (+0.40) 1 + 1 = 2.\n🟧 0.12 (-1.25) 2 + 2 = 5.\n⬜ 0.50 (+0.00) So 5."
        )

    @pytest.mark.parametrize(
        "score, square",
        [(0, "🟧"), (0.3333, "🟧"), (1 / 3, "⬜"), (0.6666, "⬜"), (2 / 3, "🟦"), (1, "🟦"), (-2.5, "🟧"), (7, "🟦")],
    )
    def test_colours(self, score, square):
        """A reward model without a sigmoid may have any score."""
        assert coloured_steps(ScoredCompletion(["x"], [[(0, 1)]], [score], score)) == f"{square} {score:.2f} x"

    def test_completions_without_scores(self):
        assert coloured_steps(REJECTED) == "⬛ -0.50 rejected: too_few_steps, control_text"
        assert coloured_steps(REJECTED, [-1.5]) == "⬛ -0.50 (-1.50) rejected: too_few_steps, control_text"
        assert coloured_steps(EMPTY, [0.0]) == "⬛ 0.00 (+0.00) rejected: too_few_steps"
        assert coloured_steps(UNKNOWN) == coloured_steps(UNKNOWN, None) == "no process reward"

    def test_a_step_is_one_line(self):
        """Otherwise the text of a policy could look like a step with another score."""
        text = "So\n🟦 1.00 (+9.00) 3.\u202e\x1b[31m"
        cell = coloured_steps(ScoredCompletion([text, "y"], [[(0, len(text))], [(0, 1)]], [0.1, 0.9], 0.1))
        assert cell == "🟧🟦\n🟧 0.10 So 🟦 1.00 (+9.00) 3.\\u202e␛[31m\n🟦 0.90 y"

    def test_long_steps_are_shortened(self):
        text = "word " * 1000
        cell = coloured_steps(ScoredCompletion([text, text], [[(0, len(text))]] * 2, [0.1, 0.9], 0.1), [1.0, 2.0])
        lines = cell.split("\n")
        assert lines[0] == "🟧🟦" and all(len(line) <= 220 and "word ... " in line for line in lines[1:])

    def test_advantages_of_another_completion(self):
        for advantages in ([0.1], [0.1] * 4):
            with pytest.raises(ValueError, match="zip"):
                coloured_steps(SCORED, advantages)


class TestPages:
    def test_the_text_of_a_page(self):
        thinking = ScoredCompletion(
            ["<think>Hm.</think>\n\n1 + 1 = 2.\n\n2."], [[(20, 30), (32, 34)]], [0.9, 0.4], 0.4, thinking=["First."]
        )
        rewards = {"accuracy": [1.0, 0.0, float("nan")], "step_reward": [0.4, -0.5, float("nan")]}
        rows = [(thinking, [0.5, -0.5]), (REJECTED, [-1.0]), (UNKNOWN, None)]
        assert texts(steps_page(7, logs_of(*rows, rewards=rewards)))[4:] == [
            "1 + 1?",
            "accuracy 1.00 · step_reward 0.40 · advantage of the completion +0.25",
            *("First.", "<think>Hm.</think>", "0.90 (+0.50)", "1 + 1 = 2.", "0.40 (-0.50)", "2."),
            "accuracy 0.00 · step_reward -0.50 · advantage of the completion +0.25 · step reward -0.50 (-1.00), "
            "rejected: too_few_steps, control_text",
            "5.",
            "accuracy – · step_reward – · advantage of the completion +0.25 · no process reward",
            "5.",
        ]

    def test_completions_of_a_prompt_are_together(self):
        messages = [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "image", "image": object(), "text": None}, {"type": "text", "text": "2?"}],
            },
        ]
        rows = [(SCORED, None)] * 4
        page = steps_page(1, logs_of(*rows, prompts=["1?", "1?", messages, "1?"]))
        heads = [unescape(head) for head in re.findall(r'<h2 class="text">(.*?)</h2>', page, re.DOTALL)]
        assert heads == ["1?", "system: Be brief.\n\nuser: [image]2?", "1?"]
        assert [section.count("<article") for section in page.split("<section>")[1:]] == [2, 1, 1]

    @pytest.mark.parametrize(
        "score, colour",
        [
            (0, "low) 100%"),
            (0.25, "low) 50%"),
            (0.5, "low) 0%"),
            (1, "high) 100%"),
            (9, "high) 100%"),
            (-9, "low) 100%"),
        ],
    )
    def test_tints(self, score, colour):
        assert tint(score) == f"color-mix(in oklab, var(--{colour}, var(--middle))"
        page = steps_page(1, logs_of((ScoredCompletion(["x"], [[(0, 1)]], [score], score), None)))
        assert page.count(f'style="--tint: {tint(score)}"') == 1

    def test_no_text_becomes_markup(self):
        """Prompts and completions are anybody's texts, and the pages are opened in browsers of others."""
        evil = "</div><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\"'&lt;"
        scored = ScoredCompletion([f"{evil}{evil}"], [[(0, len(evil))]], [0.5], 0.5, thinking=[evil])
        rejected = ScoredCompletion([evil], [[]], None, 0.0, ["blank_steps"])
        rows = [(scored, [1.0]), (rejected, [1.0])]
        plain = steps_page(1, logs_of(*((one, values) for one, values in rows)))
        page = steps_page(1, logs_of(*rows, prompts=[evil, evil], rewards={evil: [1.0, 1.0]}))
        for text in (plain, page):
            assert "<script" not in text and "<img" not in text and "\u202e" not in text
        assert page.count("&lt;script&gt;") == 1 + 2 + 4  # prompt, reward names, texts

    def test_formulas(self):
        text = r"$x^2$ costs $5."
        page = steps_page(
            1, logs_of((ScoredCompletion([text], [[(0, len(text))]], [0.5], 0.5), None), prompts=["$y$"])
        )
        assert re.findall('<math display="inline"><mrow>(.*?)</mrow></math></span>([^<]*)', page) == [
            ("<mi>y</mi>", ""),
            ("<msup><mi>x</mi><mn>2</mn></msup>", " costs $5."),
        ]

    def test_no_steps(self):
        page = steps_page(1, logs_of((EMPTY, [0.0])))
        assert "rejected: too_few_steps" in page and 'class="scored"' not in page


@pytest.fixture
def browser(tmp_path):
    program = find_chromium()
    if program is None:
        pytest.skip("needs chromium")
    with_page = Browser(program, tmp_path / "profile")
    yield with_page
    with_page.close()


@pytest.mark.parametrize("dark", [False, True])
def test_colours_in_a_browser(tmp_path, browser, dark):
    """Blue for good steps, orange for bad ones, and text that is readable on both."""
    rows = [ScoredCompletion(["x"], [[(0, 1)]], [score], score) for score in (1.0, 0.0)]
    (tmp_path / "page.html").write_text(steps_page(1, logs_of(*((row, None) for row in rows))), encoding="utf-8")
    browser.show(900, 600, dark)
    browser.open(tmp_path / "page.html")
    script = """(() => {
        const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const rgb = color => {
            context.fillStyle = color; context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        return [...document.querySelectorAll(".scored")].map(step => {
            const style = getComputedStyle(step);
            return [style.borderLeftColor, style.backgroundColor, style.color].map(rgb);
        });
    })()"""
    good, bad = browser.evaluate(script)

    def luminance(rgb):
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for border, background, text in (good, bad):
        dim, bright = sorted((luminance(background), luminance(text)))
        assert (bright + 0.05) / (dim + 0.05) >= 7  # WCAG AAA
        assert border != background
    assert good[0][2] - good[0][0] > 60 and bad[0][0] - bad[0][2] > 60
    assert not browser.errors and all(request.startswith("file:") for request in browser.requests)


class TestLogging:
    @pytest.mark.parametrize("run", [None, "a run"])
    def test_trackers(self, tmp_path, monkeypatch, run):
        """W&B is imported but has no run if an environment variable turned it off."""
        trackers = {"trackio": Tracker("trackio", "a run"), "wandb": Tracker("wandb", run)}
        for name, tracker in trackers.items():
            monkeypatch.setitem(sys.modules, name, tracker)
        args = SimpleNamespace(output_dir=str(tmp_path), report_to=["wandb", "trackio"])
        trainer = SimpleNamespace(args=args, state=SimpleNamespace(global_step=12), _logs=logs_of((SCORED, None)))
        log_steps_page(trainer)
        page = (tmp_path / "completions" / "steps_00012.html").read_text(encoding="utf-8")
        assert page == steps_page(12, trainer._logs)
        assert trackers["trackio"].logged == [{"completion_steps": ("html", page, False)}]
        assert trackers["wandb"].logged == (trackers["trackio"].logged if run else [])

    def test_nothing_was_generated(self, tmp_path):
        args = SimpleNamespace(output_dir=str(tmp_path), report_to=[])
        log_steps_page(SimpleNamespace(args=args, state=SimpleNamespace(global_step=0), _logs=logs_of()))
        assert not list(tmp_path.iterdir())
