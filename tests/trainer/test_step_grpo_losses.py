"""Every loss of TRL with one advantage per token, against plain loops over sequences and tokens."""

import pytest
import torch

from .step_grpo_planted import GROUP, MAX_LENGTH, TOKENIZER, Completion, make_trainer, policy, token_advantages


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
EPSILON = 0.02  # small, so that some ratios are clipped


def log_probs(model: torch.nn.Module, completion: Completion) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability and entropy of every token of a completion, from one sequence without padding."""
    prompt = TOKENIZER(completion.prompt)["input_ids"]
    logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1)
    return logps.gather(1, torch.tensor(completion.ids)[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def token_loss(loss_type: str, ratio, advantage: float, logp, whole_log_ratio):
    """Return the loss of one token. `ratio` is the ratio of the token or of its sequence."""
    if loss_type == "cispo":
        return -ratio.detach().clamp(max=1 + EPSILON) * advantage * logp
    if loss_type == "sapo":  # with a soft gate instead of clipping
        tau = 1.0 if advantage > 0 else 1.05
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
    if loss_type == "vespo":
        k, lam = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        weight = whole_log_ratio.detach().exp()
        return -(weight**k) * torch.exp(lam * (1 - weight)) * advantage * logp
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)


def plain_loss(
    model,
    old_model,
    batch: list[Completion],
    advantages,
    loss_type: str,
    num_tokens: int,
    sequence_level: bool = False,
    mask_truncated: bool = False,
    top_entropy: float = 1.0,
    beta: float = 0.0,
) -> torch.Tensor:
    """Return the loss of one micro-batch. `num_tokens` is the number of trained tokens of the optimizer step."""
    rows = []
    for completion in batch:
        logps, entropies = log_probs(model, completion)
        with torch.no_grad():
            old, _ = log_probs(old_model, completion)
        log_ratio = logps - old
        ratios = log_ratio.mean().exp().expand_as(logps) if sequence_level else log_ratio.exp()
        losses = [
            token_loss(loss_type, ratios[t], advantages[completion][t], logps[t], log_ratio.sum())
            for t in range(len(logps))
        ]
        if beta:
            with torch.no_grad():
                reference, _ = log_probs(policy(), completion)
            losses = [
                loss + beta * ratios[t] * ((reference[t] - logps[t]).exp() - (reference[t] - logps[t]) - 1)
                for t, loss in enumerate(losses)
            ]
        is_masked = mask_truncated and not completion.ended
        rows.append(([] if is_masked else losses, [] if is_masked else entropies.detach().tolist()))
    if top_entropy < 1:
        limit = torch.quantile(torch.tensor([value for _, row in rows for value in row]), 1 - top_entropy).item()
        rows = [([x if h >= limit else 0 * x for x, h in zip(*row, strict=True)], row[1]) for row in rows]
    sums = [sum(losses, start=torch.zeros((), dtype=torch.float64)) for losses, _ in rows]
    lengths = [len(losses) for losses, _ in rows]
    if loss_type in ("grpo", "sapo"):
        return sum(total / max(length, 1) for total, length in zip(sums, lengths, strict=True)) / len(batch)
    if loss_type == "bnpo":
        return sum(sums) / sum(lengths)
    if loss_type == "dr_grpo":
        return sum(sums) / (len(batch) * MAX_LENGTH)
    if loss_type == "luspo":
        return sum(sums) / len(batch)
    return sum(sums) / num_tokens  # dapo, cispo, vespo: over the tokens of the whole optimizer step


def assert_equals_plain_loop(
    trainer, recorder, credit: str = "min_form", scaled: bool = True, **settings
) -> list[float]:
    """
    Train, and compare the gradients of every optimizer step with plain loops.

    Returns:
        `list[float]`: For each optimizer step, the largest distance of a token's probability ratio from 1.
    """
    trainer.train()
    advantages = token_advantages(credit, scaled)
    accumulation = trainer.args.gradient_accumulation_steps
    loss_type, distances = trainer.args.loss_type, []
    for step, (batches, weights, found) in enumerate(
        zip(recorder.batches, recorder.weights, recorder.gradients, strict=False)
    ):
        model, old_model = policy(), policy()
        model.load_state_dict(weights)
        old_model.load_state_dict(recorder.weights[step - step % trainer.args.num_iterations])
        model.zero_grad()
        is_trained = [c for batch in batches for c in batch if c.ended or not settings.get("mask_truncated")]
        num_tokens = sum(len(completion.ids) for completion in is_trained)
        assert len(batches) == accumulation
        for batch in batches:
            loss = plain_loss(model, old_model, batch, advantages, loss_type, num_tokens, **settings)
            # the losses per optimizer step are sums over the micro-batches, the others are means
            (loss if loss_type in ("dapo", "cispo", "vespo") else loss / accumulation).backward()
        largest = max(gradient.abs().max().item() for gradient in found.values())
        assert largest > 1e-3
        for name, weight in model.named_parameters():
            difference = (found[name] - weight.grad).abs().max().item()
            assert difference < 1e-5 * max(largest, 1), f"step {step + 1}, {name}"
        with torch.no_grad():
            completion = batches[0][0]
            ratios = (log_probs(model, completion)[0] - log_probs(old_model, completion)[0]).exp()
        distances.append((ratios - 1).abs().max().item())
    assert len(distances) == trainer.state.global_step
    return distances


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_off_policy(tmp_path, loss_type):
    """
    Two optimizer steps on the same completions: in the second, the ratios differ from 1 and some are clipped. Two micro-batches
    of different lengths distinguish the normalisations.
    """
    trainer, recorder = make_trainer(
        tmp_path,
        loss_type=loss_type,
        epsilon=EPSILON,
        # TRL compares the ratio of CISPO with this value itself, not with 1 plus this value
        **({"epsilon_high": 1 + EPSILON} if loss_type == "cispo" else {}),
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=2,
        learning_rate=0.05 if loss_type in ("luspo", "vespo") else 0.5,  # these two weight whole sequences
    )
    first, second = assert_equals_plain_loop(trainer, recorder)
    assert first == 0 and second > EPSILON


@pytest.mark.parametrize("credit", ["step_sum", "min_form", "progress", "clip_delta"])
def test_every_credit(tmp_path, credit):
    trainer, recorder = make_trainer(tmp_path, step_credit=credit, max_steps=2)
    assert_equals_plain_loop(trainer, recorder, credit)


@pytest.mark.parametrize(
    "args, settings",
    [
        ({"importance_sampling_level": "sequence", "loss_type": "grpo"}, {"sequence_level": True}),
        ({"importance_sampling_level": "sequence", "loss_type": "luspo"}, {"sequence_level": True}),
        ({"mask_truncated_completions": True, "loss_type": "dapo"}, {"mask_truncated": True}),
        ({"mask_truncated_completions": True, "loss_type": "grpo"}, {"mask_truncated": True}),
        ({"top_entropy_quantile": 0.5, "loss_type": "dapo"}, {"top_entropy": 0.5}),
        ({"beta": 0.5, "loss_type": "dapo"}, {"beta": 0.5}),
        ({"scale_rewards": "none", "loss_type": "dr_grpo"}, {"scaled": False}),
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_options_of_the_loss(tmp_path, args, settings):
    learning_rate = 0.05 if args["loss_type"] == "luspo" else 0.5
    trainer, recorder = make_trainer(
        tmp_path, epsilon=EPSILON, num_iterations=2, max_steps=2, learning_rate=learning_rate, **args
    )
    assert_equals_plain_loop(trainer, recorder, **settings)
