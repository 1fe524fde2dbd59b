"""Fixtures of the tests of trainers."""

import pytest

from tests.helpers import tiny_model, tiny_tokenizer
from tests.trainer.kl_training import LM, moved


@pytest.fixture
def paths(tmp_path):
    """A policy and another model with its tokenizer, on disk."""
    for name, model in (("policy", tiny_model(LM)), ("other", moved(tiny_model(LM)))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return str(tmp_path / "policy"), str(tmp_path / "other")
