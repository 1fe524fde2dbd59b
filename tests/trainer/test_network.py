"""Trainers use the network only on request."""

import random
import sys

from trl_hrm._compat import BaseTrainer

from ..helpers import make_trainer, random_tree, tiny_model


def test_a_trainer_sends_no_telemetry(tmp_path, monkeypatch):
    """TRL's base trainer sends telemetry when it is created, which goes unnoticed outside CI."""
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys.modules[BaseTrainer.__module__], "send_telemetry", lambda **_: sent.append(1))
    make_trainer(tmp_path, [random_tree(random.Random(0))], tiny_model())
    assert not sent
