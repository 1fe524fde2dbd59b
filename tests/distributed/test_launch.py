"""The recipe as users launch it: in one process, in two, and killed midway."""

import json
import signal

import pytest

from ..helpers import ALL_HEADS, tiny_model, tiny_tokenizer
from .launching import Project, Run, largest_difference


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project.make(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def single(project) -> Run:
    """One process, uninterrupted: 8 optimizer steps with 4 rows each."""
    return project.run("single", "--per_device_train_batch_size", "4", "--log_worst_steps", "100")


def test_two_processes_equal_one(project, single):
    """
    Ranks hold different numbers of labels: a mean per rank would give another loss and other gradients. A wrong launch
    would run one process, or two that never exchange gradients, without any error.
    """
    args = ("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "1", "--log_worst_steps", "100")
    double = project.run("double", *args, config="cpu_2proc.yaml")
    for rank in (0, 1):
        facts = double.facts(rank)
        assert (facts["num_processes"], facts["distributed_type"]) == (2, "MULTI_CPU")
        assert facts["wrapper"] == "DistributedDataParallel"
    assert (single.facts()["num_processes"], single.facts()["distributed_type"]) == (1, "NO")
    for name in ("loss", "grad_norm", "accuracy", "num_labels", "eval_loss", "eval_auroc"):
        assert len(single.logged(name)) > 0
        assert double.logged(name) == pytest.approx(single.logged(name), rel=1e-4), name
    assert len(single.logged("loss")) == 8
    assert double.evaluation()["eval_loss"] == pytest.approx(single.evaluation()["eval_loss"], abs=1e-5)
    assert double.evaluation()["eval_num_steps"] == sum(len(tree.labels) for tree in project.held_out)
    assert largest_difference(double.weights(), single.weights()) < 1e-5
    assert largest_difference(single.weights("checkpoint-2"), single.weights()) > 1e-3
    # 5 rows of evaluation on 2 processes: the last batch is filled, and its repeated row must not be in the table
    names = sorted(path.name for path in (single.output_dir / "_evaluations").glob("*.json"))
    assert names[-1:] == ["eval_00008.json"]
    for name in names:
        first, second = (json.loads((run.output_dir / "_evaluations" / name).read_text()) for run in (single, double))
        assert first["num_labels"] == second["num_labels"] and first["ece"] == pytest.approx(second["ece"], abs=1e-4)
        places = [{(one["row"], one["step_index"]): one for one in found["worst_steps"]} for found in (first, second)]
        assert places[0] and places[0].keys() == places[1].keys()
        for key, one in places[0].items():
            numbers = {"score", "error", "loss"}
            assert {**one, **dict.fromkeys(numbers)} == {**places[1][key], **dict.fromkeys(numbers)}
            assert all(one[name] == pytest.approx(places[1][key][name], abs=1e-4) for name in numbers)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["value", "mlp", "lm_mean"])
def test_heads_of_published_models(project, head):
    """DistributedDataParallel fails for weights without a gradient, such as the output embeddings under a value head."""
    model = tiny_model(ALL_HEADS[head], initializer_range=0.05)
    model.save_pretrained(project.folder / head)
    tiny_tokenizer().save_pretrained(project.folder / head)
    args = ("--max_steps", "2", "--regression_loss", "bce")
    single = project.run(f"single-{head}", *args, "--per_device_train_batch_size", "4", model=head)
    double = project.run(
        f"double-{head}", *args, "--per_device_train_batch_size", "2", model=head, config="cpu_2proc.yaml"
    )
    assert double.facts()["wrapper"] == "DistributedDataParallel"
    assert len(single.logged("loss")) == 2
    assert double.logged("loss") == pytest.approx(single.logged("loss"), rel=1e-4)
    assert largest_difference(double.weights(), single.weights()) < 1e-5
    assert largest_difference(single.weights(), model.state_dict()) > 1e-4


@pytest.mark.slow  # two more processes; tests/trainer resumes checkpoints to the same weights in one
def test_a_killed_run_resumes_to_the_same_weights(project, single):
    """SIGKILL leaves no time to save anything, so the last checkpoint must hold all that the rest depends on."""
    args = ("--per_device_train_batch_size", "4")
    killed = project.run("killed", *args, exit_code=-signal.SIGKILL, PROBE_KILL_AT_STEP="5")
    assert (killed.output_dir / "checkpoint-4" / "model.safetensors").exists()
    assert not (killed.output_dir / "checkpoint-6").exists() and not (killed.output_dir / "model.safetensors").exists()
    resumed = project.run("killed", *args, "--resume_from_checkpoint", str(killed.output_dir / "checkpoint-4"))
    assert resumed.logged("loss") == single.logged("loss")
    assert largest_difference(resumed.weights(), single.weights()) == 0
    assert resumed.evaluation()["eval_loss"] == single.evaluation()["eval_loss"]
