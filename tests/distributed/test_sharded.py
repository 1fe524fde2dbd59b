"""
DeepSpeed and FSDP2 in two real processes on CPU, against plain data parallelism.

Wrong settings silently give plain data parallelism, or processes that never exchange gradients. So each test first
asserts what ran.
"""

import math

import numpy as np
import pytest
import torch

from trl_hrm import StepScorer
from trl_hrm.losses import step_loss

from .launching import KINDS, MODELS, SHARDED, Project, Run, assert_ran_as, largest_difference


pytestmark = pytest.mark.slow

STEPS = 8
LEARNING_RATE = 1.0
MAX_GRAD_NORM = 0.01  # as in the paper; without it the weights move several hundred times as far
SETTINGS = (
    *("--optim", "sgd", "--learning_rate", str(LEARNING_RATE), "--lr_scheduler_type", "constant"),
    *(
        "--max_grad_norm",
        str(MAX_GRAD_NORM),
        "--per_device_train_batch_size",
        "1",
        "--gradient_accumulation_steps",
        "2",
    ),
)
ON_CPU = ("--use_cpu", "false", "--ddp_backend", "gloo")
LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project.make(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def run(project):
    """Run each kind once for each model, with and without an adapter."""
    runs: dict[str, Run] = {}

    def run(kind: str, model: str = "classification", lora: bool = False) -> Run:
        name = f"{kind}-{model}{'-lora' if lora else ''}"
        if name not in runs:
            args = SETTINGS + (LORA if lora else ()) + (() if kind == "ddp" else ON_CPU)
            runs[name] = project.run(name, *args, model=model, **KINDS[kind])
        return runs[name]

    return run


def assert_saved_model_is_the_live_one(project: Project, run: Run) -> None:
    """`eval_loss` of the model in memory equals the loss of the saved model, scored in this process."""
    scorer = StepScorer.from_pretrained(str(run.output_dir))
    scores = torch.tensor(np.concatenate(scorer.score_trees(project.held_out)), dtype=torch.float64)
    labels = torch.tensor([label for tree in project.held_out for label in tree.labels], dtype=torch.float64)
    logits = torch.stack([(1 - scores).log(), scores.log()], -1)
    loss = step_loss(logits, labels, scorer.step_format).mean().item()
    assert loss == pytest.approx(run.evaluation()["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("model", [name for name, _, _ in MODELS])
@pytest.mark.parametrize("kind", SHARDED)
def test_equals_data_parallelism(project, run, kind, model):
    """Losses, gradient norms, clipping and final weights, then the saved model, loaded here."""
    reference, sharded = run("ddp", model), run(kind, model)
    assert_ran_as(reference, "ddp")
    assert_ran_as(sharded, kind)
    assert len(sharded.logged("loss")) == STEPS
    for name in ("loss", "grad_norm", "num_labels", "accuracy", "eval_loss"):
        assert sharded.logged(name) == pytest.approx(reference.logged(name), rel=1e-4), name
    assert largest_difference(sharded.weights(), reference.weights()) < 1e-5
    assert largest_difference(sharded.weights("checkpoint-4"), reference.weights("checkpoint-4")) < 1e-5
    assert_saved_model_is_the_live_one(project, sharded)


@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_clipping_is_honoured(project, run, kind):
    """8 steps of a gradient clipped to 0.01 at a learning rate of 1 move the weights by at most 0.08."""
    done = run(kind)
    first, last = done.weights("checkpoint-2"), done.weights()
    moved = math.sqrt(sum((last[name] - first[name]).square().sum().item() for name in last))
    steps = STEPS - 2
    assert 0.3 * steps * LEARNING_RATE * MAX_GRAD_NORM < moved < 1.001 * steps * LEARNING_RATE * MAX_GRAD_NORM
    assert min(done.logged("grad_norm")) > 10 * MAX_GRAD_NORM


@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_adapter(project, run, kind):
    """The adapter and the new classifier are trained on every rank, saved, and give the same scores as in memory."""
    done = run(kind, lora=True)
    assert_ran_as(done, kind)
    assert done.logged("loss") == pytest.approx(run("ddp", lora=True).logged("loss"), rel=1e-4)
    assert (done.output_dir / "adapter_model.safetensors").exists()
    assert not (done.output_dir / "model.safetensors").exists()
    assert (done.output_dir / "checkpoint-4" / "step_format.json").exists()
    assert_saved_model_is_the_live_one(project, done)
