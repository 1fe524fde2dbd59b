"""
`KLSelfTrainer` under DeepSpeed and FSDP2 in two real processes on CPU, against plain data parallelism.

There, policy and reference are two sharded models, and their heads are used outside their modules. A fault in one need
not stop the other.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from .kl_launching import LOGGED, LORA, KLProject
from .launching import KINDS, SHARDED, Run, assert_ran_as, largest_difference


pytestmark = pytest.mark.slow

SCENARIOS = {
    # one rank has about 600 trained tokens, the other 5: under ZeRO-3 both must gather equally often
    "copy": {"rows": "long"},
    # a tied policy; some ranks, and some whole steps, have no trained token
    "other": {
        "model": "lm-tied",
        "rows": "untrained",
        "packing": True,
        "max_length": 40,
        "gradient_accumulation_steps": 1,
    },
    "adapter": {"lora": LORA, "learning_rate": 0.3, "gradient_checkpointing": True},
    # 3 batches to compute, so one rank has one more
    "states": {"precompute_ref_hidden": True, "rows": "long", "per_device_eval_batch_size": 2},
    # in the folder of the previous scenario
    "states-again": {"precompute_ref_hidden": True, "rows": "long", "per_device_eval_batch_size": 2},
}
ON_CPU = {"use_cpu": False, "ddp_backend": "gloo"}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> KLProject:
    return KLProject(tmp_path_factory.mktemp("kl-sharded"))


@pytest.fixture(scope="module")
def run(project):
    """Run each scenario of a kind once. A DeepSpeed process can train only once; the others train all scenarios."""
    runs: dict[str, Run] = {}

    def scenario(kind: str, name: str) -> dict:
        args = SCENARIOS[name] | ({} if kind == "ddp" else ON_CPU)
        if name == "other":
            args["ref_model"] = str(project.folder / "lm-other")
        if "states" in name:
            args["ref_hidden_dir"] = str(project.folder / f"{kind}-ref-hidden")
        return project.scenario(f"{kind}-{name}", **args)

    def run(kind: str, name: str) -> Run:
        if f"{kind}-{name}" not in runs:
            if name == "states-again":
                run(kind, "states")
            names = [name] if kind.startswith("zero") else list(SCENARIOS)
            found = project.run(*[scenario(kind, each) for each in names], **KINDS[kind])
            runs.update(zip([f"{kind}-{each}" for each in names], found, strict=True))
        return runs[f"{kind}-{name}"]

    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the weights of the saved model, loaded as a user does."""
    if (run.output_dir / "adapter_model.safetensors").exists():
        base = AutoModelForCausalLM.from_pretrained(run.output_dir.parent / "lm")
        model = PeftModel.from_pretrained(base, run.output_dir)
    else:
        model = AutoModelForCausalLM.from_pretrained(run.output_dir)
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("kind", SHARDED)
def test_equals_data_parallelism(run, kind, name):
    """
    With shards of another rank's reference, an empty or half head, or a KL without a gradient, training would still run.
    Wrong settings silently give plain data parallelism. So the test first asserts what ran.
    """
    expected, sharded = run("ddp", name), run(kind, name)
    assert_ran_as(expected, "ddp")
    assert_ran_as(sharded, kind)
    for logged in LOGGED:
        assert sharded.logged(logged) == pytest.approx(expected.logged(logged), rel=1e-4, abs=1e-5), logged
    assert sharded.logged("kl")[-1] > 0.5
    assert largest_difference(weights(sharded), weights(expected)) < 1e-5
    assert largest_difference(weights(sharded), weights_before(sharded, name)) > 1e-3


def weights_before(run: Run, name: str) -> dict[str, torch.Tensor]:
    if name == "adapter":
        return {key: torch.zeros_like(weight) if "lora_B" in key else weight for key, weight in weights(run).items()}
    model = AutoModelForCausalLM.from_pretrained(run.output_dir.parent / ("lm-tied" if name == "other" else "lm"))
    return {key: weight.detach() for key, weight in model.named_parameters()}


@pytest.mark.parametrize("name", ["copy", "other", "adapter"])
@pytest.mark.parametrize("kind", SHARDED)
def test_the_reference_does_not_move(run, kind, name):
    """Gathered from all ranks, its weights equal those under plain data parallelism bit by bit, before and after."""
    expected = run("ddp", name).facts()["reference"]
    for rank in (0, 1):
        facts = run(kind, name).facts(rank)["reference"]
        for when in ("before", "after"):
            assert facts[when]["digest"] == expected["before"]["digest"]
            assert facts[when]["num_frozen"] == expected["before"]["num_frozen"] > 0
            assert not facts[when]["has_gradient"]
            assert facts[when]["in_training_mode"] == (name == "adapter")
        share = facts["after"]["held"] / facts["after"]["in_all"]
        assert share == pytest.approx(0.5 if kind in ("zero3", "fsdp2") else 1, abs=0.02)


@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_states_on_disk_are_reused(run, kind):
    """Recomputing costs hours, and a second launch that does not recognise the reference would not start."""
    first, second = run(kind, "states"), run(kind, "states-again")
    files = list(Path(first.output_dir.parent, f"{kind}-ref-hidden").glob("*.safetensors"))
    assert len(files) == 2
    assert max(file.stat().st_mtime for file in files) < (first.output_dir / "probe-0.json").stat().st_mtime
    assert second.logged("kl") == first.logged("kl")
