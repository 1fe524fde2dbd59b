"""Gradients of the scopes against autograd by hand."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from trl_hrm.reasoning import HrmGridConfig, HrmGridForSolving
from trl_hrm.reasoning.losses import act_loss


def make_model(**overrides) -> HrmGridForSolving:
    torch.manual_seed(0)
    options = dict(
        height=2, width=3, vocab_size=7, hidden_size=16, num_attention_heads=2, intermediate_size=24, H_layers=1, L_layers=1,
        H_cycles=3, L_cycles=2,
    )  # fmt: skip
    model = HrmGridForSolving(HrmGridConfig(**options | overrides)).double()
    torch.nn.init.normal_(model.q_head.weight)
    torch.nn.init.normal_(model.puzzle_emb.weight)
    return model


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 7, (4, 6), generator=generator), torch.randint(0, 7, (4, 6), generator=generator)


def gradients(model: HrmGridForSolving, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def by_hand(model: HrmGridForSolving, inputs: torch.Tensor, labels: torch.Tensor, scope: str) -> torch.Tensor:
    """The loss of a segment, computed with full autograd. States are detached where the scope begins."""
    config = model.config
    x = model.embed(inputs, None)
    z_H, z_L = model.initial_state(len(inputs))
    slow = model.L_module if config.tie_modules else model.H_module
    for cycle in range(config.H_cycles):
        last_cycle = cycle == config.H_cycles - 1
        if scope == "last_cycle" and last_cycle:
            z_H, z_L = z_H.detach(), z_L.detach()
        for step in range(config.L_cycles):
            if scope == "last_step" and last_cycle and step == config.L_cycles - 1:
                z_H, z_L = z_H.detach(), z_L.detach()
            z_L = model.L_module(z_L, z_H + x, model.rope)
        z_H = slow(z_H, z_L, model.rope)
    q_halt = model.q_head(z_H[:, 0])[:, 0]
    return act_loss(model.lm_head(z_H[:, 1:]), labels, q_halt).loss.mean()


@pytest.mark.parametrize("tied", [False, True], ids=["two modules", "one module"])
@pytest.mark.parametrize("scope", ["last_step", "last_cycle", "all"])
def test_scope(scope, tied):
    """Each scope has exactly the gradient of autograd on states that are detached where it begins."""
    model, (inputs, labels) = make_model(grad_scope=scope, tie_modules=tied), make_batch()
    # float32 logits in the model: the loss by hand rounds in the same place.
    ours = gradients(model, model(inputs, labels=labels).loss.double())
    hand = gradients(model, by_hand(model, inputs, labels, scope))
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, hand[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_one_step_is_the_gradient_of_the_last_calls():
    """Difference 0.0 to the last call of each module on states that were computed without gradient (HRM, one-step gradient)."""
    model, (inputs, labels) = make_model().float(), make_batch()
    ours = gradients(model, model(inputs, labels=labels).loss)
    x = model.embed(inputs, None)
    with torch.no_grad():
        z_H, z_L = model.initial_state(4)
        for cycle in range(3):
            for _ in range(2 if cycle < 2 else 1):
                z_L = model.L_module(z_L, z_H + x, model.rope)
            z_H = model.H_module(z_H, z_L, model.rope) if cycle < 2 else z_H
    z_L = model.L_module(z_L, z_H + x, model.rope)
    z_H = model.H_module(z_H, z_L, model.rope)
    losses = act_loss(model.lm_head(z_H[:, 1:]), labels, model.q_head(z_H[:, 0])[:, 0])
    hand = gradients(model, losses.loss.sum() / 4)
    for name in ours:
        assert (ours[name] - hand[name]).abs().max().item() == 0.0, name


def test_scopes_differ():
    """A scope that is ignored would have the same gradients as another."""
    inputs, labels = make_batch()
    found = []
    for scope in ("last_step", "last_cycle", "all"):
        model = make_model(grad_scope=scope)
        found.append(gradients(model, model(inputs, labels=labels).loss)["L_module.layers.0.mlp.down_proj.weight"])
    assert (found[0] - found[1]).abs().max() > 1e-4 and (found[1] - found[2]).abs().max() > 1e-4


def saved_bytes(**overrides) -> int:
    """Bytes that the graph of one segment keeps for the backward pass."""
    model, (inputs, labels) = make_model(**overrides), make_batch()
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs, labels=labels)
    return total


def test_memory_does_not_grow_with_cycles():
    """Calls outside the scope keep no graph."""
    assert saved_bytes(H_cycles=2) == saved_bytes(H_cycles=8) == saved_bytes(H_cycles=2, L_cycles=6)
    assert saved_bytes(grad_scope="last_cycle", H_cycles=2) == saved_bytes(grad_scope="last_cycle", H_cycles=8)
    assert saved_bytes(grad_scope="last_cycle", L_cycles=6) > 2 * saved_bytes(grad_scope="last_step", L_cycles=6)
    assert saved_bytes(grad_scope="all", H_cycles=8) > 3 * saved_bytes(grad_scope="all", H_cycles=2)


def test_states_and_inference_have_no_graph():
    """States with a graph would make each segment keep all segments before it."""
    model, (inputs, labels) = make_model(grad_scope="all"), make_batch()
    output = model(inputs, labels=labels)
    assert output.loss.requires_grad and not output.z_H.requires_grad and not output.z_L.requires_grad
    with torch.no_grad():
        assert not model(inputs, labels=labels).loss.requires_grad


PRESETS = ["hrm", "trm", "trm_mlp", "loop", "one_pass", "one_pass_deep"]


def make_preset(preset: str, **overrides) -> HrmGridForSolving:
    torch.manual_seed(0)
    options = dict(height=2, width=3, vocab_size=7, hidden_size=16, num_attention_heads=2) | overrides
    return HrmGridForSolving(HrmGridConfig.preset(preset, **options))


def without_gradient(model: HrmGridForSolving) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_has_a_gradient(preset):
    """A parameter without gradient stops distributed training. Only the row of the untrained continue logit may be zero."""
    model, (inputs, labels) = make_preset(preset), make_batch()
    model(inputs, labels=labels).loss.backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_of_bf16(preset):
    """Under autocast, as in training with `bf16`, each weight has about the gradient of float32."""
    # small, because errors of bf16 grow with depth
    small = dict(hidden_size=64, H_layers=1, L_layers=1, H_cycles=2, L_cycles=1)
    model, (inputs, labels) = make_preset(preset, **small), make_batch()
    exact = gradients(model, model(inputs, labels=labels).loss)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs, labels=labels).loss
    loss.backward()
    assert without_gradient(model) == []
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(exact[name].norm().item(), rel=0.05), name


@pytest.mark.parametrize("preset", PRESETS)
def test_casts_without_a_graph_are_not_reused(preset, monkeypatch):
    """
    Autocast of torch 2.7 also keeps casts that were made without a graph. If recorded calls used them, no weight of the recurrent modules
    would be trained. Here, a linear layer that keeps its casts in the same way is used instead.
    """
    model, (inputs, labels) = make_preset(preset), make_batch()
    casts, linear = {}, torch.nn.functional.linear

    def cast_linear(inputs, weight, bias=None):
        if bias is not None:  # of the Q head, without autocast
            return linear(inputs, weight, bias)
        if weight not in casts:
            casts[weight] = weight.bfloat16()
        return linear(inputs.bfloat16(), casts[weight])

    monkeypatch.setattr(torch.nn.functional, "linear", cast_linear)
    monkeypatch.setattr(torch, "clear_autocast_cache", casts.clear)
    model(inputs, labels=labels).loss.backward()
    assert without_gradient(model) == []
    kept = dict(casts)
    with torch.no_grad():  # the second pass of the trainer reuses the casts
        model(inputs)
    assert all(casts[weight] is cast for weight, cast in kept.items())
