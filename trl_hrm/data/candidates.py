r"""
Problems with candidate solutions, and the reader of candidate rows. See [`~data.candidate_sources.read_candidates`] for other sources.

A row has one candidate, or a problem with several candidates. A candidate is a text or a list of steps:

```json
{"prompt": "1+2+3?", "completion": "1+2 = 3.\n\n3+3 = 6."}
{"prompt": "1+2+3?", "completions": ["1+2 = 3.", "3+3 = 6."]}
{"prompt": "1+2+3?", "candidates": ["1+2 = 3.\n\n3+3 = 6.", ["1+2 = 3.", "3+3 = 7."]]}
```

Grades are in a column `correct` or `is_correct`. For several candidates, the column has a list and may also be called `labels`:

```json
{"prompt": "1+2+3?", "candidates": ["It is 6.", "It is 7."], "correct": [true, false]}
```

Rows written by search-and-learn, with `problem` and whole solutions as `completions`, and rows of OpenMathInstruct, with
`generated_solution` and `expected_answer`, are also supported.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from ..grading import extract_answer, opens_thinking, thinking_spans
from ..io import shown
from ..messages import content_text, is_content, plain_row, problem_of
from ..schema import Count, Share, check_json
from ..search.steps import cut_text, visible_steps
from .candidates_config import CandidatesConfig
from .problems import UNUSED, choices_of, normalize_problem, problem_key, same_answer, unused_parts
from .solutions import check_answers, count_answers, count_unsplit_text, read_whole_solutions, solution_warnings
from .sources import DatasetRows, JsonLines, all_rows


FORMS = ("completion", "completions", "candidates")
GRADES = ("correct", "is_correct")  # columns with the grade of a candidate, or a list of grades
STEP_END = "\n\n"  # default separator between the steps of a list
THINKING = "candidates_with_thinking_left_out"
CAST_NUMBERS = "In JSON Lines, put the number in quotes. In a dataset, cast the column to string."


@dataclass
class Candidate:
    """
    A candidate solution of a problem.

    Args:
        text (`str`):
            Text written by the policy.
        steps (`list[str]`):
            S step texts. Empty for a blank solution.
        answer (`str`, *optional*):
            Final answer of the solution. `None` if it has none.
        finish (`str`, *optional*):
            Why sampling ended: `"stop"`, `"eos"` or `"length"`. `None` if unknown.
        num_tokens (`int`, *optional*):
            Number of tokens written by the policy. `None` if unknown.
        correct (`bool`, *optional*):
            Whether the answer is right. `None` before grading, if there is no answer, or if grading failed.
        scores (`list[float]`, *optional*):
            S step scores. `None` before scoring, or if the solution has no steps or is too long.
    """

    text: str
    steps: list[str]
    answer: str | None = None
    finish: str | None = None
    num_tokens: int | None = None
    correct: bool | None = None
    scores: list[float] | None = None


@dataclass
class ProblemCandidates:
    """
    A problem and its candidates.

    Args:
        problem_id (`str`):
            Id of the problem.
        problem (`str`):
            Text of the problem for the reward model.
        answer (`str`, *optional*):
            Reference answer.
        candidates (`list[Candidate]`, *optional*, defaults to `[]`):
            N solutions, in the order in which they were sampled.
        where (`str`, *optional*, defaults to `""`):
            Location of the first candidate, for error messages.
        graded (`bool`, *optional*, defaults to `False`):
            Whether the source has the grades (`correct`) of the candidates. If so, they are not graded again.
        prompt (`str` or `list[dict[str, str]]`, *optional*):
            Prompt that the policy was given, as text or messages.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Chat template variables of the prompt.
        num_cut (`int`, *optional*, defaults to `0`):
            Number of candidates that were given as text and split into steps.
        num_considered (`int`, *optional*):
            Number of candidates to select from, including blank candidates and duplicates. Set by [`~data.raft.shortlist`].
    """

    problem_id: str
    problem: str
    answer: str | None = None
    candidates: list[Candidate] = field(default_factory=list)
    where: str = ""
    graded: bool = False
    prompt: str | list[dict[str, str]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    num_cut: int = 0
    num_considered: int | None = None

    def to_row(self) -> dict[str, Any]:
        """Return the row of `candidates.jsonl`, the results file of best-of-N."""
        names = ("text", "steps", "answer", "correct", "finish", "scores", "num_tokens")
        row = {"problem_id": self.problem_id, "problem": self.problem, "answer": self.answer}
        row["candidates"] = [{name: getattr(candidate, name) for name in names} for candidate in self.candidates]
        return row | {"graded": True} if self.graded else row

    @classmethod
    def from_row(cls, row: dict[str, Any], where: str = "") -> "ProblemCandidates":
        """
        Return the problem of a row of `candidates.jsonl`.

        Raises:
            `ValueError`: If the row is damaged. The message starts with `where`.
        """
        check_json(row, SavedProblem, where, "Run the command that wrote the file again.")
        candidates = [Candidate(**candidate) for candidate in row["candidates"]]
        return cls(row["problem_id"], row["problem"], row["answer"], candidates, where, row.get("graded", False))


class SavedCandidate(TypedDict):
    """Candidate in a row of `candidates.jsonl`. See [`Candidate`]."""

    text: str
    steps: list[str]
    answer: str | None
    correct: bool | None
    finish: str | None
    scores: Annotated[list[Share], Field(min_length=1)] | None
    num_tokens: NotRequired[Count | None]


class SavedProblem(TypedDict):
    """Row of `candidates.jsonl`."""

    problem_id: str
    problem: str
    answer: str | None
    candidates: list[SavedCandidate]
    graded: NotRequired[bool]


class CandidateRows:
    """
    Reader that groups the rows of candidates by problem.

    Args:
        config ([`CandidatesConfig`]):
            Options of the candidates and of their segmentation into steps.
        notes (`Counter`):
            Counter of candidates whose thinking is removed, of rows that are or look like whole solutions, of texts if the segmentation
            finds no steps in most of them, of blank steps that are removed from lists, and of unused columns that may contain a part of
            the problem. It is updated in place.
        answers (`bool`):
            Whether the column `answer` has reference answers.
        grades (`bool`):
            Whether the column `correct` (or `is_correct`, or `labels` next to `candidates`) has grades of the candidates.
    """

    def __init__(self, config: CandidatesConfig, notes: Counter, answers: bool, grades: bool):
        self.config = config
        self.notes = notes
        self.answers = answers
        self.grades = grades
        self.rule = config.step_rule()
        self.keep_thinking = bool(config.keep_thinking) or self.rule.keeps_thinking
        self.problems: dict[str, ProblemCandidates] = {}
        self.num_texts = 0
        self.num_lists = 0
        self.unsplit = Counter()  # see `count_unsplit_text`

    def read(self, rows: JsonLines | DatasetRows, before: str = "") -> list[ProblemCandidates]:
        """
        Return the problems of all rows, in the order in which they first appear.

        Args:
            rows ([`JsonLines`] or [`DatasetRows`]):
                Reader of the rows.
            before (`str`, *optional*, defaults to `""`):
                Prefix of the row locations in error messages.

        Raises:
            `ValueError`: If a row is invalid, or an option has no effect on these candidates.
        """
        found = ((before + where, row) for where, row in all_rows(rows))
        for where, row in read_whole_solutions(found, self.notes):
            self._add(_named_as_candidate(row), where)
        check_answers(self.notes, self.num_lists, self.config.candidates)
        if solution_warnings(self.unsplit):
            self.notes.update(self.unsplit)
        if self.config.segmentation is not None and self.num_lists and not self.num_texts:
            raise ValueError("`segmentation` has no effect, because all candidates are lists of steps. Remove it.")
        if self.config.join_steps is not None and self.num_texts and not self.num_lists:
            raise ValueError("`join_steps` has no effect, because all candidates are texts. Remove it.")
        return list(self.problems.values())

    def _add(self, row: dict[str, Any], where: str) -> None:
        if row.get("parents") is not None:
            raise ValueError(
                f"{where}: the row has `parents`, so it is a tree and not a candidate. Use rows with single solutions, such as the "
                "view prm."
            )
        given = [name for name in FORMS if row.get(name) is not None]
        if not given and (null := [name for name in FORMS if name in row]):
            raise ValueError(f"{where}: `{null[0]}` is null, expected a solution. Remove the row.")
        if len(given) != 1:
            raise ValueError(
                f"{where}: found {' and '.join(given) or 'none'} of `completion` (a text), `completions` (a list of steps) and "
                f"`candidates` (a list of either) among the keys {shown(sorted(row), 200)}, expected exactly one. For other column names, use "
                "--columns, such as --columns candidates=generations."
            )
        [form] = given
        values = row[form] if form == "candidates" else [row[form]]
        if not isinstance(values, list):
            raise ValueError(
                f"{where}: `candidates` is {shown(values)}, expected a list of texts or of lists of steps."
            )
        grades = self._grades(row, form, len(values), where)
        new = self._problem(row, where)
        new.graded = grades is not None
        problem = self.problems.setdefault(new.problem_id, new)
        self._check_same(problem, new, "problem" if row.get("problem_id") is None else "problem_id")
        for i, (value, grade) in enumerate(zip(values, grades or [None] * len(values), strict=True)):
            name = f"candidates[{i}]" if form == "candidates" else form
            problem.candidates.append(self._candidate(value, name, problem, where))
            problem.candidates[-1].correct = grade
        self.notes.update(UNUSED + name for name in unused_parts(row))

    def _grades(self, row: dict[str, Any], form: str, number: int, where: str) -> list[bool | None] | None:
        """Return the grades of the candidates of a row, if any. Next to `completions`, `labels` are step labels, not grades."""
        names = (*GRADES, "labels") if form == "candidates" else GRADES
        name = next((name for name in names if row.get(name) is not None), None)
        if name is None or not self.grades:
            return None
        values = row[name] if form == "candidates" else [row[name]]
        if not isinstance(values, list) or len(values) != number:
            found = f"{len(values)} grades" if isinstance(values, list) else shown(values)
            raise ValueError(
                f"{where}: `{name}` has {found} for {number} candidates, expected one grade per candidate."
            )
        for value in values:
            if value is not None and (not isinstance(value, (bool, int, float)) or value not in (0, 1)):
                raise ValueError(
                    f"{where}: `{name}` has {shown(value)}, expected true or false (or 1 or 0) for each candidate, or null if the grade "
                    "is unknown. If the column has no grades, rename it."
                )
        return [None if value is None else bool(value) for value in values]

    def _problem(self, row: dict[str, Any], where: str) -> ProblemCandidates:
        """Return the problem of a row, without its candidates."""
        prompt, problem_id = row.get("prompt"), row.get("problem_id")
        if prompt is None:
            raise ValueError(
                f"{where}: `prompt`, the prompt of the policy, is not among the keys {shown(sorted(row), 200)}. For another column name, use "
                "--columns, such as --columns prompt=problem."
            )
        if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
            prompt = [_message(message, "prompt", where) for message in prompt]
        elif not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"{where}: `prompt` is {shown(prompt)}, expected a non-empty text, or messages with `role` and `content`."
            )
        if isinstance(problem_id, int) and not isinstance(problem_id, bool):
            problem_id = str(problem_id)
        if problem_id is not None and not isinstance(problem_id, str):
            raise ValueError(
                f"{where}: `problem_id` is {shown(problem_id)}, expected a string or an integer. {CAST_NUMBERS}"
            )
        problem = row.get("problem")
        if problem is None:
            try:
                remedy = "Put the problem in a column `problem`."
                problem = prompt if isinstance(prompt, str) else problem_of(prompt, remedy)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"{where}: the problem is {shown(problem)}, expected a non-empty text.")
        choices = choices_of(row)
        problem = problem if choices is None else choices.add_to(problem)
        answer = row.get("answer") if self.answers else None
        if choices is not None and answer is not None:
            label = choices.label_of(answer)
            if label is None:
                raise ValueError(
                    f"{where}: `answer` is {shown(answer)}. It must identify exactly one of the choices {shown(choices.texts, 200)} by its text, "
                    f"its label ({', '.join(choices.labels)}) or its index from 0."
                )
            answer = label
        if answer is not None:
            if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
                raise ValueError(
                    f"{where}: `answer` is {shown(answer)}, expected a text or a number. Rename or remove the column."
                )
            # In GSM8K's format, the answer follows the last `####` of a solution
            answer = extract_answer(str(answer), ("hash",)) or str(answer).strip() or None
        return ProblemCandidates(problem_id or problem_key(problem).hex(), problem, answer, where=where, prompt=prompt)

    def _check_same(self, first: ProblemCandidates, new: ProblemCandidates, same: str) -> None:
        """Raise an error if two rows with the same problem or id (`same`) contradict each other."""
        answers = (first.answer, new.answer)
        if answers != (None, None) and (None in answers or not same_answer(*answers)):
            raise ValueError(
                f"{new.where}: `answer` is {shown(new.answer)}, but {first.where} has {shown(first.answer)} for the same problem. A "
                "problem must have one reference answer. If the column has something else, rename it, and pass a separate file of "
                "problems with reference answers."
            )
        if first.graded != new.graded:
            has, lacks = (new, first) if new.graded else (first, new)
            raise ValueError(
                f"{lacks.where}: the candidates have no grades, but {has.where} has grades for the same problem. Add `correct` to both "
                "rows, or remove it from both."
            )
        check_same_problem(first, new, same)

    def _candidate(self, value: Any, name: str, problem: ProblemCandidates, where: str) -> Candidate:
        if name == "completions" and isinstance(value, list):  # steps, each of which may be a message
            value = plain_row({name: value}, where)[name]
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            if len(value) != 1 or not _is_message(value[0]) or value[0]["role"] != "assistant":
                raise ValueError(f"{where}: `{name}` is {shown(value)}, expected exactly one assistant message.")
            value = _message(value[0], name, where)["content"]
        if isinstance(value, str) and name != "completions":
            self.num_texts += 1
            problem.num_cut += 1
            is_opened = isinstance(problem.prompt, str) and opens_thinking(problem.prompt)
            written = "<think>" + value if is_opened else value
            text, steps = value, cut_text(written.replace("\r\n", "\n"), self.rule, self.keep_thinking)
            count_unsplit_text(steps, self.rule, self.unsplit)
        elif isinstance(value, list) and name != "completion":
            for i, step in enumerate(value):
                if not isinstance(step, str):
                    raise ValueError(
                        f"{where}: `{name}[{i}]` is {shown(step)}, expected a step text. Remove this step."
                    )
            self.num_lists += 1
            count_answers(value, self.notes)
            text = written = (STEP_END if self.config.join_steps is None else self.config.join_steps).join(value)
            steps = [step.strip() for step in value if step.strip()]
            if len(steps) < len(value):
                self.notes["blank_steps_left_out"] += len(value) - len(steps)
            steps = [step.strip() for step in visible_steps(steps, self.keep_thinking)]
            steps = [step for step in steps if step]
        else:
            expected = {
                "completion": "a text, or one assistant message",
                "completions": "a list of step texts",
            }
            raise ValueError(
                f"{where}: `{name}` is {shown(value)}, expected {expected.get(name, 'a text or a list of step texts')}."
            )
        if not self.keep_thinking and thinking_spans(written):
            self.notes[THINKING] += 1
        return Candidate(text, steps)


def check_same_problem(first: ProblemCandidates, new: ProblemCandidates, same: str) -> None:
    """Raise an error if the prompts or the problems of two rows or runs with the same problem or id (`same`) differ."""
    for name in ("prompt", "problem"):
        if _normalized(getattr(first, name)) != _normalized(getattr(new, name)):
            raise ValueError(
                f"{new.where}: `{name}` is {shown(getattr(new, name))}, but {first.where} has {shown(getattr(first, name))} "
                f"for the same {same}. Both must have the same {name}. Different problems need different ids."
            )


def _named_as_candidate(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of OpenMathInstruct-1 or -2 with the column names of candidates. Its prompt is the bare problem."""
    problem = row.get("problem", row.get("question"))
    if row.get("generated_solution") is None or problem is None or any(row.get(name) is not None for name in FORMS):
        return row
    named = {"prompt": problem, "completion": row["generated_solution"], "answer": row.get("expected_answer")}
    return {name: value for name, value in named.items() if value is not None} | row


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return value.get("content") is not None and is_content(value["content"])


def _message(message: dict[str, Any], name: str, where: str) -> dict[str, str]:
    more = sorted(key for key, value in message.items() if key not in ("role", "content") and value is not None)
    if more:
        raise ValueError(
            f"{where}: a message of `{name}` has {', '.join(more)}. Only `role` and `content` are supported. Remove it, or move it "
            "to the content."
        )
    try:
        return {"role": message["role"], "content": content_text(message["content"])}
    except ValueError as error:
        raise ValueError(f"{where}: `{name}`: {error}") from error


def _normalized(prompt: str | list[dict[str, str]]) -> Any:
    """Return a problem or prompt with normalized whitespace."""
    if isinstance(prompt, str):
        return normalize_problem(prompt)
    return [(message["role"], normalize_problem(message["content"])) for message in prompt]
