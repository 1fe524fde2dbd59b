"""Fixtures for the trainer tests."""

import pytest

from tests.helpers import tiny_model, tiny_tokenizer
from tests.trainer.kl_training import LM, moved


@pytest.fixture
def paths(tmp_path):
    """Paths of a saved policy and of a saved reference model, both with tokenizers."""
    for name, model in (("policy", tiny_model(LM)), ("other", moved(tiny_model(LM)))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return str(tmp_path / "policy"), str(tmp_path / "other")
