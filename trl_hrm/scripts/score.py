"""Score the steps of solutions with a trained step reward model."""

from dataclasses import dataclass, field
from pathlib import Path

from ..data.sources import parse_columns
from ..io import replacing
from ..scoring.reward_model_config import RewardModelConfig


@dataclass(kw_only=True)
class ScoreConfig(RewardModelConfig):
    """
    Settings of [`score`]: those of [`RewardModelConfig`], and

    Args:
        input (`str`):
            JSON Lines of solutions with `prompt` and `completions` (a list of steps), and optional `parents`.
        columns (`dict[str, str]`, *optional*):
            New names of columns, such as `{"completions": "steps"}`. On the command line `completions=steps`.
        output (`str`, *optional*):
            File for the rows with a column `scores`, null for solutions that are too long for the model. By default a table is
            printed.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether to score the steps of a reasoning model's thinking too. By default they get null.
    """

    input: str = field(
        metadata={
            "help": "JSON Lines of solutions with `prompt` and `completions` (a list of steps), and optional `parents`.",
            "positional": True,
        }
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Read COLUMN as NAME, for rows with other column names, as in prompt=question completions=steps.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "Write the rows with a column `scores` here, null for solutions that are too long for the model "
            "(default: print a table).",
            "metavar": "FILE",
        },
    )
    keep_thinking: bool = field(
        default=False,
        metadata={"help": "Score the steps of a reasoning model's thinking too, instead of giving them null."},
    )

    def __post_init__(self):
        if self.columns is not None:
            self.columns = parse_columns(self.columns)
        super().__post_init__()


def score(config: ScoreConfig) -> str:
    """
    Score the steps of solutions.

    Args:
        config ([`ScoreConfig`]):
            What to score, and with which reward model.

    Returns:
        `str`: A table of the scores, or where they were written, and what was left out.

    Raises:
        `ValueError`: If a row is damaged, with file and line.
    """
    from collections import Counter

    from ..data.faults import format_places
    from ..data.solutions import check_answers, count_answers, leave_out_thinking, solution_warnings
    from ..scoring.candidate_scores import fits

    notes = Counter()
    places, trees = _read(config.input, config.columns or {})
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)  # what fails there fails before the long part
    for tree in trees:
        count_answers(tree.completions, notes, tree.parents)
    check_answers(notes, len(trees), config.input)
    shown = [leave_out_thinking(tree, where, config.keep_thinking) for where, tree in zip(places, trees, strict=True)]
    scorer = config.load_scorer()
    fitting = [not steps or fits(scorer, tree.prompt, tree.completions, tree.parents, config) for tree, steps in shown]
    to_score = [tree for (tree, steps), is_fitting in zip(shown, fitting, strict=True) if is_fitting and steps]
    found = iter(scorer.score_trees(to_score, spans=config.spans, combine=config.combine, progress=True))
    scores = []
    for tree, (_, steps), is_fitting in zip(trees, shown, fitting, strict=True):
        score_of = dict(zip(steps, next(found), strict=True)) if is_fitting and steps else {}
        scores.append([score_of.get(step) for step in range(len(tree.completions))] if is_fitting else None)
    scored = [values for values in scores if values is not None]
    if config.output is None:
        lines = ["\n\n".join(format_scores(tree, values) for tree, values in zip(trees, scores, strict=True))]
    else:
        _write(config.output, trees, scores)
        num_scored = sum(value is not None for values in scored for value in values)
        lines = [f"Scores of {num_scored} steps of {len(scored)} rows written to {config.output}."]
    lines += [f"warning: {warning}" for warning in solution_warnings(notes)]
    num_thinking = sum(None in values for values in scored)
    if num_thinking:
        lines.append(
            f"{num_thinking:,} rows have steps of thinking, which are not scored. --keep_thinking scores them."
        )
    for reason, verb, odd in (
        (f"more tokens than the {scorer.max_positions} positions of the model", "not scored", _where(places, fitting)),
        ("a blank step", "scored as given", _where(places, [all(map(str.strip, t.completions)) for t in trees])),
        ("no steps", "without scores", _where(places, [tree.completions for tree in trees])),
    ):
        if odd:
            lines.append(f"warning: {format_places(reason, odd, verb)}")
    return "\n".join(lines)


def _where(places: list[str], are_fine: list) -> list[str]:
    return [place for place, is_fine in zip(places, are_fine, strict=True) if not is_fine]


def format_scores(tree, scores: list[float | None] | None) -> str:
    """
    The prompt of a tree, and below it its steps with their scores, indented by depth where the tree branches. Steps without a
    score have a dash. Without scores, why there are none.
    """
    if scores is None:
        return f"{tree.prompt}\n  too long for the model"
    branches = any(parent != i - 1 for i, parent in enumerate(tree.parents))
    lines = [tree.prompt]
    for i, (text, score) in enumerate(zip(tree.completions, scores, strict=True)):
        indent = "  " * (len(tree.path(i)) - 1) if branches else ""
        shown = "    -" if score is None else f"{score:.3f}"
        lines.append(f"  {shown}  {indent}{' '.join(text.split())}")
    return "\n".join(lines)


def _read(path: str, columns: dict[str, str]) -> tuple[list[str], list]:
    """Places and step trees of the rows of a file; labels are not needed and ignored."""
    from ..data.sources import JsonLines, all_rows
    from ..step_tree import StepTree

    places, trees = [], []
    for where, row in all_rows(JsonLines([path], columns)):
        if not isinstance(row.get("completions"), list):
            raise ValueError(
                f"{where}: found {repr(row)[:60]}, expected an object with `prompt` and a list `completions`. Name other columns "
                "with --columns, such as --columns prompt=question completions=steps."
            )
        if row.get("prompt") is None and row.get("problem") is not None:
            raise ValueError(
                f"{where}: found `problem` and `completions` without `prompt`, as search-and-learn writes whole solutions, expected "
                "the steps of one solution. `trl-hrm best-of-n` and `select-raft` read such files. If the completions are steps, "
                "add --columns prompt=problem."
            )
        labels = row.pop("labels", None)
        tree = StepTree.from_row(row | {"labels": [None] * len(row["completions"])}, where, blank_steps=True)
        if labels is not None:
            tree.extra["labels"] = labels
        places.append(where)
        trees.append(tree)
    if not trees:
        raise ValueError(f"{path}: no row in it, expected JSON Lines with `prompt` and `completions`.")
    return places, trees


def _write(path: str, trees: list, scores: list[list[float | None] | None]) -> None:
    import json

    with replacing(path) as file:
        for tree, values in zip(trees, scores, strict=True):
            row = tree.to_row()
            del row["labels"]
            file.write(json.dumps(row | tree.extra | {"scores": values}, ensure_ascii=False) + "\n")
