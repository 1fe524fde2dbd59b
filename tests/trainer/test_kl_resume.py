"""`KLSelfTrainer` killed between two checkpoints, in a real process, and resumed in another process."""

import functools
import signal
from collections.abc import Callable

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


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory) -> Callable[[str], tuple[Run, Run]]:
    """Run a scenario of 8 steps twice: uninterrupted, and resumed after it was killed at step 5."""
    project = KLProject(tmp_path_factory.mktemp("kl-resume"))

    @functools.cache
    def runs(name: str) -> tuple[Run, Run]:
        def scenario(folder: str, resume: str = "") -> dict:
            return project.scenario(f"{name}-{folder}", resume=resume, **TRAINING, **SCENARIOS[name])

        [killed] = project.run(scenario("killed"), exit_code=-signal.SIGKILL, PROBE_KILL_AT_STEP="5")
        assert (killed.output_dir / "checkpoint-4" / FILES[name]).exists()
        assert not (killed.output_dir / "checkpoint-6").exists() and not (killed.output_dir / FILES[name]).exists()
        resumed, unbroken = project.run(scenario("killed", "checkpoint-4"), scenario("unbroken"))
        return unbroken, resumed

    return runs


def named(*names: str) -> list:
    """Return the names as parameters. All but the first are slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name != names[0])) for name in names]


@pytest.mark.parametrize("name", named("copy", "adapter", "states"))
def test_resuming_equals_an_uninterrupted_run(runs_of, name):
    """
    If the reference were made from the checkpoint instead of the initial model, the KL would be smaller and the policy
    different, without an error. The same holds for a different row order or a newly initialized adapter.
    """
    unbroken, resumed = runs_of(name)
    for logged in LOGGED:
        assert resumed.logged(logged) == unbroken.logged(logged), logged
    kl = resumed.logged("kl")
    assert len(kl) == 8 and kl[0] < 1e-3
    assert min(kl[4:]) > 0.1  # with a reference from the checkpoint, the first KL after resuming would be 0
    found, expected = (load_file(run.output_dir / FILES[name]) for run in (resumed, unbroken))
    assert largest_difference(found, expected) == 0
    assert largest_difference(load_file(unbroken.output_dir / "checkpoint-4" / FILES[name]), expected) > 1e-3


@pytest.mark.parametrize("name", named("copy", "adapter"))
def test_the_reference_is_the_model_that_training_began_with(runs_of, name):
    """Compares weights bit by bit, because logs would agree if both runs were wrong in the same way."""
    unbroken, resumed = (run.facts()["reference"] for run in runs_of(name))
    digests = {facts[when]["digest"] for facts in (unbroken, resumed) for when in ("before", "after")}
    assert len(digests) == 1
