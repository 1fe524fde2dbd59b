"""`trl-hrm reward`, `trl-hrm implicit-prm`, `trl-hrm kl-self` and `trl-hrm grpo`: how options are divided, and training in two processes."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from trl import GRPOConfig, SFTConfig

from tests.distributed.launching import Project, free_port
from trl_hrm import HRMRewardConfig, ImplicitPRMConfig, KLSelfConfig, StepGRPOConfig
from trl_hrm._compat import BaseConfig
from trl_hrm.cli import main
from trl_hrm.scripts.training import TrainingScriptArguments, launch, load_splits, run_script


ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; from trl_hrm.scripts.training import launch; launch(sys.argv[1], sys.argv[2:])"
VALUES = {"model_name_or_path": "model", "use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def launched(monkeypatch) -> list:
    """Records the calls of `accelerate launch` instead of starting processes."""
    calls = []
    monkeypatch.setattr(accelerate_launch, "launch_command", calls.append)
    return calls


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "reward.yaml"
    path.write_text(yaml.safe_dump(VALUES | {"dataset_name": "data", "output_dir": str(tmp_path / "out")}))
    return path


@pytest.mark.parametrize(
    ("name", "config", "base"),
    [
        ("reward", HRMRewardConfig, BaseConfig),
        ("implicit-prm", ImplicitPRMConfig, HRMRewardConfig),
        ("kl-self", KLSelfConfig, SFTConfig),
        ("grpo", StepGRPOConfig, GRPOConfig),
    ],
)
def test_help_lists_own_options_without_importing_torch(name, config, base):
    code = f"{RUN}; assert not {{'torch', 'accelerate'}} & sys.modules.keys()"
    result = subprocess.run([sys.executable, "-c", code, name, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    own = {field.name for field in dataclasses.fields(config)} - {field.name for field in dataclasses.fields(base)}
    for option in {"dataset_name", "dataset_test_split", "config", "accelerate_config", "help_all", *own}:
        assert re.search(rf"--{option}\b", result.stdout), option


def test_all_options_on_request(capsys):
    launch("reward", ["--help_all"])
    shown = capsys.readouterr().out
    for option in ("--error_weight", "--warmup_steps", "--lora_r", "--make_tiny_model"):
        assert option in shown


@pytest.mark.parametrize(
    ("name", "module"), [("reward", "reward"), ("kl-self", "kl_self"), ("implicit-prm", "implicit_prm")]
)
def test_unknown_options_go_to_accelerate(launched, config, name, module):
    own = ["--config", str(config), "--learning_rate", "2e-5", "--max_length", "2"]
    launch(name, [*own[:4], "--num_processes", "2", "--multi_gpu", *own[4:]])
    [args] = launched
    assert (args.num_processes, args.multi_gpu, args.config_file) == (2, True, None)
    assert (args.module, args.training_script) == (True, f"trl_hrm.scripts.{module}")
    assert args.training_script_args == own


def test_options_shared_with_accelerate(launched, config):
    """`accelerate launch` would use `--config=FILE` as its own file, and `--debug` of a training has a value."""
    assert main(["reward", f"--config={config}", "--debug", "underflow_overflow"]) == 0
    assert launched[0].training_script_args == ["--config", str(config), "--debug", "underflow_overflow"]
    assert launched[0].config_file is None


def test_a_damaged_file_is_a_one_line_error(launched, config, capsys):
    for text, message in (("a: [", "not valid YAML"), ("1: 2", "expected the name"), ("a: 1\na: 2", "'a' twice")):
        config.write_text(text)
        assert main(["kl-self", "--config", str(config)]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: {config}") and message in shown
    assert not launched


def test_accelerate_config_by_name_or_file_and_from_yaml(launched, config):
    config.write_text(config.read_text() + "accelerate_config: zero2\nnum_processes: 4\n")
    launch("reward", ["--config", str(config)])
    file = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
    launch("reward", ["--config", str(config), "--accelerate_config", str(file), "--num_processes", "3"])
    from_yaml, overridden = launched
    assert (Path(from_yaml.config_file).name, from_yaml.num_processes) == ("zero2.yaml", 4)
    assert (overridden.config_file, overridden.num_processes) == (str(file), 3)
    assert overridden.training_script_args == ["--config", str(config)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no_such_option", "1"], "--no_such_option"),
        (["--num_processes", "2", "--no_such_switch"], "--no_such_switch"),
        (["--error_weight", "-1"], "error_weight"),
        (["--accelerate_config", "zero9"], "zero9"),
    ],
)
def test_refuses_before_a_process_is_started(launched, config, options, message):
    """Two processes would both load the model and print interleaved errors."""
    with pytest.raises(ValueError, match=message):
        launch("reward", ["--config", str(config), *options])
    assert not launched


@pytest.mark.parametrize("module", ["reward", "kl_self"])
@pytest.mark.parametrize(
    ("entry", "remedy"),
    [
        ("datasets: [{path: a}, {path: b}]", "trl-hrm build-stepwise INPUT INPUT --weights"),
        ("streaming: true", "Remove it"),
    ],
)
def test_refuses_mixtures_of_trl(launched, config, capsys, module, entry, remedy):
    """A script that is run without the launcher ignores unknown keys of the file, and would train on `dataset_name` alone."""
    script = importlib.import_module(f"trl_hrm.scripts.{module}")
    config.write_text(f"{config.read_text()}{entry}\n")
    with pytest.raises(ValueError, match=remedy):
        launch(module.replace("_", "-"), ["--config", str(config)])
    with pytest.raises(SystemExit):
        run_script(script.main, script.make_parser(), ["--config", str(config)], fail_with_unknown_args=False)
    assert remedy in capsys.readouterr().err and not launched


@pytest.mark.parametrize("entry", ["no_such_option: 1", "multi_gpu: true"])
def test_refuses_keys_of_the_file(launched, config, entry):
    """`accelerate launch` would use the value as the script to run."""
    config.write_text(f"{config.read_text()}{entry}\n")
    with pytest.raises(ValueError, match=entry.split(":")[0]):
        launch("reward", ["--config", str(config)])
    assert not launched


def test_a_file_instead_of_a_dataset(tmp_path):
    """The error said that the Hub cannot be reached."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+2?"}\n')
    arguments = TrainingScriptArguments(dataset_name=str(tmp_path / "train.jsonl"))
    with pytest.raises(ValueError, match=r"train.jsonl is a file. `dataset_name` must be a folder"):
        load_splits(arguments, None)


@pytest.mark.slow  # .ci/run trains in two processes with YAML files
def test_trains_in_two_processes_from_yaml_and_command_line(tmp_path):
    """From a folder without a clone, as after `pip install`."""
    Project.make(tmp_path)
    values = {
        "dataset_name": "data",
        "model_name_or_path": "classification",
        "output_dir": "out",
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "packing": False,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1.0,
        "num_processes": 2,
    }
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(VALUES | values))
    options = ["--config", "reward.yaml", "--learning_rate", "1e-3", "--per_device_train_batch_size", "2"]
    outputs = []
    for plan in ("true", "false"):
        words = [*options, "--plan", plan, "--cpu", "--main_process_port", str(free_port())]
        result = subprocess.run(
            [sys.executable, "-c", RUN, "reward", *words], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr[-6000:]
        assert (tmp_path / "out").exists() == (plan == "false")
        outputs.append([line for line in result.stdout.splitlines() if line.startswith(("training plan", "  "))])
    assert outputs[0] == outputs[1] and outputs[0].count("training plan") == 1  # only the main process prints it
    assert "  rows per optimizer step    4 (batch size 2 x accumulation 1 x processes 2)" in outputs[0]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    first, last = (log for log in state["log_history"] if "loss" in log)
    assert first["learning_rate"] == 1e-3
    assert last["epoch"] == 2 * 4 / 16  # 2 steps of 2 processes with 2 of the 16 rows each
    assert (tmp_path / "out" / "model.safetensors").exists()
