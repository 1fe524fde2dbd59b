"""The valid inputs that the fuzzer mutates."""

from pathlib import Path

import pytest

from .targets import make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder
