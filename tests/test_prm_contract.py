"""`trl_hrm.prm` has the names, signature, defaults, tags and metrics of `trl.experimental.prm` in TRL 1.13, copied by hand."""

import inspect
import logging
from dataclasses import fields

import numpy as np
import pytest
from transformers import HfArgumentParser
from transformers.trainer_utils import EvalPrediction

from trl_hrm import HRMRewardTrainer
from trl_hrm._compat import BaseConfig
from trl_hrm.prm import PRMConfig, PRMTrainer
from trl_hrm.prm.prm_trainer import compute_accuracy


class TestNames:
    def test_modules(self):
        """axolotl imports the first two modules, and its copy of the trainer uses the other two."""
        from trl_hrm.prm import prm_config, prm_trainer

        assert prm_config.PRMConfig is PRMConfig and prm_trainer.PRMTrainer is PRMTrainer

    def test_constructor(self):
        """Checks positions too, because a moved parameter would take the wrong argument."""
        parameters = list(inspect.signature(PRMTrainer).parameters.values())
        assert [(parameter.name, parameter.default) for parameter in parameters] == [
            ("model", None),
            ("args", None),
            ("data_collator", None),
            ("train_dataset", None),
            ("eval_dataset", None),
            ("processing_class", None),
            ("model_init", None),
            ("compute_metrics", None),
            ("callbacks", None),
            ("optimizers", (None, None)),
            ("preprocess_logits_for_metrics", None),
            ("peft_config", None),
        ]
        assert {parameter.kind for parameter in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}

    def test_tokenize_row(self):
        assert isinstance(inspect.getattr_static(PRMTrainer, "tokenize_row"), staticmethod)
        parameters = inspect.signature(PRMTrainer.tokenize_row).parameters.values()
        assert [parameter.name for parameter in parameters] == [
            "features",
            "tokenizer",
            "step_separator",
            "max_length",
            "max_completion_length",
            "train_on_last_step_only",
            "is_eval",
        ]
        assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)

    def test_identity(self):
        assert PRMTrainer._tag_names == ["trl", "prm"]
        assert PRMTrainer._name == "PRM"
        assert PRMTrainer._paper["id"] == "2211.14275"
        assert "@article{uesato2022solving," in PRMTrainer._paper["citation"]
        # ... and none of these come from the other trainer or are passed to it
        assert HRMRewardTrainer._name == "HRM Reward" and HRMRewardTrainer._paper["id"] == "2503.13551"


class TestConfig:
    def test_fields_and_defaults(self, tmp_path):
        """A changed default would change a run without any change in the user's code."""
        own = {
            "max_length": 1024,
            "max_completion_length": None,
            "disable_dropout": True,
            "step_separator": "\n",
            "train_on_last_step_only": False,
            "dataset_num_proc": None,
            "accept_changes": [],  # added
        }
        assert {field.name for field in fields(PRMConfig)} - {field.name for field in fields(BaseConfig)} == own.keys()
        config = PRMConfig(str(tmp_path), use_cpu=True)
        others = {"learning_rate": 1e-5, "logging_steps": 10, "gradient_checkpointing": True, "bf16": True}
        assert {name: getattr(config, name) for name in own | others} == own | others

    def test_command_line(self, tmp_path):
        args = ["--output_dir", str(tmp_path), "--step_separator", ";", "--max_completion_length", "7", "--use_cpu"]
        [config] = HfArgumentParser(PRMConfig).parse_args_into_dataclasses([*args, "--train_on_last_step_only"])
        assert (config.step_separator, config.max_completion_length, config.train_on_last_step_only) == (";", 7, True)


def logits_of(*rows: str) -> np.ndarray:
    """Return logits: `"10"` is a row of two tokens, the first judged correct and the second wrong."""
    return np.array([[[0.2, 0.8] if token == "1" else [0.7, 0.3] for token in row] for row in rows])


class TestAccuracy:
    @pytest.mark.parametrize(
        ("rows", "labels", "expected"),
        [
            (("10", "10"), [[1, 0], [0, 1]], 0.5),
            (("10", "10"), [[1, 0], [1, -100]], 1.0),
            (("10", "10"), [[1, 1], [0, -100]], 1 / 3),
            (("1111",), [[-100, 1, 0, -100]], 0.5),
            (("1010",), [[0.9, 0.9, 0.5, 0.4]], 0.75),
            (("10",), [[-100.0, 0.0]], 1.0),
        ],
    )
    def test_steps(self, rows, labels, expected):
        """If padding, the largest part of the batch, were counted, it would hide the judged steps."""
        predictions, labels = logits_of(*rows), np.array(labels)
        assert compute_accuracy((predictions, labels)) == {"accuracy": pytest.approx(expected)}
        assert compute_accuracy(EvalPrediction(predictions=predictions, label_ids=labels))[
            "accuracy"
        ] == pytest.approx(expected)

    def test_padded_predictions(self):
        """If batches have different lengths, the logits are padded with -100 too."""
        predictions = logits_of("10")
        predictions[0, 1] = -100
        assert compute_accuracy((predictions, np.array([[1, -100]]))) == {"accuracy": 1.0}

    def test_pairs(self, caplog):
        """Rewards of chosen and rejected texts. A tie is neither right nor wrong."""
        rewards, labels = np.array([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]), np.array([0, 1, 1])
        with caplog.at_level(logging.WARNING):
            assert compute_accuracy((rewards, labels)) == {"accuracy": 0.5}
        assert (  # TRL's own tests look for these words
            "There are 1 out of 3 instances where the predictions for both options are equal. These instances are ignored in "
            "the accuracy computation."
        ) in caplog.text
        caplog.clear()
        assert compute_accuracy((rewards[:2], labels[:2])) == {"accuracy": 0.5} and not caplog.text
