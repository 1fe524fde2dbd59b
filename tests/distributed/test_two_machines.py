"""`trl-hrm reward` trains on several machines: here two launchers that meet through the network of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_hrm.scripts.training import launch

from .launching import ROOT, Project, free_port


def start(folder: Path, name: str, *launcher: str) -> subprocess.Popen:
    settings = {
        "config": ROOT / "recipes" / "tiny" / "hrm_reward.yaml",
        "make_tiny_model": "false",
        "dataset_name": "data",
        "model_name_or_path": "classification",
        "output_dir": name,
        "packing": "false",
        "max_steps": 3,
        "warmup_steps": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": "true",
    }
    words = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "trl_hrm.cli", "reward", *words, *launcher]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)


def test_options_of_machines_go_to_accelerate(monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    options = (
        "--num_machines 4 --machine_rank 2 --num_processes 32 --main_process_ip 10.0.0.1 --main_process_port 29500"
    )
    training = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    launch("reward", ["--dataset_name", "data", *options.split(), *training])
    [args] = launched
    assert (args.num_machines, args.machine_rank, args.num_processes, args.multi_gpu) == (4, 2, 32, True)
    assert (args.main_process_ip, args.main_process_port) == ("10.0.0.1", 29500)
    assert args.training_script_args == ["--dataset_name", "data", *training]
    launch("reward", ["--dataset_name", "data", "--num_machines", "1", *training])
    assert launched[1].num_machines == 1 and not launched[1].multi_gpu
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    one_gpu_each = ["--num_machines", "4", "--num_processes", "4", "--machine_rank", "1"]
    launch("reward", ["--dataset_name", "data", *one_gpu_each, *training])
    assert launched[2].multi_gpu
    for processes in ([], ["--num_processes", "6"]):
        with pytest.raises(ValueError, match="`num_processes` is (None|6). Set `num_processes` to the number of"):
            launch("reward", ["--dataset_name", "data", "--num_machines", "4", *processes, *training])
    assert len(launched) == 3


@pytest.mark.parametrize(("name", "is_multi_gpu"), [("single_gpu", True), ("multi_gpu", False), ("zero3", False)])
def test_machines_with_a_configuration(monkeypatch, name, is_multi_gpu):
    """The configurations of TRL are for one machine: 8 processes would be 4 per machine, and `single_gpu` starts separate trainings."""
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    options = ["--dataset_name", "data", "--accelerate_config", name, "--num_machines", "2"]
    training = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(ValueError, match="`num_processes` is None"):
        launch("reward", [*options, *training])
    launch("reward", [*options, "--num_processes", "16", *training])
    assert (launched[0].num_processes, launched[0].multi_gpu) == (16, is_multi_gpu)


@pytest.mark.slow  # four launchers and as many training processes
def test_two_machines_train_what_one_machine_trains(tmp_path):
    Project.make(tmp_path)
    port = str(free_port())
    machines = {
        f"machine-{rank}": start(
            tmp_path,
            f"machine-{rank}",
            *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
        )
        for rank in range(2)
    }
    for name, process in machines.items():
        assert process.wait(600) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
    single = start(tmp_path, "single", "--num_processes", "2", "--main_process_port", str(free_port()))
    assert single.wait(600) == 0, (tmp_path / "single.log").read_text()[-3000:]
    assert not (tmp_path / "machine-1" / "model.safetensors").exists()  # only the first machine saves
    weights = load_file(tmp_path / "machine-0" / "model.safetensors")
    expected = load_file(tmp_path / "single" / "model.safetensors")
    before = load_file(tmp_path / "classification" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
