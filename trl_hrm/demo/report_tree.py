"""A picture of a search tree: colours for values, lines for kinds of steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.report_pictures import Picture, Theme, draw, shown_label


if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 9.5  # inches
BOX = (0.82, 0.66)  # of the place of a node
EDGES = {
    "right": ("right step", "-", 1.4),
    "first_error": ("first error", "--", 2.0),
    "correction": ("correction", "-", 3.4),
    "locally_right": ("locally right, stays wrong", ":", 1.8),
    "new_error": ("new error", "-.", 1.8),
    "lucky": ("right again by chance", (0, (1, 3)), 1.8),
    "answer": ("answer", "-", 0.8),
}


def tree_picture(tree: dict[str, Any]) -> Picture:
    """
    The tree from left to right.

    Args:
        tree (`dict[str, Any]`):
            `problem`, and `nodes` with `parent` (-1 for the problem), `text`, mean MC `value`, `count` of how often the step was
            sampled, `kind`, and `correct` for answers.
    """
    nodes = tree["nodes"]
    places = tree_places([node["parent"] for node in nodes])
    num_rows = max((y for _, y in places), default=0) + 1
    depth = max((x for x, _ in places), default=0)

    def paint(axes: "Axes", theme: Theme) -> None:
        root = (-1.0, sum(y for (x, y) in places if x == 0) / max(sum(x == 0 for x, _ in places), 1))
        for node, place in zip(nodes, places, strict=True):
            _edge(axes, theme, root if node["parent"] < 0 else places[node["parent"]], place, node["kind"])
        _box(axes, theme, root, "problem", theme.page, theme.quiet, 1)
        for node, place in zip(nodes, places, strict=True):
            color, width = (theme.right, 2.4) if node["kind"] == "correction" else (theme.quiet, 0.8)
            _box(axes, theme, place, node_words(node), _shade(theme, node["value"]), color, width)
        _names(axes, theme)
        axes.set_xlim(-1.5, depth + 0.5)
        axes.set_ylim(num_rows - 0.4, -0.6)
        axes.axis("off")

    corrections = [node for node in nodes if node["kind"] == "correction"]
    text = f"A search tree of {len(nodes)} steps for: {tree['problem']} " + " ".join(
        f"Correction {step_text(node)}, value {_number(node['value'])}, after {step_text(nodes[node['parent']])}, "
        f"value {_number(nodes[node['parent']]['value'])}."
        for node in corrections
        if node["parent"] >= 0
    )
    title = "Steps with their MC values, bluer for higher; a correction has a thick line and frame"
    return draw("tree", title, text, paint, 1.0 + 0.46 * num_rows, WIDTH)


def tree_places(parents: Sequence[int]) -> list[tuple[float, float]]:
    """Depth and row of each node: leaves one below another, a parent in the middle of its children."""
    children: dict[int, list[int]] = {}
    for i, parent in enumerate(parents):
        children.setdefault(parent, []).append(i)
    places: dict[int, tuple[float, float]] = {}
    num_leaves = 0

    def place(i: int, depth: int) -> float:
        nonlocal num_leaves
        rows = [place(child, depth + 1) for child in children.get(i, ())]
        if not rows:
            rows = [float(num_leaves)]
            num_leaves += 1
        places[i] = (float(depth), sum(rows) / len(rows))
        return places[i][1]

    for top in children.get(-1, ()):
        place(top, 0)
    return [places[i] for i in range(len(parents))]


def step_text(node: dict[str, Any]) -> str:
    """The step in one line, without its header."""
    lines = [line for line in node["text"].splitlines() if not line.startswith(("# Step", "# END"))]
    return " ".join(" ".join(lines).replace("# Answer", "answer").split())


def node_words(node: dict[str, Any]) -> str:
    """A node as it is read in the picture: its step, and its value, or whether its answer is right."""
    mark = "" if node["correct"] is None else " ✓" if node["correct"] else " ✗"
    return f"{step_text(node)[:24]}{mark}\n{_number(node['value'])}, n = {node['count']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _edge(axes: "Axes", theme: Theme, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
    _, style, width = EDGES[kind]
    x, y = (start[0] + BOX[0] / 2, end[0] - BOX[0] / 2), (start[1], end[1])
    axes.plot(x, y, color=_edge_color(theme, kind), linestyle=style, linewidth=width, zorder=1)


def _edge_color(theme: Theme, kind: str) -> str:
    if kind == "correction":
        return theme.right
    return theme.wrong if kind in ("first_error", "new_error") else theme.quiet


def _box(
    axes: "Axes", theme: Theme, place: tuple[float, float], words: str, color: object, frame: str, width: float
) -> None:
    from matplotlib.patches import Rectangle

    corner = (place[0] - BOX[0] / 2, place[1] - BOX[1] / 2)
    axes.add_patch(Rectangle(corner, *BOX, facecolor=color, edgecolor=frame, linewidth=width, zorder=2))
    axes.text(*place, shown_label(words), color=theme.text, fontsize=7, ha="center", va="center", zorder=3)


def _shade(theme: Theme, value: float | None) -> object:
    """From the colour of what is wrong, over the page's, to that of what is right: pale, so that text is read on it."""
    from matplotlib.colors import to_rgb

    if value is None:
        return theme.page
    end = to_rgb(theme.right if value > 0.5 else theme.wrong)
    share = 0.45 * abs(2 * value - 1)
    return tuple(share * mine + (1 - share) * page for mine, page in zip(end, to_rgb(theme.page), strict=True))


def _names(axes: "Axes", theme: Theme) -> None:
    """What the lines mean, above the tree."""
    for kind, (label, style, width) in EDGES.items():
        axes.plot([], [], color=_edge_color(theme, kind), linestyle=style, linewidth=width, label=label)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(EDGES),
        frameon=False,
        fontsize=7.5,
        labelcolor=theme.text,
        borderaxespad=0,
        handlelength=2.6,
    )
