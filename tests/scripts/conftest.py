"""Inputs that the tests of all commands share."""

from pathlib import Path

import pytest

from .commands import make_inputs


@pytest.fixture(scope="module")
def work(tmp_path_factory, policy) -> Path:
    """Inputs of all commands, each made by the command that writes it."""
    work = tmp_path_factory.mktemp("work")
    make_inputs(work, policy)
    return work
