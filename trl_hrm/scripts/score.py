"""Score the steps of solutions with a step reward model."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.sources import parse_columns
from ..io import check_regular, claimed_file, dump_json, parse_json, shown, write_or_keep
from ..scoring.reward_model_config import RewardModelConfig
from ..search.segmentation_config import THINKING_OPTIONS, SegmentationConfig
from ..terminal import colored, has_color, one_line, plain


if TYPE_CHECKING:
    from collections import Counter

MAX_LINE = 1 << 28  # bytes of a row
MAX_TEXT = 1 << 25  # bytes of a solution
STDIN = "-"
TEXTS, SPLIT, THINKING = "texts", "texts_with_several_steps", "texts_with_thinking"
STDIN_NAME = "standard input"
OTHER_FORMATS = (".gz", ".parquet", ".csv")  # by their names, other programs would read the scores as these


@dataclass(kw_only=True)
class ScoreConfig(RewardModelConfig, SegmentationConfig):
    """
    Configuration of [`score`]. It also has the fields of [`RewardModelConfig`] and [`SegmentationConfig`]. The segmentation is applied to
    solutions that are texts, and defaults to `"step_header"`.

    Args:
        input (`str`, *optional*):
            JSON Lines file of solutions, or `-` for standard input. A row has `prompt` and either `completions` (a list of steps) or
            `completion` (a text, which is split into steps), and `parents` for trees. With `prompt`, it is a text file of one solution.
        prompt (`str`, *optional*):
            Problem of a single solution, which is `solution` or the text in `input`.
        solution (`str`, *optional*):
            Text of a single solution, which is split into steps.
        columns (`dict[str, str]`, *optional*):
            Column to read for each expected name, such as `{"completions": "steps"}`, or `completions=steps` on the command line.
        output (`str`, *optional*):
            Output file for the rows, with an additional column `scores`. It is null for solutions that are too long for the model.
            By default, a table is printed.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether to also score the thinking steps of a reasoning model. By default, their scores are null. In a text, thinking is left
            out, except with `segmentation="thinking"`.

    Raises:
        `ValueError`: If not exactly one of `input` and `solution` is set, `solution` is set without `prompt`, or an option has no effect.
    """

    input: str | None = field(
        default=None,
        metadata={
            "help": "JSON Lines file of solutions, or - for standard input. A row has `prompt` and either `completions` (a list of steps) "
            "or `completion` (a text, which is split into steps), and `parents` for trees. With --prompt, it is a text file of one "
            "solution.",
            "positional": True,
            "nargs": "?",
        },
    )
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "Problem of a single solution, which is --solution or the text in INPUT.",
            "metavar": "TEXT",
        },
    )
    solution: str | None = field(
        default=None,
        metadata={"help": "Text of a single solution, which is split into steps. Needs --prompt.", "metavar": "TEXT"},
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
        metadata={
            "help": "Also score the thinking steps of a reasoning model. By default, their scores are null, and thinking in texts is left out."
        },
    )

    def __post_init__(self):
        if self.columns is not None:
            self.columns = parse_columns(self.columns)
        super().__post_init__()
        if self.solution is not None and self.prompt is None:
            raise ValueError("`solution` is set without `prompt`. Set `prompt` to the problem.")
        if self.solution is None and self.input is None:
            raise ValueError(
                "There is nothing to score. Give a JSON Lines file as `input`, `-` for standard input, or `prompt` and `solution`."
            )
        if self.solution is not None and self.input is not None:
            raise ValueError(f"Both `input` ({shown(self.input)}) and `solution` are set. Remove one of them.")
        if self.columns and self.prompt is not None:
            raise ValueError("`columns` has no effect with `prompt`, because a text has no columns. Remove it.")


def score(config: ScoreConfig) -> str:
    """
    Score the steps of solutions with a step reward model.

    Args:
        config ([`ScoreConfig`]):
            Solutions and reward model.

    Returns:
        `str`: A table of the scores or the path of the output file, and warnings about rows without scores.

    Raises:
        `OSError`: If the output file cannot be written, or is a file without scores, such as weights. This is checked first. If the disk
            fills up later, the scores are saved in the system's temporary folder.
        `ValueError`: If a row is invalid, standard input is a terminal, or the input is empty or not text. The message has the file and
            line.
    """
    if config.output is None:
        return _score(config, None)
    inputs = [] if config.input in (None, STDIN) else [config.input]
    with claimed_file(config.output, "output", inputs=inputs) as output:
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
    from ..data.solutions import UNSPLIT, check_answers, count_answers, leave_out_thinking, solution_warnings
    from ..messages import system_texts
    from ..scoring.candidate_scores import fits
    from ..scoring.generative_scorer import GenerativeScorer, format_judge_cost

    notes = Counter()
    name = STDIN_NAME if config.input == STDIN else config.input or "solution"
    places, rows, trees = _read(config, notes)
    if output is not None:
        for where, row in zip(places, rows, strict=True):
            dump_json(row, where)  # a NaN raises here, and not after scoring
    lists = [tree for row, tree in zip(rows, trees, strict=True) if row.get("completions") is not None]
    for tree in lists:  # a text was split by this command
        count_answers(tree.completions, notes, tree.parents)
    check_answers(notes, len(lists), name)
    visible = [
        leave_out_thinking(tree, where, config.keep_thinking) for where, tree in zip(places, trees, strict=True)
    ]
    scorer = config.load_scorer()
    fitting = [
        not steps or fits(scorer, tree.prompt, tree.completions, tree.parents, config) for tree, steps in visible
    ]
    to_score = [tree for (tree, steps), is_fitting in zip(visible, fitting, strict=True) if is_fitting and steps]
    if not to_score:
        raise ValueError(
            f"{name}: none of the {len(trees):,} rows can be scored: {fitting.count(False):,} have more tokens than the "
            f"{scorer.max_positions} positions of the model, the others have no steps or only thinking steps."
        )
    found = iter(scorer.score_trees(to_score, spans=config.spans, combine=config.combine, progress=True))
    scores = []
    for tree, (_, steps), is_fitting in zip(trees, visible, fitting, strict=True):
        score_of = dict(zip(steps, next(found), strict=True)) if is_fitting and steps else {}
        scores.append([score_of.get(step) for step in range(len(tree.completions))] if is_fitting else None)
    scored = [values for values in scores if values is not None]
    if output is None:
        lines = [
            "\n\n".join(format_scores(tree, values, has_color()) for tree, values in zip(trees, scores, strict=True))
        ]
    else:
        _write(output, rows, trees, scores)
        num_scored = sum(value is not None for values in scored for value in values)
        lines = [f"Wrote scores of {num_scored} steps in {len(scored)} rows to {plain(config.output)}."]
    rule = config.step_rule().name if notes[TEXTS] else None
    lines += [f"warning: {one_line(warning)}" for warning in solution_warnings(notes, rule)]
    is_judged = [True] * len(trees)
    if isinstance(scorer, GenerativeScorer):
        lines.append(format_judge_cost(scorer.cost))
        is_judged = [
            values is None or all(values[step] is not None for step in steps)
            for values, (_, steps) in zip(scores, visible, strict=True)
        ]
    num_thinking = sum(
        is_fitting and len(steps) < len(tree.completions)
        for tree, (_, steps), is_fitting in zip(trees, visible, fitting, strict=True)
    )
    if num_thinking:
        lines.append(
            f"{num_thinking:,} rows have thinking steps, which are not scored. Use --keep_thinking to score them."
        )
    if notes[THINKING]:
        lines.append(
            f"Thinking is left out of {notes[THINKING]:,} text{'s' * (notes[THINKING] > 1)}. Use --segmentation thinking to score its steps."
        )
    num_system = sum(bool(system_texts(row.get("prompt"))) for row in rows)
    if num_system:
        lines.append(
            f"warning: the system messages of {num_system:,} row{'s' * (num_system > 1)} are left out. The reward model is shown the "
            "`system_prompt` of its step format, if it has one."
        )
    if notes[TEXTS] and not notes[SPLIT] and not notes[UNSPLIT]:
        lines.append(
            f"warning: the rule {rule} finds no text with two steps. If the solutions have steps, choose another "
            "--segmentation, such as blank_line."
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


def _read(config: ScoreConfig, notes: "Counter") -> tuple[list[str], list[dict[str, Any]], list]:
    """
    Return the locations, the rows and the step trees of the input. Labels are optional and kept as they are. `notes` counts texts
    (`TEXTS`), and those with several steps (`SPLIT`) and with thinking (`THINKING`).
    """
    from ..data.sources import SUFFIXES, JsonLines, all_rows

    if config.solution is not None:
        found = [("solution", {"prompt": config.prompt, "completion": config.solution})]
    elif config.prompt is not None:
        if config.input.endswith(SUFFIXES):
            raise ValueError(
                f"`input` is the JSON file {shown(config.input)}. With `prompt`, it must be the text of one solution. Remove `prompt`."
            )
        found = [(config.input, {"prompt": config.prompt, "completion": _read_text(config.input)})]
    else:
        with _file_of(config.input) as path:
            found = list(all_rows(JsonLines([path], config.columns or {})))
            found = [
                (where.replace(path, STDIN_NAME) if config.input == STDIN else where, row) for where, row in found
            ]
    places, rows, trees = [], [], []
    for where, row in found:
        places.append(where)
        rows.append(row)
        trees.append(_read_tree(row, where, config, notes))
    unused = [
        name for name in (*THINKING_OPTIONS, "step_pattern", "segmentation") if getattr(config, name) is not None
    ]
    if unused and not notes[TEXTS]:
        raise ValueError(
            f"`{unused[-1]}` has no effect, because all solutions are lists of steps (`completions`). Remove it, or give each solution as a "
            "text in the column `completion`."
        )
    return places, rows, trees


def _read_tree(row: dict[str, Any], where: str, config: ScoreConfig, notes: "Counter"):
    """Return the step tree of a row without labels, which are kept as an extra column."""
    from ..data.solutions import count_unsplit_text
    from ..grading import opens_thinking, thinking_spans
    from ..messages import step_text
    from ..search.steps import cut_text
    from ..step_tree import StepTree

    if row.get("completion") is not None and row.get("completions") is None:
        try:
            text = step_text(row["completion"])
        except ValueError as error:
            raise ValueError(f"{where}: `completion`: {error}") from error
        if not isinstance(text, str):
            raise ValueError(f"{where}: `completion` is {shown(text)}, expected the text of a solution.")
        if row.get("parents") is not None:
            raise ValueError(
                f"{where}: found `parents` next to a text. Only steps (`completions`) can be a tree. Remove `parents`."
            )
        rule = config.step_rule()
        if isinstance(row.get("prompt"), str) and opens_thinking(row["prompt"]):
            text = "<think>" + text
        steps = cut_text(text.replace("\r\n", "\n"), rule, config.keep_thinking or rule.keeps_thinking)
        count_unsplit_text(steps, rule, notes)
        notes[TEXTS] += 1
        notes[SPLIT] += len(steps) > 1
        notes[THINKING] += not (config.keep_thinking or rule.keeps_thinking) and bool(thinking_spans(text))
        row = row | {"completions": steps}
    if not isinstance(row.get("completions"), list):
        raise ValueError(
            f"{where}: found {shown(row, 60)}, expected an object with `prompt` and a list `completions`, or a text `completion`. For other "
            "column names, use --columns, such as --columns prompt=question completions=steps."
        )
    if row.get("prompt") is None and row.get("problem") is not None:
        raise ValueError(
            f"{where}: found `problem` and `completions` without `prompt`. search-and-learn writes whole solutions in this format, "
            "but `score` expects the steps of one solution. Use `trl-hrm best-of-n` or `select-raft` for whole solutions. If "
            "the completions are steps, add --columns prompt=problem."
        )
    labels = row.get("labels")
    tree = StepTree.from_row(row | {"labels": [None] * len(row["completions"])}, where, blank_steps=True)
    if labels is not None:
        tree.extra["labels"] = labels
    return tree


def _read_text(path: str) -> str:
    """Return the text of a file, or of standard input."""
    if path == STDIN:
        name, data = STDIN_NAME, _standard_input().read(MAX_TEXT + 1)
    else:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: file not found. With `prompt`, `input` is the text file of a solution.")
        check_regular(path)
        with open(path, "rb") as file:
            name, data = path, file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"{name}: the text has more than {MAX_TEXT >> 20} MB, expected one solution.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: the text is not valid UTF-8 ({error}). Expected the text of a solution.") from error
    if "\0" in text:
        raise ValueError(f"{name}: found binary data, expected the text of a solution.")
    if not text.strip():
        raise ValueError(f"{name}: the text is empty, expected the text of a solution.")
    return text.replace("\r\n", "\n")


@contextmanager
def _file_of(path: str) -> Iterator[str]:
    """Context manager that returns a file, and saves standard input to a temporary file. Errors name standard input instead."""
    import shutil
    import tempfile

    if path != STDIN:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="trl_hrm-") as folder:
        saved = str(Path(folder, "stdin.jsonl"))
        with open(saved, "wb") as file:
            shutil.copyfileobj(_standard_input(), file)
            if not file.tell():
                raise ValueError(f"{STDIN_NAME} is empty, expected JSON Lines with `prompt` and `completions`.")
        try:
            yield saved
        except ValueError as error:
            raise ValueError(str(error).replace(saved, STDIN_NAME)) from error


def _standard_input() -> Any:
    """
    Return the bytes of standard input.

    Raises:
        `ValueError`: If it is a terminal, on which the command would wait without a message, or closed.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise ValueError(
            "`input` is -, but nothing is piped to standard input. Pipe a file, such as `trl-hrm score - --reward_model MODEL < "
            "solutions.jsonl`, or give the file as `input`."
        )
    return sys.stdin.buffer


def _write(path: Path, rows: list[dict[str, Any]], trees: list, scores: list[list[float | None] | None]) -> None:
    lines = []
    for given, tree, values in zip(rows, trees, scores, strict=True):
        row = tree.to_row()
        del row["labels"]
        # messages stay messages
        row |= {name: given[name] for name in ("prompt", "completions") if given.get(name) is not None}
        lines.append(dump_json(row | tree.extra | {"scores": values}, path) + "\n")
    write_or_keep(path.parent, {path.name: "".join(lines)})
