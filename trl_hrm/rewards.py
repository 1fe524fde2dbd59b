"""Use a step reward model as a reward function of TRL's GRPOTrainer and RLOOTrainer, with guards against reward hacking."""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import patch_environment
from transformers.integrations import is_deepspeed_zero3_enabled

from .encoding import find_control_text
from .grading import opens_thinking, thinking_spans
from .io import shown
from .messages import content_text, problem_of, prompt_text
from .scoring.aggregate import aggregate as aggregate_scores
from .scoring.candidate_scores import fits
from .scoring.generative_scorer import GenerativeScorer
from .scoring.scorer import StepScorer
from .scoring.scoring_config import ScoringConfig
from .scoring.tree_scorer import TreeScorer
from .search.steps import RULES, StepRule, read_text, regex_rule, step_spans
from .search.thinking import ThinkingRule


GUARDS = ("too_few_steps", "too_many_steps", "repeated_steps", "blank_steps", "too_long", "control_text")
_STEP_NUMBER = re.compile(r"^\W*(?:step\s*\d+\W*|\d+[.:)]\s+)", re.IGNORECASE)  # "Step 2: x", "(2) x", "2. x"


@dataclass(frozen=True)
class ScoredCompletion:
    r"""
    Steps of a completion and their scores. See [`~token_steps.token_steps`] for the tokens of each step.

    Args:
        texts (`list[str]`):
            Text of the completion, or the contents of its assistant messages.
        spans (`list[list[tuple[int, int]]]`):
            Start and end of each non-blank step in its text, in characters, per text.
        scores (`list[float]`, *optional*):
            Scores of the steps of all texts, in order. `None` if a guard rejected the completion, or the row has no problem.
        reward (`float`, *optional*):
            Reward of the completion. `None` if the row has no problem.
        guards (`list[str]`, *optional*):
            Guards that rejected the completion.
        thinking (`list[str]`, *optional*):
            Thinking that TRL's parser of responses separated from each text, or an empty string.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether thinking in the texts is part of the steps.

    Example:

    ```python
    >>> reward = StepReward("me/my-hrm")
    >>> reward(["1 + 2 + 3?"], ["1 + 2 = 3.\n\n3 + 3 = 6."])
    [0.81]
    >>> reward.scored[0].spans, reward.scored[0].scores
    ([[(0, 10), (12, 22)]], [0.93, 0.81])
    ```
    """

    texts: list[str]
    spans: list[list[tuple[int, int]]]
    scores: list[float] | None = None
    reward: float | None = None
    guards: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    keep_thinking: bool = False

    @property
    def steps(self) -> list[str]:
        """Steps of all texts, as the reward model reads them."""
        return [
            read_text(text[start:end], self.keep_thinking)
            for text, spans in zip(self.texts, self.spans, strict=True)
            for start, end in spans
        ]

    @property
    def step_rewards(self) -> list[float] | None:
        """Scores of the steps. A completion that a guard rejected has one reward for all of its text. `None` without a reward."""
        if self.scores is None and self.reward is not None:
            return [self.reward]
        return self.scores


class StepReward:
    r"""
    Reward function that scores every step of a completion with a step reward model.

    Each completion is split into steps. All completions of a batch are scored in one call, where completions of the same problem
    form a tree. The scores of the steps are aggregated into one reward. Guards reject completions that exploit the reward model:
    a rejected completion gets `guard_reward`, and its steps are not scored.

    The guard `control_text` is always active. It rejects a completion if a step contains a control token of the reward model, such
    as `<|im_end|>`, or a `step_separator` with letters or digits, because these could imitate turns and ends of steps. Tags that are
    not special tokens, such as `<think>`, are allowed. One control token at the end of a completion is removed, since some
    trainers keep the EOS token in the text.

    A completion with tool calls is a list of messages. Its steps are the steps of the contents of all assistant messages, in order, and
    each message starts a new step. Tool calls and the results of tools are not shown to the reward model.

    Example:

    ```python
    >>> from trl import GRPOTrainer
    >>> trainer = GRPOTrainer(model, reward_funcs=[StepReward("outputs/tiny-hrm", aggregate="min")], ...)
    ```

    Args:
        reward_model (`str` or [`~scoring.tree_scorer.TreeScorer`]):
            Path or Hub id of a checkpoint with a `step_format.json`, or a scorer. A checkpoint is loaded on the device of each
            process, without sharding. A scorer is not moved.
        aggregate (`str` or `Callable[[Sequence[float]], float]`, *optional*, defaults to `"min"`):
            How to aggregate the step scores into the reward. See [`~scoring.aggregate.aggregate`].
        problem_column (`str`, *optional*):
            Column of the dataset with the problem to show to the reward model. A row where it is `None` gets no reward from this
            function. By default, the problem is the prompt or, in a conversation, the user message, without system messages. Required
            for conversations with several turns.
        segmentation (`str` or [`StepRule`], *optional*):
            Rule that splits completions into steps, or its name. `"thinking"` also splits the thinking of a reasoning model (see
            [`ThinkingRule`]). By default, completions are split at the `step_separator`
            of the checkpoint. If the separator is a blank line, `# Answer` stays in the same step as the text after it, as in the
            datasets of this package. If policies do not write the separator, because it is a control token or belongs to the format
            of a published model (`" ки"`, a reply `"+"`), completions are split at blank lines.
        spans (`Sequence[int]`, *optional*, defaults to `(1,)`), combine (`str`, *optional*, defaults to `"max"`):
            How steps are scored. See [`StepScorer.score`].
        guard_reward (`float`, *optional*, defaults to `0.0`):
            Reward of a completion that a guard rejects.
        min_steps (`int`, *optional*, defaults to `2`):
            Guard `too_few_steps`: minimum number of steps of a completion. A completion without steps is always rejected.
        max_steps (`int`, *optional*, defaults to `64`):
            Guard `too_many_steps`: maximum number of steps of a completion. `None` disables this guard.
        max_repeated (`float`, *optional*, defaults to `0.25`):
            Guard `repeated_steps`: maximum share of steps that repeat an earlier step, ignoring case, white space and step
            numbers. `None` disables this guard.
        max_blank (`int`, *optional*, defaults to `4`):
            Guard `blank_steps`: maximum number of pieces between two separators without letters and digits. Pieces of white space
            are never scored. `None` disables this guard.
        max_tokens (`int`, *optional*):
            Guard `too_long`: maximum number of tokens of the steps, including separators, with the tokenizer of the reward model.
            By default, only completions with more tokens than the reward model has positions are rejected.
        keep_thinking (`bool`, *optional*):
            Whether to score the thinking of a reasoning model like the rest of the completion. Defaults to `True` with
            `segmentation="thinking"`, and to `False` otherwise. With `False`, the text up to `</think>` is removed before splitting and guards, and a completion that contains only thinking has no steps. In a
            conversation whose chat template adds the opening tag, a completion that ends before `</think>` cannot be distinguished
            from one without thinking. Thinking that TRL's parser of responses removed from the content cannot be scored.
        name (`str`, *optional*, defaults to `"step_reward"`):
            Name of the reward in the logs. Must be unique if a run has several of these rewards.
        scorer_kwargs:
            Keyword arguments for [`StepScorer.from_pretrained`], such as `dtype="bfloat16"` or `max_length`.

    After a call, `metrics` (`dict[str, float]`) contains `step_score` (mean score of the scored steps), `num_steps` (mean number of
    steps), `thinking_left_out` (share of completions whose thinking was removed), `tool_messages_left_out` (share of completions with
    results of tools), `guarded` (share of rejected completions), `guarded_steps` (share of steps in rejected completions), and
    `guarded/{reason}` for each guard (a completion can have several reasons). They are logged under `{name}/` if the trainer passes
    `log_metric`. `scored` (`list[ScoredCompletion]`) contains the steps and scores of each completion.

    Raises:
        `FileNotFoundError`: If the checkpoint has no `step_format.json`.
        `ValueError`: If the model does not fit the head in its step format, or an argument is invalid.
    """

    def __init__(
        self,
        reward_model: str | TreeScorer,
        aggregate: str | Callable[[Sequence[float]], float] = "min",
        problem_column: str | None = None,
        segmentation: str | StepRule | None = None,
        spans: Sequence[int] = (1,),
        combine: Literal["max", "mean"] = "max",
        guard_reward: float = 0.0,
        min_steps: int = 2,
        max_steps: int | None = 64,
        max_repeated: float | None = 0.25,
        max_blank: int | None = 4,
        max_tokens: int | None = None,
        keep_thinking: bool | None = None,
        name: str = "step_reward",
        **scorer_kwargs,
    ):
        if isinstance(reward_model, os.PathLike):
            reward_model = os.fspath(reward_model)
        if isinstance(aggregate, str):
            aggregate_scores([0.5], aggregate)  # checks the name
        rules = RULES | {"thinking": ThinkingRule()}
        if isinstance(segmentation, str):
            if segmentation not in rules:
                raise ValueError(f"`segmentation` is {shown(segmentation)}. It must be one of {', '.join(rules)}.")
            segmentation = rules[segmentation]
        if not math.isfinite(guard_reward):
            raise ValueError(
                f"`guard_reward` is {guard_reward}. It must be a finite number, because TRL ignores NaN rewards."
            )
        if min_steps < 1 or (max_steps is not None and max_steps < min_steps):
            raise ValueError(
                f"`min_steps` is {min_steps} and `max_steps` is {max_steps}. They must satisfy 1 <= min_steps <= max_steps."
            )
        if max_repeated is not None and not 0 <= max_repeated <= 1:
            raise ValueError(f"`max_repeated` is {max_repeated}. It must be a share of the steps, from 0 to 1.")
        for limit, value, least in (("max_blank", max_blank, 0), ("max_tokens", max_tokens, 1)):
            if value is not None and value < least:
                raise ValueError(
                    f"`{limit}` is {value}, which would reject every completion. It must be at least {least}."
                )
        if not isinstance(reward_model, str) and scorer_kwargs:
            raise ValueError(
                f"You passed {sorted(scorer_kwargs)} with a scorer that is already loaded. Pass the reward model by name, or "
                "remove these arguments."
            )
        self.scorer = _load(reward_model, **scorer_kwargs) if isinstance(reward_model, str) else reward_model
        if isinstance(self.scorer, GenerativeScorer):
            raise ValueError(
                "`reward_model` is a GenerativeScorer, which is too slow for training and has no score for some steps. Pass a step reward "
                "model."
            )
        self.scoring = ScoringConfig(spans, combine)
        self.scorer.score([], [], spans=spans, combine=combine)  # raises errors before anything is sampled
        self.separator = written_separator(self.scorer)
        self.rule = separator_rule(self.separator) if segmentation is None else segmentation
        if keep_thinking is False and self.rule.keeps_thinking:
            raise ValueError(
                "`keep_thinking` is False, but `segmentation` is 'thinking', which has steps in thinking. Remove `keep_thinking`, or use "
                "another segmentation."
            )
        self.aggregate = aggregate
        self.problem_column = problem_column
        self.guard_reward = guard_reward
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.max_repeated = max_repeated
        self.max_blank = max_blank
        self.max_tokens = max_tokens
        self.keep_thinking = self.rule.keeps_thinking if keep_thinking is None else keep_thinking
        self.__name__ = name  # TRL logs the reward under this name
        self.metrics: dict[str, float] = {}
        self.scored: list[ScoredCompletion] = []

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
                B prompts: texts, or lists of messages.
            completions (`Sequence[str]` or `Sequence[list[dict]]`):
                B completions: texts, or lists of messages with the roles assistant and tool.
            log_metric, log_extra (`Callable`, *optional*):
                Functions of TRL that log the metrics, and a column of the completions table with the guards that rejected each
                completion.
            columns:
                Columns of the dataset, B values each, and other arguments of TRL.

        Returns:
            `list[float | None]`: B rewards. `None` for rows where the `problem_column` is `None`.

        Raises:
            `ValueError`: If a prompt has no problem, the `problem_column` does not have one problem or `None` per completion, a
            completion has messages with other roles or anything other than text, thinking should be kept but is not in the content of
            a message, or a score or reward is not finite.
        """
        problems: list[str | None] = []
        if self.problem_column is None:
            remedy = "Add a column with the problem to the dataset, and set `problem_column` to its name."
            try:
                problems += [prompt if isinstance(prompt, str) else problem_of(prompt, remedy) for prompt in prompts]
            except ValueError as error:
                raise ValueError(f"{self.__name__}: {error}") from error
        elif self.problem_column in columns:
            problems += [self._problem(value) for value in columns[self.problem_column]]
            if len(problems) != len(completions):
                raise ValueError(
                    f"{self.__name__}: the column {shown(self.problem_column)} has {len(problems)} values for {len(completions)} "
                    "completions. Pass one problem for each completion, or `None`."
                )
        else:
            raise ValueError(
                f"{self.__name__}: `problem_column` is {shown(self.problem_column)}, but the dataset has only the columns "
                f"{sorted(name for name, value in columns.items() if isinstance(value, list))} in addition to the prompt. Set "
                "`problem_column` to one of them."
            )
        read = [self._read(*pair) for pair in zip(prompts, completions, strict=True)]
        texts = [seen for seen, _ in read]
        scored = [completion for _, completion in read]
        steps = [completion.steps for completion in scored]
        reasons = [
            [] if problem is None else self.guards(problem, text, solution)
            for problem, text, solution in zip(problems, texts, steps, strict=True)
        ]
        trees: dict[str, list[int]] = {}  # the completions of each problem
        for i, problem in enumerate(problems):
            if problem is not None and not reasons[i]:
                trees.setdefault(problem, []).append(i)
        rewards: list[float | None] = [None if problem is None else self.guard_reward for problem in problems]
        step_scores: list[list[float] | None] = [None] * len(problems)
        solutions = [[steps[i] for i in members] for members in trees.values()]
        scores = []
        if trees:
            spans, combine = self.scoring.spans, self.scoring.combine
            scores = self.scorer.score(list(trees), solutions, spans=spans, combine=combine)
        for members, values in zip(trees.values(), scores, strict=True):
            for i, found in zip(members, values, strict=True):
                if len(found) != len(steps[i]) or not all(map(math.isfinite, found)):
                    raise ValueError(
                        f"{self.__name__}: the reward model returned the scores {found} for {len(steps[i])} steps. It must return one "
                        "finite number per step. Check its weights and its dtype."
                    )
                step_scores[i] = list(found)
                rewards[i] = aggregate_scores(found, self.aggregate)
                if not math.isfinite(rewards[i]):  # it would make every advantage of its group NaN
                    raise ValueError(
                        f"{self.__name__}: the aggregate of the step scores {found} is {rewards[i]}. It must be finite."
                    )
        self.scored = [
            replace(completion, scores=found, reward=reward, guards=guards)
            for completion, found, reward, guards in zip(scored, step_scores, rewards, reasons, strict=True)
        ]
        judged = [i for i, problem in enumerate(problems) if problem is not None]
        flat = [score for values in scores for found in values for score in found]
        self.metrics = _metrics([len(steps[i]) for i in judged], [reasons[i] for i in judged], flat)
        if judged:
            left_out = [
                any(scored[i].thinking) or (not self.keep_thinking and any(map(thinking_spans, texts[i])))
                for i in judged
            ]
            with_tools = [
                any(message["role"] == "tool" for message in completions[i])
                for i in judged
                if not isinstance(completions[i], str)
            ]
            self.metrics["thinking_left_out"] = sum(left_out) / len(judged)
            self.metrics["tool_messages_left_out"] = sum(with_tools) / len(judged)
        if log_metric is not None:
            for key, value in self.metrics.items():
                log_metric(f"{self.__name__}/{key}", value)
        if log_extra is not None:
            log_extra(f"{self.__name__}/guards", [", ".join(found) for found in reasons])
        return rewards

    def steps(self, text: str) -> list[str]:
        """
        Split a completion into non-blank steps, without thinking, separators, surrounding white space and the EOS token.
        """
        return [read_text(text[start:end], self.keep_thinking) for start, end in self.spans(text)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the start and end of each step of a completion in its text, in characters. See [`~rewards.StepReward.steps`]."""
        control = find_control_text(self.scorer.tokenizer, text, tags=False)[-1:]
        if control and text.rstrip().endswith(control[0]):
            text = text.rstrip().removesuffix(control[0])
        separator = ""
        if self.scorer.step_format.prompt_style != "turns":  # a reply such as "+" is not part of a step
            separator = self.scorer.step_format.step_separator.strip()
        spans = []
        for start, end in step_spans(text, self.rule, self.keep_thinking):
            step = read_text(text[start:end], self.keep_thinking).removesuffix(separator).strip()
            # The first of these ends, unless thinking comes between parts of the step
            ends = range(start + len(step), end + 1)
            end = next(end for end in ends if read_text(text[start:end], self.keep_thinking) == step)
            spans += [(start, end)] if step else []
        return spans

    def guards(self, problem: str, text: str | Sequence[str], steps: Sequence[str]) -> list[str]:
        """
        Return the guards that reject a completion.

        Args:
            problem (`str`):
                The problem.
            text (`str` or `Sequence[str]`):
                The completion, or the texts of its messages.
            steps (`Sequence[str]`):
                Steps of the completion.

        Returns:
            `list[str]`: Subset of `GUARDS`, in the same order.
        """
        texts = [read_text(one, self.keep_thinking) for one in ([text] if isinstance(text, str) else text)]
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
            self.max_blank is not None and sum(num_blank(one, self.separator) for one in texts) > self.max_blank,
            num_tokens > (math.inf if self.max_tokens is None else self.max_tokens)
            or not fits(self.scorer, problem, steps, range(-1, len(steps) - 1), self.scoring),
            any(self.scorer.step_format.find_markers(self.scorer.tokenizer, step) for step in steps),
        )
        return [guard for guard, stop in zip(GUARDS, stops, strict=True) if stop]

    def _problem(self, value: Any) -> str | None:
        """Return the problem in a value of the column, or `None` if it is missing."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        where = f"in the column {shown(self.problem_column)}"
        try:
            problem = prompt_text(value)
        except ValueError as error:
            raise ValueError(f"{self.__name__}: {where}, {error}") from error
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(
                f"{self.__name__}: found {shown(value)} {where}, expected a text with the problem, or `None` for a row without one. Set "
                "`problem_column` to another column."
            )
        return problem

    def _read(
        self, prompt: str | list[dict[str, Any]], completion: str | list[dict[str, Any]]
    ) -> tuple[list[str], ScoredCompletion]:
        """Return the texts of a completion, with a leading `<think>` if the prompt ends with this tag, and its steps without scores."""
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        roles = [message["role"] for message in messages]
        if roles[:1] != ["assistant"] or not {"assistant", "tool"}.issuperset(roles):
            raise ValueError(
                f"{self.__name__}: a completion has messages with the roles {roles}. It must start with an assistant message, and all "
                "others must have the role assistant or tool. Remove the others in the rollout function or environment."
            )
        messages = [message for message in messages if message["role"] == "assistant"]
        texts = [content_text(message.get("content")) for message in messages]
        thinking = [message.get("reasoning_content") or message.get("thinking") or "" for message in messages]
        if self.keep_thinking and any(thinking):
            raise ValueError(
                f"{self.__name__}: `keep_thinking` is True, but the `response_template` of the policy's tokenizer separates the thinking "
                "from the content of a message, and only the content is scored. Set `keep_thinking=False`, or remove the template."
            )
        tag = "<think>" if isinstance(prompt, str) and opens_thinking(prompt) else ""
        seen = [tag + texts[0], *texts[1:]]
        spans = [self.spans(text) for text in seen]
        spans[0] = [(start - len(tag), end - len(tag)) for start, end in spans[0]]
        return seen, ScoredCompletion(texts, spans, thinking=thinking, keep_thinking=self.keep_thinking)


def written_separator(scorer: TreeScorer) -> str:
    r"""
    Return the text between steps in the completions of a policy: the separator of the reward model, or a blank line if
    policies do not write the separator, because it is a control token or belongs to the format of a published model
    (`" ки"`, five line breaks, a reply `"+"`).
    """
    step_format = scorer.step_format
    separator = step_format.step_separator
    if separator.isspace():
        written = separator + step_format.step_suffix
        return "\n\n" if step_format.tokenization == "string" and "\n\n" in written else written
    is_written = step_format.tokenization == "pieces" and not find_control_text(scorer.tokenizer, separator)
    return separator if is_written else "\n\n"


def separator_rule(separator: str) -> StepRule:
    r"""
    Return the rule that splits a text at a step separator.

    Example:

    ```python
    >>> separator_rule(" ки").ends("One. ки Two. ки")
    [7, 15]
    ```
    """
    return RULES["blank_line"] if separator.isspace() and "\n\n" in separator else regex_rule(re.escape(separator))


def num_blank(text: str, separator: str) -> int:
    r"""
    Return the number of pieces between two separators, or before the first one, without letters and digits.

    Example:

    ```python
    >>> num_blank("One.\n\n\n\n...\n\nTwo.\n\n", "\n\n")
    2
    ```
    """
    pieces = text.split(separator)[:-1]
    return sum(not any(map(str.isalnum, piece)) for piece in pieces)


def _metrics(num_steps: list[int], reasons: list[list[str]], scores: list[float]) -> dict[str, float]:
    """Return the metrics of one batch. Means over no values are omitted."""
    metrics = {"step_score": math.fsum(scores) / len(scores)} if scores else {}
    if reasons:
        metrics["num_steps"] = sum(num_steps) / len(num_steps)
        metrics["guarded"] = sum(map(bool, reasons)) / len(reasons)
        metrics |= {f"guarded/{guard}": sum(guard in found for found in reasons) / len(reasons) for guard in GUARDS}
    if sum(num_steps):
        rejected = sum(number for number, found in zip(num_steps, reasons, strict=True) if found)
        metrics["guarded_steps"] = rejected / sum(num_steps)
    return metrics


def _load(path_or_repo: str, **kwargs) -> StepScorer:
    """Load the reward model on the device of this process, without sharding."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "StepReward: the config of the trainer has enabled ZeRO-3, which would shard the reward model. Create the "
            "StepReward before the GRPOConfig or RLOOConfig, or pass a scorer."
        )
    device = PartialState().device
    kwargs.setdefault("device_map", None if device.type == "cpu" else {"": device})
    # If enabled, only rank 0 loads weights and FSDP sends them to the others, which works only for the policy
    with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
        return StepScorer.from_pretrained(path_or_repo, **kwargs)
