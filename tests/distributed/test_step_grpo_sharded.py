"""`StepGRPOTrainer` under DeepSpeed and FSDP2 in two real processes on CPU, against plain data parallelism."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ..helpers import tiny_model
from .launching import KINDS, SHARDED, Run, assert_ran_as, largest_difference
from .step_grpo_launching import StepGRPOProject


pytestmark = pytest.mark.slow

SCENARIOS = {
    # groups are spread over the ranks, which have completions of different lengths
    "full": {"step_credit": "step_sum"},
    "adapter": {"lora": {"r": 4, "target_modules": "all-linear"}, "learning_rate": 0.5, "num_iterations": 2},
    # the policy samples: each kind gathers its weights for this
    "sampled": {"sampled": True, "outcome": False},
}
ON_CPU = {"use_cpu": False, "ddp_backend": "gloo"}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> StepGRPOProject:
    return StepGRPOProject(tmp_path_factory.mktemp("step-grpo-sharded"))


@pytest.fixture(scope="module")
def run(project):
    """Run each scenario of a kind once. A DeepSpeed process can train only once; the others train all scenarios."""
    runs: dict[str, Run] = {}

    def run(kind: str, name: str) -> Run:
        if f"{kind}-{name}" not in runs:
            names = [name] if kind.startswith("zero") else list(SCENARIOS)
            scenarios = [
                project.scenario(
                    f"{kind}-{each}",
                    per_device_train_batch_size=2,
                    max_steps=3,
                    **(SCENARIOS[each] | ({} if kind == "ddp" else ON_CPU)),
                )
                for each in names
            ]
            found = project.run(*scenarios, **KINDS[kind])
            runs.update(zip([f"{kind}-{each}" for each in names], found, strict=True))
        return runs[f"{kind}-{name}"]

    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the weights of the saved model, loaded as a user does."""
    if (run.output_dir / "adapter_model.safetensors").exists():
        base = AutoModelForCausalLM.from_pretrained(run.output_dir.parent / "policy")
        model = PeftModel.from_pretrained(base, run.output_dir)
    else:
        model = AutoModelForCausalLM.from_pretrained(run.output_dir)
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", ["full", "adapter"])
@pytest.mark.parametrize("kind", SHARDED)
def test_equals_data_parallelism(run, kind, name):
    """Wrong settings silently give plain data parallelism. So the test first asserts what ran."""
    expected, sharded = run("ddp", name), run(kind, name)
    assert_ran_as(expected, "ddp")
    assert_ran_as(sharded, kind)
    for logged in ("loss", "grad_norm", "reward", "rewards/step_reward/mean"):
        assert sharded.logged(logged) == pytest.approx(expected.logged(logged), rel=1e-4, abs=1e-5), logged
    assert max(expected.logged("grad_norm")) > 1e-2
    assert largest_difference(weights(sharded), weights(expected)) < 1e-5


@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_the_policy_samples(run, kind):
    """Sampling draws from the generators of each rank, so only the parts that do not depend on them are compared."""
    sharded = run(kind, "sampled")
    assert_ran_as(sharded, kind)
    for rank in (0, 1):
        for advantages, completions in sharded.facts(rank)["shapes"]:
            assert advantages == completions and completions[0] == 2
    assert all(0 < reward < 1 for reward in sharded.logged("rewards/step_reward/mean"))
    assert max(sharded.logged("grad_norm")) > 0
    moved = largest_difference(weights(sharded), weights_before(sharded))
    assert moved > 1e-5 and all(weight.isfinite().all() for weight in weights(sharded).values())


def weights_before(run: Run) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(run.output_dir.parent / "policy")
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_the_reward_model_is_whole_on_every_rank(run, kind):
    """Loaded in shards, it would score with empty weights, or wait for another rank."""
    expected = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert [run(kind, "full").facts(rank)["in_reward_model"] for rank in (0, 1)] == [expected] * 2
