"""Score the steps of solutions with a step reward model in transformers."""

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forest import TokenTree, pack, pad_rows
from ..heads import check_head, gather_steps, step_outputs
from ..loading import load_reward_model, load_tokenizer, read_step_format
from ..losses import step_score
from ..step_format import StepFormat
from ..tree_attention import check_attention, model_inputs, use_tree_attention
from .tree_scorer import TreeScorer, longest_path


class StepScorer(TreeScorer):
    """
    Scores every step of candidate solutions with a step reward model.

    The candidates of a prompt form a tree, which is encoded as in training, so shared prefixes pass through the model
    only once. Up to float rounding, the scores are the same as with one forward pass per step.

    Example:

    ```python
    >>> scorer = StepScorer.from_pretrained("outputs/tiny-hrm")
    >>> scorer.score(["1+2+3 = ?"], [[["1+2 = 3.", "3+3 = 6."], ["1+2 = 3.", "3+3 = 7."]]])
    [[[0.98, 0.97], [0.98, 0.03]]]
    ```

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model whose outputs fit the head in `step_format`. It is set to evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            Step format that the model was trained with.
        max_length (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens per row. Longer trees are split, which does not change the scores. A single path can
            be longer, up to the number of positions of the model.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of rows per forward pass.

    Raises:
        `ValueError`: If the model, the tokenizer and the step format do not fit each other, or a number is below 1.
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
                raise ValueError(f"`{name}` is {value}. It must be at least 1.")
        super().__init__(tokenizer, step_format, getattr(model.config, "max_position_embeddings", None))
        check_head(model, step_format)
        check_attention(model.config._attn_implementation)
        use_tree_attention(model, model.device)
        self.model = model.eval()
        self.max_length = max_length
        self.batch_size = batch_size
        self._label_token_ids = step_format.label_token_ids(tokenizer) if step_format.head == "lm" else None

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str,
        step_format: StepFormat | str | None = None,
        max_length: int = 2048,
        batch_size: int = 8,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **model_init_kwargs,
    ) -> "StepScorer":
        """
        Load a checkpoint of [`HRMRewardTrainer`], or a LoRA adapter with its base model.

        Args:
            path_or_repo (`str`):
                Path or Hub id of the checkpoint, with its tokenizer and `step_format.json`.
            step_format ([`StepFormat`] or `str`, *optional*):
                Step format for a checkpoint without `step_format.json`, or its name or file (see [`StepFormat.named`]).
            max_length, batch_size:
                See [`StepScorer`].
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                Arguments for loading the checkpoint.
            model_init_kwargs:
                Keyword arguments for `from_pretrained` of the model, such as `dtype="bfloat16"` (defaults to `float32`).

        Raises:
            `FileNotFoundError`: If the checkpoint has no `step_format.json` and `step_format` is not given.
            `ValueError`: If the weights of the checkpoint do not fit the head (missing weights would be random), or the
            model, the tokenizer and the step format do not fit each other.
        """
        if step_format is None:
            step_format = read_step_format(path_or_repo, revision)
        elif isinstance(step_format, str):
            step_format = StepFormat.named(step_format)
        tokenizer = load_tokenizer(path_or_repo, revision, trust_remote_code)
        kwargs = {"trust_remote_code": trust_remote_code, **model_init_kwargs}
        model = load_reward_model(path_or_repo, step_format, revision=revision, **kwargs)
        return cls(model, tokenizer, step_format, max_length=max_length, batch_size=batch_size)

    def _forward(self, trees: list[TokenTree], progress: bool) -> list[np.ndarray]:
        """Return the scores of each token tree, indexed by the numbers of its steps."""
        scores = [np.full(len(tree.steps), np.nan) for tree in trees]
        limit = max(self.max_length, longest_path(trees))
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
        """Return the scores at the step tokens of each row, in order of position."""
        joined = [TokenTree.join(row) for row in rows]
        tokens = pad_rows(joined, self.tokenizer.pad_token_id or 0)
        width = tokens["input_ids"].shape[1]
        device = self.model.device
        tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
        with step_outputs(self.model, self.step_format, self._label_token_ids):
            logits = self.model(**model_inputs(**tokens, config=self.model.config, dtype=self.model.dtype)).logits
        positions = np.concatenate([row.step_positions + i * width for i, row in enumerate(joined)])
        scores = step_score(gather_steps(logits, torch.from_numpy(positions).to(device)), self.step_format)
        ends = np.cumsum([len(row.steps) for row in joined])[:-1]
        return np.split(scores.cpu().numpy().astype(np.float64), ends)
