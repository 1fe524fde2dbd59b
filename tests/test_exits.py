"""
Texts of data are escaped where they leave the package: in the terminal, in Markdown cards, on HTML pages and in error messages.

Every text field of the inputs, every folder and every model name is hostile.
"""

import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from trl_hrm.cli import COMMANDS, main
from trl_hrm.io import shell_word
from trl_hrm.pages.page import Table, code, markdown, render
from trl_hrm.pages.pictures import THEMES, new_figure, shown_label
from trl_hrm.terminal import colored, one_line, plain, printable

from .evaluation import benchmark_rows
from .fakes import write_rows
from .helpers import make_trainer, random_tree, save_checkpoint
from .scripts.commands import save_judge
from .search.policies import KNOWN


CONTROL = "\x1b[31m\x1b]0;title\x07\x9b1m\x00\x7f\u202e\u2066\u200b\ud800"
MARKUP = (
    "\n# heading\r\n---\nlicense: mit\n---\n| a | b |\n|---|---|\n| 1 | 2 |\n```\n~~~\n<!-- x --> <script>evil()</script></script>"
    "<img src=x onerror=evil()> ![i](http://evil.example/i.png) [x](javascript:evil()) *e* **s** `c` {{ 7*7 }} {% raw %} $x$ &lt;\n- li"
)
HOSTILE = f"evil{MARKUP}{CONTROL}".replace("\ud800", "")  # JSON files and Parquet hold no surrogates
FOLDER = (
    "\x1b[31m\x1b]0;t\x07\x9b1m\u202e\u200b\n# h\r\n---\n|a|b|\n|-|-|\n```\n<script>e()<img src=x onerror=e()>[x](javascript:e()) `c`"
    "{{ 7*7 }} {% raw %} $x$ *e*"
)
INNOCENT = "fine"


def unsafe(text: str) -> set[str]:
    """Return the control characters of a text, without line breaks, tabs, and the carriage returns of progress bars."""
    return {one for one in text if not one.isprintable() and one not in "\n\t\r\N{NO-BREAK SPACE}"}


def rows_of(text: str) -> list[dict]:
    """Return rows in TRL's stepwise format with a text in every field."""
    return [
        {
            "prompt": f"{text} {i}",
            "completions": [f"{text} a", f"{text} b"],
            "labels": [True, i % 2 == 0],
            f"column {text}": text,
        }
        for i in range(40)
    ]


def prm800k_rows(text: str) -> list[dict]:
    """Return PRM800K records. Every fourth has an unknown finish reason."""
    step = {
        "completions": [{"text": text, "rating": 1}],
        "human_completion": None,
        "chosen_completion": 0,
    }
    reasons = (text, "solution", "solution", "solution")
    return [
        {
            "question": {"problem": f"{text} {i}", "ground_truth_answer": text},
            "label": {"steps": [step, step], "finish_reason": reasons[i % 4]},
        }
        for i in range(40)
    ]


class Structure(HTMLParser):
    """Counts the elements of a page with their attributes' names."""

    def __init__(self, page: str):
        super().__init__()
        self.found: Counter = Counter()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found[tag, *(name for name, _ in attributes)] += 1
        for name, value in attributes:
            assert not (value or "").lower().strip().startswith("javascript:"), (tag, name)


def card_structure(path: Path) -> tuple[dict, list]:
    """Return the metadata of a card, and everything in its Markdown that is not text or code."""
    _, head, text = re.split(r"^---$", path.read_text(encoding="utf-8"), maxsplit=2, flags=re.MULTILINE)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    spans = [token for block in tokens for token in block.children or () if token.nesting >= 0]
    kinds = [token.type + token.tag for token in tokens if token.type not in ("inline", "html_block")]
    return yaml.safe_load(head), [
        *kinds,
        *sorted(Counter(t.type for t in spans if t.type not in ("text", "code_inline", "softbreak")).items()),
        [token.content for token in tokens if token.type == "html_block"],
    ]


class TestFunctions:
    @pytest.mark.parametrize("function", [plain, one_line, printable, markdown, code, shell_word, shown_label])
    def test_no_control_characters(self, function):
        found = function(CONTROL + MARKUP)
        assert unsafe(found) == set() and "\r" not in found
        assert "\n" not in found or function is printable

    def test_plain(self):
        assert plain("a\x1b[1m\r\nb\u202ec") == "a␛[1m b\\u202ec"

    def test_one_line_keeps_both_ends(self):
        """What to do is at the end of an error message."""
        found = one_line(f"begin{'x' * 5000}end")
        assert len(found) == 1000 and found.startswith("beginx") and found.endswith("xend") and "x ... x" in found
        assert one_line("x" * 1000) == "x" * 1000

    def test_only_own_colors_are_kept(self):
        text = f"{colored('good', 0.9)}\n{CONTROL}\x1b[38;5;160mleft red\x1b[38;5;1m"
        assert unsafe(printable(text)) == set()
        assert printable(text, color=True).startswith("\x1b[38;5;34mgood\x1b[0m\n␛[31m")
        assert printable(text, color=True).count("\x1b") == 2
        assert printable(colored("a\rb\x9b", 0.9), color=True) == "\x1b[38;5;34ma␍b\\u009b\x1b[0m"

    @pytest.mark.parametrize(
        "text", ["a model", "Qwen/Qwen2.5-7B", "snake_case", "0.25", "it's 5 (of 6)", "Ünï: 'x'", ""]
    )
    def test_ordinary_text_is_unchanged_in_markdown(self, text):
        assert markdown(text) == text

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("*a*", "`*a*`"),
            ("a `b` ``c", "```a `b` ``c```"),
            ("`", "`` ` ``"),
            ("_a_", "`_a_`"),
            ("# a", "`# a`"),
            ("www.evil.example", "`www.evil.example`"),
            ("- a", "`- a`"),
            ("1. a", "`1. a`"),
            ("\\n", "`\\n`"),
        ],
    )
    def test_markup_becomes_code(self, text, expected):
        assert markdown(text) == expected
        [_, inline, _] = MarkdownIt("commonmark").parse(expected)
        assert [(one.type, one.content) for one in inline.children if one.content] == [("code_inline", plain(text))]

    def test_a_cell_of_a_table(self):
        [cell] = [
            token
            for token in MarkdownIt("commonmark").enable("table").parse(Table(["a"], [[markdown(MARKUP)]]).markdown())
            if token.type == "inline" and "evil" in token.content
        ]
        assert [one.type for one in cell.children] == ["code_inline"] and cell.children[0].content == plain(MARKUP)

    def test_a_page_has_no_element_of_a_text(self):
        """Also no character that reverses or hides the text around it."""
        pages = [
            render("tree.html.jinja", data={"text": text, "links": {}}, formulas=[]) for text in (INNOCENT, HOSTILE)
        ]  # the only template with JSON in a script
        assert Structure(pages[0]).found == Structure(pages[1]).found

    def test_labels_of_a_picture(self):
        """Text between dollar signs is a formula, and an invalid formula stops matplotlib."""
        axes = new_figure().subplots()
        for text in (HOSTILE, r"$\frac{$", r"\$x\$", "_hidden"):
            axes.plot([0, 1], label=shown_label(text))
        axes.legend()
        axes.figure.savefig("/dev/null", format="png", facecolor=THEMES["light"].page)


class TestCards:
    @pytest.mark.parametrize("command", ["build-stepwise", "build-prm800k"])
    def test_a_built_dataset(self, tmp_path, monkeypatch, capfd, command):
        """The finish reason is the name of a count, and the names of columns are in the table of columns."""
        monkeypatch.chdir(tmp_path)
        cards = []
        for text in (INNOCENT, HOSTILE):
            rows = rows_of(text) if command == "build-stepwise" else prm800k_rows(text)
            path = write_rows(tmp_path / f"{FOLDER if text == HOSTILE else text}.jsonl", rows)
            output = tmp_path / f"out {FOLDER if text == HOSTILE else text}"
            assert main([command, path, "--output_dir", str(output), "--view", "prm", "--num_proc", "1"]) == 0
            cards.append(card_structure(output / "README.md"))
        assert unsafe((tmp_path / output / "README.md").read_text(encoding="utf-8")) == set()
        printed = capfd.readouterr()
        assert unsafe(printed.out) == unsafe(printed.err) == set()
        for facts, _ in cards:
            facts["configs"][0].pop("description")  # a digest of the content
        assert cards[0] == cards[1]

    def test_a_model(self, tmp_path, monkeypatch):
        """The names of folders and evaluation datasets are in the headings and tables of a model card."""
        import random

        monkeypatch.chdir(tmp_path)
        cards = []
        for text in (INNOCENT, FOLDER):
            trees = [random_tree(random.Random(i), f"p{i}") for i in range(4)]
            trainer = make_trainer(f"out {text}", trees)
            trainer.dataset_name = f"/data/{text}"
            trainer.state.log_history = [{"step": 0, f"eval_{text}_loss": 0.5, "eval_loss": 0.25}]
            trainer.eval_dataset = {text: trainer.train_dataset}
            trainer.create_model_card(model_name=text, tags=[text])
            path = Path(trainer.args.output_dir) / "README.md"
            cards.append(card_structure(path)[1])
            body = path.read_text(encoding="utf-8").split("\n---\n", 1)[1]  # YAML keeps all characters
            assert unsafe(body) == set()
        assert cards[0] == cards[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exits")


@pytest.fixture(scope="module")
def checkpoint(work) -> str:
    return save_checkpoint(work / f"rm {FOLDER}", max_position_embeddings=4096)


PROMPT = [
    "--prompt",
    "question",
    "--prompt_style",
    "plain",
    "--engine",
    "transformers",
    "--final_stops",
    "# END!",
    FOLDER,
]


class TestCommands:
    """Each command with hostile texts, in the order in which they use each other's outputs."""

    @pytest.fixture(autouse=True)
    def safe(self, work, monkeypatch, capfd):
        monkeypatch.chdir(work)
        yield
        printed = capfd.readouterr()
        assert unsafe(printed.out) == unsafe(printed.err) == set() and printed.out
        lines = printed.out.splitlines() + printed.err.splitlines()
        assert not [
            line for line in lines if line.strip().startswith(("# h", "license:"))
        ]  # a text makes no line of its own

    @pytest.fixture(scope="class")
    def problems(self, work) -> str:
        rows = [row | {"problem_id": f"{i} {HOSTILE}", "problem": f"{row['problem']}"} for i, row in enumerate(KNOWN)]
        rows.append({"problem": HOSTILE, "answer": HOSTILE, "problem_id": HOSTILE})
        return write_rows(work / f"problems {FOLDER}", rows)

    @pytest.fixture(scope="class")
    def candidates(self, work) -> str:
        rows = [
            {
                "prompt": f"{HOSTILE} {i}",
                "answer": "2",
                "problem_id": f"{i} {HOSTILE}",
                "candidates": [f"{HOSTILE}\n\n\\boxed{{{n}}}" for n in range(4)],
            }
            for i in range(6)
        ]
        return write_rows(work / f"candidates {FOLDER}", rows)

    def test_annotate(self, work, policy, problems):
        words = ["annotate", "--problems", problems, "--policy", policy, "--output_dir", f"run {FOLDER}", *PROMPT]
        assert main([*words, "--max_step_tokens", "30", "--num_children", "2", "--max_depth", "2"]) == 0

    def test_export(self, work):
        run = f"run {FOLDER}"
        assert main(["export", run, "--output_dir", f"trees {FOLDER}", "--num_proc", "1", "--test_size", "0"]) == 0
        path = work / f"trees {FOLDER}" / "README.md"
        assert unsafe(path.read_text(encoding="utf-8")) == set()
        facts, structure = card_structure(path)
        assert "license" not in facts and structure.count("heading_openh1") == 1
        assert structure.count("heading_openh2") == 7 and structure.count("table_opentable") == 3
        assert structure[-1] == [] and not {"html_inline", "image", "strong_open", "em_open"} & {
            one[0] for one in structure if isinstance(one, tuple)
        }

    def test_inspect(self, work):
        run = f"run {FOLDER}"
        assert main(["inspect", run]) == 0
        assert main(["inspect", run, "--problem", "4", "--html", "page.html"]) == 0
        innocent = render("tree.html.jinja", data={"links": {}}, formulas=[])
        assert Structure((work / "page.html").read_text(encoding="utf-8")).found == Structure(innocent).found

    def test_best_of_n(self, candidates, checkpoint):
        words = ["best-of-n", "--candidates", candidates, "--reward_model", checkpoint, "--n", "1", "4"]
        assert main([*words, "--output_dir", f"bon {FOLDER}"]) == 0

    def test_select_raft(self, work, candidates, checkpoint):
        words = ["select-raft", "--candidates", candidates, "--reward_model", checkpoint, "--num_candidates", "4"]
        assert main([*words, "--output_dir", f"raft {FOLDER}", "--test_size", "0"]) == 0
        path = work / f"raft {FOLDER}" / "README.md"
        assert unsafe(path.read_text(encoding="utf-8")) == set()
        structure = card_structure(path)[1]
        assert structure.count("heading_openh1") == 1 and structure[-1] == []

    def test_step_search(self, policy, problems, checkpoint):
        words = ["step-search", "--problems", problems, "--policy", policy, "--reward_model", checkpoint, "--n", "2"]
        assert main([*words, "--output_dir", f"search {FOLDER}", *PROMPT, "--max_step_tokens", "10"]) == 0

    def test_judge(self, work, policy):
        save_judge(work, policy)
        path = write_rows(work / f"solutions {FOLDER}", rows_of(HOSTILE)[:3])
        words = ["judge", path, "--judge", "judge", "--engine", "transformers", "--template", "judge.json"]
        assert main([*words, "--max_response_tokens", "8", "--output_dir", f"judged {FOLDER}"]) == 0

    def test_score(self, work, checkpoint):
        path = write_rows(work / f"solutions {FOLDER}", rows_of(HOSTILE)[:3])
        assert main(["score", path, "--reward_model", checkpoint]) == 0
        assert main(["score", path, "--reward_model", checkpoint, "--output", f"scores {FOLDER}"]) == 0

    def test_benchmark(self, work, checkpoint):
        rows = [benchmark_rows.process_row(i, i % 3 - 1, problem=f"{HOSTILE} {i}", subset=HOSTILE) for i in range(8)]
        path = write_rows(work / f"rows {FOLDER}", rows)
        words = ["benchmark", path, "--suite", "processbench", "--reward_model", checkpoint]
        assert main([*words, "--output_dir", f"bench {FOLDER}", "--validation_size", "0"]) == 0

    def test_report(self, work):
        """The page has the same elements as one of runs with innocent names."""
        names = ["bon", "search", "bench"]
        for name in names:
            shutil.copytree(work / f"{name} {FOLDER}", work / name)
        pages = []
        for folders in (names, [f"{name} {FOLDER}" for name in names]):
            assert main(["report", *folders, "--output", "report.html"]) == 0
            pages.append((work / "report.html").read_text(encoding="utf-8"))
            assert unsafe(pages[-1]) == set()
        assert Structure(pages[0]).found == Structure(pages[1]).found


@pytest.mark.parametrize("command", COMMANDS)
def test_errors_are_one_safe_line(tmp_path, monkeypatch, capfd, command):
    """The name of a file that does not exist, of an option, and the value of an option."""
    monkeypatch.chdir(tmp_path)
    for words in ([HOSTILE.replace("\x00", "")], [f"--{HOSTILE}"], ["--seed", HOSTILE], ["--config", FOLDER]):
        try:
            status = main([command, *words])
        except SystemExit as stop:
            status = stop.code
        printed = capfd.readouterr()
        assert unsafe(printed.out) == unsafe(printed.err) == set(), words
        if status:
            assert printed.err.startswith("error: ") and len(printed.err.splitlines()) <= 2, printed.err


def test_values_in_errors_are_short(tmp_path, capfd):
    """A long value in a row was quoted whole."""
    long = "x" * 1_000_000
    for row in ({"prompt": long}, {"prompt": "p", "completions": [1], "labels": [long]}, {long: 1}, [long]):
        path = write_rows(tmp_path / "rows.jsonl", [row])
        assert (
            main(["build-stepwise", path, "--output_dir", str(tmp_path / "out"), "--strict", "--num_proc", "1"]) == 1
        )
        assert len(capfd.readouterr().err) < 1200
