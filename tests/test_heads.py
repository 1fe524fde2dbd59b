"""Which model carries a head, and that the language-model head computes only two logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from trl_hrm.heads import check_head, gather_steps, step_outputs
from trl_hrm.step_format import StepFormat

from .helpers import HEADS, assert_gradients_equal, gradients, tiny_model


LM = HEADS["lm"]
IDS = torch.tensor([[5, 6, 7, 8]])


def test_lm_outputs_are_two_columns_of_the_full_logits():
    """In the order wrong, correct, with a bias if there is one. The model is unchanged afterwards."""
    model = tiny_model(HEADS["lm"])
    model.lm_head = torch.nn.Linear(64, model.config.vocab_size)  # with a bias
    before = model(IDS).logits
    with step_outputs(model, LM, [11, 3]):
        found = model(IDS).logits
    torch.testing.assert_close(found, before[..., [11, 3]])
    torch.testing.assert_close(model(IDS).logits, before)
    with pytest.raises(RuntimeError), step_outputs(model, LM, [11, 3]):
        raise RuntimeError  # an error inside the block must also restore the model
    torch.testing.assert_close(model(IDS).logits, before)


def test_lm_gradients_equal_those_of_the_full_logits():
    model = tiny_model(HEADS["lm"], tie_word_embeddings=True)
    expected = gradients(model, model(IDS).logits[..., [11, 3]].square().sum())
    with step_outputs(model, LM, [11, 3]):
        found = gradients(model, model(IDS).logits.square().sum())
    assert_gradients_equal(found, expected)


def test_token_classifiers_are_unchanged():
    model = tiny_model()
    with step_outputs(model, StepFormat(), None):
        assert model(IDS).logits.shape == (1, 4, 2)


def test_gather_steps_reads_flat_positions():
    logits = torch.arange(2 * 3 * 2).view(2, 3, 2)
    assert gather_steps(logits, torch.tensor([[2, 0], [4, 3]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [6, 7]]]


class TestCheck:
    def test_fitting_models(self):
        for step_format in HEADS.values():
            check_head(tiny_model(step_format), step_format)

    def test_three_labels(self):
        """With three classes, a softmax would silently give the score 1 − p₀ − p₂."""
        model = tiny_model()
        model.config.num_labels = 3
        with pytest.raises(ValueError, match="num_labels=3"):
            check_head(model, HEADS["classification"])

    def test_classification_model_for_regression(self):
        with pytest.raises(ValueError, match="num_labels=2"):
            check_head(tiny_model(), HEADS["regression"])

    def test_no_output_embeddings(self):
        with pytest.raises(ValueError, match="AutoModelForCausalLM"):
            check_head(AutoModel.from_config(tiny_model().config), HEADS["lm"])

    def test_a_classifier_is_not_a_language_model(self):
        with pytest.raises(ValueError, match="output embeddings"):
            check_head(tiny_model(), HEADS["lm"])

    def test_an_adapter_on_the_output_embeddings(self):
        """The two rows are read from the base weight, so the adapter would silently be ignored."""
        model = get_peft_model(tiny_model(HEADS["lm"]), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match="PEFT adapter"):
            check_head(model, HEADS["lm"])

    def test_output_embeddings_that_an_adapter_trains_whole(self):
        """`modules_to_save` wraps the module. The rows must come from the trained copy."""
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model(HEADS["lm"]), config)
        check_head(model, HEADS["lm"])
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
        expected = model(input_ids=IDS).logits[..., [11, 3]]
        with step_outputs(model, LM, [11, 3]):
            torch.testing.assert_close(model(input_ids=IDS).logits, expected)
