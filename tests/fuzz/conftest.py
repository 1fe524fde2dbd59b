"""The valid inputs that the fuzzer mutates."""

import shutil
from pathlib import Path

import pytest

from .targets import make_inputs


@pytest.fixture(scope="session")
def inputs(made_once, policy) -> Path:
    return made_once("fuzz-inputs", lambda folder: make_inputs(folder, lambda path: shutil.copytree(policy, path)))
