"""KL between policy and reference: per token against full logits in float64, per sequence and scaled by hand."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    set_seed,
)

from trl_hrm import kl
from trl_hrm._compat import chunked_divergence
from trl_hrm.kl import LMHead, scaled_kl, sequence_kl, token_kl, trained_sequences, trained_tokens


def full_kl(hidden, head: LMHead, ref_hidden, ref_head: LMHead, direction: str) -> torch.Tensor:
    """The slow reference: all logits, in float64."""

    def log_probs(states, head):
        logits = states.double() @ head.weight.double().T
        if head.bias is not None:
            logits = logits + head.bias.double()
        logits = logits * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return logits.log_softmax(-1)

    policy, reference = log_probs(hidden, head), log_probs(ref_hidden, ref_head)
    if direction == "reverse":
        return (policy.exp() * (policy - reference)).sum(-1)
    return (reference.exp() * (reference - policy)).sum(-1)


def random_pair(num_tokens: int, vocab_size: int = 50, seed: int = 0):
    """Return a policy and a reference with different widths, biases, scales and caps. The policy has gradients."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    head = LMHead(randn(vocab_size, 8).requires_grad_(), randn(vocab_size).requires_grad_(), 0.7, 5.0)
    ref_head = LMHead(randn(vocab_size, 6), None, 1.3, None)
    return randn(num_tokens, 8).requires_grad_(), head, randn(num_tokens, 6), ref_head


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_token_kl_and_gradients_equal_full_logits_in_float64(direction, num_tokens):
    """A swapped direction, a missing scale or cap, or a lost last tile would still give plausible numbers."""
    hidden, head, ref_hidden, ref_head = random_pair(num_tokens)
    leaves = [hidden, head.weight, head.bias]
    weights = torch.linspace(-1, 2, num_tokens)  # every token has a different incoming gradient
    found = token_kl(hidden, head, ref_hidden, ref_head, direction)
    found_gradients = torch.autograd.grad((found * weights).sum(), leaves)
    expected = full_kl(hidden, head, ref_hidden, ref_head, direction)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted.float(), rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_directions_differ():
    """Otherwise the test above could compare one direction with itself."""
    pair = random_pair(5)
    assert not torch.allclose(token_kl(*pair, "forward"), token_kl(*pair, "reverse"), rtol=0.05)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_of_a_distribution_with_itself_is_zero(direction):
    """Exactly 0: any other loss at the start would pull a policy away from itself."""
    hidden, head, _, _ = random_pair(20)
    found = token_kl(
        hidden, head, hidden.detach(), LMHead(*(part.detach() for part in head[:2]), *head[2:]), direction
    )
    assert found.tolist() == [0.0] * 20
    assert torch.autograd.grad(found.sum(), hidden)[0].abs().max() < 1e-6


def test_no_token_gives_an_empty_differentiable_result():
    """A micro-batch without a trained token must neither fail nor block the other ranks."""
    hidden, head, ref_hidden, ref_head = random_pair(0)
    found = token_kl(hidden, head, ref_hidden, ref_head)
    assert found.shape == (0,)
    found.sum().backward()
    assert head.weight.grad.abs().max() == 0


def test_tiles_do_not_change_the_result_and_leave_no_trace(monkeypatch):
    """TRL's constant must be restored after the call, and must also apply to the backward pass."""
    pair = random_pair(33)
    tiles = chunked_divergence.VOCAB_CHUNK_SIZE
    whole = token_kl(*pair)
    monkeypatch.setattr(kl, "LOGITS_PER_TILE", 7)
    seen = []
    tile = chunked_divergence._backward_tile
    monkeypatch.setattr(
        chunked_divergence,
        "_backward_tile",
        lambda *args, **kwargs: (seen.append(args[0].shape[1]), tile(*args, **kwargs)),
    )
    small = token_kl(*pair)
    torch.testing.assert_close(small, whole, rtol=1e-6, atol=1e-6)
    small.sum().backward()
    vocabulary = len(pair[1].weight)
    assert seen == [7] * (vocabulary // 7) + [vocabulary % 7]
    assert chunked_divergence.VOCAB_CHUNK_SIZE == tiles


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Gemma2Config(**SIZES, final_logit_softcapping=3.0),
        CohereConfig(**SIZES, logit_scale=0.25),
        GraniteConfig(**SIZES, logits_scaling=4.0),
    ],
    ids=lambda config: config.model_type,
)
def test_the_head_makes_the_logits_of_its_model(config: PretrainedConfig):
    """Ignoring a multiplier or cap would give the KL of distributions that the model never samples from."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.tensor([[3, 9, 27, 5]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = LMHead.of(model)
    found = hidden @ head.weight.T * head.logit_scale
    if head.softcap is not None:
        found = head.softcap * torch.tanh(found / head.softcap)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert (head.logit_scale, head.softcap) == {
        "llama": (1.0, None),
        "gemma2": (1.0, 3.0),
        "cohere": (0.25, None),
        "granite": (0.25, None),
    }[config.model_type]


def test_sequences_of_trained_tokens_by_hand():
    """A token counted for its neighbour changes two logarithms, but no shape."""
    ignored = -100
    labels = torch.tensor([[ignored, 5, 6, ignored], [ignored] * 4, [7, 8, ignored, 9]])
    assert trained_tokens(labels).tolist() == [[True, True, False], [False] * 3, [True, False, True]]
    assert trained_sequences(labels).tolist() == [0, 0, 1, 1]  # the second row has no sequence and uses no number
    # one row with four sequences: two tokens, three, one untrained, and two of padding, each starting at position 0
    labels = torch.tensor([[ignored, 5, ignored, 6, 7, ignored, ignored, ignored, ignored]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 0, 0]])
    assert trained_sequences(labels, positions).tolist() == [0, 1, 1]
    assert trained_sequences(labels).tolist() == [0, 0, 0]


def test_sequences_of_several_packed_rows():
    """Positions that continue across rows must not continue the count of the previous row."""
    labels = torch.tensor([[-100, 1, -100, 2], [-100, 3, 4, 5]])
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert trained_sequences(labels, positions).tolist() == [0, 1, 2, 2, 2]


def test_sequence_kl_by_hand():
    """A mean over the tokens of a batch instead of a sequence differs only if lengths differ."""
    per_token = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    sequences = torch.tensor([0, 0, 1, 1, 1])
    assert sequence_kl(per_token, sequences).tolist() == [3.0, 28.0]
    assert sequence_kl(per_token, sequences, "token_mean").tolist() == pytest.approx([1.5, 28 / 3])
    assert sequence_kl(per_token[:0], sequences[:0]).tolist() == []


def test_the_logarithm_scales_the_gradient_by_one_over_one_plus_kl():
    """This is the purpose of the paper's objective: a sequence that is far away pulls less."""
    divergence = torch.tensor([0.0, 1.0, 999.0], requires_grad=True)
    scaled = scaled_kl(divergence)
    assert scaled.tolist() == pytest.approx([0.0, math.log(2), math.log(1000)])
    assert torch.autograd.grad(scaled.sum(), divergence)[0].tolist() == pytest.approx([1.0, 0.5, 0.001])
    assert scaled_kl(divergence, "none") is divergence
