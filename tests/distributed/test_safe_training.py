"""Two real processes: a loss that is NaN on one rank, and a SIGKILL of both while they save a checkpoint."""

import re

import pytest

from trl_hrm.training.checkpoints import newest_complete, why_incomplete

from .launching import KINDS, SHARDED, Project, largest_difference


pytestmark = pytest.mark.slow
ARGS = ("--per_device_train_batch_size", "2")
ON_CPU = ("--use_cpu", "false", "--ddp_backend", "gloo")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project.make(tmp_path_factory.mktemp("safe"))


def args_of(kind: str) -> tuple[str, ...]:
    return ARGS if kind == "ddp" else ARGS + ON_CPU


@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_a_nan_on_one_rank_stops_all(project, kind):
    """A rank that stops alone leaves the others waiting for it until a timeout."""
    run = project.run(f"nan-{kind}", *args_of(kind), exit_code=1, PROBE_NAN_AT_STEP="5", **KINDS[kind])
    log = (project.folder / f"nan-{kind}.log").read_text(encoding="utf-8")
    # The launcher ends the other process when one has ended, perhaps before it prints
    assert re.search(r"error( on process 1)?: The training diverged: the loss at step 5 is NaN or infinite\.", log)
    assert f"The newest complete checkpoint is {run.output_dir}/checkpoint-4." in log
    assert sorted(path.name for path in run.output_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert all(weight.isfinite().all() for weight in run.weights("checkpoint-4").values())
    assert not (run.output_dir / "model.safetensors").exists()


@pytest.mark.parametrize(("kind", "files"), [("ddp", 1), ("ddp", 8), ("ddp", 12), ("fsdp2", 9)])
def test_killed_while_saving(project, kind, files):
    """Resumed with `--resume_from_checkpoint true` on the command line, it ends with the weights of an uninterrupted run."""
    name = f"killed-{kind}-{files}"
    killed = project.run(name, *args_of(kind), exit_code=None, PROBE_KILL_AT_FILE=f"4,{files}", **KINDS[kind])
    found, _ = newest_complete(killed.output_dir)
    assert found.name in ("checkpoint-2", "checkpoint-4")
    complete = why_incomplete(killed.output_dir / "checkpoint-4") is None
    resumed = project.run(name, *args_of(kind), "--resume_from_checkpoint", "true", **KINDS[kind])
    log = (project.folder / f"{name}.log").read_text(encoding="utf-8")
    assert f"Training resumes from {found}." in log
    assert complete or f"{killed.output_dir}/checkpoint-4 is skipped, because it is incomplete" in log
    if not (project.folder / f"whole-{kind}").exists():
        project.run(f"whole-{kind}", *args_of(kind), **KINDS[kind])
    whole = type(resumed)(project.folder / f"whole-{kind}")
    assert largest_difference(resumed.weights(), whole.weights()) < 1e-6


def test_other_settings_are_refused_on_all_ranks(project):
    project.run("refused", *ARGS, config="cpu_2proc.yaml")
    options = ("--resume_from_checkpoint", "true", "--learning_rate", "1e-4")
    project.run("refused", *ARGS, *options, config="cpu_2proc.yaml", exit_code=1)
    log = (project.folder / "refused.log").read_text(encoding="utf-8")
    assert "learning_rate was 0.001 and is 0.0001" in log
    project.run("refused", "--per_device_train_batch_size", "2", *options[:2], exit_code=1)
    assert "num_processes was 2 and is 1" in (project.folder / "refused.log").read_text(encoding="utf-8")
