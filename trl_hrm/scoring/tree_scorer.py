"""Base classes of the scorers: candidates become token trees, and the model's outputs at the ends of steps become scores."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, find_adapter_config_file

from ..forest import TokenTree, TokenTrie
from ..heads import num_labels
from ..loading import check_checkpoint
from ..losses import step_score
from ..step_format import StepFormat
from ..step_tree import StepTree
from .scoring_config import ScoringConfig


logger = logging.getLogger(__name__)

DOCS = "docs/scoring_without_trl_hrm.md"


class TreeScorer:
    """
    Base class of the scorers. A subclass implements `_forward`, which scores the steps of token trees.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            Text contract the model was trained with.
        max_positions (`int`, *optional*):
            Tokens of the longest path that the model can read. `None` for a model without such a limit.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, step_format: StepFormat, max_positions: int | None = None
    ) -> None:
        step_format.check(tokenizer)
        self.tokenizer = tokenizer
        self.step_format = step_format
        self.max_positions = max_positions

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[Sequence[str]]],
        spans: Sequence[int] = (1,),
        combine: Literal["max", "mean"] = "max",
        progress: bool = False,
    ) -> list[list[list[float]]]:
        """
        Score the steps of candidate solutions.

        Args:
            prompts (`Sequence[str]`):
                B problems.
            candidates (`Sequence[Sequence[Sequence[str]]]`):
                For each prompt N candidates, each a list of S step texts. N and S may differ. A blank step is judged as it
                stands: it has a score, so that labels of the steps after it keep their places.
            spans (`Sequence[int]`, *optional*, defaults to `(1,)`):
                How many steps are judged as one. `(1,)` judges each step alone, the inference of the
                [HRM](https://huggingface.co/papers/2503.13551) paper (section 3.1). `(1, 2)` also judges it merged
                with the step before it, where a model trained on merged steps can approve a correction.
            combine (`str`, *optional*, defaults to `"max"`):
                `"max"` or `"mean"` of the scores of a step over the spans that exist for it.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            `list[list[list[float]]]`: Scores in `[0, 1]`, prompts × candidates × steps.

        Raises:
            `ValueError`: If the lists do not match, a step is not a string, a solution has more tokens than the model has
            positions, or the model returns a score that is not a number.
        """
        if len(prompts) != len(candidates):
            raise ValueError(
                f"Got {len(prompts)} prompts and candidates for {len(candidates)}; expected one list each."
            )
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

    def score_trees(
        self,
        trees: Sequence[StepTree],
        spans: Sequence[int] = (1,),
        combine: Literal["max", "mean"] = "max",
        progress: bool = False,
    ) -> list[list[float]]:
        """Score every step of step trees; see [`TreeScorer.score`]. Returns one list per tree, in order of its steps."""
        scoring = ScoringConfig(spans, combine)
        if max(scoring.spans) > 1:
            self.step_format.check_merged(self.tokenizer)
        encoded = [self._encode(tree, sorted(set(scoring.spans)), f"prompt {i}") for i, tree in enumerate(trees)]
        token_trees = [token_tree for token_tree, _ in encoded]
        if self.max_positions is not None:
            for tree, token_tree in zip(trees, token_trees, strict=True):
                longest = longest_path([token_tree])
                if longest > self.max_positions:
                    raise ValueError(
                        f"A solution has {longest} tokens, but the model has {self.max_positions} positions. Shorten or drop "
                        f"it; its prompt is {shown_prompt(tree.prompt)}."
                    )
        reduce = np.max if scoring.combine == "max" else np.mean
        scores = []
        for tree, (_, steps), values in zip(trees, encoded, self._forward(token_trees, progress), strict=True):
            scores.append([float(reduce(values[judged])) for judged in steps])
            check_scores(scores[-1], len(steps), f"prompt {shown_prompt(tree.prompt)}")
        return scores

    def _encode(self, tree: StepTree, spans: list[int], where: str) -> tuple[TokenTree, list[list[int]]]:
        """Token tree of a step tree, and for each step the numbers of the judged steps that end with it."""
        tree.validate(where, blank_steps=True)  # a blank step is judged at its separator
        paths = [tree.path(step) for step in range(len(tree.completions))]
        merged = [path[-span:] for path in paths for span in spans if 1 < span <= len(path)]
        texts = tree.completions + [self.step_format.merge([tree.completions[i] for i in run]) for run in merged]
        prompt_ids, step_ids = self.step_format.encode(self.tokenizer, tree.prompt, texts)
        trie = TokenTrie()
        nodes = {-1: trie.insert(prompt_ids)}
        judged: list[list[int]] = []
        for step, parent in enumerate(tree.parents):
            nodes[step] = trie.insert(step_ids[step], after=nodes[parent])
            judged.append([trie.mark(nodes[step])])
        for run, ids in zip(merged, step_ids[len(tree.completions) :], strict=True):
            node = trie.insert(ids, after=nodes[tree.parents[run[0]]])
            judged[run[-1]].append(trie.mark(node))
        return trie.layout(), judged

    def _forward(self, trees: list[TokenTree], progress: bool) -> list[np.ndarray]:
        """Scores of the judged steps of each token tree, by their numbers."""
        raise NotImplementedError


class ChainScorer(TreeScorer):
    """
    A scorer whose model reads plain sequences: one for each path to an end of the tree, where all steps of the path are read.

    A path that others begin with has no sequence of its own. It cannot express the label tokens of a causal language model.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, step_format: StepFormat, max_positions: int | None = None
    ) -> None:
        refuse_label_tokens(step_format)
        super().__init__(tokenizer, step_format, max_positions)

    def _forward(self, trees: list[TokenTree], progress: bool) -> list[np.ndarray]:
        chains = [(i, chain) for i, tree in enumerate(trees) if len(tree) for chain in tree.chains()]
        scores = [np.full(len(tree.steps), np.nan) for tree in trees]
        if chains:  # vLLM refuses an empty batch
            outputs = self._outputs([chain.input_ids.tolist() for _, chain in chains], progress)
            for (i, chain), rows in zip(chains, outputs, strict=True):
                self.check_outputs(rows, len(chain))
                values = step_score(rows[torch.from_numpy(chain.step_positions)], self.step_format)
                scores[i][chain.steps] = values.numpy()
        return scores

    def check_outputs(self, rows: torch.Tensor, num_tokens: int) -> None:
        """Check that there is one output for each token. Otherwise a step would be read at the wrong place."""
        expected = (num_tokens, num_labels(self.step_format))
        if tuple(rows.shape) != expected:
            raise ValueError(
                f"vLLM answered a sequence of {num_tokens} tokens with outputs of shape {tuple(rows.shape)}, expected "
                f"{expected}: each token, and the labels of head {self.step_format.head!r}. Start it with this checkpoint, "
                '`--runner pooling`, and no other pooling type than "ALL".'
            )

    def _outputs(self, sequences: list[list[int]], progress: bool) -> list[torch.Tensor]:
        """Outputs of the classifier before any activation: for a sequence of L token ids shape `(L, C)`, on the CPU."""
        raise NotImplementedError


def refuse_label_tokens(step_format: StepFormat) -> None:
    """Raise `ValueError` for the head `"lm"`, which is not a classifier."""
    if step_format.head == "lm":
        raise ValueError(
            'vLLM gives the outputs of token classifiers at every token, but `head="lm"` reads the logits of two tokens of a '
            f"causal language model. Make a token classifier of these two, as {DOCS} shows, or use StepScorer "
            "(`--reward_model_engine transformers`)."
        )


def shown_prompt(prompt: str) -> str:
    """Return a prompt as messages show it."""
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")


def check_scores(scores: Sequence[float], num_steps: int, where: str) -> None:
    """
    Check that a reward model has returned one finite score for each step of a solution or tree.

    Args:
        scores (`Sequence[float]`):
            The scores.
        num_steps (`int`):
            Number of steps.
        where (`str`):
            Where the steps come from.

    Raises:
        `ValueError`: If a score is NaN or infinite, or there is not one for each step.
    """
    if len(scores) != num_steps or not all(map(math.isfinite, scores)):
        raise ValueError(
            f"{where}: the reward model returned {list(scores)} for {num_steps} steps, expected one finite number for each. "
            "Check the model."
        )


def longest_path(trees: Sequence[TokenTree]) -> int:
    """Tokens of the longest path of several trees."""
    return max((int(tree.position_ids.max(initial=-1)) + 1 for tree in trees), default=0)


def read_text_contract(
    path_or_repo: str, step_format: StepFormat | None, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, StepFormat]:
    """
    Read the tokenizer and the format of a checkpoint that vLLM serves, and check that its weights fit the head.

    vLLM loads the weights itself, so their names and shapes are read from the headers of the files (see
    [`~loading.check_checkpoint`]).

    Raises:
        `ValueError`: If it is a LoRA adapter, if it is not a token classifier with the outputs of the head, or if weights
        are missing or unexpected.
        `FileNotFoundError`: If it has no `step_format.json` and none is given.
    """
    if find_adapter_config_file(path_or_repo, revision=revision) is not None:
        raise ValueError(
            f"{path_or_repo} is a LoRA adapter, and vLLM serves no adapter of a token classifier with its trained head. "
            f"Merge it into its base model first, as {DOCS} shows, or use StepScorer (`--reward_model_engine transformers`)."
        )
    if step_format is None:
        step_format = StepFormat.from_pretrained(path_or_repo, revision=revision)
    refuse_label_tokens(step_format)
    tokenizer = AutoTokenizer.from_pretrained(path_or_repo, revision=revision, trust_remote_code=trust_remote_code)
    checked = False
    if not Path(path_or_repo).is_dir() or Path(path_or_repo, CONFIG_NAME).exists():
        config = AutoConfig.from_pretrained(path_or_repo, revision=revision, trust_remote_code=trust_remote_code)
        check_classifier(config, path_or_repo, step_format)
        checked = check_checkpoint(path_or_repo, step_format, revision, trust_remote_code)
    if not checked:
        logger.warning(
            "%s has no safetensors files that can be read here, so whether its weights have head %r is not checked. A "
            "missing head would be random, and so would every score. Save it with `save_pretrained`, or check it once "
            "with `StepScorer.from_pretrained`, which reads all formats of weights.",
            path_or_repo,
            step_format.head,
        )
    return tokenizer, step_format


def check_classifier(config: Any, name: str, step_format: StepFormat) -> None:
    """
    Check that a configuration is of a token classifier with the outputs of the head.

    Raises:
        `ValueError`: If the model is not a token classifier, or its number of labels is wrong.
    """
    architectures = config.architectures or []
    if not any(architecture.endswith("ForTokenClassification") for architecture in architectures):
        raise ValueError(
            f"{name} has the architectures {architectures}, expected one that ends with ForTokenClassification. If it is "
            f"a causal language model, {DOCS} shows how to make a token classifier of it. Other heads are not supported."
        )
    if config.num_labels != num_labels(step_format):
        raise ValueError(
            f"{name} has num_labels={config.num_labels}, but head {step_format.head!r} needs {num_labels(step_format)}."
        )
