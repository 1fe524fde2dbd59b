"""`KLSelfTrainer` in two processes and in one: the same losses, the same KL, the same weights."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from ..helpers import tiny_tokenizer
from .kl_launching import LOGGED, LORA, KLProject
from .launching import Run, largest_difference


# Differences between the scenarios. Each precomputes states into its own output folder.
SCENARIOS = {
    "copy": {"gradient_accumulation_steps": 2},
    "evaluated": {"evaluate_first": True},  # an evaluation must not stop the processes from exchanging gradients
    "long": {"rows": "long", "ref_model": "lm-other", "model": "lm-tied", "kl_direction": "reverse"},
    "adapter": {"lora": LORA | {"modules_to_save": ["lm_head"]}, "gradient_accumulation_steps": 2},
    "packed": {"packing": True, "max_length": 64, "gradient_accumulation_steps": 2},
    "untrained": {"rows": "untrained", "packing": True, "max_length": 40},
    "states": {"precompute_ref_hidden": True, "gradient_accumulation_steps": 2},
    "untrained-states": {
        **{"precompute_ref_hidden": True, "rows": "untrained", "packing": True, "max_length": 40},
        "per_device_eval_batch_size": 2,  # 3 batches to compute, so one rank has one more
    },
    "adapter-states": {"precompute_ref_hidden": True, "lora": LORA},
}
FAST = ("copy",)  # the others vary it


def named(names) -> list:
    """Return the names as parameters. Scenarios outside of `FAST` are slow."""
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory) -> Callable[[str], tuple[Run, Run]]:
    """
    Return the runs of a scenario: with 1 row per process in two processes, and with 2 rows in this process. The scenarios outside of
    `FAST` are launched together.
    """

    @cache
    def runs(is_fast: bool) -> dict[str, tuple[Run, Run]]:
        project = KLProject(tmp_path_factory.mktemp("kl"))
        names, found = [name for name in SCENARIOS if (name in FAST) == is_fast], []
        for num_processes in (2, 1):
            scenarios = []
            for name in names:
                args = SCENARIOS[name] | {"per_device_train_batch_size": 2 // num_processes}
                if "ref_model" in args:
                    args["ref_model"] = str(project.folder / args["ref_model"])
                scenarios.append(project.scenario(f"{name}-{num_processes}", **args))
            if num_processes == 2:
                found.append(project.run(*scenarios, config="cpu_2proc.yaml"))
            else:
                found.append(project.run_here(*scenarios))
        return dict(zip(names, zip(*found, strict=True), strict=True))

    return lambda name: runs(name in FAST)[name]


def weights(run: Run) -> dict[str, torch.Tensor]:
    adapter = run.output_dir / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else run.output_dir / "model.safetensors")


@pytest.mark.parametrize("name", named(SCENARIOS))
def test_two_processes_equal_one(run_of, name):
    """
    If the logarithm used the KL of one rank or micro-batch, or each rank took the mean over its own sequences, training
    would run with different gradients and without an error. The same holds for processes that exchange no gradients.
    """
    double, single = run_of(name)
    for rank in (0, 1):
        facts = double.facts(rank)
        assert (facts["num_processes"], facts["distributed_type"]) == (2, "MULTI_CPU")
        assert facts["wrapper"] == "DistributedDataParallel"
    assert (single.facts()["num_processes"], single.facts()["distributed_type"]) == (1, "NO")
    for logged in LOGGED:
        assert double.logged(logged) == pytest.approx(single.logged(logged), rel=1e-4, abs=1e-5), logged
    assert len(single.logged("kl")) > 2 and single.logged("kl")[-1] > 0.05  # there is something to compare
    assert largest_difference(weights(double), weights(single)) < 1e-5


@pytest.mark.parametrize("name", named(name for name in SCENARIOS if "states" not in name))
def test_the_reference_does_not_move(run_of, name):
    """A reference that is trained along, or left in training mode, would show only as a smaller KL."""
    for run in run_of(name):
        before, after = (run.facts()["reference"][when] for when in ("before", "after"))
        assert before == after
        assert before["num_frozen"] > 0 and not after["has_gradient"]
        assert after["in_training_mode"] == ("adapter" in name)


@pytest.mark.parametrize("name", named(["untrained", "untrained-states"]))
def test_rows_without_a_trained_token(run_of, name):
    """
    A prompt that fills a row leaves nothing to train on. Then one rank has no sequence and the other has some, or neither
    has any. A mean over no sequences would be NaN and destroy every weight.
    """
    for run in run_of(name):
        assert len(run.logged("loss")) == 6
        assert run.logged("loss").count(0) == 3 and len(run.logged("kl")) == 3
        assert all(weight.isfinite().all() for weight in weights(run).values())


@pytest.mark.slow  # like the scenario
def test_long_rows_are_long(run_of):
    """Otherwise the scenario would not test ranks with different numbers of token blocks."""
    rows = (run_of("long")[0].output_dir.parent / "long.jsonl").read_text(encoding="utf-8").splitlines()
    lengths = [len(ids) for ids in tiny_tokenizer()([row.split('"completion": ')[1] for row in rows])["input_ids"]]
    assert min(lengths[::2]) > 520 and max(lengths[1::2]) < 16


@pytest.mark.parametrize("name", named(name for name in SCENARIOS if "states" in name))
def test_ranks_share_the_work(run_of, name):
    """Each rank must compute its own part, so that no sequence is skipped or computed twice."""
    folders = [run.output_dir / "_ref_hidden" for run in run_of(name)]
    files = [sorted(folder.glob("*.safetensors")) for folder in folders]
    assert [len(found) for found in files] == [2, 1]
    parts = [[load_file(path) for path in found] for found in files]
    assert not parts[0][0].keys() & parts[0][1].keys()
    assert abs(len(parts[0][0]) - len(parts[0][1])) <= 8
    double, single = parts[0][0] | parts[0][1], parts[1][0]
    assert double.keys() == single.keys() and len(single) == (5 if name.startswith("untrained") else 16)
    for key, states in single.items():
        # padded to a different length, a state is rounded differently
        torch.testing.assert_close(double[key], states, rtol=0.01, atol=0.01)
    assert (folders[0] / "manifest.json").read_text() == (folders[1] / "manifest.json").read_text()
