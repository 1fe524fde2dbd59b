"""`StepGRPOTrainer` in two processes and in one: the same rewards, the same advantages, the same weights."""

import pytest
import torch
from safetensors.torch import load_file

from .launching import Run, largest_difference
from .step_grpo_launching import StepGRPOProject


pytestmark = pytest.mark.slow

# In two processes, a batch is half as large. With one micro-batch per step, a group of 4 completions is then spread over both ranks;
# with two micro-batches, each rank samples whole groups.
SCENARIOS = {
    "min_form": {},
    "step_sum": {"step_credit": "step_sum", "gradient_accumulation_steps": 2, "outcome": False},
    "progress": {"step_credit": "progress", "loss_type": "grpo", "scale_rewards": "batch"},
    "clip_delta": {
        "step_credit": "clip_delta",
        "clip_threshold": 0.6,
        "loss_type": "dr_grpo",
        "step_reward_weight": 2.0,
    },
    "outcome": {"step_credit": "outcome", "step_reward_weight": 0.5},
    # rank 1 has no problem to score in the first step, and another rank or none in the next ones
    "half": {"rows": "half", "gradient_accumulation_steps": 2, "shuffle_dataset": False},
    "iterations": {"num_iterations": 2, "gradient_accumulation_steps": 2, "loss_type": "cispo"},
    "lora": {"lora": {"r": 4, "target_modules": "all-linear"}, "learning_rate": 0.5},
}
EXACT = ("loss", "grad_norm", "reward", "reward_std", "rewards/step_reward/mean", "rewards/step_reward/std")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Run, Run]]:
    """The runs of each scenario, in two processes and in one."""
    project = StepGRPOProject(tmp_path_factory.mktemp("step-grpo"))
    found = []
    for num_processes, config in ((2, "cpu_2proc.yaml"), (1, None)):
        scenarios = [
            project.scenario(
                f"{name}-{num_processes}", per_device_train_batch_size=4 // num_processes, max_steps=3, **args
            )
            for name, args in SCENARIOS.items()
        ]
        found.append(project.run(*scenarios, config=config))
    return dict(zip(SCENARIOS, zip(*found, strict=True), strict=True))


def weights(run: Run) -> dict[str, torch.Tensor]:
    adapter = run.output_dir / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else run.output_dir / "model.safetensors")


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_equal_one(runs, name):
    """
    A baseline over the completions of one rank, step rewards in the order of another rank, or a group that is cut at the
    border of a rank would still train, with other advantages.
    """
    double, single = runs[name]
    for rank in (0, 1):
        facts = double.facts(rank)
        assert (facts["num_processes"], facts["distributed_type"]) == (2, "MULTI_CPU")
        assert facts["wrapper"] == "DistributedDataParallel"
    assert (single.facts()["num_processes"], single.facts()["distributed_type"]) == (1, "NO")
    for logged in EXACT:
        assert double.logged(logged) == pytest.approx(single.logged(logged), rel=1e-4, abs=1e-6, nan_ok=True), logged
    assert len(single.logged("loss")) == 3
    keys = [{key for log in run.facts()["log_history"] for key in log} for run in (double, single)]
    assert keys[0] == keys[1]
    assert largest_difference(weights(double), weights(single)) < 1e-6
    assert max(single.logged("grad_norm")) > 1e-2  # there is something to compare


@pytest.mark.parametrize("name", SCENARIOS)
def test_advantages_have_the_shape_of_the_completions(runs, name):
    for run, ranks in zip(runs[name], ((0, 1), (0,)), strict=True):
        for rank in ranks:
            shapes = run.facts(rank)["shapes"]
            assert len(shapes) >= 3
            for advantages, completions in shapes:
                assert advantages == (completions[:1] if name == "outcome" else completions)


def test_scenarios_differ(runs):
    """Otherwise an option would be accepted and ignored."""
    whole = {name: weights(single) for name, (_, single) in runs.items() if name != "lora"}
    names = list(whole)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert largest_difference(whole[a], whole[b]) > 1e-5, (a, b)
