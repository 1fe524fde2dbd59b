r"""
Implicit step rewards: log-ratios of a policy and its reference model, summed over the tokens of a step
([ImplicitPRM](https://huggingface.co/papers/2412.01981)).

The reward of the tokens in a span of a solution y to a problem x is

r = β · Σₜ (ln π(yₜ | x, y₁…yₜ₋₁) − ln π_ref(yₜ | x, y₁…yₜ₋₁)).

In a forest row (see [`trl_hrm.forest`]), a token is predicted at the token above it on its path, which is not always the token
before it in the row. The log-probabilities of the tokens are computed in tiles (see [`~kl.token_log_probs`]).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from .forest import ancestors_of, parents_of, path_sums
from .kl import LMHead, causal_lm_of, token_log_probs


if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class StepTokens:
    """
    The tokens of the labelled steps in a batch of forest rows. T is the number of tokens of the batch, rows one after the other.

    Args:
        subtree_end (`torch.Tensor`): First index after the subtree of each token, shape `(T,)`.
        ends (`torch.Tensor`): Index of the last token of each step, any shape.
        above (`torch.Tensor`): Index of the token above the first token of each step, -1 for none, shape of `ends`.
        tokens (`torch.Tensor`): Indices of the N tokens that belong to a step, shape `(N,)`.
        parents (`torch.Tensor`): Index of the token above each of them, which predicts it, shape `(N,)`.
    """

    subtree_end: torch.Tensor
    ends: torch.Tensor
    above: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor

    @classmethod
    def of(
        cls, position_ids: torch.Tensor, subtree_end: torch.Tensor, ends: torch.Tensor, starts: torch.Tensor
    ) -> "StepTokens":
        """
        Find the tokens of steps.

        Args:
            position_ids, subtree_end (`torch.Tensor`):
                Shape `(B, L)`, as [`~forest.pad_rows`] returns them.
            ends (`torch.Tensor`):
                Index of the last token of each step, in the flattened rows, any shape.
            starts (`torch.Tensor`):
                Number of tokens on the path before each step, shape of `ends`.
        """
        rows, length = position_ids.shape
        offsets = length * torch.arange(rows, device=position_ids.device)[:, None]
        position_ids, subtree_end = position_ids.flatten(), (subtree_end + offsets).flatten()
        above = ancestors_of(position_ids, ends, starts - 1)
        # Number of steps of each token: those that end in its subtree, without those that also start below it
        size = len(position_ids)
        marks = torch.zeros(size + 1, dtype=torch.long, device=position_ids.device)
        marks.index_add_(0, ends.flatten(), torch.ones_like(ends.flatten()))
        marks.index_add_(0, above.flatten() % (size + 1), -torch.ones_like(ends.flatten()))  # -1: after the last token
        before = marks.cumsum(0) - marks
        tokens = torch.arange(size, device=position_ids.device)
        in_step = before[subtree_end] - before[tokens] > 0
        tokens = tokens[in_step & (position_ids > 0)]  # nothing predicts the first token of a path
        return cls(subtree_end, ends, above, tokens, parents_of(position_ids)[tokens])

    def log_probs(self, model: "PreTrainedModel | PeftModel", inputs: dict) -> torch.Tensor:
        """
        Return the log-probability of each token of a step.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Causal language model. With an adapter, the adapter is used unless it is disabled.
            inputs (`dict`):
                Keyword arguments for the forward pass. See [`~tree_attention.model_inputs`].

        Returns:
            `torch.Tensor`: Shape `(N,)`, float32, in nats.
        """
        causal_lm = causal_lm_of(model)
        hidden = causal_lm.base_model(**inputs).last_hidden_state.flatten(0, 1)[self.parents]
        return token_log_probs(hidden, LMHead.of(causal_lm), inputs["input_ids"].flatten()[self.tokens])

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """
        Sum values over the tokens of each step.

        Args:
            values (`torch.Tensor`):
                One value for each of the N tokens, shape `(N,)`.

        Returns:
            `torch.Tensor`: Shape of `ends`, in float64 (float32 on MPS), because a running sum over a row loses digits.
        """
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        in_row = values.new_zeros(len(self.subtree_end), dtype=dtype).index_put((self.tokens,), values.to(dtype))
        sums = path_sums(in_row, self.subtree_end)
        sums = torch.cat([sums, sums.new_zeros(1)])  # index -1: above the first token
        return sums[self.ends] - sums[self.above]
