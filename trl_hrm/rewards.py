"""A step reward model as a reward function of TRL's GRPOTrainer and RLOOTrainer, with guards against the known hacks."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import patch_environment
from transformers.integrations import is_deepspeed_zero3_enabled

from .data.problems import content_text, problem_of
from .encoding import find_control_text
from .grading import opens_thinking, thinking_spans, visible_text, without_thinking_tags
from .scoring.aggregate import aggregate as aggregate_scores
from .scoring.candidate_scores import fits
from .scoring.scorer import StepScorer
from .scoring.scoring_config import ScoringConfig
from .scoring.tree_scorer import TreeScorer
from .search.steps import RULES, StepRule, cut_text, regex_rule


GUARDS = ("too_few_steps", "too_many_steps", "repeated_steps", "blank_steps", "too_long", "control_text")
_STEP_NUMBER = re.compile(r"^\W*(?:step\s*\d+\W*|\d+[.:)]\s+)", re.IGNORECASE)  # "Step 2: x", "(2) x", "2. x"


class StepReward:
    r"""
    Reward function that judges every step of a completion with a step reward model.

    A completion is cut into steps. All completions of a batch are scored in one call, completions of the same problem as one tree,
    and the scores of the steps become one reward. A completion that a guard stops gets `guard_reward` and is counted; its steps are
    not scored.

    The guard `control_text` is always on. It stops a completion if a step holds a control token of the reward model, such as
    `<|im_end|>`, or a `step_separator` with letters or digits: these could forge turns and ends of steps. Tags that are not
    special tokens, such as `<think>`, are allowed. One control token at the very end is removed: some trainers leave the end
    of the sequence in the text.

    Example:

    ```python
    >>> from trl import GRPOTrainer
    >>> trainer = GRPOTrainer(model, reward_funcs=[StepReward("outputs/tiny-hrm", aggregate="min")], ...)
    ```

    Args:
        reward_model (`str` or [`~scoring.tree_scorer.TreeScorer`]):
            Folder or Hub repository of a checkpoint with its `step_format.json`, which is loaded whole on the device of each
            process; or a scorer, which stays where it is.
        aggregate (`str` or `Callable[[Sequence[float]], float]`, *optional*, defaults to `"min"`):
            How the scores of the steps become the reward. See [`~scoring.aggregate.aggregate`].
        problem_column (`str`, *optional*):
            Column of the dataset with the problem as the reward model is to see it. A row where it is `None` gets no reward
            from this function. By default the problem is the prompt, or its one message of the user; messages of the system are
            left out. A dialogue of several turns needs this column.
        segmentation (`str`, *optional*):
            Name of the [`StepRule`] that cuts completions into steps. By default they are cut at the `step_separator` of the
            checkpoint; where that is a blank line, `# Answer` stays with what follows it, as in the datasets of this package.
            If it is a control token, which policies do not write, they are cut at blank lines.
        spans (`Sequence[int]`, *optional*, defaults to `(1,)`), combine (`str`, *optional*, defaults to `"max"`):
            How steps are judged. See [`StepScorer.score`].
        guard_reward (`float`, *optional*, defaults to `0.0`):
            Reward of a completion that a guard stops.
        min_steps (`int`, *optional*, defaults to `2`):
            Guard `too_few_steps`: minimum number of steps of a completion. A completion without steps is always stopped.
        max_steps (`int`, *optional*, defaults to `64`):
            Guard `too_many_steps`: maximum number of steps of a completion. `None` for no limit.
        max_repeated (`float`, *optional*, defaults to `0.25`):
            Guard `repeated_steps`: the largest share of steps that say the same as an earlier step, up to case, white space
            and the number of the step. `None`: no limit.
        max_blank (`int`, *optional*, defaults to `4`):
            Guard `blank_steps`: the most pieces between two separators that have neither a letter nor a digit. Those of white
            space alone are never scored. `None`: no limit.
        max_tokens (`int`, *optional*):
            Guard `too_long`: maximum number of tokens of the steps, with separators, by the tokenizer of the reward model. By default
            only a completion with more tokens than the reward model has positions is stopped.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether a reasoning model's thinking is judged like the rest of a completion. By default it is left out, up to
            `</think>`, also of the guards, and a completion that only thinks has no steps. Where the chat template opens the tag in
            the prompt, a completion that was cut off before `</think>` cannot be told from one without thinking.
        name (`str`, *optional*, defaults to `"step_reward"`):
            Name in the logs. Give two of one run different names.
        scorer_kwargs:
            Passed to [`StepScorer.from_pretrained`], for example `dtype="bfloat16"` or `max_length`.

    After a call, `metrics` (`dict[str, float]`) holds its parts: `step_score`, the mean score of the steps that were scored;
    `num_steps`, the mean number of steps; `thinking_left_out`, the share of completions whose thinking was left out;
    `guarded`, the share of completions that a guard stopped; and
    `guarded/{reason}` for each guard (a completion may have several reasons). They are logged under `{name}/` where the trainer
    gives `log_metric`.

    Raises:
        `FileNotFoundError`: If the checkpoint has no `step_format.json`.
        `ValueError`: If the model does not have the head of its format, or an argument has no meaning.
    """

    def __init__(
        self,
        reward_model: str | TreeScorer,
        aggregate: str | Callable[[Sequence[float]], float] = "min",
        problem_column: str | None = None,
        segmentation: str | None = None,
        spans: Sequence[int] = (1,),
        combine: Literal["max", "mean"] = "max",
        guard_reward: float = 0.0,
        min_steps: int = 2,
        max_steps: int | None = 64,
        max_repeated: float | None = 0.25,
        max_blank: int | None = 4,
        max_tokens: int | None = None,
        keep_thinking: bool = False,
        name: str = "step_reward",
        **scorer_kwargs,
    ):
        if isinstance(aggregate, str):
            aggregate_scores([0.5], aggregate)  # checks the name
        if segmentation is not None and segmentation not in RULES:
            raise ValueError(f"segmentation is {segmentation!r}, expected one of {', '.join(RULES)}.")
        if not math.isfinite(guard_reward):
            raise ValueError(f"guard_reward is {guard_reward}, expected a number: TRL leaves out what is none.")
        if min_steps < 1 or (max_steps is not None and max_steps < min_steps):
            raise ValueError(
                f"min_steps is {min_steps} and max_steps {max_steps}, expected 1 <= min_steps <= max_steps: a completion without "
                "steps has nothing to judge."
            )
        if max_repeated is not None and not 0 <= max_repeated <= 1:
            raise ValueError(f"max_repeated is {max_repeated}, expected a share of the steps, from 0 to 1.")
        for limit, value, least in (("max_blank", max_blank, 0), ("max_tokens", max_tokens, 1)):
            if value is not None and value < least:
                raise ValueError(f"{limit} is {value}, expected {least} or more: it would stop every completion.")
        if not isinstance(reward_model, str) and scorer_kwargs:
            raise ValueError(f"{sorted(scorer_kwargs)} say how to load a reward model, but a scorer is given.")
        self.scorer = _load(reward_model, **scorer_kwargs) if isinstance(reward_model, str) else reward_model
        self.scoring = ScoringConfig(spans, combine)
        self.scorer.score([], [], spans=spans, combine=combine)  # errors show before anything is sampled
        separator = self.scorer.step_format.step_separator
        if segmentation is None:
            is_control = find_control_text(self.scorer.tokenizer, separator)
            self.rule = RULES["blank_line"] if is_control else separator_rule(separator)
        else:
            self.rule = RULES[segmentation]
        self.aggregate = aggregate
        self.problem_column = problem_column
        self.guard_reward = guard_reward
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.max_repeated = max_repeated
        self.max_blank = max_blank
        self.max_tokens = max_tokens
        self.keep_thinking = keep_thinking
        self.__name__ = name  # by which TRL logs the reward
        self.metrics: dict[str, float] = {}

    def __call__(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        completions: Sequence[str | list[dict[str, Any]]],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **columns,
    ) -> list[float | None]:
        """
        Return the rewards of completions.

        Args:
            prompts (`Sequence[str]` or `Sequence[list[dict]]`):
                B prompts: texts, or messages.
            completions (`Sequence[str]` or `Sequence[list[dict]]`):
                B completions: texts, or one message of the assistant each.
            log_metric, log_extra (`Callable`, *optional*):
                TRL's, for the metrics and for a column of the table of completions with the guards that stopped each.
            columns:
                Columns of the dataset, B values each, and what else TRL passes.

        Returns:
            `list[float | None]`: B rewards. `None` where `problem_column` is `None`.

        Raises:
            `ValueError`: If a prompt has no problem, a completion is not one text, or a score or reward is not a number.
        """
        problems: list[str | None] = []
        if self.problem_column is None:
            remedy = "Write the problem into a column of the dataset and name it as `problem_column`."
            try:
                problems += [prompt if isinstance(prompt, str) else problem_of(prompt, remedy) for prompt in prompts]
            except ValueError as error:
                raise ValueError(f"{self.__name__}: {error}") from error
        elif self.problem_column in columns:
            problems += columns[self.problem_column]
        else:
            raise ValueError(
                f"{self.__name__}: problem_column is {self.problem_column!r}, and the dataset has the columns "
                f"{sorted(name for name, value in columns.items() if isinstance(value, list))} next to the prompt. Name one of them."
            )
        texts = [_completion_text(*pair) for pair in zip(prompts, completions, strict=True)]
        steps = [self.steps(text) for text in texts]
        reasons = [
            [] if problem is None else self.guards(problem, text, solution)
            for problem, text, solution in zip(problems, texts, steps, strict=True)
        ]
        trees: dict[str, list[int]] = {}  # the completions of each problem
        for i, problem in enumerate(problems):
            if problem is not None and not reasons[i]:
                trees.setdefault(problem, []).append(i)
        rewards: list[float | None] = [None if problem is None else self.guard_reward for problem in problems]
        solutions = [[steps[i] for i in members] for members in trees.values()]
        scores = []
        if trees:
            spans, combine = self.scoring.spans, self.scoring.combine
            scores = self.scorer.score(list(trees), solutions, spans=spans, combine=combine)
        for members, values in zip(trees.values(), scores, strict=True):
            for i, step_scores in zip(members, values, strict=True):
                rewards[i] = aggregate_scores(step_scores, self.aggregate)
                if not math.isfinite(rewards[i]):  # it would make every advantage of its group NaN
                    raise ValueError(
                        f"{self.__name__}: the aggregate of the step scores {step_scores} is {rewards[i]}."
                    )
        judged = [i for i, problem in enumerate(problems) if problem is not None]
        flat = [score for values in scores for step_scores in values for score in step_scores]
        self.metrics = _metrics([len(steps[i]) for i in judged], [reasons[i] for i in judged], flat)
        if judged:
            left_out = [not self.keep_thinking and bool(thinking_spans(texts[i])) for i in judged]
            self.metrics["thinking_left_out"] = sum(left_out) / len(judged)
        if log_metric is not None:
            for key, value in self.metrics.items():
                log_metric(f"{self.__name__}/{key}", value)
        if log_extra is not None:
            log_extra(f"{self.__name__}/guards", [", ".join(found) for found in reasons])
        return rewards

    def steps(self, text: str) -> list[str]:
        """
        The steps of a completion, without thinking, separators, the space around them and the end of the sequence. None is
        blank.
        """
        end = find_control_text(self.scorer.tokenizer, text, tags=False)[-1:]
        if end and text.rstrip().endswith(end[0]):
            text = text.rstrip().removesuffix(end[0])
        separator = self.scorer.step_format.step_separator.strip()
        pieces = cut_text(text, self.rule, self.keep_thinking)
        steps = [piece.removesuffix(separator).strip() for piece in pieces]
        return [step for step in steps if step]

    def guards(self, problem: str, text: str, steps: Sequence[str]) -> list[str]:
        """
        Return the guards that stop a completion.

        Args:
            problem (`str`):
                The problem.
            text (`str`):
                The completion.
            steps (`Sequence[str]`):
                Its steps.

        Returns:
            `list[str]`: Some of `GUARDS`, in their order.
        """
        text = without_thinking_tags(text) if self.keep_thinking else visible_text(text)
        contents = {" ".join(_STEP_NUMBER.sub("", step).split()).casefold() for step in steps}
        num_repeated = len(steps) - len(contents)
        num_tokens = 0
        if self.max_tokens is not None:
            _, step_ids = self.scorer.step_format.encode(self.scorer.tokenizer, problem, steps)
            num_tokens = sum(map(len, step_ids))
        stops = (
            len(steps) < self.min_steps,
            self.max_steps is not None and len(steps) > self.max_steps,
            self.max_repeated is not None and num_repeated > self.max_repeated * len(steps),
            self.max_blank is not None and num_blank(text, self.scorer.step_format.step_separator) > self.max_blank,
            num_tokens > (math.inf if self.max_tokens is None else self.max_tokens)
            or not fits(self.scorer, problem, steps, range(-1, len(steps) - 1), self.scoring),
            any(self.scorer.step_format.find_markers(self.scorer.tokenizer, step) for step in steps),
        )
        return [guard for guard, stop in zip(GUARDS, stops, strict=True) if stop]


def separator_rule(separator: str) -> StepRule:
    r"""
    The rule that cuts at a separator of steps.

    Example:

    ```python
    >>> separator_rule(" ки").ends("One. ки Two. ки")
    [7, 15]
    ```
    """
    return RULES["blank_line"] if separator.isspace() and "\n\n" in separator else regex_rule(re.escape(separator))


def num_blank(text: str, separator: str) -> int:
    r"""
    Number of pieces between two separators, or before the first, that have neither a letter nor a digit.

    Example:

    ```python
    >>> num_blank("One.\n\n\n\n...\n\nTwo.\n\n", "\n\n")
    2
    ```
    """
    pieces = text.split(separator)[:-1]
    return sum(not any(map(str.isalnum, piece)) for piece in pieces)


def _completion_text(prompt: str | list[dict[str, Any]], completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion, after the tag with which its prompt may begin the thinking."""
    tag = "<think>" if isinstance(prompt, str) and opens_thinking(prompt) else ""
    if isinstance(completion, str):
        return tag + completion
    roles = [message["role"] for message in completion]
    if roles != ["assistant"]:
        raise ValueError(
            f"a completion has messages of {roles}, expected one, of the assistant: a step reward model judges one text. "
            "Completions with calls of tools cannot be judged."
        )
    return tag + content_text(completion[0]["content"])


def _metrics(num_steps: list[int], reasons: list[list[str]], scores: list[float]) -> dict[str, float]:
    """Parts of the rewards of one batch. A mean over nothing is left out."""
    metrics = {"step_score": math.fsum(scores) / len(scores)} if scores else {}
    if reasons:
        metrics["num_steps"] = sum(num_steps) / len(num_steps)
        metrics["guarded"] = sum(map(bool, reasons)) / len(reasons)
        metrics |= {f"guarded/{guard}": sum(guard in found for found in reasons) / len(reasons) for guard in GUARDS}
    return metrics


def _load(path_or_repo: str, **kwargs) -> StepScorer:
    """The reward model on the device of this process, whole."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "StepReward: the configuration of the trainer turned ZeRO-3 on, so that the reward model would be loaded in "
            "shards. Make the StepReward before the GRPOConfig or RLOOConfig, or pass it a scorer."
        )
    device = PartialState().device
    kwargs.setdefault("device_map", None if device.type == "cpu" else {"": device})
    # with it on, FSDP expects the weights from the first rank, which only sends the weights of the policy
    with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
        return StepScorer.from_pretrained(path_or_repo, **kwargs)
