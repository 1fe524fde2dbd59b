"""`KLSelfTrainer` killed between two checkpoints, in a real process, and resumed in another process."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors.torch import load_file

from ..distributed.kl_launching import LOGGED, LORA, KLProject
from ..distributed.launching import Run, largest_difference


SCENARIOS = {
    "copy": {},
    "adapter": {"lora": LORA | {"lora_dropout": 0.2, "modules_to_save": ["lm_head"]}},
    "states": {"precompute_ref_hidden": True},
}
TRAINING = {
    "optim": "adamw_torch",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "random",
    "save_strategy": "steps",
    "save_steps": 2,
}
FILES = {name: "adapter_model.safetensors" if name == "adapter" else "model.safetensors" for name in SCENARIOS}


def make_runs(project: KLProject, names: list[str]) -> dict[str, tuple[Run, Run]]:
    """Each scenario of 8 steps twice: uninterrupted, and resumed after it was killed at step 5."""

    def scenario(name: str, folder: str, resume: str = "") -> dict:
        return project.scenario(f"{name}-{folder}", resume=resume, **TRAINING, **SCENARIOS[name])

    def kill(name: str) -> None:
        run = project.run(scenario(name, "killed"), exit_code=-signal.SIGKILL, PROBE_KILL_AT_STEP="5")[0]
        assert (run.output_dir / "checkpoint-4" / FILES[name]).exists()
        assert not (run.output_dir / "checkpoint-6").exists() and not (run.output_dir / FILES[name]).exists()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill, names))
    resumed = [scenario(name, "killed", "checkpoint-4") for name in names]
    found = project.run(*resumed, *[scenario(name, "unbroken") for name in names])
    return dict(zip(names, zip(found[len(names) :], found[: len(names)], strict=True), strict=True))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> KLProject:
    return KLProject(tmp_path_factory.mktemp("kl-resume"))


@pytest.fixture(scope="module")
def runs(project) -> dict[str, tuple[Run, Run]]:
    return make_runs(project, ["copy", "adapter"])


@pytest.mark.parametrize("name", ["copy", "adapter"])
def test_resuming_equals_an_uninterrupted_run(runs, name):
    """
    If the reference were made from the checkpoint instead of the initial model, the KL would be smaller and the policy
    different, without an error. The same holds for a different row order or a newly initialized adapter.
    """
    check_resumed(*runs[name], name)


@pytest.mark.slow
def test_resuming_with_precomputed_states(project):
    check_resumed(*make_runs(project, ["states"])["states"], "states")


def check_resumed(unbroken: Run, resumed: Run, name: str) -> None:
    for logged in LOGGED:
        assert resumed.logged(logged) == unbroken.logged(logged), logged
    kl = resumed.logged("kl")
    assert len(kl) == 8 and kl[0] < 1e-3
    assert min(kl[4:]) > 0.1  # with a reference from the checkpoint, the first KL after resuming would be 0
    found, expected = (load_file(run.output_dir / FILES[name]) for run in (resumed, unbroken))
    assert largest_difference(found, expected) == 0
    assert largest_difference(load_file(unbroken.output_dir / "checkpoint-4" / FILES[name]), expected) > 1e-3


@pytest.mark.parametrize("name", ["copy", "adapter"])
def test_the_reference_is_the_model_that_training_began_with(runs, name):
    """Compares weights bit by bit, because logs would agree if both runs were wrong in the same way."""
    unbroken, resumed = (run.facts()["reference"] for run in runs[name])
    digests = {facts[when]["digest"] for facts in (unbroken, resumed) for when in ("before", "after")}
    assert len(digests) == 1
