"""`trl-hrm env` prints what a bug report needs, and no secrets."""

import importlib.metadata
import os
import platform
import subprocess
import sys

import pytest

from trl_hrm.cli import main
from trl_hrm.scripts.env import PACKAGES


def lines_of(printed: str) -> dict[str, str]:
    assert all(line.startswith("- ") for line in printed.splitlines())  # a list in Markdown
    return dict(line[2:].split(": ", 1) for line in printed.splitlines())


def test_versions(capsys, monkeypatch):
    """A module's `__version__` and its installed distribution may differ. The report must name the installed version."""
    version = importlib.metadata.version
    found = {"torch": "9.9+cu999", "deepspeed": None, "vllm": None}

    def installed(name: str) -> str:
        if found.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found.get(name) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert main(["env"]) == 0
    printed = lines_of(capsys.readouterr().out)
    assert set(PACKAGES) < printed.keys()
    assert printed["torch"] == "9.9+cu999" and printed["deepspeed"] == printed["vllm"] == "not installed"
    assert printed["transformers"] == version("transformers") and printed["trl_hrm"] == version("trl-hrm")
    assert printed["Python"] == platform.python_version()


@pytest.mark.parametrize(("names", "expected"), [([], "none"), (["NVIDIA A", "NVIDIA B"], "NVIDIA A, NVIDIA B")])
def test_devices(capsys, monkeypatch, names, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["env"]) == 0
    assert lines_of(capsys.readouterr().out)["Devices"] == expected


def test_no_secrets(tmp_path):
    """Bug reports are public, so addresses and paths in accelerate's configuration must not be printed."""
    secrets = {
        "HF_TOKEN": "hf_planted",
        "OPENAI_API_KEY": "sk-planted",
        "WANDB_API_KEY": "wandb-planted",
        "HF_ENDPOINT": "http://hub.planted.example",
        "USER": "user-planted",
        "LOGNAME": "user-planted",
        "HOSTNAME": "host-planted",
        "HOME": str(tmp_path / "home-planted"),
        "HF_HOME": str(tmp_path / "home-planted" / "hf"),
    }
    folder = tmp_path / "home-planted" / "hf" / "accelerate"
    for expected in ("not found", "found"):
        done = subprocess.run(
            [sys.executable, "-m", "trl_hrm.cli", "env"],
            env=os.environ | secrets,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert lines_of(done.stdout)["Default accelerate config"] == expected
        for text in ("planted", str(tmp_path), platform.node(), sys.prefix):
            assert text not in done.stdout
        assert "planted" not in done.stderr
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "default_config.yaml").write_text("main_process_ip: ip-planted\ndistributed_type: 'NO'\n")
