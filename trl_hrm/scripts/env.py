"""Print versions and devices for a bug report. Environment variables, paths and user names are never printed."""

from dataclasses import dataclass

from ..config import Config


PACKAGES = (
    "trl_hrm",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "vllm",
    "huggingface_hub",
    "hf_xet",
    "math-verify",
    "evaluate",
)


@dataclass(kw_only=True)
class EnvConfig(Config):
    """Configuration of [`print_env`]. It has no fields."""


def print_env(config: EnvConfig | None = None) -> str:
    """Return the versions of the packages and the names of the devices, as a Markdown list."""
    import platform
    from pathlib import Path

    import torch
    from accelerate.commands.config import default_config_file

    facts = {
        "Platform": platform.platform(),
        "Python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "CUDA version of torch": torch.version.cuda or "none",
        "Devices": _devices(),
        "Default accelerate config": "found" if Path(default_config_file).is_file() else "not found",
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not names and torch.backends.mps.is_available():
        names = ["MPS"]
    return ", ".join(names) or "none"
