"""Format a search tree, or the problems of a run, as text for a terminal."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from ..terminal import color_of, plain
from .inspection import CORRECT, OUTCOMES, WRONG, Inspection, Line, lines
from .tree import ROOT, SearchTree


BAR = 8  # columns of a bar
VALUE = BAR + 5  # columns of a number and its bar
ANSWER = 24  # columns
NAME = 24
GUIDE = 4  # columns per level of the tree
FITTING_LINES = 100
PROMPT_LINES = 4


def format_tree(
    inspection: Inspection,
    width: int = 120,
    depth: int | None = None,
    breadth: int = 8,
    rollouts: bool = False,
    color: bool = False,
) -> str:
    """
    Format a tree with one line per node: MC score, correct solutions below, beginning of the text, and outcome of the solution.

    Hidden nodes are counted where they are hidden. Control characters in texts are replaced by visible characters.

    Args:
        inspection ([`Inspection`]):
            Tree with its scores and counts.
        width (`int`, *optional*, defaults to `120`):
            Width of the terminal in columns.
        depth (`int`, *optional*):
            Number of levels to show. Defaults to as many as fit into 100 lines, but at least one.
        breadth (`int`, *optional*, defaults to `8`):
            Maximum number of lines below one line.
        rollouts (`bool`, *optional*, defaults to `False`):
            Whether to show each rollout. By default, the rollouts from a node share one line.
        color (`bool`, *optional*, defaults to `False`):
            Whether to colour lines by score, with escape sequences.
    """
    tree, found = inspection.tree, lines(inspection.tree)
    below: list[list[int]] = [[] for _ in found]
    for i, line in enumerate(found[1:], start=1):
        if rollouts or found[line.above].kind != "rollouts":
            below[line.above].append(i)
    depth = _fitting_depth(below, breadth) if depth is None else depth
    children, outcomes = tree.children(), inspection.outcomes()
    # the prompt is first
    shares = [_share(inspection, i) if children[i] else "" for i in range(ROOT, len(tree.nodes))]
    share_width = max(map(len, shares))
    room = width - VALUE - share_width - 4  # for the guides of the tree, and the texts

    columns: list[Text] = []  # columns to the left of the tree, one entry per line
    root = Tree("", guide_style="dim")
    # a line or a remark, its parent branch, and its depth
    pending: list[tuple[int | str, Tree | None, int]] = [(0, None, 0)]
    while pending:
        line, parent, level = pending.pop()
        if isinstance(line, str):
            columns.append(Text(" " * (VALUE + 4 + share_width)))
            parent.add(Text(line, style="dim"))
            continue
        node, kind = found[line].nodes[0], found[line].kind
        is_cut = level >= depth
        number = _num_nodes(found, below, below[line]) if is_cut else 0
        more = f"  … {number:,} below" if number else ""
        value, share = _value(inspection.scores[node]), shares[node + 1]
        ending, style = _ending(inspection, outcomes, found[line]), ""
        if kind == "rollouts":
            value, share, text = (" " * VALUE, ""), "", f"{len(found[line].nodes)} rollouts"
        elif kind == "prompt":
            text = "(prompt)"
        else:
            text, correct = plain(tree.step_text(node)), tree.nodes[node].correct
            style = "" if correct is None else _hue(float(correct))
        text = _cut(text, max(room - GUIDE * level - cell_len(ending + more), 12))
        columns.append(Text.assemble(value, f"  {share:<{share_width}}  "))
        label = Text.assemble(text, (ending, style), (more, "dim"))
        if parent is None:
            root.label = label
        branch = root if parent is None else parent.add(label)
        shown: list[int | str] = []
        if not is_cut:
            shown, hidden = list(below[line][:breadth]), below[line][breadth:]
            if hidden:
                shown.append(f"… {len(hidden)} more, with {_num_nodes(found, below, hidden):,} nodes in total")
        pending.extend((child, branch, level + 1) for child in reversed(shown))

    console = _console(width, color)
    wide = console.options.update(
        width=VALUE + share_width + GUIDE * (len(found) + 1) + width
    )  # wide enough that labels are never wrapped
    drawn = console.render_lines(root, wide, pad=False)
    texts = [*_head(inspection, console), Text()]
    for column, segments in zip(columns, drawn, strict=True):
        texts.append(Text.assemble(column, *((segment.text, segment.style or "") for segment in segments)))
    return _rendered(texts, console)


def problem_lines(
    rows: Iterable[tuple[int, SearchTree, float | None]], width: int = 120, color: bool = False
) -> Iterator[str]:
    """
    Format the problems of a run as a table with one line per problem.

    Args:
        rows (`Iterable[tuple[int, SearchTree, float | None]]`):
            Index, tree, and MC score of the prompt of each problem.
        width (`int`, *optional*, defaults to `120`):
            Width of the terminal in columns.
        color (`bool`, *optional*, defaults to `False`):
            Whether to colour lines by score, with escape sequences.
    """
    yield f"{'#':>6}  {'MC score':<{VALUE}}  {'nodes':>7}  {'status':<13}  {'id':<{NAME}}  problem"
    for place, tree, score in rows:
        name = set_cell_size(_cut(plain(tree.problem.problem_id), NAME), NAME)
        facts = f"  {len(tree.nodes):>7,}  {tree.status:<13}  {name}  "
        prompt = _cut(plain(tree.problem.prompt), width - 8 - VALUE - cell_len(facts))
        yield _rendered([Text.assemble(f"{place:>6}  ", _value(score), facts, prompt)], _console(width, color))


def _head(inspection: Inspection, console: Console) -> list[Text]:
    """Return the lines above a tree: problem, totals, and description of the scores."""
    problem, totals, width = inspection.tree.problem, inspection.totals, console.width
    facts = [f"problem {plain(problem.problem_id)}", inspection.tree.status, f"{totals['num_nodes']:,} nodes"]
    if totals["num_tokens"]:
        facts.append(f"{totals['num_tokens']:,} tokens generated, {totals['num_cached']:,} from cache")
    prompt = [line.plain.rstrip() for line in Text(plain(problem.prompt)).wrap(console, width)] or [""]
    if len(prompt) > PROMPT_LINES:
        prompt = prompt[:PROMPT_LINES]
        prompt[-1] = _cut(prompt[-1], width - 1) + "…"
    return [
        Text(_cut(" · ".join(facts), width), style="bold"),
        *map(Text, prompt),
        Text(_cut(f"reference answer: {plain(problem.answer)}", width)),
        Text(_cut(f"MC scores: {inspection.basis}", width), style="dim"),
        Text(
            _cut("columns: MC score; correct/answered solutions below, +N? without an answer; step", width),
            style="dim",
        ),
    ]


def _ending(inspection: Inspection, outcomes: list[str | None], line: Line) -> str:
    """Return the text after the step of a line: marks, and the outcome of the solution."""
    if line.kind == "prompt":
        return ""
    if line.kind == "rollouts":
        found = Counter(outcomes[i] for i in line.nodes)
        return ": " + ", ".join(f"{found[name]} {name}" for name in OUTCOMES if found[name])
    node, ended = inspection.tree.nodes[line.nodes[0]], outcomes[line.nodes[0]]
    answer = _cut(plain(node.answer or ""), ANSWER)
    marks = [f"×{len(line.nodes)}"] if len(line.nodes) > 1 else []
    if node.merged_from is not None:
        marks.append("moved up")
    if ended in (CORRECT, WRONG):
        marks.append(f"{'✓' if ended == CORRECT else '✗'} {answer}")
    elif ended is not None:
        marks.append(f"? {ended}" + (f" {answer}" if answer else ""))
    return "  " + "  ".join(marks) if marks else ""


def _share(inspection: Inspection, index: int) -> str:
    """Return how many solutions below an inner node are correct, have an answer, and have no answer, such as `3/5 +2?`."""
    counts = inspection.counts[index]
    if not (counts.answered or counts.unresolved):
        return ""
    return f"{counts.correct}/{counts.answered}" + (f" +{counts.unresolved}?" if counts.unresolved else "")


def _fitting_depth(below: list[list[int]], breadth: int) -> int:
    level, total, depth = [0], 1, 0
    while level:
        level = [child for line in level for child in below[line][:breadth]]
        total += len(level)
        if total > FITTING_LINES and depth:
            return depth
        depth += 1
    return depth


def _num_nodes(found: list[Line], below: list[list[int]], roots: list[int]) -> int:
    """Return the number of nodes on some lines and below them."""
    pending, total = list(roots), 0
    while pending:
        line = pending.pop()
        total += len(found[line].nodes)
        if found[line].kind != "rollouts":
            pending.extend(below[line])
    return total


def _value(score: float | None) -> tuple[str, str]:
    """Return number and bar, `VALUE` columns wide, and their style."""
    if score is None:
        return f"{'   –':<{VALUE}}", ""
    eighths = round(score * BAR * 8)
    bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
    return f"{score:.2f} {bar:<{BAR}}", _hue(score)


def _hue(score: float) -> str:
    return f"color({color_of(score)})"


def _cut(text: str, width: int) -> str:
    """Cut a text to `width` columns. An ellipsis marks the cut."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…" * (width > 0)


def _console(width: int, color: bool) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        height=24,
        color_system="256" if color else None,
        force_terminal=color,
        force_jupyter=False,
        no_color=False,
    )


def _rendered(texts: Iterable[Text], console: Console) -> str:
    """Return lines as text, with escape sequences if the console has colours."""
    console.print(Text("\n").join(texts), end="", no_wrap=True, overflow="ignore", crop=False, highlight=False)
    return console.file.getvalue()
