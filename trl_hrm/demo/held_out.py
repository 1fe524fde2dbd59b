"""KL divergence from the reference and language-model loss on held-out trajectories, measured during training."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..kl import LMHead, sequence_kl, token_kl, trained_sequences, trained_tokens


class HeldOut(TrainerCallback):
    """
    Callback that measures KL divergence from the reference and language-model loss on held-out trajectories, before training, every few
    steps, and at the end. The trainer's own log has no KL at λ = 0, because it then has no reference.

    Args:
        reference ([`~transformers.PreTrainedModel`]):
            Policy before training.
        rows (`Sequence[dict[str, list[int]]]`):
            Held-out trajectories with `input_ids` and `labels`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer for padding.
        every (`int`):
            Number of steps between two measurements.
    """

    def __init__(
        self,
        reference: PreTrainedModel,
        rows: Sequence[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        every: int,
    ):
        collator = DataCollatorForSeq2Seq(tokenizer)
        self.reference = reference.eval()
        self.batches = [collator(rows[i : i + 64]) for i in range(0, len(rows), 64)]
        self.every = every
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.curve.append({"step": 0, **self.measure(model)})

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.curve.append({"step": state.global_step, **self.measure(model)})

    @torch.no_grad()
    def measure(self, policy: PreTrainedModel) -> dict[str, float]:
        """Return `lm_loss` in nats per token, `kl` in nats per sequence, `log_kl` (mean of ln(1 + KL)) and `kl_max` (maximum KL)."""
        was_training = policy.training
        policy.eval()
        losses, divergences = [], []
        for batch in self.batches:
            labels = batch["labels"]
            hidden, ref_hidden = (last_hidden_states(model, batch) for model in (policy, self.reference))
            logits = policy.get_output_embeddings()(hidden)
            targets = labels[:, 1:][trained_tokens(labels)]
            losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
            kl = token_kl(hidden, LMHead.of(policy), ref_hidden, LMHead.of(self.reference))
            divergences.append(sequence_kl(kl, trained_sequences(labels)))
        policy.train(was_training)
        loss, kl = torch.cat(losses), torch.cat(divergences)
        found = {"lm_loss": loss.mean(), "kl": kl.mean(), "log_kl": kl.log1p().mean(), "kl_max": kl.max()}
        return {name: value.item() for name, value in found.items()}


def last_hidden_states(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the hidden states that predict the trained tokens, of shape `(N, H)`."""
    states = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return states[:, :-1][trained_tokens(batch["labels"])]
