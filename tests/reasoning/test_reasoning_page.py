"""The page and the tables of `trl-hrm reason`, from hand-written results."""

import json
import re

import pytest

from trl_hrm.reasoning.study_report import (
    PAPERS,
    board_views,
    format_results,
    make_pictures,
    render_report,
    segments_table,
    strategies_table,
)


SEEDS = (0.5, 0.6, 0.7)


def number(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "seeds": [mean - 0.1, mean, mean + 0.1]}


def system(title, mean, segments):
    halted = {**number(mean), "mean_segments": 1.5}
    return {
        "title": title,
        "parameters": 98498,
        "seconds_per_step": 0.04,
        "learning_rate": 3e-3,
        "tried_learning_rates": {"0.003": 0.5},
        "steps": 100,
        "segments": segments,
        "points": [50, 100],
        "run_seconds": [1.0, None, 3.0],
        "exact": {"seconds": number(mean), "steps": number(mean - 0.2)},
        "cell": {"seconds": number(0.75), "steps": number(0.7)},
        "by_segment": [number(mean * (i + 1) / (4 * segments)) for i in range(4 * segments)],
        "strategies": {
            budget: {f"{name}, {segments} segments": halted for name in ("first_halt", "choose_by_q")}
            for budget in ("seconds", "steps")
        },
        "by_blanks": {"8": number(mean)},
        "by_rating": {"0": number(mean), "1": number(0.3)},
        "few_blanks": {str(blanks): number(0.3 + blanks / 20) for blanks in range(1, 6)},
        "validation": [{"step": step, **number(mean * step / 100)} for step in (50, 100)],
    }


SOLUTION = [2, 3, 4, 5, 4, 5, 2, 3, 3, 2, 5, 4, 5, 4, 3, 2]
PUZZLE = [2, 1, 4, 5, *SOLUTION[4:]]
WRONG = [2, 5, 4, 5, *SOLUTION[4:]]


@pytest.fixture(scope="module")
def results():
    part = {"<HRM> − loop control": {"mean": -0.25, "low": -0.35, "high": -0.15, "seeds": list(SEEDS)}}
    return {
        "seeds": [0, 1, 2],
        "equal_steps": 80,
        "settings": {"systems": ["one_pass", "hrm"], "augment": True, "clues": None},
        "versions": {"torch": "2.13.0"},
        "data": {
            "family": "sudoku",
            "height": 4,
            "width": 4,
            "splits": {"train": 1000, "validation": 100, "test": 500, "few_blanks": 200},
            "build": None,
        },
        "systems": {"one_pass": system("one pass", 0.25, 1), "hrm": system("<HRM> of this test", 0.625, 2)},
        "claims": [
            {
                "claim": "The hierarchy beats the same blocks in one loop",
                "margin": 0.0,
                "seconds": {"verdict": "does not hold", "parts": part},
                "steps": {"verdict": "open", "parts": part},
            }
        ],
        "boards": {
            "height": 4,
            "width": 4,
            "puzzles": [PUZZLE],
            "solutions": [SOLUTION],
            "answers": {"hrm": [[PUZZLE], [WRONG], *[[SOLUTION]] * 6]},
            "q_halt": {"hrm": [[-5.0], [-0.25], *[[3.5]] * 6]},
        },
    }


@pytest.fixture(scope="module")
def page(results):
    return render_report(results, make_pictures(results))


def test_text_for_the_terminal(results):
    text = format_results(results)
    assert (
        "| <HRM> of this test | 62.5 % (52.5 to 72.5)          | 62.5 %      | 75.0 %        | 98,498     | 100   | 2       | 40.0"
        in text
    )
    assert (
        "| <HRM> of this test | 42.5 % (32.5 to 52.5)          | 62.5 %      | 70.0 %        | 98,498     | 80 "
        in text
    )  # equal steps
    assert "does not hold | −25.0 points (−35.0 to −15.0)" in text
    assert "Boards with few blanks" in text
    assert "They are not results of this run." in text


def test_segments_beyond_the_training_are_shown(results):
    head, [one, hrm] = (table := segments_table(results)).head, table.rows
    assert head == ["System", "1 segment", "2 segments", "4 segments", "8 segments"]
    assert one[-1] == "–" and hrm[-1].startswith("62.5 %") and hrm[2].startswith("15.6 %")


def test_strategies_name_the_mean_segment(results):
    rows = strategies_table(results).rows
    assert ["<HRM> of this test", "first halt (q > 0), up to 2", "62.5 % (52.5 to 72.5)", "1.5"] in rows


def test_numbers_of_the_papers_are_apart(page):
    """74.5 % must never look like a result of this run."""
    before, _, after = page.partition('<section id="papers">')
    assert "74.5" in after and "74.5" not in re.sub(r'"data:image[^"]*"', "", before)
    assert "These are not results of this run." in after
    assert len({len(row) for row in (PAPERS.head, *PAPERS.rows)}) == 1


def test_names_are_escaped(page):
    assert "&lt;HRM&gt; of this test" in page
    assert "<HRM>" not in page


def test_the_page_is_deterministic(results, page):
    assert render_report(results, make_pictures(results)) == page


def test_kinds_of_cells(results):
    """A wrong cell that looks like a right one would make an unsolved board look solved."""
    [board] = board_views(results)["drawn"]  # after the 2 segments of the training
    kinds = [cell["kind"] for row in board["rows"] for cell in row]
    assert kinds == ["given", "wrong", "given", "given", *["given"] * 12]
    assert (board["num_wrong"], board["q_halt"]) == (1, -0.25)


def test_page_without_recurrent_systems(results):
    """There is nothing to play then, and no script."""
    alone = {**results, "systems": {"one_pass": results["systems"]["one_pass"]}, "claims": []}
    alone["boards"] = {**results["boards"], "answers": {}, "q_halt": {}}
    page = render_report(alone, make_pictures(alone))
    assert "<script" not in page and "script-src" not in page


def test_results_of_mazes_have_no_few_blanks(results):
    maze = json.loads(json.dumps(results))
    maze["data"] |= {"family": "maze", "splits": {"train": 10, "validation": 10, "test": 10}}
    for one in maze["systems"].values():
        one.pop("few_blanks")
    maze["boards"] |= {"answers": {"hrm": [[[1] * 16]] * 8}, "puzzles": [[1] * 16], "solutions": [[1] * 16]}
    page = render_report(maze, make_pictures(maze))
    assert "few-blanks" not in page
    assert "with few blanks" not in format_results(maze)
    assert "by cells of the path" in page and "by number of blanks" not in page  # a maze has no blanks
    assert "number of guesses" not in page


class TestInTheBrowser:
    def test_boards_change_from_segment_to_segment(self, show, page):
        browser = show(page)
        state = "[document.querySelector('.board-figure figcaption').textContent, document.querySelectorAll('.cell.wrong').length]"
        assert browser.evaluate(state) == ["1 wrong, q -0.25", 1]
        browser.evaluate(
            "(() => {const s = document.getElementById('segment'); s.value = 1; s.dispatchEvent(new Event('input'))})()"
        )
        assert browser.evaluate(state) == ["1 wrong, q -5.00", 1]
        assert browser.texts(".cell")[1] == "·"
        browser.evaluate(
            "(() => {const s = document.getElementById('segment'); s.value = 8; s.dispatchEvent(new Event('input'))})()"
        )
        assert browser.evaluate(state) == ["solved, q 3.50", 0]
        assert browser.texts("#number") == ["8 (trained with 2)"]
        browser.click("#play")  # from the end, it starts again
        assert browser.texts("#play") == ["Pause"] and browser.texts("#number") == ["1"]
        browser.click("#play")
        assert browser.texts("#play") == ["Play"]

    def test_wrong_cells_differ_without_colour(self, show, page):
        browser = show(page)
        styles = browser.evaluate(
            "['wrong', 'given'].map(kind => {const s = getComputedStyle(document.querySelector('.cell.' + kind));"
            "return [s.outlineStyle, s.backgroundImage !== 'none', Number(s.fontWeight)]})"
        )
        assert styles == [["solid", True, 400], ["none", False, 750]]

    def test_without_script(self, page):
        """The boards of the last segment of the training are part of the page itself."""
        [figure] = re.findall(r'<figure class="board-figure">.*?</figure>', page, re.DOTALL)
        assert figure.count('class="cell wrong') == 1 and figure.count('class="cell given') == 15
        assert "1 wrong, q -0.25" in figure

    @pytest.mark.parametrize("width", [400, 1280])
    @pytest.mark.parametrize("dark", [False, True])
    def test_no_horizontal_overflow(self, show, page, width, dark):
        browser = show(page, width, dark=dark)
        browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        browser.settle()
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        stray = browser.evaluate(
            "[...document.querySelectorAll('body *')].filter(e => !e.closest('table') && e.getBoundingClientRect().right > innerWidth + 1)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )
        assert stray == []
