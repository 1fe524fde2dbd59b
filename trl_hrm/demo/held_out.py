"""How far a policy has gone from its reference, and how well it has learned, on trajectories that it is not trained on."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..kl import LMHead, sequence_kl, token_kl, trained_sequences, trained_tokens


class HeldOut(TrainerCallback):
    """
    KL divergence to the reference and language-model loss on held-out trajectories, before training, every few steps, and at the
    end. At λ = 0 the trainer has no reference of its own, so that its log could not be compared.

    Args:
        reference ([`~transformers.PreTrainedModel`]):
            The policy before training.
        rows (`Sequence[dict[str, list[int]]]`):
            Held-out trajectories: `input_ids` and `labels`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Pads them.
        every (`int`):
            Steps between two measures.
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
        """`lm_loss` in nats per token; `kl` in nats per sequence, `log_kl` the mean of ln(1 + KL), `kl_max` the largest."""
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
    """States that predict the trained tokens, shape `(N, H)`."""
    states = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return states[:, :-1][trained_tokens(batch["labels"])]
