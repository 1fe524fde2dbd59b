"""Base classes of the scorers: encode candidates as token trees and convert the model's outputs to step scores."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, find_adapter_config_file

from ..forest import TokenTree, TokenTrie
from ..io import shown
from ..loading import check_checkpoint, load_tokenizer, read_step_format
from ..losses import step_score
from ..search.steps import HEADER, RULES, StepRule, cut_text
from ..step_format import StepFormat
from ..step_tree import StepTree
from ..terminal import plain
from .scoring_config import ScoringConfig, plain_candidates


logger = logging.getLogger(__name__)

DOCS = "docs/scoring_without_trl_hrm.md"
ALL_TOKENS = '`--pooler-config \'{"pooling_type": "ALL"}\'`'  # option of `vllm serve`
# Ends of the names of vLLM's classes for each head
CLASSES = {
    "classification": ("ForTokenClassification",),
    "regression": ("ForTokenClassification",),
    "mlp": ("Qwen2ForProcessRewardModel",),
    "lm": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
}


class TreeScorer:
    """
    Base class of the scorers. A subclass implements `_forward`, which scores the steps of token trees.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            Step format that the model was trained with.
        max_positions (`int`, *optional*):
            Maximum number of tokens per path, or `None` if the model has no limit.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, step_format: StepFormat, max_positions: int | None = None
    ) -> None:
        step_format.check(tokenizer)
        self.tokenizer = tokenizer
        self.step_format = step_format
        self.max_positions = max_positions
        self._warned_of_headers = False

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[Sequence[str]]],
        spans: Sequence[int | str] = (1,),
        combine: Literal["max", "mean"] = "max",
        progress: bool = False,
    ) -> list[list[list[float]]]:
        """
        Score the steps of candidate solutions.

        Args:
            prompts (`Sequence[str]`):
                B problems. Each may be a list of messages with one user message. System messages are left out.
            candidates (`Sequence[Sequence[Sequence[str]]]`):
                N candidates for each prompt, each a list of S step texts. N and S can differ between prompts and candidates.
                A blank step gets a score like any other step. A step may be an assistant message, or a list with one.
            spans (`Sequence[int | str]`, *optional*, defaults to `(1,)`):
                Numbers of consecutive steps to score as one step. `(1,)` scores each step separately, as the
                [HRM](https://huggingface.co/papers/2503.13551) paper does at inference (section 3.1). `(1, 2)` also scores
                each step merged with the previous step, so that a model trained on merged steps can give a correction a high
                score. `(1, "thought")` also scores each step that begins with a mark such as "Wait" merged with the thought before
                it. See [`~search.thinking.thought_length`].
            combine (`str`, *optional*, defaults to `"max"`):
                How to combine the scores of a step over several spans: `"max"` or `"mean"`. The first steps of a solution
                have fewer spans.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            `list[list[list[float]]]`: Scores in `[0, 1]`, prompts × candidates × steps.

        Raises:
            `ValueError`: If the lists have different lengths, a step is not a text, a prompt has several user messages, a solution has more tokens than the
            model has positions, or the model returns NaN or infinity.
        """
        prompts, candidates = plain_candidates(prompts, candidates)
        trees = []
        for prompt, solutions in zip(prompts, candidates, strict=True):
            tree = StepTree(prompt, [], [], [])
            for steps in solutions:
                first = len(tree.completions)
                tree.completions += steps
                tree.parents += [-1, *range(first, first + len(steps) - 1)][: len(steps)]
            tree.labels = [None] * len(tree.completions)
            trees.append(tree)
        results = []
        for scores, solutions in zip(self.score_trees(trees, spans, combine, progress), candidates, strict=True):
            ends = np.cumsum([0, *(len(steps) for steps in solutions)])
            results.append([scores[start:end] for start, end in zip(ends, ends[1:], strict=False)])
        return results

    def score_texts(
        self,
        prompts: Sequence[str],
        texts: Sequence[str],
        rule: StepRule | str = "step_header",
        spans: Sequence[int | str] = (1,),
        combine: Literal["max", "mean"] = "max",
        progress: bool = False,
    ) -> list[list[tuple[str, float]]]:
        """
        Split solutions into steps and score them. The thinking of a reasoning model is left out, except with a [`ThinkingRule`].

        Example:

        ```python
        >>> scorer.score_texts(["1+2+3 = ?"], ["1+2 = 3.\\n\\n3+3 = 7."], rule="blank_line")
        [[('1+2 = 3.', 0.98), ('3+3 = 7.', 0.03)]]
        ```

        Args:
            prompts (`Sequence[str]`):
                B problems, see [`TreeScorer.score`].
            texts (`Sequence[str]`):
                B solutions, one per problem.
            rule ([`StepRule`] or `str`, *optional*, defaults to `"step_header"`):
                Rule that splits a solution into steps, or its name: `"step_header"`, `"blank_line"`, `"sentence"` or `"formula"`.
            spans (`Sequence[int | str]`), combine (`str`), progress (`bool`):
                See [`TreeScorer.score`].

        Returns:
            `list[list[tuple[str, float]]]`: The steps of each solution with their scores in `[0, 1]`. A blank solution has no steps.

        Raises:
            `ValueError`: If `rule` is unknown, or the lists have different lengths. See also [`TreeScorer.score`].
        """
        if isinstance(rule, str):
            if rule not in RULES:
                raise ValueError(f"`rule` is {shown(rule)}. It must be a `StepRule` or one of {', '.join(RULES)}.")
            rule = RULES[rule]
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise ValueError(
                f"`texts` has {shown(wrong)}. Each solution must be a string. For lists of steps, use `score`."
            )
        steps = [cut_text(text, rule, rule.keeps_thinking) for text in texts]
        scores = self.score(prompts, [[one] for one in steps], spans, combine, progress)
        return [list(zip(one, values, strict=True)) for one, [values] in zip(steps, scores, strict=True)]

    def score_trees(
        self,
        trees: Sequence[StepTree],
        spans: Sequence[int | str] = (1,),
        combine: Literal["max", "mean"] = "max",
        progress: bool = False,
    ) -> list[list[float]]:
        """Score every step of step trees. Return one list per tree, in order of its steps. See [`TreeScorer.score`]."""
        scoring = ScoringConfig(spans, combine)
        if scoring.merges:
            self.step_format.check_merged(self.tokenizer)
        self._warn_of_headers(trees)
        encoded = [self._encode(tree, scoring, f"prompt {i}") for i, tree in enumerate(trees)]
        token_trees = [token_tree for token_tree, _ in encoded]
        if self.max_positions is not None:
            for tree, token_tree in zip(trees, token_trees, strict=True):
                longest = longest_path([token_tree])
                if longest > self.max_positions:
                    raise ValueError(
                        f"A solution has {longest} tokens, but the model has {self.max_positions} positions. Shorten or "
                        f"remove the solution. Its prompt is {shown(tree.prompt)}."
                    )
        scores = []
        for tree, (_, steps), values in zip(trees, encoded, self._forward(token_trees, progress), strict=True):
            scores.append([combined(values[judged], scoring) for judged in steps])
            check_scores(scores[-1], len(steps), f"prompt {shown(tree.prompt)}")
        return scores

    def _warn_of_headers(self, trees: Sequence[StepTree]) -> None:
        """Warn once if steps have a header of their own besides the numbered prefix of the step format."""
        prefix = self.step_format.step_prefix
        if "{number}" not in prefix or self._warned_of_headers:
            return
        numbered = re.compile(r"\d+".join(map(re.escape, prefix.split("{number}"))))
        steps = [step for tree in trees for step in tree.completions]
        odd = [step for step in steps if re.match(HEADER, f"{step}\n") and not numbered.match(step)]
        if odd:
            self._warned_of_headers = True
            logger.warning(
                f"{len(odd):,} of {len(steps):,} steps begin with a header of their own, such as {shown(odd[0][:20])}. The step format also "
                f"writes {shown(prefix)} before each step, so the model reads two headers, unlike in its training. "
                "Remove the headers from the steps."
            )

    def _encode(self, tree: StepTree, scoring: ScoringConfig, where: str) -> tuple[TokenTree, list[list[int]]]:
        """Return the token tree of a step tree and, for each step, the numbers of the scored steps that end with it."""
        tree.validate(where, blank_steps=True)  # a blank step is scored at its separator
        merged = merged_runs(tree.completions, tree.parents, scoring, self.step_format)
        texts = tree.completions + [self.step_format.merge([tree.completions[i] for i in run]) for run in merged]
        parents = [*tree.parents, *(tree.parents[run[0]] for run in merged)]
        trie = TokenTrie()
        nodes = self.step_format.insert(trie, self.tokenizer, tree.prompt, texts, parents)
        if self.step_format.head == "implicit":
            # the tokens whose log-ratios are summed. Steps are not merged, see `check_merged`
            before = tree.parents if self.step_format.score_span == "step" else [-1] * len(texts)
            starts = [trie.shared_length(nodes[step], nodes[before[step]]) for step in range(len(texts))]
            judged = [[trie.mark(nodes[step], start)] for step, start in enumerate(starts)]
            return trie.layout(), judged
        judged = [[trie.mark(nodes[step])] for step in range(len(tree.completions))]
        for number, run in enumerate(merged, start=len(tree.completions)):
            judged[run[-1]].append(trie.mark(nodes[number]))
        return trie.layout(), judged

    def _forward(self, trees: list[TokenTree], progress: bool) -> list[np.ndarray]:
        """Return the scores of each token tree, indexed by the numbers of its steps."""
        raise NotImplementedError


class ChainScorer(TreeScorer):
    """
    Base class of scorers whose model takes plain sequences: one sequence per root-to-leaf path, with scores for all steps.

    A token classifier returns its outputs for every token of a sequence. A causal language model (`head="lm"`) returns the
    log-probabilities of the two label tokens after each step.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, step_format: StepFormat, max_positions: int | None = None
    ) -> None:
        refuse_head(step_format)
        super().__init__(tokenizer, step_format, max_positions)
        self.label_token_ids = step_format.label_token_ids(tokenizer) if step_format.head == "lm" else None

    def _forward(self, trees: list[TokenTree], progress: bool) -> list[np.ndarray]:
        chains = [(i, chain) for i, tree in enumerate(trees) if len(tree) for chain in tree.chains()]
        scores = [np.full(len(tree.steps), np.nan) for tree in trees]
        if chains:  # vLLM raises on an empty batch
            sequences = [(chain.input_ids.tolist(), chain.step_positions.tolist()) for _, chain in chains]
            for (i, chain), rows in zip(chains, self._outputs(sequences, progress), strict=True):
                scores[i][chain.steps] = step_score(rows, self.step_format).numpy()
        return scores

    def check_outputs(self, rows: torch.Tensor, num_tokens: int) -> None:
        """Check that there is one output per token. Otherwise, scores would be read at the wrong tokens."""
        expected = (num_tokens, self.step_format.num_labels)
        if tuple(rows.shape) != expected:
            raise ValueError(
                f"vLLM returned outputs of shape {tuple(rows.shape)} for a sequence of {num_tokens} tokens. Expected "
                f"{expected}: one row per token, one column per label of head {self.step_format.head!r}. Start vLLM with this "
                f"checkpoint, `--runner pooling` and {ALL_TOKENS}."
            )

    def _outputs(self, sequences: list[tuple[list[int], list[int]]], progress: bool) -> list[torch.Tensor]:
        """
        Return the outputs of the head, before softmax or sigmoid, for sequences of token ids with the positions of their
        steps. The outputs of a sequence with S steps have the shape `(S, C)` and are on the CPU.
        """
        raise NotImplementedError


def combined(scores: Sequence[float], scoring: ScoringConfig) -> float:
    """Return the score of a step from its scores over several spans."""
    return float(np.max(scores) if scoring.combine == "max" else np.mean(scores))


def merged_runs(
    steps: Sequence[str], parents: Sequence[int], scoring: ScoringConfig, step_format: StepFormat
) -> list[list[int]]:
    """
    Return the runs of steps of a tree that are scored as one step, in order of their last steps.

    Args:
        steps (`Sequence[str]`):
            Texts of the S steps.
        parents (`Sequence[int]`):
            For each of the S steps, the index of the previous step, which is smaller, or `-1` for the problem.
        scoring ([`ScoringConfig`]):
            How steps are scored.
        step_format ([`StepFormat`]):
            Step format of the model.

    Returns:
        `list[list[int]]`: Indices of the steps of each run, at least 2.
    """
    runs = []
    for step in range(len(steps)) if scoring.merges else ():
        path = [step]
        while parents[path[-1]] != -1:
            path.append(parents[path[-1]])
        path.reverse()
        runs += [path[-length:] for length in scoring.merged_lengths([steps[i] for i in path], step_format)]
    return runs


def refuse_head(step_format: StepFormat) -> None:
    """Raise `ValueError` if vLLM has no class for the head."""
    if step_format.head == "implicit":
        raise ValueError(
            "The head 'implicit' needs a second model, the reference, which one vLLM engine does not run. Use StepScorer "
            "(`--reward_model_engine transformers`)."
        )
    if step_format.head not in CLASSES:
        raise ValueError(
            f"vLLM has no class for head {step_format.head!r}. Convert the model to a token classifier as described in {DOCS}, "
            "or use StepScorer (`--reward_model_engine transformers`)."
        )


def check_scores(scores: Sequence[float], num_steps: int, where: str) -> None:
    """
    Check that a reward model returned one score from 0 to 1 per step.

    Args:
        scores (`Sequence[float]`):
            Scores of a solution or tree.
        num_steps (`int`):
            Number of steps.
        where (`str`):
            Source of the steps, for the error message.

    Raises:
        `ValueError`: If the number of scores is not `num_steps`, or a score is not in `[0, 1]`.
    """
    if len(scores) != num_steps or not all(0 <= score <= 1 for score in scores):
        raise ValueError(
            f"{where}: the reward model returned {shown(list(scores), 200)} for {num_steps} steps. It must return one finite number from 0 to "
            "1 per step. Check the model."
        )


def longest_path(trees: Sequence[TokenTree]) -> int:
    """Return the number of tokens of the longest path of several trees."""
    return max((int(tree.position_ids.max(initial=-1)) + 1 for tree in trees), default=0)


def read_text_contract(
    path_or_repo: str, step_format: StepFormat | str | Path | None, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, StepFormat]:
    """
    Read the tokenizer and the step format of a checkpoint for vLLM, and check that its weights fit the head.

    Since vLLM loads the weights itself, only their names and shapes are read here, from the headers of the files (see
    [`~loading.check_checkpoint`]).

    Raises:
        `ValueError`: If the checkpoint is a LoRA adapter, if vLLM has no class for it whose outputs fit the head, or if
        weights are missing or unexpected.
        `FileNotFoundError`: If the checkpoint has no `step_format.json` and `step_format` is `None`.
    """
    if find_adapter_config_file(path_or_repo, revision=revision) is not None:
        raise ValueError(
            f"{path_or_repo} is a LoRA adapter, which the scorers with vLLM do not load. Merge the adapter into its base model as "
            f"described in {DOCS}, or use StepScorer (`--reward_model_engine transformers`)."
        )
    if step_format is None:
        step_format = read_step_format(path_or_repo, revision)
    elif not isinstance(step_format, StepFormat):
        step_format = StepFormat.named(step_format)
    refuse_head(step_format)
    tokenizer = load_tokenizer(path_or_repo, revision, trust_remote_code)
    checked = False
    if not Path(path_or_repo).is_dir() or Path(path_or_repo, CONFIG_NAME).exists():
        config = AutoConfig.from_pretrained(path_or_repo, revision=revision, trust_remote_code=trust_remote_code)
        check_architecture(config, path_or_repo, step_format)
        checked = check_checkpoint(path_or_repo, step_format, revision, trust_remote_code)
    if not checked:
        logger.warning(
            "%s has no readable safetensors files, so it could not be checked whether its weights include the head %r. With "
            "a missing head, all scores would be random. Save the model with `save_pretrained`, or check it once with "
            "`StepScorer.from_pretrained`, which reads all weight formats.",
            plain(path_or_repo),
            step_format.head,
        )
    return tokenizer, step_format


def check_architecture(config: Any, name: str, step_format: StepFormat) -> None:
    """
    Check that a model config names a class of vLLM whose outputs fit the head.

    Raises:
        `ValueError`: If vLLM has no class for the head, or if the model has another class or number of labels.
    """
    refuse_head(step_format)
    expected = CLASSES[step_format.head]
    architectures = config.architectures or []
    if not any(architecture.endswith(expected) for architecture in architectures):
        raise ValueError(
            f"{name} has the architectures {architectures}, but vLLM needs one that ends with {' or '.join(expected)} for head "
            f"{step_format.head!r}. Set `head` of the step format to the head that the model was trained with. If it is the right "
            f"one, convert the model to a token classifier as described in {DOCS}, or use StepScorer (`--reward_model_engine "
            "transformers`)."
        )
    if step_format.head != "lm" and config.num_labels != step_format.num_labels:
        raise ValueError(
            f"{name} has num_labels={config.num_labels}, but head {step_format.head!r} needs {step_format.num_labels}."
        )
