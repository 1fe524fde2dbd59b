"""Reward for the final answer, for TRL's GRPOTrainer and RLOOTrainer and for [`StepGRPOTrainer`]."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

from .grading import DEFAULT_EXTRACTORS, AnswerGrader, Grade, extract_answer, opens_thinking
from .io import shown
from .messages import content_text


# Outcomes of a completion in the metrics, in addition to a right and a wrong answer
STATUSES = ("no_answer", "unparseable", "timeout", "no_reference", "ungradable", "died")
UNGRADED = ("no_reference", "ungradable", "died")  # not the fault of the completion


class AccuracyReward:
    r"""
    Reward function that grades the final answer: 1.0 if it is right, 0.0 if it is wrong, unreadable or missing.

    Answers are found by [`extract_answer`], which ignores the thinking of reasoning models, and graded by [`AnswerGrader`] in worker
    processes. Unlike in [`~trl.rewards.accuracy_reward`], the answer need not be LaTeX, prompts and completions can be plain texts,
    and an answer on which SymPy does not terminate cannot block the training.

    The workers start with the first call. They end with the process, or earlier if the reward is used as a context manager.

    Example:

    ```python
    >>> with AccuracyReward() as accuracy:
    ...     accuracy(["1 + 2?"] * 3, ["The answer is 3.", r"\boxed{4}", "I give up."], answer=["3"] * 3)
    [1.0, 0.0, 0.0]
    ```

    Args:
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column of the dataset with the reference answer: a text or a number. From a whole solution, the answer in the last
            `\boxed{...}` or after `####` is read.
        extractors (`Sequence[str]`, *optional*, defaults to `("marker", "tag", "boxed", "hash", "answer_is")`):
            Extractors of the answer of a completion. See [`extract_answer`].
        num_workers (`int`, *optional*, defaults to `1`), timeout (`float`, *optional*, defaults to `10.0`):
            Number of worker processes of each training process, and timeout for grading an answer, in seconds. An answer that takes
            longer gets 0.0.
        name (`str`, *optional*, defaults to `"accuracy"`):
            Name of the reward in the logs.

    If the trainer passes `log_metric`, the shares of completions with `no_answer`, an `unparseable` answer, a `timeout`,
    `no_reference`, an `ungradable` reference, and an answer whose worker process `died` twice are logged under `{name}/`.

    Raises:
        `ValueError`: If an extractor is unknown, or a number is out of range.
    """

    def __init__(
        self,
        answer_column: str = "answer",
        extractors: Sequence[str] = DEFAULT_EXTRACTORS,
        num_workers: int = 1,
        timeout: float = 10.0,
        name: str = "accuracy",
    ):
        extract_answer("", extractors)  # checks the names
        AnswerGrader(num_workers, timeout)  # checks the numbers
        self.answer_column = answer_column
        self.extractors = tuple(extractors)
        self.num_workers = num_workers
        self.timeout = timeout
        self.__name__ = name  # TRL logs the reward under this name
        self._grader: AnswerGrader | None = None

    def __call__(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[str | list[dict[str, Any]]],
        log_metric: Callable[[str, float], None] | None = None,
        **columns,
    ) -> list[float | None]:
        """
        Return the rewards of completions.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                B prompts: texts, or lists of messages.
            completions (`Sequence[str]` or `Sequence[list[dict]]`):
                B completions: texts, or lists of messages. The answer is read from the last assistant message.
            log_metric (`Callable`, *optional*):
                Function of TRL that logs the metrics.
            columns:
                Columns of the dataset, B values each, and other arguments of TRL.

        Returns:
            `list[float | None]`: B rewards. `None` for rows whose reference is missing or unreadable, and for answers whose worker
            process died twice.

        Raises:
            `ValueError`: If the dataset has no `answer_column`, the column does not have one value per completion, or a reference is
            neither a text nor a number.
            [`~grading.GraderError`]: If the grader does not work.
        """
        if self.answer_column not in columns:
            raise ValueError(
                f"{self.__name__}: `answer_column` is {shown(self.answer_column)}, but the dataset has only the columns "
                f"{sorted(name for name, value in columns.items() if isinstance(value, list))} in addition to the prompt. Set "
                "`answer_column` to the column with the reference answers."
            )
        answers = [
            extract_answer(_last_text(prompt, completion), self.extractors)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        references = [self._reference(value) for value in columns[self.answer_column]]
        if len(references) != len(answers):
            raise ValueError(
                f"{self.__name__}: the column {shown(self.answer_column)} has {len(references)} values for {len(answers)} completions. "
                "Pass one reference answer for each completion."
            )
        if self._grader is None:
            self._grader = AnswerGrader(self.num_workers, self.timeout).__enter__()
        with ThreadPoolExecutor(self.num_workers) as threads:
            grades = list(threads.map(self._grade, answers, references))
        if log_metric is not None and grades:
            counts = Counter(grade.status for grade in grades)
            for status in STATUSES:
                log_metric(f"{self.__name__}/{status}", counts[status] / len(grades))
        return [None if grade.status in UNGRADED else float(grade.correct is True) for grade in grades]

    def __enter__(self) -> "AccuracyReward":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._grader is not None:
            self._grader.__exit__(*error)
            self._grader = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_grader": None}  # a copy starts its own workers

    def _reference(self, value: Any) -> str | None:
        """Return the reference answer in a value of the column, or `None` if it is missing."""
        is_number = isinstance(value, Real) and not isinstance(value, bool)  # also numbers of NumPy
        if value is None or (is_number and math.isnan(value)):
            return None
        if not isinstance(value, str) and not is_number:
            raise ValueError(
                f"{self.__name__}: found {shown(value)} in the column {shown(self.answer_column)}, expected a text or a number with "
                "the reference answer. Set `answer_column` to another column."
            )
        text = str(value)
        return extract_answer(text, ("hash", "boxed")) or text.strip() or None

    def _grade(self, answer: str | None, reference: str | None) -> Grade:
        if reference is None:
            return Grade(None, "no_reference")
        # first, so that all completions of a problem are graded or none
        if self._grader.grade(reference, reference).status == "ungradable":
            return Grade(None, "ungradable")
        return Grade(None, "no_answer") if answer is None else self._grader.grade(answer, reference)


def _last_text(prompt: str | list[dict[str, Any]], completion: str | list[dict[str, Any]]) -> str:
    """Return the text that has the answer, with a leading `<think>` if the prompt ends with this tag."""
    if not isinstance(completion, str):
        texts = [content_text(message.get("content")) for message in completion if message["role"] == "assistant"]
        completion = texts[-1] if texts else ""
    return ("<think>" if isinstance(prompt, str) and opens_thinking(prompt) else "") + completion
