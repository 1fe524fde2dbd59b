"""Scores of reasoning steps from a trained step reward model."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from .._compat import create_model_from_path
from ..forest import TokenTree, TokenTrie, pack, pad_rows
from ..heads import check_head, gather_steps, model_class, num_labels, step_outputs
from ..losses import step_score
from ..step_format import StepFormat
from ..step_tree import StepTree
from ..tree_attention import check_attention, model_inputs, use_tree_attention


class StepScorer:
    """
    Scores every step of candidate solutions with a step reward model.

    Candidates of a prompt share their prefix once: they become a tree, and a tree is one row of the batch, encoded as
    in training. The scores equal those of one forward pass per step prefix up to float rounding.

    Example:

    ```python
    >>> scorer = StepScorer.from_pretrained("outputs/tiny-hrm")
    >>> scorer.score(["1+2+3 = ?"], [[["1+2 = 3.", "3+3 = 6."], ["1+2 = 3.", "3+3 = 7."]]])
    [[[0.98, 0.97], [0.98, 0.03]]]
    ```

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model with the outputs of the head that `step_format` names. It is put in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            Text contract the model was trained with.
        max_length (`int`, *optional*, defaults to `2048`):
            Tokens of a row. A longer tree is split exactly; a single path may be longer, up to the model's positions.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows of a forward pass.

    Raises:
        `ValueError`: If model, tokenizer and format do not fit each other, or a number is below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        step_format: StepFormat,
        max_length: int = 2048,
        batch_size: int = 8,
    ):
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more.")
        step_format.check(tokenizer)
        check_head(model, step_format)
        check_attention(model.config._attn_implementation)
        use_tree_attention(model, model.device)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.step_format = step_format
        self.max_length = max_length
        self.batch_size = batch_size
        self._label_token_ids = step_format.label_token_ids(tokenizer) if step_format.head == "lm" else None

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str,
        step_format: StepFormat | None = None,
        max_length: int = 2048,
        batch_size: int = 8,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **model_init_kwargs,
    ) -> "StepScorer":
        """
        Load a checkpoint of [`HRMRewardTrainer`], or a LoRA adapter of it with its base model.

        Args:
            path_or_repo (`str`):
                Folder or Hub repository with the model, its tokenizer and `step_format.json`.
            step_format ([`StepFormat`], *optional*):
                Format to use for a checkpoint that has no `step_format.json`.
            max_length, batch_size:
                See [`StepScorer`].
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                Passed on when loading.
            model_init_kwargs:
                Passed to `from_pretrained` of the model, for example `dtype="bfloat16"` (`float32` if not given).

        Raises:
            `FileNotFoundError`: If the checkpoint has no `step_format.json` and none is given.
        """
        if step_format is None:
            step_format = StepFormat.from_pretrained(path_or_repo, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(path_or_repo, revision=revision, trust_remote_code=trust_remote_code)
        kwargs = {"trust_remote_code": trust_remote_code, **model_init_kwargs}
        if find_adapter_config_file(path_or_repo, revision=revision) is None:
            model = create_model_from_path(path_or_repo, model_class(step_format), revision=revision, **kwargs)
        else:
            model = _load_adapter(path_or_repo, step_format, revision, kwargs)
        return cls(model, tokenizer, step_format, max_length=max_length, batch_size=batch_size)

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
                For each prompt N candidates, each a list of S step texts. N and S may differ.
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
            `ValueError`: If the lists do not match, a step is empty, a solution has more tokens than the model has
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
        """Score every step of step trees; see [`StepScorer.score`]. Returns one list per tree, in order of its steps."""
        if 1 not in spans or min(spans) < 1 or combine not in ("max", "mean"):
            raise ValueError(
                f"spans={tuple(spans)}, combine={combine!r}: `spans` must hold 1 (a first step has no step to be merged "
                "with) and positive numbers, `combine` must be 'max' or 'mean'."
            )
        if max(spans) > 1:
            self.step_format.check(self.tokenizer, merged=True)
        encoded = [self._encode(tree, sorted(set(spans)), f"prompt {i}") for i, tree in enumerate(trees)]
        scores = self._forward([token_tree for token_tree, _ in encoded], progress)
        for tree, values in zip(trees, scores, strict=True):
            if not np.isfinite(values).all():
                shown = repr(tree.prompt if len(tree.prompt) <= 80 else tree.prompt[:77] + "...")
                raise ValueError(f"The model returned a score that is not a number for the prompt {shown}: {values}.")
        reduce = np.max if combine == "max" else np.mean
        return [
            [float(reduce(tree_scores[judged])) for judged in steps]
            for tree_scores, (_, steps) in zip(scores, encoded, strict=True)
        ]

    def _encode(self, tree: StepTree, spans: list[int], where: str) -> tuple[TokenTree, list[list[int]]]:
        """Token tree of a step tree, and for each step the numbers of the judged steps that end with it."""
        tree.validate(where)
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
        scores = [np.full(len(tree.steps), np.nan) for tree in trees]
        longest = max((int(tree.position_ids.max(initial=-1)) + 1 for tree in trees), default=0)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(
                f"A solution has {longest} tokens, but the model has {positions} positions. Shorten or drop it."
            )
        limit = max(self.max_length, longest)
        owners, parts = [], []
        for i, tree in enumerate(trees):
            for part in tree.split(limit) if len(tree) else ():
                owners.append(i)
                parts.append(part)
        rows = sorted(pack([len(part) for part in parts], limit), key=lambda row: -sum(len(parts[i]) for i in row))
        with tqdm(total=len(rows), desc="Scoring", unit="row", disable=not progress) as bar:
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                for row, values in zip(
                    batch, self._score_rows([[parts[i] for i in row] for row in batch]), strict=True
                ):
                    ends = np.cumsum([len(parts[i].steps) for i in row])
                    for i, part_values in zip(row, np.split(values, ends[:-1]), strict=True):
                        scores[owners[i]][parts[i].steps] = part_values
                bar.update(len(batch))
        return scores

    @torch.inference_mode()
    def _score_rows(self, rows: list[list[TokenTree]]) -> list[np.ndarray]:
        """Scores at the step tokens of each row, in order of position."""
        joined = [TokenTree.join(row) for row in rows]
        tokens = pad_rows(joined, self.tokenizer.pad_token_id or 0)
        width = tokens["input_ids"].shape[1]
        device = self.model.device
        tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
        with step_outputs(self.model, self._label_token_ids):
            logits = self.model(**model_inputs(**tokens, config=self.model.config, dtype=self.model.dtype)).logits
        positions = np.concatenate([row.step_positions + i * width for i, row in enumerate(joined)])
        scores = step_score(gather_steps(logits, torch.from_numpy(positions).to(device)), self.step_format)
        ends = np.cumsum([len(row.steps) for row in joined])[:-1]
        return np.split(scores.cpu().numpy().astype(np.float64), ends)


def _load_adapter(path_or_repo: str, step_format: StepFormat, revision: str | None, kwargs: dict):
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(path_or_repo, revision=revision).base_model_name_or_path
    if step_format.head != "lm":
        kwargs = {"num_labels": num_labels(step_format), **kwargs}
    model = create_model_from_path(base, model_class(step_format), **kwargs)
    return PeftModel.from_pretrained(model, path_or_repo, revision=revision)
