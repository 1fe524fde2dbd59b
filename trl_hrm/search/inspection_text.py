"""A search tree, and the problems of a run, as text for a terminal."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate, takewhile

from .inspection import CORRECT, OUTCOMES, WRONG, Inspection, Line, lines
from .tree import ROOT, SearchTree


# Red, yellow, green among the 256 colours; legible on white and on black
RAMP = (160, 166, 172, 178, 142, 106, 70, 34)
DIM, BOLD = "2", "1"
BAR = 8  # columns of a bar
ANSWER = 24  # columns
NAME = 24
FITTING_LINES = 100


def format_tree(
    inspection: Inspection,
    width: int = 120,
    depth: int | None = None,
    breadth: int = 8,
    rollouts: bool = False,
    color: bool = False,
) -> str:
    """
    A tree, one line per node: value, share of solved leaves, the beginning of the text, how the solution ended.

    What is left out is counted where it is left out. Control characters of a text are shown as such and never sent to the
    terminal.

    Args:
        inspection ([`Inspection`]):
            The tree with its scores and counts.
        width (`int`, *optional*, defaults to `120`):
            Columns of the terminal.
        depth (`int`, *optional*):
            Levels to show. By default as many as fit 100 lines, and at least one.
        breadth (`int`, *optional*, defaults to `8`):
            Most lines under one line.
        rollouts (`bool`, *optional*, defaults to `False`):
            Show each rollout. By default the rollouts from a node are one line.
        color (`bool`, *optional*, defaults to `False`):
            Colour by value, with escape sequences.
    """
    found = lines(inspection.tree)
    below = _lines_below(found, rollouts)
    depth = _fitting_depth(found, below, breadth) if depth is None else depth
    painter = _Painter(inspection, width, color)
    texts = [*painter.head(), ""]
    pending: list[tuple[int | str, str, str]] = [(0, "", "")]  # line or remark, its indent, indent of those below it
    while pending:
        line, own, under = pending.pop()
        if isinstance(line, str):
            texts.append(painter.remark(line, own))
            continue
        num_below = _num_nodes(found, below, below[line]) if found[line].depth >= depth else 0
        texts.append(painter.line(found[line], own, num_below))
        shown: list[int | str] = list(below[line][:breadth])
        if found[line].depth >= depth:
            shown = []
        elif len(below[line]) > breadth:
            hidden = below[line][breadth:]
            shown.append(f"… {len(hidden)} more, with {_num_nodes(found, below, hidden):,} nodes in all")
        last = len(shown) - 1
        pending.extend(
            (child, under + ("└─ " if i == last else "├─ "), under + ("   " if i == last else "│  "))
            for i, child in reversed(list(enumerate(shown)))
        )
    return "\n".join(texts)


def problem_lines(
    rows: Iterable[tuple[int, SearchTree, float | None]], width: int = 120, color: bool = False
) -> Iterator[str]:
    """
    The problems of a run, one line each under a line of titles.

    Args:
        rows (`Iterable[tuple[int, SearchTree, float | None]]`):
            Place, tree, and MC score of the prompt.
        width (`int`, *optional*, defaults to `120`):
            Columns of the terminal.
        color (`bool`, *optional*, defaults to `False`):
            Colour by value, with escape sequences.
    """
    yield f"{'#':>6}  {'value':<{BAR + 5}}  {'nodes':>7}  {'status':<13}  {'id':<{NAME}}  problem"
    for place, tree, score in rows:
        name = _pad(shorten(plain(tree.problem.problem_id), NAME), NAME)
        facts = f"  {len(tree.nodes):>7,}  {tree.status:<13}  {name}  "
        room = width - 8 - BAR - 5 - _columns(facts)
        yield f"{place:>6}  {_value(score, color)}{facts}{shorten(plain(tree.problem.prompt), room)}"


def plain(text: str) -> str:
    """One line of text that is safe to print: white space becomes a space, other control characters become visible."""
    return "".join(map(_visible, " ".join(text.split())))


def shorten(text: str, width: int) -> str:
    """The beginning of `text`, at most `width` columns wide, with an ellipsis if it goes on."""
    if _columns(text) <= width:
        return text
    return text[: _num_fitting(text, width - 1)] + "…" if width > 0 else ""


def wrap(text: str, width: int, most: int) -> list[str]:
    """`text` in lines of at most `width` columns, broken at spaces where there are any, and cut after `most` lines."""
    found: list[str] = []
    while _columns(text) > width and len(found) < most - 1:
        end = _num_fitting(text, width)
        end = max(text.rfind(" ", 0, end + 1), 0) or end
        found.append(text[:end])
        text = text[end:].lstrip()
    return [*found, shorten(text, width)]


class _Painter:
    def __init__(self, inspection: Inspection, width: int, color: bool):
        self.inspection, self.width, self.color = inspection, width, color
        self.tree = inspection.tree
        self.children = inspection.tree.children()
        self.outcomes = inspection.outcomes()
        self.share_width = max((len(self.share(i)) for i in range(ROOT, len(self.tree.nodes))), default=0)

    def head(self) -> list[str]:
        problem, totals = self.tree.problem, self.inspection.totals
        facts = [f"problem {plain(problem.problem_id)}", self.tree.status, f"{totals['num_nodes']:,} nodes"]
        if totals["num_tokens"]:
            facts.append(f"{totals['num_tokens']:,} tokens generated, {totals['num_cached']:,} from cache")
        return [
            paint(shorten(" · ".join(facts), self.width), BOLD, self.color),
            *wrap(plain(problem.prompt), self.width, most=4),
            shorten(f"reference answer: {plain(problem.answer)}", self.width),
            paint(shorten(self.inspection.basis, self.width), DIM, self.color),
        ]

    def share(self, index: int) -> str:
        """Solved leaves of those answered under an inner node, and how many are unresolved."""
        counts = self.inspection.counts[index]
        if not self.children[index] or not (counts.answered or counts.unresolved):
            return ""
        return f"{counts.correct}/{counts.answered}" + (f" +{counts.unresolved}?" if counts.unresolved else "")

    def line(self, line: Line, indent: str, num_below: int) -> str:
        first = line.nodes[0]
        share, ending, tint = self.share(first), self.ending(line), None
        more = f"  … {num_below:,} below" if num_below else ""
        if line.kind == "rollouts":
            value, share, text = " " * (BAR + 5), "", f"{len(line.nodes)} rollouts"
        else:
            value = _value(self.inspection.scores[first], self.color)
            text = "(prompt)" if first == ROOT else plain(self.tree.step_text(first))
            tint = self.tint(line)
        before = f"  {share:<{self.share_width}}  "
        room = max(self.width - BAR - 5 - _columns(before + indent + ending + more), 12)
        text = shorten(text, room) + paint(ending, tint, self.color) + paint(more, DIM, self.color)
        return value + before + paint(indent, DIM, self.color) + text

    def tint(self, line: Line) -> str | None:
        node = self.tree.nodes[line.nodes[0]] if line.kind == "node" else None
        return None if node is None or node.correct is None else _hue(float(node.correct))

    def ending(self, line: Line) -> str:
        """What stands after the text: marks, and how the solution ended."""
        if line.kind == "prompt":
            return ""
        if line.kind == "rollouts":
            found = Counter(self.outcomes[i] for i in line.nodes)
            return ": " + ", ".join(f"{found[name]} {name}" for name in OUTCOMES if found[name])
        node = self.tree.nodes[line.nodes[0]]
        marks = [f"×{len(line.nodes)}"] if len(line.nodes) > 1 else []
        if node.merged_from is not None:
            marks.append("moved up")
        ended = self.outcomes[line.nodes[0]]
        if ended in (CORRECT, WRONG):
            marks.append(f"{'✓' if ended == CORRECT else '✗'} {shorten(plain(node.answer or ''), ANSWER)}")
        elif ended is not None:
            marks.append(f"? {ended}" + (f" {shorten(plain(node.answer), ANSWER)}" if node.answer else ""))
        return "  " + "  ".join(marks) if marks else ""

    def remark(self, text: str, indent: str) -> str:
        return " " * (BAR + 5 + 4 + self.share_width) + paint(indent + text, DIM, self.color)


def _lines_below(found: list[Line], rollouts: bool) -> list[list[int]]:
    below: list[list[int]] = [[] for _ in found]
    for i, line in enumerate(found[1:], start=1):
        if rollouts or found[line.above].kind != "rollouts":
            below[line.above].append(i)
    return below


def _fitting_depth(found: list[Line], below: list[list[int]], breadth: int) -> int:
    level, total, depth = [0], 1, 0
    while level:
        level = [child for line in level for child in below[line][:breadth]]
        total += len(level)
        if total > FITTING_LINES and depth:
            return depth
        depth += 1
    return depth


def _num_nodes(found: list[Line], below: list[list[int]], roots: list[int]) -> int:
    pending, total = list(roots), 0
    while pending:
        line = pending.pop()
        total += len(found[line].nodes)
        if found[line].kind != "rollouts":
            pending.extend(below[line])
    return total


def _value(score: float | None, color: bool) -> str:
    """Number and bar, `BAR + 5` columns wide."""
    if score is None:
        return "   –" + " " * (BAR + 1)
    eighths = round(score * BAR * 8)
    bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
    return paint(f"{score:.2f} {bar:<{BAR}}", _hue(score), color)


def _hue(score: float) -> str:
    return f"38;5;{RAMP[min(int(score * len(RAMP)), len(RAMP) - 1)]}"


def paint(text: str, code: str | None, color: bool) -> str:
    """`text` between escape sequences, if colours are asked for."""
    return f"\x1b[{code}m{text}\x1b[0m" if color and code is not None and text else text


def _visible(character: str) -> str:
    if unicodedata.category(character)[0] != "C":
        return character
    if character < " ":
        return chr(0x2400 + ord(character))  # the picture of a control character
    return f"\\u{ord(character):04x}"


def _columns(text: str) -> int:
    """Columns that a terminal takes."""
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(character: str) -> int:
    """Two columns for East Asian wide characters, none for combining ones."""
    return 0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")


def _num_fitting(text: str, width: int) -> int:
    """Number of characters at the beginning of `text` that take at most `width` columns."""
    ends = accumulate(map(_width, text))
    return sum(1 for _ in takewhile(lambda end: end <= width, ends))


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _columns(text))
