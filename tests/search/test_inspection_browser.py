"""The page of a search tree in a real browser: display, mouse, keys, and no requests."""

import json

import pytest

from trl_hrm.scripts.inspect import InspectConfig, inspect_tree
from trl_hrm.search.compression import compress
from trl_hrm.search.inspection import render_tree
from trl_hrm.search.nodes import write_nodes
from trl_hrm.search.tree import ROOT, SearchTree

from ..browser import Browser
from .trees import full_tree, inspection_of, random_search_tree, tree_of


HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1><!-- <svg onload=window.hacked=1>"
    "<style>*{display:none}</style>&lt;b&gt; javascript:window.hacked=1"
)
SOLUTION = "First line.\n\n    indented  twice\n\\[ x < 3 & y > 2 \\]"


def tree_page(tree: SearchTree, **options: str) -> str:
    return render_tree(inspection_of(tree, **options))


def row(text: str) -> str:
    """Return a selector for the row with this text. The first row is `row-0`, the first node `row-1`."""
    return f"#row-{text}"


def num_rows(browser: Browser) -> int:
    """Return the number of rows of the open tree, including those out of sight."""
    return browser.evaluate(
        "document.getElementById('rows').offsetHeight / document.querySelector('.row').offsetHeight"
    )


SMALL = tree_of(
    (ROOT, "1 + 2 = 3.\n\n# Step 2\n", {"tail": 9}),
    (0, SOLUTION, {"answer": "3", "correct": True}),
    (0, "Hence 4.", {"answer": "4", "correct": False, "seed": 2**53 + 1}),
    (ROOT, "and so on", {"finish": "length"}),
)


def test_head_and_rows(show):
    browser = show(tree_page(SMALL, run="runs/mcts", basis="by hand"))
    assert browser.evaluate("document.title") == "p1 · search tree"
    assert browser.texts("#kicker") == ["runs/mcts · problem p1done"]
    assert browser.texts("#problem") == ["What is 1 + 2?"]
    assert dict(zip(browser.texts("#facts dt"), browser.texts("#facts dd"), strict=True)) == {
        "Reference answer": "3",
        "MC score of the prompt": "0.500 by hand",
        "Correct answers": "1 of 2, 1 more without an answer",
        "Nodes": "4",
        "Tokens generated": "12",
        "Tokens from cache": "0",
    }
    assert browser.texts(".row .value") == ["0.50", "0.50", "1.00", "0.00", "–"]
    assert browser.texts(".row .step") == [
        "Prompt",
        "1 + 2 = 3.",
        "# Step 2 First line. indented twice \\[ x < 3 & y > 2 \\]",
        "# Step 2 Hence 4.",
        "and so on",
    ]
    assert browser.texts(".row .badge") == ["✓ 3", "✗ 4", "truncated"]


def test_a_click_shows_the_full_text(show):
    browser = show(tree_page(SMALL))
    browser.click(row("2"))
    assert browser.texts("#detail pre") == [f"# Step 2\n{SOLUTION}"]
    assert browser.texts("#detail h2") == ["Step 2"]
    assert browser.texts("#detail .change")[0] == "0.50 above the previous step"
    assert browser.texts("#detail .trail-list span") == ["Prompt", "1 + 2 = 3."]
    browser.click(row("3"))
    facts = dict(zip(browser.texts("#detail dt"), browser.texts("#detail dd"), strict=True))
    assert facts["Seed"] == str(2**53 + 1)  # a JavaScript number would lose the last digit
    assert facts["Answer"] == "4 (wrong)" and facts["Node"] == f"{2:016x}"
    browser.click("#detail .trail-list li:last-child button")
    assert browser.texts("#detail h2") == ["Step 1"]
    assert browser.texts("#detail .badge") == ["✓ 3", "✗ 4"]


def test_a_solution_that_was_cut_into_steps_counts_once(show):
    """The last step ends like its rollout. Counting both would double every answer."""
    solution = {"answer": "3", "correct": True}
    browser = show(
        tree_page(
            tree_of(
                (ROOT, "One. Three.", solution | {"role": "rollout"}),
                (ROOT, "Four.", {"answer": "4", "correct": False, "role": "rollout"}),
                (ROOT, "One.", {"role": "segment"}),
                (2, " Three.", solution | {"role": "segment"}),
                (2, " 3", solution | {"role": "rollout"}),
            )
        )
    )
    assert browser.texts("#detail .badge") == ["✓ 3", "✗ 4"]
    assert browser.texts(".row .share") == ["1/2", "1/1"]
    assert browser.texts(".row.group .step") == ["Prompt", "2 rollouts"]


def test_hostile_text_is_inert(show):
    """A policy may write anything. The page must show it and never run it."""
    tree = tree_of(
        (ROOT, HOSTILE, {"stop_reason": HOSTILE}),
        (0, HOSTILE, {"answer": HOSTILE, "correct": False}),
        (0, "a", {"role": "rollout", "answer": HOSTILE, "correct": True}),
        (0, "b", {"role": "rollout", "answer": HOSTILE}),
        prompt=HOSTILE,
        answer=HOSTILE,
        name=HOSTILE,
    )
    browser = show(tree_page(tree, run=HOSTILE, basis=HOSTILE))
    browser.click("#depths button:last-of-type")
    for i in range(6):
        browser.click(row(str(i)))
    browser.click(row("1"))
    assert browser.texts("#detail pre") == [HOSTILE] == browser.texts("#problem")
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("document.querySelectorAll('img, svg svg, body style, iframe, a').length") == 0
    assert browser.evaluate("document.scripts.length") == 2


def test_formulas(show):
    """Formulas are drawn in the problem, the rows, the full text, the path and the answers. Offsets count UTF-16 units."""
    tree = tree_of(
        (ROOT, "😀 So $x^2$ costs $5 and $7.", {}),
        (0, r"\[\begin{pmatrix}1\end{pmatrix}\] $<b>$", {"answer": r"\frac{1}{2}", "correct": True}),
        prompt=r"Find $\frac{a}{b}$.",
        answer=r"\frac{1}{2}",
    )
    browser = show(tree_page(tree))
    browser.click(row("2"))

    def sources(selector):
        return browser.evaluate(
            f"[...document.querySelectorAll('{selector} .math')].map(found => [found.title, found.firstChild.namespaceURI])"
        )

    namespace = "http://www.w3.org/1998/Math/MathML"
    assert sources("#problem") == [[r"$\frac{a}{b}$", namespace]]
    assert sources("#row-1") == [["$x^2$", namespace]]
    assert [title for title, _ in sources("#row-2 .step")] == ["$<b>$"]  # a matrix is too high
    assert sources("#row-2 .badge") == sources("#facts") == [[r"\frac{1}{2}", namespace]]
    assert [title for title, _ in sources("#detail pre")] == [r"\[\begin{pmatrix}1\end{pmatrix}\]", "$<b>$"]
    assert [title for title, _ in sources("#detail .trail-list")] == ["$x^2$"]
    assert browser.texts("#row-1 .step") == ["😀 So x2 costs $5 and $7."]
    assert browser.texts("#row-2 .step") == [r"\[\begin{pmatrix}1\end{pmatrix}\] <b>"]
    browser.click("#search")
    browser.type("x^2")  # the text that was sampled
    assert browser.texts("#hits") == ["1 found"] and browser.texts("mark") == ["x^2"]
    height = browser.evaluate("document.querySelector('#problem math').getBoundingClientRect().height")
    assert height > browser.evaluate(
        "parseFloat(getComputedStyle(document.querySelector('#problem')).fontSize)"
    )  # a fraction


def test_links_to_other_problems(browser, tmp_path):
    trees = {name: tree_of((ROOT, "One.", {}), name=name) for name in ("a", "b", "c")}
    write_nodes(list(trees.values()), tmp_path / "nodes.parquet")
    inspect_tree(InspectConfig(input=str(tmp_path / "nodes.parquet"), all=True, html=str(tmp_path / "pages")))
    browser.open(tmp_path / "pages" / "index.html")
    assert browser.texts(".problems a") == ["a", "b", "c"]
    title = lambda: browser.evaluate("document.title")  # noqa: E731

    def follow(action, *arguments):
        browser.after_load(lambda: action(*arguments))
        return title()

    assert follow(browser.click, ".problems a") == "a · search tree"
    assert browser.texts(".pages a") == ["Next →", "All problems"]
    assert follow(browser.press, "n") == "b · search tree"
    assert follow(browser.click, "#page-next") == "c · search tree"
    assert browser.texts(".pages a") == ["← Previous", "All problems"]
    assert follow(browser.press, "p") == "b · search tree"
    browser.click("#search")
    browser.press("n")  # is typed
    assert title() == "b · search tree" and browser.evaluate("document.getElementById('search').value") == "n"
    assert follow(browser.click, "#page-index").startswith("Search trees of ")
    assert browser.errors == [] and all(request.startswith("file:") for request in browser.requests)


def test_keys(show):
    browser = show(tree_page(SMALL))
    browser.evaluate("document.getElementById('tree').focus()")

    def selected(*keys):
        for key in keys:
            browser.press(key)
        (text,) = browser.texts("[aria-selected=true] .step")
        active = "document.getElementById(document.activeElement.getAttribute('aria-activedescendant'))"
        assert browser.evaluate(f"{active}.querySelector('.step').textContent") == text
        return text

    assert selected() == "Prompt"
    assert selected("ArrowDown", "ArrowDown").startswith("# Step 2 First")
    assert selected("ArrowLeft") == "1 + 2 = 3."
    assert num_rows(browser) == 5
    assert selected("ArrowLeft") == "1 + 2 = 3." and num_rows(browser) == 3
    assert selected("ArrowDown") == "and so on"
    assert selected("Home", "ArrowRight", "ArrowRight", "ArrowRight").startswith("# Step 2 First")
    assert selected("End") == "and so on"
    browser.press("/")
    assert browser.evaluate("document.activeElement.id") == "search"


def test_search(show):
    browser = show(tree_page(full_tree(3, 4)))  # 120 nodes, so not all are open
    browser.click("#search")
    browser.type("step 4 is 119.")
    assert browser.texts("#hits") == ["1 found"]
    browser.press("Enter")
    assert browser.texts("#hits") == ["1 of 1"]
    assert browser.texts("#detail pre") == ["Step 4 is 119."]
    assert browser.texts("mark") == ["Step 4 is 119."]
    assert browser.evaluate("document.querySelectorAll('.found path').length") == 1


def test_every_node_of_a_large_tree_is_there(show):
    """Only visible rows are drawn. Every row must be reachable, and the page must stay small."""
    tree = full_tree(5, 5)
    browser = show(tree_page(tree), height=2400)
    assert len(tree.nodes) == 3905 and "3,905" in browser.texts("#facts dd")
    browser.click("#depths button:last-of-type")
    assert num_rows(browser) == 3906
    seen = set()
    for place in range(0, 3906 * 30, 1800):
        browser.evaluate(f"document.getElementById('tree').scrollTop = {place}")
        browser.settle()
        seen.update(browser.texts(".row .step"))
        assert browser.evaluate("document.querySelectorAll('.row').length") < 120
    assert seen == {"Prompt", *(node.text.strip() for node in tree.nodes)}


def test_the_picture_selects(show):
    """Bars are found by bisection. An off-by-one error would select the neighbouring step."""
    tree = full_tree(4, 3)
    browser = show(tree_page(tree))
    first = [i for i, node in enumerate(tree.nodes) if node.parent == ROOT]
    for place, node in enumerate(first):
        browser.click("#picture", x=(place + 0.5) / 4, y=1.5 / 4)
        assert browser.texts("#detail pre") == [tree.step_text(node)]
    last = [i for i, node in enumerate(tree.nodes) if tree.depth(i) == 3]
    order = sorted(last, key=tree.path)
    for place in (0, 1, 31, 63):
        browser.click("#picture", x=(place + 0.5) / 64, y=3.5 / 4)
        assert browser.texts("#detail pre") == [tree.step_text(order[place])]


def test_colours_of_the_picture(show):
    """One bar per node: blue for right, orange for wrong, striped for unknown."""
    tree = tree_of(
        (ROOT, "a", {"answer": "3", "correct": True}),
        (ROOT, "b", {"answer": "4", "correct": False}),
        (ROOT, "c", {"finish": "length"}),
    )
    browser = show(tree_page(tree))
    bars = browser.evaluate(
        "[...document.querySelectorAll('.all path')].map(p => [p.getAttribute('d').split('M').length - 1, getComputedStyle(p).fill])"
    )
    assert sum(number for number, _ in bars) == 4
    fills = [fill for _, fill in bars]
    assert len(set(fills)) == 4 and sum("url" in fill for fill in fills) == 1


def test_rollouts_and_compressed_trees_open(show):
    """Random trees contain every kind of line. Faults show as errors in the console."""
    for tree in (random_search_tree(0), random_search_tree(1)):
        for view in (tree, compress(tree, 7, probability=1.0, min_children=2)):
            browser = show(tree_page(view))
            browser.click("#depths button:last-of-type")
            lines = browser.evaluate("lines.length")
            assert num_rows(browser) == lines
            texts = browser.evaluate(f"[...Array({lines}).keys()].map(i => (select(i), byId('detail').textContent))")
            assert all(texts)
            moved = sum(node.merged_from is not None for node in view.nodes)
            assert sum("Merged from" in text for text in texts) == moved


def test_a_tree_without_nodes(show):
    """A problem that was just opened or never solved must show an empty tree."""
    browser = show(tree_page(tree_of()))
    assert browser.texts(".row .value") == ["–"] and browser.texts("#detail pre") == ["What is 1 + 2?"]
    assert browser.texts("#depths *") == []


@pytest.mark.parametrize("width, height", [(320, 640), (390, 844), (820, 1180), (1000, 560), (1920, 1080)])
def test_sizes(show, width, height):
    """Nothing may overflow on the right, and the tree must keep some room."""
    long = "x" * 400
    tree = tree_of((ROOT, long, {}), (0, long, {"answer": long, "correct": True}), prompt=long, answer=long, name=long)
    browser = show(tree_page(tree, run=long, basis=long), width, height)
    browser.click(row("1"))
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.getElementById('tree').clientHeight") > 120
    stray = browser.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className)"
    )
    assert stray == [], json.dumps(stray)
