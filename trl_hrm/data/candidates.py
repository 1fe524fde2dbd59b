r"""
Candidate solutions of problems, from JSON Lines files, datasets and runs of `trl-hrm annotate`.

A row is one candidate, or one problem with its candidates; a candidate is a text or a list of steps:

```json
{"prompt": "1+2+3?", "completion": "1+2 = 3.\n\n3+3 = 6."}
{"prompt": "1+2+3?", "completions": ["1+2 = 3.", "3+3 = 6."]}
{"prompt": "1+2+3?", "candidates": ["1+2 = 3.\n\n3+3 = 6.", ["1+2 = 3.", "3+3 = 7."]]}
```

Grades are in a column `correct` or `is_correct`, of several candidates as a list, which may also be called `labels`:

```json
{"prompt": "1+2+3?", "candidates": ["It is 6.", "It is 7."], "correct": [true, false]}
```

Rows of search-and-learn, with `problem` and whole solutions as `completions`, are read too.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset

from ..grading import extract_answer, opens_thinking, thinking_spans
from ..search.manifest import MANIFEST
from ..search.run_folder import node_files, read_manifest, read_summary
from ..search.steps import StepRule, cut_text, visible_steps
from ..search.tree import SearchTree
from .candidates_config import CandidatesConfig
from .dialogues import problem_of
from .node_files import NodeFiles, run_warnings
from .problems import UNUSED, choices_of, normalize_problem, parts_warning, problem_key, unused_parts
from .self_training import asked, prompt_of
from .solutions import check_answers, count_answers, read_whole_solutions
from .sources import DatasetRows, JsonLines, all_rows


FORMS = ("completion", "completions", "candidates")
GRADES = ("correct", "is_correct")  # columns with the grade of a candidate, or a list of them
STEP_END = "\n\n"  # between steps that are given as a list
THINKING = "candidates_with_thinking_left_out"


@dataclass
class Candidates:
    """
    A problem and its candidate solutions.

    Args:
        problem (`str`):
            The problem alone, as the reward model is shown it.
        prompt (`str` or `list[dict[str, str]]`):
            What the policy was asked: text, or messages.
        problem_id (`str`):
            Key of the problem.
        texts (`list[str]`, *optional*):
            N solutions.
        steps (`list[list[str]]`, *optional*):
            N lists of step texts.
        where (`str`, *optional*, defaults to `""`):
            Place of the first candidate, for error messages.
        num_cut (`int`, *optional*, defaults to `0`):
            Number of candidates that were cut into steps by the segmentation.
        answer (`str`, *optional*):
            The reference answer, if answers were read and a row has one.
        grades (`list[bool | None]`, *optional*):
            Whether each candidate is right, if the rows say so.
        num_candidates (`int`, *optional*, defaults to `0`):
            Number of candidates that were considered, blank and equal ones included. Known after [`shortlist`].
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the chat template with which the policy was asked.
    """

    problem: str
    prompt: str | list[dict[str, str]]
    problem_id: str
    texts: list[str] = field(default_factory=list)
    steps: list[list[str]] = field(default_factory=list)
    where: str = ""
    num_cut: int = 0
    answer: str | None = None
    grades: list[bool | None] | None = None
    num_candidates: int = 0
    chat_template_kwargs: dict[str, Any] | None = None


def read_candidates(
    config: CandidatesConfig, counts: Counter, answers: bool = False, grades: bool = False
) -> list[Candidates]:
    """
    Read candidates and put those of one problem together: rows with the same `problem_id` or, without one, the same
    problem.

    Args:
        config ([`CandidatesConfig`]):
            What to read, and how texts are cut into steps.
        counts (`Counter`):
            Counts problems of a run that have no candidates, and its solutions that did not come to their end; candidates whose
            thinking is left out; of rows, those of whole solutions and those of steps that look like them, blank steps that
            are left out of lists, and columns that may carry a part of the problem and are not used.
        answers (`bool`, *optional*, defaults to `False`):
            Whether the column `answer` of rows holds reference answers.
        grades (`bool`, *optional*, defaults to `False`):
            Whether the column `correct` (or `is_correct`, or `labels` next to `candidates`) of rows holds grades of the candidates.

    Returns:
        `list[Candidates]`: One per problem, in the order in which they first appear.

    Raises:
        `FileNotFoundError`: If there is no such file or folder.
        `ValueError`: If a row is faulty, or an option has no meaning for these candidates.
    """
    path = Path(config.candidates)
    if is_run(config):
        groups = _read_run(config, counts)
    elif path.is_dir() and any(path.glob("log-*.jsonl")):
        raise FileNotFoundError(
            f"{path}: found the log of a search (log-*.jsonl) without its {MANIFEST}, which tells what the policy was asked. "
            "Copy the whole folder of trl-hrm annotate."
        )
    elif path.suffix == ".parquet":
        raise ValueError(
            f"{path}: found a Parquet file, expected JSON Lines or a folder. Name the folder of the dataset or of the run "
            "that it belongs to."
        )
    elif path.is_dir():
        groups = _read_dataset(config, answers, grades, counts)
    else:
        _refuse(config, ("split",), "a file")
        groups = _RowReader(config, answers, grades, counts).read(JsonLines([config.candidates], config.columns), "")
    if not groups:
        raise ValueError(f"{path}: there is nothing in it, expected candidates to choose from.")
    forms = {isinstance(group.prompt, str): group.where for group in reversed(groups)}
    if len(forms) > 1:
        raise ValueError(
            f"{forms[True]} has a text as `prompt`, {forms[False]} messages: they cannot stand in one dataset. Give candidates "
            "of one form at a time."
        )
    return groups


def source_warnings(config: CandidatesConfig) -> list[str]:
    """What the user should know of candidates of a run. See [`run_warnings`]."""
    if not is_run(config):
        return []
    return run_warnings({config.candidates: read_manifest(config.candidates) | read_summary(config.candidates)})


def is_run(config: CandidatesConfig) -> bool:
    """
    Whether the candidates are those of a run of `trl-hrm annotate`.

    Raises:
        `ValueError`: If they are and an option has no meaning for them.
    """
    if not Path(config.candidates, MANIFEST).is_file():
        return False
    _refuse(config, ("split", "join_steps", "columns"), "a run")
    return True


def rule_of(config: CandidatesConfig) -> StepRule | None:
    """
    Return the rule that cuts texts into steps: the one that the options name or, for a run, the one of its search. `None` for a
    run whose manifest has none.
    """
    if config.segmentation is not None or not is_run(config):
        return config.step_rule()
    steps = read_manifest(config.candidates).get("steps")
    return None if steps is None else StepRule(**steps)


def cut_again(config: CandidatesConfig) -> StepRule | None:
    """Return the rule to cut the solutions of a run with. `None` if they keep the steps of their search."""
    return rule_of(config) if config.segmentation is not None or config.keep_thinking else None


def _refuse(config: CandidatesConfig, names: tuple[str, ...], kind: str) -> None:
    for name in names:
        if getattr(config, name) not in (None, {}):
            raise ValueError(f"{name} is {getattr(config, name)!r}, but {config.candidates} is {kind}. Leave it out.")


def _read_run(config: CandidatesConfig, counts: Counter) -> list[Candidates]:
    prompt, rule = prompt_of(read_manifest(config.candidates)), cut_again(config)
    source = NodeFiles([str(file) for file in node_files(config.candidates)])
    groups = []
    for chunk in source.chunks():
        for where, _, tree in source.read(chunk):
            problem = tree.problem
            if tree.status != "done":
                counts["notes", f"problems_{tree.status}"] += 1
                continue
            counts["notes", "solutions_without_an_end"] += _num_cut_off(tree)
            solutions = list(finished_solutions(tree))
            if solutions:
                texts, steps = map(list, zip(*solutions, strict=True))
                if rule is not None:
                    steps = [cut_text(text, rule, config.keep_thinking) for text in texts]
                num_thinking = 0 if config.keep_thinking else sum(bool(thinking_spans(text)) for text in texts)
                if num_thinking:
                    counts["notes", THINKING] += num_thinking
                question = asked(prompt, problem.prompt)
                groups.append(
                    Candidates(
                        problem.prompt,
                        question,
                        problem.problem_id,
                        texts,
                        steps,
                        where,
                        chat_template_kwargs=prompt.chat_template_kwargs,
                    )
                )
            else:
                counts["notes", "problems_without_a_finished_solution"] += 1
    return groups


def finished_solutions(tree: SearchTree) -> Iterator[tuple[str, list[str]]]:
    """
    Text and steps of every solution that came to its end, right or wrong. Rollouts that only judge a prefix were not cut into
    steps and are none.
    """
    for i, node in enumerate(tree.nodes):
        if node.is_final and node.role != "rollout":
            steps = [tree.step_text(j) for j in tree.path(i)]
            yield tree.text(i), [text for text in steps if text]


def _num_cut_off(tree: SearchTree) -> int:
    """How many solutions end without an end: by length, depth or budget."""
    goes_on = {node.parent for node in tree.nodes if node.role != "rollout"}
    return sum(i not in goes_on for i, node in enumerate(tree.nodes) if not node.is_final and node.role != "rollout")


def _read_dataset(config: CandidatesConfig, answers: bool, grades: bool, counts: Counter) -> list[Candidates]:
    # a cache of its own: the shared one may hold the rows of another directory of the same name
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = load_dataset(config.candidates, split=config.split or "train", cache_dir=cache)
        except ValueError as error:  # names the splits that there are, and no place
            raise ValueError(f"{config.candidates}: {error}") from error
        source = DatasetRows(rows, config.columns)
        return _RowReader(config, answers, grades, counts).read(source, f"{config.candidates}, ")


class _RowReader:
    """Puts the candidates of rows together by problem."""

    def __init__(self, config: CandidatesConfig, answers: bool, grades: bool, counts: Counter):
        self.config = config
        self.answers = answers
        self.grades = grades
        self.counts = counts
        self.rule = config.step_rule()
        self.groups: dict[str, Candidates] = {}
        self.num_texts = 0
        self.num_lists = 0
        self.with_answers: Counter = Counter()

    def read(self, rows: JsonLines | DatasetRows, before: str) -> list[Candidates]:
        """The groups of all rows, whose places in error messages begin with `before`."""
        found = ((before + where, row) for where, row in all_rows(rows))
        for where, row in read_whole_solutions(found, self.counts):
            self.add(row, where)
        check_answers(self.with_answers, self.num_lists, self.config.candidates)
        self.counts.update({("notes", name): number for name, number in self.with_answers.items()})
        if self.config.segmentation is not None and self.num_lists and not self.num_texts:
            raise ValueError("segmentation cuts texts, and all candidates are lists of steps. Leave it out.")
        if self.config.join_steps is not None and self.num_texts and not self.num_lists:
            raise ValueError("join_steps joins lists of steps, and all candidates are texts. Leave it out.")
        return list(self.groups.values())

    def add(self, row: dict[str, Any], where: str) -> None:
        """Add the candidates of one row."""
        if row.get("parents") is not None:
            raise ValueError(
                f"{where}: the row has `parents`: it is a tree, not a candidate. Give rows of single solutions, as the view "
                "prm has them."
            )
        given = [name for name in FORMS if row.get(name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{where}: found {' and '.join(given) or 'none'} of `completion`, `completions` and `candidates` among the "
                f"keys {sorted(row)}, expected one: a text, a list of steps, or a list of either. Name other columns with "
                "--columns, such as --columns candidates=generations."
            )
        values = row[given[0]] if given[0] == "candidates" else [row[given[0]]]
        if not isinstance(values, list):
            raise ValueError(
                f"{where}: `candidates` is {_shown(values)}, expected a list of texts or of lists of steps."
            )
        grades = _grades(row, given[0], len(values), where) if self.grades else None
        group, num_texts = self._group(row, grades is not None, where), self.num_texts
        for i, value in enumerate(values):
            name = f"candidates[{i}]" if given[0] == "candidates" else given[0]
            text, steps = self._candidate(value, name, group.prompt, where)
            group.texts.append(text)
            group.steps.append(steps)
        if grades is not None:
            group.grades += grades
        group.num_cut += self.num_texts - num_texts
        for name in unused_parts(row):
            self.counts["notes", f"{UNUSED}{name}"] += 1

    def _group(self, row: dict[str, Any], is_graded: bool, where: str) -> Candidates:
        if row.get("prompt") is None:
            raise ValueError(
                f"{where}: found no `prompt` among the keys {sorted(row)}, expected what the policy was asked. Name another column "
                "with --columns, such as --columns prompt=problem."
            )
        prompt, problem_id = _prompt(row["prompt"], where), row.get("problem_id")
        if problem_id is not None and not isinstance(problem_id, str):
            raise ValueError(
                f"{where}: `problem_id` is {problem_id!r}, expected a string. Put quotes around a number in JSON Lines; cast "
                "the column of a dataset to string."
            )
        problem = _problem(row, prompt, where)
        new = Candidates(problem, prompt, problem_id or problem_key(problem).hex(), where=where)
        if is_graded:
            new.grades = []
        if self.answers:
            new.answer = _answer(row.get("answer"), where)
        group = self.groups.setdefault(new.problem_id, new)
        if group.answer != new.answer:
            raise ValueError(
                f"{where}: `answer` is {_shown(new.answer)} and {group.where} has {_shown(group.answer)} for the same problem, "
                "expected the one reference answer. If the column holds something else, rename it, and give the problems with "
                "their answers by themselves."
            )
        if (group.grades is None) != (new.grades is None):
            has, lacks = (where, group.where) if is_graded else (group.where, where)
            raise ValueError(
                f"{lacks}: found no grades of the candidates, and {has} has them for the same problem; expected `correct` in both or "
                "in neither."
            )
        for name in ("prompt", "problem"):
            if _normalized(getattr(group, name)) != _normalized(getattr(new, name)):
                same = "problem" if problem_id is None else "problem_id"
                raise ValueError(
                    f"{where}: `{name}` is {_shown(getattr(new, name))} and {group.where} has {_shown(getattr(group, name))} "
                    f"for the same {same}; candidates are compared within one {name}. Give different problems different ids."
                )
        return group

    def _candidate(
        self, value: Any, name: str, prompt: str | list[dict[str, str]], where: str
    ) -> tuple[str, list[str]]:
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = _assistant_text(value, name, where)
        if isinstance(value, str) and name != "completions":
            self.num_texts += 1
            written = "<think>" + value if isinstance(prompt, str) and opens_thinking(prompt) else value
            self._count_thinking(written)
            return value, cut_text(written, self.rule, self.config.keep_thinking)
        if isinstance(value, list) and name != "completion":
            for i, step in enumerate(value):
                if not isinstance(step, str):
                    raise ValueError(
                        f"{where}: `{name}[{i}]` is {_shown(step)}, expected a step text. Remove the step."
                    )
            self.num_lists += 1
            count_answers(value, self.with_answers)
            text = (STEP_END if self.config.join_steps is None else self.config.join_steps).join(value)
            self._count_thinking(text)
            steps = [step.strip() for step in value if step.strip()]
            if len(steps) < len(value):
                self.counts["notes", "blank_steps_left_out"] += len(value) - len(steps)
            steps = [step.strip() for step in visible_steps(steps, self.config.keep_thinking)]
            return text, [step for step in steps if step]
        expected = {"completion": "a text, or one message of the assistant", "completions": "a list of step texts"}
        raise ValueError(
            f"{where}: `{name}` is {_shown(value)}, expected {expected.get(name, 'a text or a list of step texts')}."
        )

    def _count_thinking(self, text: str) -> None:
        if not self.config.keep_thinking and thinking_spans(text):
            self.counts["notes", THINKING] += 1


def _prompt(prompt: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return [_message(message, "prompt", where) for message in prompt]
    raise ValueError(
        f"{where}: `prompt` is {_shown(prompt)}, expected a non-empty text, or messages with `role` and `content`."
    )


def _grades(row: dict[str, Any], form: str, number: int, where: str) -> list[bool | None] | None:
    """Grades of the candidates of a row, `None` if it has none. `labels` next to a list of steps are those of the steps."""
    names = [name for name in (*GRADES, *(["labels"] if form == "candidates" else [])) if row.get(name) is not None]
    if not names:
        return None
    values = row[names[0]] if form == "candidates" else [row[names[0]]]
    if not isinstance(values, list) or len(values) != number:
        found = f"{len(values)} grades" if isinstance(values, list) else _shown(values)
        raise ValueError(f"{where}: `{names[0]}` has {found} for {number} candidates, expected one grade for each.")
    for value in values:
        if value is not None and (not isinstance(value, (bool, int, float)) or value not in (0, 1)):
            raise ValueError(
                f"{where}: `{names[0]}` has {_shown(value)}, expected true or false (or 1 or 0) for each candidate, or null where it is "
                "not known. If the column holds something else, rename it."
            )
    return [None if value is None else bool(value) for value in values]


def _problem(row: dict[str, Any], prompt: str | list[dict[str, str]], where: str) -> str:
    """What the reward model is shown: the column `problem`, or else the prompt, or its one message of the user."""
    problem = row.get("problem")
    if problem is None:
        try:
            problem = (
                prompt if isinstance(prompt, str) else problem_of(prompt, "Write the problem into a column `problem`.")
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f"{where}: the problem is {_shown(problem)}, expected a non-empty text.")
    choices = choices_of(row)
    return problem if choices is None else choices.add_to(problem)


def unused_warnings(counts: Counter) -> list[str]:
    """What [`read_candidates`] counted of columns that may carry a part of the problem."""
    found = {key[1]: count for key, count in counts.items() if key[0] == "notes" and key[1].startswith(UNUSED)}
    return parts_warning({name.removeprefix(UNUSED): count for name, count in found.items()})


def _answer(answer: Any, where: str) -> str | None:
    """The reference answer; of a solution in GSM8K's format, what follows its last `####`."""
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(
            f"{where}: `answer` is {_shown(answer)}, expected a text or a number. Rename or remove the column."
        )
    return extract_answer(str(answer), ("hash",)) or str(answer).strip() or None


def _assistant_text(messages: list[dict[str, Any]], name: str, where: str) -> str:
    if len(messages) != 1 or not _is_message(messages[0]) or messages[0]["role"] != "assistant":
        raise ValueError(f"{where}: `{name}` is {_shown(messages)}, expected one message, of the assistant.")
    return _message(messages[0], name, where)["content"]


def _message(message: dict[str, Any], name: str, where: str) -> dict[str, str]:
    more = sorted(key for key, value in message.items() if key not in ("role", "content") and value is not None)
    if more:
        raise ValueError(
            f"{where}: a message of `{name}` has {', '.join(more)} beside `role` and `content`, which the chosen rows would "
            "lose. Remove it, or write it into the content."
        )
    return {"role": message["role"], "content": message["content"]}


def _normalized(prompt: str | list[dict[str, str]]) -> Any:
    """A problem or prompt without differences of whitespace."""
    if isinstance(prompt, str):
        return normalize_problem(prompt)
    return [(message["role"], normalize_problem(message["content"])) for message in prompt]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
