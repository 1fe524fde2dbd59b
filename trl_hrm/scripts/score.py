"""Score the steps of solutions with a step reward model."""

from dataclasses import dataclass, field
from pathlib import Path

from ..data.sources import parse_columns
from ..io import claimed_file, parse_json, shown, write_or_keep
from ..scoring.reward_model_config import RewardModelConfig
from ..terminal import colored, has_color, one_line, plain


MAX_LINE = 1 << 28  # bytes of a row
OTHER_FORMATS = (".gz", ".parquet", ".csv")  # by their names, other programs would read the scores as these


@dataclass(kw_only=True)
class ScoreConfig(RewardModelConfig):
    """
    Configuration of [`score`]. It also has the fields of [`RewardModelConfig`].

    Args:
        input (`str`):
            JSON Lines file of solutions with the columns `prompt`, `completions` (a list of steps) and, for trees, `parents`.
        columns (`dict[str, str]`, *optional*):
            Column to read for each expected name, such as `{"completions": "steps"}`, or `completions=steps` on the command line.
        output (`str`, *optional*):
            Output file for the rows, with an additional column `scores`. It is null for solutions that are too long for the model.
            By default, a table is printed.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether to also score the thinking steps of a reasoning model. By default, their scores are null.
    """

    input: str = field(
        metadata={
            "help": "JSON Lines file of solutions with the columns `prompt`, `completions` (a list of steps) and, for "
            "trees, `parents`.",
            "positional": True,
        }
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Column to read for each expected name, such as prompt=problem completions=steps.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "Output file for the rows, with an additional column `scores`. It is null for solutions that are too "
            "long for the model (default: print a table).",
            "metavar": "FILE",
        },
    )
    keep_thinking: bool = field(
        default=False,
        metadata={"help": "Also score the thinking steps of a reasoning model. By default, their scores are null."},
    )

    def __post_init__(self):
        if self.columns is not None:
            self.columns = parse_columns(self.columns)
        super().__post_init__()


def score(config: ScoreConfig) -> str:
    """
    Score the steps of solutions with a step reward model.

    Args:
        config ([`ScoreConfig`]):
            Solutions and reward model.

    Returns:
        `str`: A table of the scores or the path of the output file, and warnings about rows without scores.

    Raises:
        `OSError`: If the output file cannot be written, or is a file without scores, such as weights. This is checked first. If the disk fills up later, the scores are saved in the
            system's temporary folder.
        `ValueError`: If a row is invalid. The message has the file and line.
    """
    if config.output is None:
        return _score(config, None)
    with claimed_file(config.output, "output", inputs=[config.input]) as output:
        if output.suffix in OTHER_FORMATS:
            raise ValueError(f"`output` is {config.output}. It must be a JSON Lines file, such as scores.jsonl.")
        if output.exists() and output.stat().st_size and not _has_scores(output):
            raise FileExistsError(
                f"{config.output} exists and has no scores of an earlier run. Choose another `output`."
            )
        return _score(config, output)


def _has_scores(file: Path) -> bool:
    """Return whether the first line of a file is a row with scores. Other files, such as weights, are not replaced."""
    with open(file, "rb") as opened:
        line = opened.readline(MAX_LINE)
    try:
        row = parse_json(line, str(file))
    except ValueError:
        return False
    return isinstance(row, dict) and "scores" in row


def _score(config: ScoreConfig, output: Path | None) -> str:
    from collections import Counter

    from ..data.faults import format_places
    from ..data.solutions import check_answers, count_answers, leave_out_thinking, solution_warnings
    from ..scoring.candidate_scores import fits
    from ..scoring.generative_scorer import GenerativeScorer, format_judge_cost

    notes = Counter()
    places, trees = _read(config.input, config.columns or {})
    for tree in trees:
        count_answers(tree.completions, notes, tree.parents)
    check_answers(notes, len(trees), config.input)
    shown = [leave_out_thinking(tree, where, config.keep_thinking) for where, tree in zip(places, trees, strict=True)]
    scorer = config.load_scorer()
    fitting = [not steps or fits(scorer, tree.prompt, tree.completions, tree.parents, config) for tree, steps in shown]
    to_score = [tree for (tree, steps), is_fitting in zip(shown, fitting, strict=True) if is_fitting and steps]
    if not to_score:
        raise ValueError(
            f"{config.input}: none of the {len(trees):,} rows can be scored: {fitting.count(False):,} have more tokens than the "
            f"{scorer.max_positions} positions of the model, the others have no steps or only thinking steps."
        )
    found = iter(scorer.score_trees(to_score, spans=config.spans, combine=config.combine, progress=True))
    scores = []
    for tree, (_, steps), is_fitting in zip(trees, shown, fitting, strict=True):
        score_of = dict(zip(steps, next(found), strict=True)) if is_fitting and steps else {}
        scores.append([score_of.get(step) for step in range(len(tree.completions))] if is_fitting else None)
    scored = [values for values in scores if values is not None]
    if output is None:
        lines = [
            "\n\n".join(format_scores(tree, values, has_color()) for tree, values in zip(trees, scores, strict=True))
        ]
    else:
        _write(output, trees, scores)
        num_scored = sum(value is not None for values in scored for value in values)
        lines = [f"Wrote scores of {num_scored} steps in {len(scored)} rows to {plain(config.output)}."]
    lines += [f"warning: {one_line(warning)}" for warning in solution_warnings(notes)]
    is_judged = [True] * len(trees)
    if isinstance(scorer, GenerativeScorer):
        lines.append(format_judge_cost(scorer.cost))
        is_judged = [
            values is None or all(values[step] is not None for step in steps)
            for values, (_, steps) in zip(scores, shown, strict=True)
        ]
    num_thinking = sum(
        is_fitting and len(steps) < len(tree.completions)
        for tree, (_, steps), is_fitting in zip(trees, shown, fitting, strict=True)
    )
    if num_thinking:
        lines.append(
            f"{num_thinking:,} rows have thinking steps, which are not scored. Use --keep_thinking to score them."
        )
    for reason, verb, odd in (
        (f"more tokens than the {scorer.max_positions} positions of the model", "not scored", _where(places, fitting)),
        ("a blank step", "scored as given", _where(places, [all(map(str.strip, t.completions)) for t in trees])),
        ("no readable verdict of the judge", "with steps without scores", _where(places, is_judged)),
        ("no steps", "without scores", _where(places, [tree.completions for tree in trees])),
    ):
        if odd:
            lines.append(f"warning: {one_line(format_places(reason, odd, verb))}")
    return "\n".join(lines)


def _where(places: list[str], are_fine: list) -> list[str]:
    return [place for place, is_fine in zip(places, are_fine, strict=True) if not is_fine]


def format_scores(tree, scores: list[float | None] | None, color: bool = False) -> str:
    """
    Return the prompt of a tree followed by its steps and their scores, as text. With `color`, red is a low score and green a high one.

    Steps of a branching tree are indented by depth. Steps without a score have a dash. If `scores` is `None`, the text says that the
    tree is too long for the model.
    """
    if scores is None:
        return f"{plain(tree.prompt)}\n  too long for the model"
    branches = any(parent != i - 1 for i, parent in enumerate(tree.parents))
    lines = [plain(tree.prompt)]
    for i, (text, score) in enumerate(zip(tree.completions, scores, strict=True)):
        indent = "  " * (len(tree.path(i)) - 1) if branches else ""
        line = f"{'    -' if score is None else f'{score:.3f}'}  {indent}{plain(text)}"
        lines.append(f"  {colored(line, score)}" if color and score is not None else f"  {line}")
    return "\n".join(lines)


def _read(path: str, columns: dict[str, str]) -> tuple[list[str], list]:
    """Return the locations and step trees of the rows of a file. Labels are optional and kept as they are."""
    from ..data.sources import JsonLines, all_rows
    from ..step_tree import StepTree

    places, trees = [], []
    for where, row in all_rows(JsonLines([path], columns)):
        if not isinstance(row.get("completions"), list):
            raise ValueError(
                f"{where}: found {shown(row, 60)}, expected an object with `prompt` and a list `completions`. For other column "
                "names, use --columns, such as --columns prompt=question completions=steps."
            )
        if row.get("prompt") is None and row.get("problem") is not None:
            raise ValueError(
                f"{where}: found `problem` and `completions` without `prompt`. search-and-learn writes whole solutions in this format, "
                "but `score` expects the steps of one solution. Use `trl-hrm best-of-n` or `select-raft` for whole solutions. If "
                "the completions are steps, add --columns prompt=problem."
            )
        labels = row.pop("labels", None)
        tree = StepTree.from_row(row | {"labels": [None] * len(row["completions"])}, where, blank_steps=True)
        if labels is not None:
            tree.extra["labels"] = labels
        places.append(where)
        trees.append(tree)
    return places, trees


def _write(path: Path, trees: list, scores: list[list[float | None] | None]) -> None:
    import json

    lines = []
    for tree, values in zip(trees, scores, strict=True):
        row = tree.to_row()
        del row["labels"]
        lines.append(json.dumps(row | tree.extra | {"scores": values}, ensure_ascii=False) + "\n")
    write_or_keep(path.parent, {path.name: "".join(lines)})
