r"""Formulas in pages: which parts of a text are formulas, exact MathML, and markup that no formula can break."""

import json
import re
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from trl_hrm.pages.latex import MAX_CHARACTERS, find_math, to_mathml, with_math


def formulas(text: str) -> list[str]:
    return [text[found.start : found.end] for found in find_math(text)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Let $x$ and $y_1$.", ["$x$", "$y_1$"]),
        (r"So \(x = 2\), thus \[y = 3\] and $$z = 4$$", [r"\(x = 2\)", r"\[y = 3\]", "$$z = 4$$"]),
        ("$$\nx^2\n$$", ["$$\nx^2\n$$"]),
        (r"\begin{align*} a &= b \\ c &= d \end{align*} end", [r"\begin{align*} a &= b \\ c &= d \end{align*}"]),
        (r"The answer is \boxed{\frac{1}{2}}.", [r"\boxed{\frac{1}{2}}"]),
        (r"$\boxed{5}$", [r"$\boxed{5}$"]),
        (r"\[ a \\[2pt] b \]", [r"\[ a \\[2pt] b \]"]),
        ("$ n $ and $ x > 0,$", ["$ n $", "$ x > 0,$"]),
        ("$2 \\text{ apples and pears}$", ["$2 \\text{ apples and pears}$"]),
        ("$a$-$b$", ["$a$", "$b$"]),
        # not formulas
        ("costs $5 and $7", []),
        ("between $5-$7", []),
        ("It is $5, not 3$ or so.", []),
        ("He pays $5 (or $6) and she has 3$ left.", []),
        ("total = $6 * 8 = $48.", []),
        ("He pays $600*50=$<<600*50=30000>>30000.", []),
        ("She has $ 10.00 - $ 5.00 left.", []),
        ("It costs 400-320=$<<400-320=80>>80\nThen 3*50=$<<3*50=150>>150.", []),
        ("$1500, so it costs $$ more.", []),
        ("one $", []),
        ("$$ $$", []),
        (r"\[ no end, \( no end, $x", []),
        ("$x\n\ny$", []),
        ("`$x$` and\n```\n$x$\n```\n", []),
        ('[asy] label("$A$", (0,0)); [/asy] $B$', ["$B$"]),
        (r"\\(x\\)", []),
        # a price before a formula does not shift the pairs
        ("For $5 you get $x$ of it, or $3 + x$.", ["$x$", "$3 + x$"]),
        (r"It costs \$5 or \$6.", [r"\$", r"\$"]),
    ],
)
def test_what_is_a_formula(text, expected):
    """A wrong pair of dollar signs would turn all prose between two formulas into formulas."""
    assert formulas(text) == expected


def test_escaped_dollar_sign():
    text = with_math(r"It costs \$5 & $x$.")
    assert re.sub("<[^>]*>", "", text) == "It costs $5 &amp; x."


@pytest.mark.parametrize(
    "latex, mathml",
    [
        ("x", "<mi>x</mi>"),
        (r"\frac{1}{2}", "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>"),
        ("a<b", "<mi>a</mi><mo>&lt;</mo><mi>b</mi>"),
        (r"\boxed{5}", '<mrow class="box"><mrow><mn>5</mn></mrow></mrow>'),
        (r"9 \& 2", "<mn>9</mn><mi>&amp;</mi><mn>2</mn>"),
        (r"\$5", "<mi>$</mi><mn>5</mn>"),
        # a percent sign, which starts a comment in LaTeX
        ("20% + 1", "<mn>20</mn><mi>%</mi><mo>&#x0002B;</mo><mn>1</mn>".replace("&#x0002B;", "+")),
        (r"20\%", "<mn>20</mn><mi>%</mi>"),
        (r"\text{50% of it}", "<mtext>50%\xa0of\xa0it</mtext>"),
    ],
)
def test_exact_mathml(latex, mathml):
    assert to_mathml(latex) == f'<math display="inline"><mrow>{mathml}</mrow></math>'


def test_displayed_formulas_and_tables():
    assert to_mathml("x", "block").startswith('<math display="block">')
    assert "block" in with_math("$$x$$") and "block" not in with_math("$x$")
    rows = {"align*": 2, "aligned": 2, "gather": 2, "eqnarray*": 2, "cases": 2, "alignat*": 2}
    for name, count in rows.items():
        argument = "{2}" if name == "alignat*" else ""
        markup = to_mathml(rf"\begin{{{name}}}{argument} a &= b \\ &= c \end{{{name}}}")
        assert markup.count("<mtr>") == count and ">2<" not in markup, name
    assert to_mathml(r"a &= b \\ c &= d").count("<mtr>") == 2  # lines without an environment
    spaced = to_mathml(r"\begin{align*} a &= 50% \\[4pt] c &= d \end{align*}")
    assert spaced.count("<mtr>") == 2 and "%" in spaced and "[" not in spaced
    lines = to_mathml(r"\begin{array}{c|c} 1 & 2 \\ \hline 3 & 4 \end{array}")
    assert re.findall(r'<mtd columnalign="center"( class="[^"]*")?><mn>(\d)', lines) == [
        (' class="right below"', "1"),
        (' class="below"', "2"),
        (' class="right"', "3"),
        ("", "4"),
    ]


@pytest.mark.parametrize(
    "latex",
    [
        "",
        "  ",
        r"\frac{1}",
        "2^3^4",
        r"\left( x",
        r"\begin{aligned} x",
        r"\unknown{x}",
        r"\href{javascript:alert(1)}{x}",
        "a & b",
        r"\newcommand{\a}{x} \a",
        r"\def\a{\a\a} \a",
        "x" * (MAX_CHARACTERS + 1),
        "{" * 2000 + "}" * 2000,
        r"\sqrt{" * 800,
        # the converter would show another formula
        r"\begin{array}{r@{}l} 1 & 2 \end{array}",
        r"\begin{array}{*{2}{c}} 1 & 2 \end{array}",
        r"\text{The set \{1, 2\}} = S",
    ],
)
def test_what_cannot_be_converted_is_shown_as_it_is(latex):
    assert to_mathml(latex) is None
    text = f"before \\({latex}\\) after"
    assert with_math(text) == Markup.escape(text)


class Tags(HTMLParser):
    """The elements and attributes of a page, as a browser would find them."""

    def __init__(self, text: str):
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found |= {tag, *(f"{tag}[{name}]" for name, _ in attrs)}


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.mark.parametrize(
    "text",
    [
        EVIL,
        f"$\\text{{{EVIL}}}$",
        f"$x {EVIL} y$",
        f"\\[\\mbox{{{EVIL}}}\\]",
        f'$\\color{{"><script>}}{{{EVIL}}}$',
        f'\\(\\text{{"{EVIL}}}\\)" onclick="',
        "$\\text{&lt;script&gt;alert(1)&lt;/script&gt;}$",
        "$\\text{&#x3C;script&#x3E;}$",
        f"\\boxed{{\\text{{{EVIL}}}}}",
        '$\\hspace{1em" onload="alert(1)}$',
        "$\\class{x}{y} \\style{color:red}{x} \\require{x} \\url{javascript:x}$",
        "$\\text{\u202e}$",
        "$\\text{&#x202E;}$",
        "$\\text{&#xD800;}$",
    ],
)
def test_no_markup_of_a_text_survives(text):
    """The converter itself writes the text of formulas without escaping it."""
    page = with_math(text)
    tags = Tags(page).found
    assert not {"script", "img"} & tags
    assert not [tag for tag in tags if re.search(r"\[(on|href|src|style)", tag)]
    assert "\u202e" not in page
    page.encode()  # a page is written as UTF-8


def sources_of(page: str) -> str:
    """Return the text of which a page was made, with the sources of its formulas from their tooltips."""
    return Markup(re.sub(r'<span class="math" title="([^"]*)">.*?</span>', r"\1", str(page))).unescape()


def test_nothing_is_lost():
    text = r"A & B: $x < 1$, \(\unknown\), costs $5," + "\n\n" + r"\[y\] <b>"
    assert sources_of(with_math(text)) == text


@pytest.mark.parametrize(
    "unit",
    ["$", "$$", "$x", r"\(", r"\[", r"\(x", "[asy]", "```\n", r"\boxed{", r"\begin{align}", "$ ", r"$\text{"],
)
def test_long_texts_take_linear_time(unit):
    """Searching the end of each opening up to the end of the text would take hours here."""
    text = unit * 20_000
    assert sources_of(with_math(text)) == text


def test_real_solutions(shared_data):
    """At least 99.5 % of the formulas of MATH and OlympiadBench can be converted."""
    lines = (shared_data / "math500" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    texts = [row[name] for row in map(json.loads, lines) for name in ("problem", "solution")]
    solutions = json.loads((shared_data / "processbench" / "olympiadbench.json").read_text(encoding="utf-8"))[:40]
    texts += [text for row in solutions for text in (row["problem"], *row["steps"])]
    converted = missed = 0
    for text in texts:
        found = formulas(text)
        converted += len(found)
        for formula in found:
            text = text.replace(formula, "", 1)
        missed += len(re.findall(r"\\\(|\\\[|\$\$", text))  # their openings are never prices
    assert converted > 1500 and missed / (converted + missed) < 0.005


def test_a_dollar_sign_inside_a_text_does_not_end_the_formula_in_half():
    assert "{if" not in with_math(r"$\text{if $x$ is}$").replace(r"\text{if", "")
    assert to_mathml(r"\text{if ") is None
    assert to_mathml(r"\{1, 2\}") is not None


def test_escapes_in_a_text_are_the_characters():
    assert "<mtext>5%\xa0of\xa0$3\xa0&amp;\xa0a_b</mtext>" in with_math(r"$\text{5\% of \$3 \& a_b}$").replace(
        " ", "\xa0"
    )


@pytest.mark.parametrize(
    "digits, braces",
    [
        (r"\sqrt23", r"\sqrt{2}3"),
        (r"\sqrt[3]27", r"\sqrt[3]{2}7"),
        (r"\frac{1}23", r"\frac{1}{2}3"),
        (r"\dfrac{x+1}{2}34", r"\dfrac{x+1}{2}34"),
    ],
)
def test_an_argument_of_one_digit(digits, braces):
    """LaTeX takes the first digit: √2·3, where √23 would be another value."""
    assert to_mathml(digits) == to_mathml(braces) is not None
