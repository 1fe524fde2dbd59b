"""
`ImplicitPRMTrainer` in two real processes on CPU: under data parallelism, DeepSpeed and FSDP2, with every kind of reference.

Policy and reference are two models, whose heads are used outside their modules. A fault in one need not stop the other.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trl_hrm import StepFormat, StepScorer

from .launching import KINDS, SHARDED, Project, Run, assert_ran_as, largest_difference


ON_CPU = ("--use_cpu", "false", "--ddp_backend", "gloo")
LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear")
SETTINGS = (
    *("--optim", "sgd", "--learning_rate", "0.05", "--lr_scheduler_type", "constant", "--beta", "0.5"),
    *("--train_on_last_step_only", "true", "--per_device_eval_batch_size", "2"),
)
REFERENCES = {
    "copy": (),
    "adapter": LORA,
    "precomputed": ("--precompute_ref_log_probs", "true"),
    "adapter-precomputed": (*LORA, "--precompute_ref_log_probs", "true"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project.make(tmp_path_factory.mktemp("implicit"))


@pytest.fixture(scope="module")
def run(project):
    """Run each kind once for each reference, with 4 rows per optimizer step."""
    runs: dict[tuple[str, str, str], Run] = {}

    def run(kind: str, reference: str = "copy", model: str = "lm") -> Run:
        if (kind, reference, model) not in runs:
            args = [*SETTINGS, *REFERENCES[reference]]
            args += ["--per_device_train_batch_size", "4" if kind == "single" else "2"]
            args += ON_CPU if kind not in ("single", "ddp") else ()
            runs[kind, reference, model] = project.run(
                f"{kind}-{reference}-{model}",
                *args,
                model=model,
                recipe="implicit_prm",
                **({} if kind == "single" else KINDS[kind]),
            )
        return runs[kind, reference, model]

    return run


def assert_same(one: Run, other: Run) -> None:
    assert len(one.logged("loss")) == 8
    for name in ("loss", "grad_norm", "num_labels", "accuracy", "eval_loss", "eval_auroc"):
        assert one.logged(name) == pytest.approx(other.logged(name), rel=1e-4), name
    assert abs(one.logged("loss")[-1] - one.logged("loss")[0]) > 1e-3


def assert_saved_model_is_the_live_one(project: Project, run: Run) -> None:
    """`eval_loss` of the model in memory equals the loss of the saved model, scored in this process."""
    folder = str(run.output_dir)
    scorer = StepScorer.from_pretrained(folder, replace(StepFormat.from_pretrained(folder), score_span="prefix"))
    trees = project.single_held_out
    scores = torch.tensor(np.concatenate(scorer.score_trees(trees)), dtype=torch.float64)
    labels = torch.tensor([label for tree in trees for label in tree.labels], dtype=torch.float64)
    loss = F.binary_cross_entropy(scores, labels).item()
    assert loss == pytest.approx(run.evaluation()["eval_loss"], abs=1e-5)


@pytest.mark.slow  # test_launch.py trains in two processes with the same base class, and `.ci/run` launches this trainer in two
def test_two_processes_equal_one(project, run):
    """Ranks hold different numbers of labels. A mean per rank would give another loss and other gradients."""
    single, double = run("single"), run("ddp")
    assert_ran_as(double, "ddp")
    assert_same(double, single)
    assert largest_difference(double.weights(), single.weights()) < 1e-5
    assert_saved_model_is_the_live_one(project, double)


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
def test_references_in_two_processes(project, run, reference):
    """The adapter starts at the reference with a loss of ln 2, as the copy does. Precomputed sums give the same training."""
    single, double = run("single", reference), run("ddp", reference)
    assert_same(double, single)
    live = run("single", reference.removesuffix("-precomputed").replace("precomputed", "copy"))
    assert single.logged("loss") == pytest.approx(live.logged("loss"), rel=1e-5)
    assert single.logged("loss")[0] == pytest.approx(0.6931, abs=1e-3)
    assert_saved_model_is_the_live_one(project, double)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lm", "lm-tied"])
@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_equals_data_parallelism(project, run, kind, model):
    parallel, sharded = run("ddp", model=model), run(kind, model=model)
    assert_ran_as(sharded, kind)
    assert_same(sharded, parallel)
    assert largest_difference(sharded.weights(), parallel.weights()) < 1e-5
    assert_saved_model_is_the_live_one(project, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter", "precomputed"])
@pytest.mark.parametrize("kind", SHARDED)
def test_references_of_sharded_models(project, run, kind, reference):
    parallel, sharded = run("ddp", reference), run(kind, reference)
    assert_ran_as(sharded, kind)
    assert_same(sharded, parallel)
    assert_saved_model_is_the_live_one(project, sharded)
