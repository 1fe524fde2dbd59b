"""How a tree is shown: in the terminal, on the page, and by the command."""

import json
import re
import unicodedata
from pathlib import Path

import pytest

from trl_hrm import ExportConfig, InspectConfig, export, inspect_tree
from trl_hrm.cli import main
from trl_hrm.search.compression import compress
from trl_hrm.search.inspection import OUTCOMES, lines, page_data, render_tree
from trl_hrm.search.inspection_text import format_tree, problem_lines
from trl_hrm.search.nodes import write_nodes
from trl_hrm.search.tree import ROOT
from trl_hrm.terminal import plain, printable

from .scripted import SEARCHES, read_trees, run_scripted
from .trees import full_tree, inspection_of, random_search_tree, tree_of


SMALL = tree_of(
    (ROOT, "1 + 2 = 3.\n\n# Step 2\n", {"tail": 9}),
    (0, "So it is 3.", {"answer": "3", "correct": True}),
    (0, "So it is 3.", {"answer": "3", "correct": True}),
    (0, "Hence 4.", {"answer": "4", "correct": False}),
    (0, "Hence I.", {"answer": "I"}),
    (ROOT, "and so on", {"finish": "length"}),
    (0, "3", {"role": "rollout", "answer": "3", "correct": True}),
    (0, "5", {"role": "rollout", "answer": "5", "correct": False}),
    (0, "six", {"role": "rollout", "finish": "eos", "is_final": True}),
)

SMALL_TEXT = """\
problem p1 · done · 9 nodes · 27 tokens generated, 0 from cache
What is 1 + 2?
reference answer: 3
MC scores: by hand
columns: MC score; correct/answered solutions below, +N? without an answer; step

0.60 ████▊     3/5 +2?  (prompt)
0.60 ████▊     3/5 +1?  ├── 1 + 2 = 3.
                        │   ├── 3 rollouts: 1 correct, 1 wrong, 1 no answer
1.00 ████████           │   ├── # Step 2 So it is 3.  ×2  ✓ 3
0.00                    │   ├── # Step 2 Hence 4.  ✗ 4
   –                    │   └── # Step 2 Hence I.  ? ungraded I
   –                    └── and so on  ? truncated"""


def test_a_tree_in_the_terminal():
    """Compare the whole output: values, shares, glyphs, folded rollouts, folded equal leaves and every ending."""
    text = format_tree(inspection_of(SMALL, basis="by hand"))
    assert [line.rstrip() for line in text.split("\n")] == SMALL_TEXT.split("\n")


def test_every_node_is_on_one_line():
    """A node lost when siblings are folded would leave no trace."""
    for seed in range(30):
        tree = random_search_tree(seed)
        for view in (tree, compress(tree, seed, probability=1.0, min_children=2)):
            found = lines(view)
            shown = [node for line in found if line.kind == "node" for node in line.nodes]
            assert sorted(shown) == list(range(len(view.nodes)))
            for line in found[1:]:
                above = found[line.above]
                assert line.depth == above.depth + 1
                if above.kind == "rollouts":
                    assert set(line.nodes) <= set(above.nodes)
                else:
                    assert {view.nodes[i].parent for i in line.nodes} == {above.nodes[0]}


def test_equal_siblings_with_something_below_them_stay_apart():
    """Folding them would show the subtree of the first and hide that of the other."""
    rows = [(ROOT, "Same.", {}), (ROOT, "Same.", {}), (0, "3", {"answer": "3", "correct": True}), (1, "x", {})]
    assert sum(line.kind == "node" for line in lines(tree_of(*rows))) == 4


@pytest.mark.parametrize("rollouts", [False, True])
@pytest.mark.parametrize("depth, breadth", [(None, 8), (1, 1), (2, 3), (3, 2), (50, 1), (50, 1000)])
def test_hidden_nodes_are_counted(depth, breadth, rollouts):
    """A tree cut without a note looks like a smaller tree."""
    for seed in range(10):
        tree = random_search_tree(seed)
        text = format_tree(inspection_of(tree), width=10_000, depth=depth, breadth=breadth, rollouts=rollouts)
        total = 0
        for line in text.split("\n")[7:]:
            left_out = re.search(r"… ([\d,]+) below|with ([\d,]+) nodes in total", line)
            if left_out:
                total += int((left_out[1] or left_out[2]).replace(",", ""))
            folded, group = re.search(r"×(\d+)", line), re.search(r"─ (\d+) rollouts:", line)
            if group:
                total += 0 if rollouts else int(group[1])
            elif "nodes in total" not in line:
                total += int(folded[1]) if folded else 1
        assert total == len(tree.nodes)
        if breadth == 1000 and depth == 50:
            assert "…" not in text


def test_a_tree_without_nodes():
    assert format_tree(inspection_of(tree_of())).split("\n")[-1].split() == ["–", "(prompt)"]


def test_the_default_depth_fits():
    inspection = inspection_of(full_tree(5, 5))
    assert len(format_tree(inspection).split("\n")) == 6 + 1 + 5 + 25
    assert "… 155 below" in format_tree(inspection)


HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J\x00\r\x08 \u202egnp.exe \ud800 <script>alert(1)</script>"


def test_control_characters_never_reach_the_terminal():
    """A policy could write an escape sequence that clears the screen, sets a title or hides text."""
    tree = tree_of(
        (ROOT, HOSTILE, {"answer": HOSTILE, "correct": None}),
        (ROOT, HOSTILE, {"answer": HOSTILE, "correct": True}),
        prompt=HOSTILE,
        answer=HOSTILE,
        name=HOSTILE,
    )
    texts = [format_tree(inspection_of(tree), width=1000), *problem_lines([(0, tree, 0.5)], width=1000)]
    for text in texts:
        assert not {c for c in text if unicodedata.category(c)[0] == "C"} - {"\n"}
    colored = format_tree(inspection_of(tree), width=1000, color=True)
    assert re.sub(r"\x1b\[(\d+;)*\d+m", "", colored) == texts[0]
    assert "␛[31mred" in texts[0] and "\\u202e" in texts[0]


def test_colours_follow_the_value():
    tree = tree_of((ROOT, "a", {"answer": "3", "correct": True}), (ROOT, "b", {"answer": "4", "correct": False}))
    prompt, right, wrong = format_tree(inspection_of(tree), color=True).split("\n")[-3:]
    assert right.startswith("\x1b[38;5;34m1.00 ████████\x1b[0m")
    assert wrong.startswith("\x1b[38;5;160m0.00 ")
    assert prompt.startswith("\x1b[38;5;142m0.50 ████ ")


@pytest.mark.parametrize("width", [80, 97, 133])
def test_lines_fit_the_terminal(width):
    """A line that wraps breaks the layout. Chinese characters take two columns."""
    tree = tree_of(
        (ROOT, "因为一加二等于三，" * 20, {}),
        (0, "word " * 50, {"answer": "1234567890" * 9, "correct": False}),
        (0, "e\u0301" * 90, {"answer": "等" * 40}),
        prompt="这道题的答案是什么？" * 60,
        answer="三" * 200,
        name="名" * 300,
    )
    text = format_tree(inspection_of(tree, basis="long " * 60), width=width)
    for line in [*text.split("\n"), *problem_lines([(0, tree, None)], width=width)]:
        columns = sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in line)
        assert columns <= width, line


def test_a_long_problem_is_cut_after_four_lines():
    tree = tree_of(prompt="one two three four " * 9)
    head = format_tree(inspection_of(tree), width=20).split("\n")
    assert head[1:5] == ["one two three four"] * 3 + ["one two three four…"] and head[5].startswith("reference answer")
    assert plain(" a\n\n b\tc ") == "a b c"


OUTCOME_CASES = {
    "correct": {"answer": "3", "correct": True},
    "wrong": {"answer": "4", "correct": False},
    "ungraded": {"answer": "I"},
    "truncated": {"finish": "length"},
    "no answer": {"finish": "eos", "is_final": True},
    "not continued": {},
}


def test_outcomes():
    """An unreadable answer or a truncated solution must never be shown as wrong."""
    tree = tree_of(*[(ROOT, name, fields) for name, fields in OUTCOME_CASES.items()])
    assert inspection_of(tree).outcomes() == list(OUTCOME_CASES)
    budget = tree_of((ROOT, "a", {"weight": 2.0}), (ROOT, "b", {}), (0, "c", {"answer": "3", "correct": True}))
    assert inspection_of(budget).outcomes() == [None, "dropped", "correct"]
    recorded = tree_of((ROOT, "a", {"value": 0.25}))
    assert inspection_of(recorded).outcomes() == [None]
    assert {*OUTCOME_CASES, "dropped"} == set(OUTCOMES)


def test_page_escapes_the_texts_of_the_tree():
    """One `</script>` in a text would end the data and run whatever the policy wrote."""
    tree = tree_of((ROOT, HOSTILE + "</script><img src=x onerror=alert(1)><!--", {"seed": 2**52 + 1}), prompt=HOSTILE)
    page = render_tree(inspection_of(tree, run=HOSTILE))
    assert page == render_tree(inspection_of(tree, run=HOSTILE))
    page.encode("utf-8")  # a lone surrogate would be an error
    assert page.count("<script") == 2 and page.count("</script") == 2 and "<img" not in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    assert data == json.loads(json.dumps(page_data(inspection_of(tree, run=HOSTILE), {}))) | {"links": {}}
    assert data["nodes"]["text"] == [printable(tree.step_text(0)), printable(HOSTILE)]
    assert data["problem"]["prompt"] == printable(HOSTILE) and "\u202e" not in page + json.dumps(
        data, ensure_ascii=False
    )
    assert data["nodes"]["seed"] == [str(2**52 + 1), None]
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mcts"
    run_scripted(folder, SEARCHES["rollouts"], shard=(0, 2))
    return folder


def test_list_of_problems(run_folder, capsys):
    assert main(["inspect", str(run_folder)]) == 0
    titles, *rows = capsys.readouterr().out.splitlines()
    assert titles.split() == ["#", "MC", "score", "nodes", "status", "id", "problem"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert all(re.search(rf" done +p00{i} +What is {i}", row) for i, row in enumerate(rows))
    assert not (run_folder / "inspect").exists()


def test_one_problem_by_place_and_by_id(run_folder, tmp_path, capsys):
    assert main(["inspect", str(run_folder), "--problem", "2"]) == 0
    by_place = capsys.readouterr().out
    page = run_folder / "inspect" / "p002.html"
    assert by_place.startswith("problem p002 · done · ") and by_place.endswith(f"\nPage: {page}\n")
    assert "\x1b" not in by_place  # not a terminal
    (nodes,) = re.findall(r'"node_id":(\[.*?\])', page.read_text(encoding="utf-8"))
    expected = read_trees(run_folder)["p002"]  # in canonical order: the page must not depend on the order of arrival
    assert json.loads(nodes) == [*(node.node_id for node in expected.nodes), None]
    other = tmp_path / "other" / "page.html"
    assert main(["inspect", str(run_folder), "--problem", "p002", "--html", str(other)]) == 0
    assert capsys.readouterr().out.split("\nPage")[0] == by_place.split("\nPage")[0]
    assert other.read_bytes() == page.read_bytes()
    (page.parent / "index.html").write_text("")  # the list that `--all` wrote
    assert main(["inspect", str(run_folder), "--problem", "2"]) == 0
    assert '"links":{"index":"index.html"}' in page.read_text(encoding="utf-8")
    (page.parent / "index.html").unlink()


@pytest.mark.parametrize(
    "options, names, folder",
    [
        (["--all"], [f"p00{i}" for i in range(6)], None),
        (["--problem", "4", "p001", "--html", "pages", "--hnc"], ["p004", "p001"], "pages"),
    ],
)
def test_several_problems(run_folder, tmp_path, monkeypatch, capsys, options, names, folder):
    """Each page links to its neighbours in the order in which they were asked for."""
    monkeypatch.chdir(tmp_path)
    folder = Path(folder or run_folder / "inspect")
    assert main(["inspect", str(run_folder), *options]) == 0
    assert capsys.readouterr().out == f"Pages of {len(names)} problems: {folder / 'index.html'}\n"
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<a href="(.*?)">(.*?)</a>', index) == [(f"{name}.html", name) for name in names]
    for i, name in enumerate(names):
        page = (folder / f"{name}.html").read_text(encoding="utf-8")
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
        links = {"index": "index.html"}
        links |= {"previous": f"{names[i - 1]}.html"} if i else {}
        links |= {"next": f"{names[i + 1]}.html"} if i + 1 < len(names) else {}
        assert data["links"] == links and data["problem"]["id"] == name
        assert ("node compression" in data["basis"]) == ("--hnc" in options)


def test_options_change_what_is_shown(run_folder, tmp_path, capsys):
    """An option could be accepted and ignored."""
    folder = tmp_path / "full"
    run_scripted(folder, SEARCHES["narrow"])

    def shown(path, *options):
        assert main(["inspect", str(path), "--problem", "3", *options]) == 0
        return capsys.readouterr().out

    rollouts = shown(run_folder)
    assert "rollouts: " in rollouts
    assert len(shown(run_folder, "--rollouts").split("\n")) > len(rollouts.split("\n"))
    assert " below\n" in shown(folder, "--depth", "1") and " below\n" not in shown(folder, "--depth", "9")
    assert " nodes in total\n" in shown(folder, "--breadth", "2") and " nodes in all\n" not in shown(folder)
    values = {
        shown(folder, *words).split("\n")[6] for words in ([], ["--estimator", "leaf_share"], ["--truncated", "wrong"])
    }
    assert len(values) == 3
    assert "moved up" not in shown(folder)


def test_compressed_view(tmp_path, capsys):
    """Moved steps must look different from sampled ones, because they do not count for their new parent's value."""
    path = tmp_path / "nodes.parquet"
    write_nodes([full_tree(5, 3)], path)
    argv = [
        "inspect",
        str(path),
        "--problem",
        "full",
        "--html",
        str(tmp_path / "page.html"),
        "--depth",
        "9",
        "--breadth",
        "99",
    ]
    assert main(argv) == 0
    plain_view = capsys.readouterr().out
    moved = {}
    for rule in ("per_parent", "per_child"):
        assert main([*argv, "--hnc", "--hnc_rule", rule, "--hnc_seed", "3"]) == 0
        view = capsys.readouterr().out
        moved[rule] = int(re.search(rf"node compression moved (\d+) nodes \({rule}, seed 3", view)[1])
        assert view.count("moved up") == moved[rule] and "moved up" not in plain_view
        assert view.split("\n")[0] == plain_view.split("\n")[0]  # totals of the search do not change
    assert 0 < moved["per_parent"] < moved["per_child"]


def test_compressed_as_in_an_export(tmp_path, capsys):
    """Other numbers of children, passes or another probability showed another tree than the export has."""
    path = tmp_path / "nodes.parquet"
    write_nodes([full_tree(3, 4)], path)
    hnc = {"hnc": True, "hnc_min_children": 2, "hnc_probability": 0.8, "hnc_passes": 2, "hnc_seed": 1}
    hnc |= {"hnc_rule": "per_child"}
    report = export(ExportConfig(inputs=[path], output_dir=tmp_path / "out", num_proc=1, test_size=0.0, **hnc))
    inspect_tree(InspectConfig(input=path, problem=["full"], html=tmp_path / "page.html", **hnc))
    options = r"per_child, seed 1, probability 0.8, at least 2 children, passes: 2"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    moved = int(re.search(rf"node compression moved (\d+) nodes \({options}\)", page)[1])
    assert f"moved {moved} nodes" in capsys.readouterr().out
    assert moved == report["notes"]["hnc_moved_nodes"] > 12


def test_a_run_that_is_still_going(tmp_path, capsys):
    """The last line may be half written, and the trees are unfinished."""
    folder = tmp_path / "run"
    run_scripted(folder)
    (log,) = folder.glob("log-*.jsonl")
    events = log.read_bytes().splitlines(keepends=True)
    half = events[: len(events) // 2]
    log.write_bytes(b"".join(half) + events[len(events) // 2][:20])
    assert main(["inspect", str(folder)]) == 0
    open_row = next(row for row in capsys.readouterr().out.splitlines() if " open " in row)
    assert main(["inspect", str(folder), "--problem", open_row.split()[0]]) == 0
    assert " · open · " in capsys.readouterr().out


def test_openr_trees(openr, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["inspect", str(openr), "--format", "openr", "--problem", "2", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    num_nodes = 4 if openr.stem == "openr" else 23
    assert f" · done · {num_nodes} nodes\n" in out and "reference answer: \\frac{11}{36}" in out
    assert "0.19 █▌" in out and "MC scores: recorded in the source\n" in out
    assert page.exists()


def test_ids_that_are_not_file_names(tmp_path, capsys, monkeypatch):
    """`a/b` and `a_b` must not share a page, and `../x` must not leave the folder."""
    monkeypatch.chdir(tmp_path)
    names = ["a/b", "a_b", "../x", "q" * 300, "问题", "index"]
    write_nodes([tree_of((ROOT, "One.", {}), name=name) for name in names], tmp_path / "nodes.parquet")
    for name in names:
        assert main(["inspect", "nodes.parquet", "--problem", name]) == 0
    pages = re.findall(r"Page: (.*)", capsys.readouterr().out)
    assert len(set(pages)) == len(names)
    assert {path.name for path in tmp_path.glob("*.html")} == set(pages)
    assert main(["inspect", "nodes.parquet", "--all"]) == 0
    assert {path.name for path in (tmp_path / "inspect").glob("*.html")} == {*pages, "index.html"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--problem", "77"], "problem '77' is not among its 6 problems"),
        (["--all", "--problem", "1"], "`all` shows every problem"),
        (["--all", "--depth", "2"], "`depth` has no effect with several problems"),
        (["--problem", "1", "2", "--rollouts"], "`rollouts` has no effect with several problems"),
        (["--problem", "1", "77", "--html", "pages"], "problem '77' is not among its 6 problems"),
        (["--problem", "1", "p001", "--html", "pages"], "problem 'p001' is there twice"),
        (["--html", "x.html"], "`html` has no effect without `problem`"),
        (["--depth", "2"], "`depth` has no effect without `problem`"),
        (["--rollouts"], "`rollouts` has no effect without `problem`"),
        (["--problem", "1", "--hnc_seed", "3"], "`hnc_seed` has no effect without `hnc`"),
        (["--problem", "1", "--hnc_rule", "per_child"], "`hnc_rule` has no effect without `hnc`"),
        (["--problem", "1", "--hnc_min_children", "2"], "`hnc_min_children` has no effect without `hnc`"),
        (
            ["--format", "openr", "--estimator", "leaf_share"],
            "`estimator` is leaf_share, but openr files contain values",
        ),
        (["--format", "openr", "--truncated", "wrong"], "`truncated` is wrong, but openr files contain values"),
        (["--problem", "1", "--depth", "0"], "`depth` is 0"),
        (["--problem", "1", "--breadth", "-1"], "`breadth` is -1"),
        (["--format", "openr"], "is a folder without search logs. Expected a JSON Lines file of openr"),
    ],
)
def test_errors(run_folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(run_folder), *options]) == 1
    assert message in capsys.readouterr().err


def test_folder_without_a_run(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "is a folder without search logs" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "missing")]) == 1
    assert "missing" in capsys.readouterr().err
