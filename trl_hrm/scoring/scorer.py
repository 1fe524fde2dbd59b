"""Score the steps of solutions with a step reward model in transformers."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import is_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forest import TokenTree, pack, pad_rows
from ..heads import check_head, gather_steps, step_outputs
from ..implicit import StepTokens
from ..io import shown
from ..loading import load_reference_model, load_reward_model, load_tokenizer, read_step_format
from ..losses import step_score
from ..precision import warn_of_slow_bf16
from ..step_format import StepFormat
from ..tree_attention import check_attention, check_model, model_inputs, use_tree_attention
from .scoring_config import checkpoint_name
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
            Maximum number of tokens per row. Longer trees are split, which does not change the scores. A single path can be longer, up to
            the number of positions of the model. Rows then have up to twice as many tokens as the longest path.
        batch_size (`int`, *optional*, defaults to `8`):
            Maximum number of rows per forward pass. Of rows longer than `max_length`, fewer are scored at once: a forward pass has at
            most `batch_size * max_length` tokens, or one row.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            Reference model, for a model without an adapter and the head `"implicit"`. It is set to evaluation mode.

    Raises:
        `ValueError`: If the model, the tokenizer, the step format and the reference model do not fit each other, or a number is
        below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        step_format: StepFormat,
        max_length: int = 2048,
        batch_size: int = 8,
        reference: PreTrainedModel | None = None,
    ):
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}. It must be at least 1.")
        max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        super().__init__(tokenizer, step_format, max_positions)
        check_head(model, step_format)
        needs_reference = step_format.head == "implicit" and not is_peft_model(model)
        if needs_reference != (reference is not None):
            raise ValueError(
                "The head 'implicit' needs a `reference` model. Pass it, or use `StepScorer.from_pretrained`, which loads it."
                if needs_reference
                else f"`reference` has no effect with head {step_format.head!r} and {type(model).__name__}. Remove it."
            )
        for one in (model,) if reference is None else (model, reference):
            check_attention(one.config._attn_implementation)
            check_model(one)
            use_tree_attention(one, one.device)
            one.eval()
        if model.dtype == torch.bfloat16:
            warn_of_slow_bf16(model.device, 'Load the model with `dtype="float32"`.')
        if reference is not None:
            sizes = [one.config.get_text_config().vocab_size for one in (model, reference)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"The model has a vocabulary of {sizes[0]} tokens, but the reference model has {sizes[1]}. Use the reference model "
                    "of the training."
                )
        self.model = model
        self.reference = reference
        self.max_length = max_length
        self.batch_size = batch_size
        self._label_token_ids = step_format.label_token_ids(tokenizer) if step_format.head == "lm" else None

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        step_format: StepFormat | str | Path | None = None,
        max_length: int = 2048,
        batch_size: int = 8,
        revision: str | None = None,
        trust_remote_code: bool = False,
        reference_model: str | None = None,
        **model_init_kwargs,
    ) -> "StepScorer":
        """
        Load a checkpoint of [`HRMRewardTrainer`] or [`ImplicitPRMTrainer`], or a LoRA adapter with its base model.

        Args:
            path_or_repo (`str` or `Path`):
                Path or Hub id of the checkpoint, with its tokenizer and `step_format.json`.
            step_format ([`StepFormat`], `str` or `Path`, *optional*):
                Step format for a checkpoint without `step_format.json`, or its name, file or folder (see [`StepFormat.named`]).
            max_length, batch_size:
                See [`StepScorer`].
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                Arguments for loading the checkpoint.
            reference_model (`str`, *optional*):
                Path or Hub id of the reference model, for the head `"implicit"`. Defaults to the name in the step format. Its
                weights must be the same as in training.
            model_init_kwargs:
                Keyword arguments for `from_pretrained` of the model, such as `dtype="bfloat16"` (defaults to `float32`).

        Raises:
            `FileNotFoundError`: If the checkpoint has no `step_format.json` and `step_format` is not given.
            `TypeError`: If `path_or_repo` is a loaded model.
            `ValueError`: If the weights of the checkpoint do not fit the head (missing weights would be random), the
            model, the tokenizer and the step format do not fit each other, or the reference model has other weights than in
            training.
        """
        path_or_repo = checkpoint_name(path_or_repo, f"{cls.__name__}(model, tokenizer, step_format)")
        if step_format is None:
            step_format = read_step_format(path_or_repo, revision)
        elif not isinstance(step_format, StepFormat):
            step_format = StepFormat.named(step_format)
        tokenizer = load_tokenizer(path_or_repo, revision, trust_remote_code)
        kwargs = {"trust_remote_code": trust_remote_code, **model_init_kwargs}
        if reference_model is not None and step_format.head != "implicit":
            raise ValueError(
                f"`reference_model` is {shown(reference_model)}, which has no effect with head {step_format.head!r}. Remove it."
            )
        model = load_reward_model(path_or_repo, step_format, revision=revision, **kwargs)
        reference = None
        if step_format.head == "implicit":
            reference = load_reference_model(path_or_repo, step_format, revision, reference_model, **kwargs)
        return cls(model, tokenizer, step_format, max_length, batch_size, reference)

    def _forward(self, trees: list[TokenTree], progress: bool) -> list[np.ndarray]:
        """Return the scores of each token tree, indexed by the numbers of its steps."""
        scores = [np.full(len(tree.steps), np.nan) for tree in trees]
        # Branches below a long path, such as merged thoughts, would each repeat the path if they did not fit into its row
        longest = longest_path(trees)
        limit = self.max_length if longest <= self.max_length else 2 * longest
        owners, parts = [], []
        for i, tree in enumerate(trees):
            for part in tree.split(limit) if len(tree) else ():
                owners.append(i)
                parts.append(part)
        rows = sorted(pack([len(part) for part in parts], limit), key=lambda row: -sum(len(parts[i]) for i in row))
        with tqdm(total=len(rows), desc="Scoring", unit="row", disable=not progress) as bar:
            start = 0
            while start < len(rows):
                width = sum(len(parts[i]) for i in rows[start])  # of the longest row that is left
                number = min(self.batch_size, self.batch_size * self.max_length // width)
                batch = rows[start : start + max(number, 1)]
                start += len(batch)
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
        largest, size = int(tokens["input_ids"].max()), self.model.config.get_text_config().vocab_size
        if largest >= size:  # on a GPU, the lookup would end the process
            raise ValueError(
                f"{self.model.name_or_path}: the tokenizer gives the token id {largest} ({shown(self.tokenizer.convert_ids_to_tokens(largest))}), "
                f"but the model has embeddings of {size} tokens. Use the tokenizer that the model was trained with."
            )
        width = tokens["input_ids"].shape[1]
        device = self.model.device
        tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
        positions = np.concatenate([row.step_positions + i * width for i, row in enumerate(joined)])
        positions = torch.from_numpy(positions).long().to(device)
        if self.step_format.head == "implicit":
            starts = torch.from_numpy(np.concatenate([row.starts for row in joined])).long().to(device)
            outputs = self._implicit_rewards(tokens, positions, starts)[:, None]
        else:
            with step_outputs(self.model, self.step_format, self._label_token_ids):
                inputs = model_inputs(**tokens, config=self.model.config, dtype=self.model.dtype)
                outputs = gather_steps(self.model(**inputs).logits, positions)
        scores = step_score(outputs, self.step_format)
        ends = np.cumsum([len(row.steps) for row in joined])[:-1]
        return np.split(scores.cpu().numpy().astype(np.float64), ends)

    def _implicit_rewards(
        self, tokens: dict[str, torch.Tensor], ends: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        """Return β times the sum of the log-ratios of each step, shape of `ends`. See [`~implicit.StepTokens`]."""
        steps = StepTokens.of(tokens["position_ids"], tokens["subtree_end"], ends, starts)
        log_probs = []
        for model in (self.model, self.reference or self.model):
            is_reference = bool(log_probs)
            with model.disable_adapter() if is_reference and self.reference is None else nullcontext():
                inputs = model_inputs(**tokens, config=model.config, dtype=model.dtype)
                log_probs.append(steps.log_probs(model, inputs))
        return self.step_format.beta * steps.sums(log_probs[0] - log_probs[1])
