"""Fixtures for the tests that need vLLM."""

import pytest

from ..search.serving import ENVIRONMENT


@pytest.fixture
def vllm_environment(monkeypatch):
    pytest.importorskip("vllm", reason="needs vLLM; `make test-slow` installs it")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
