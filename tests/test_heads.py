"""Which model carries a head, and that the language-model head computes only two logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, BertConfig, ViTConfig

from trl_hrm.heads import check_head, gather_steps, model_class, step_outputs

from .helpers import ALL_HEADS, HEADS, assert_gradients_equal, gradients, tiny_model


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


@pytest.mark.parametrize("tied", [False, True])
def test_mean_logits(tied):
    """One column: the mean of all logits, which is computed from the mean of the output embeddings and of the bias."""
    model = tiny_model(ALL_HEADS["lm_mean"], tie_word_embeddings=tied)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    logits = model(IDS).logits.mean(-1, keepdim=True)
    expected = gradients(model, logits.square().sum())
    with step_outputs(model, ALL_HEADS["lm_mean"], None):
        found = model(IDS).logits
        torch.testing.assert_close(found, logits)
        assert_gradients_equal(gradients(model, found.square().sum()), expected)
    assert model(IDS).logits.shape == (1, 4, model.config.vocab_size)


@pytest.mark.parametrize(("head", "width"), [("classification", 2), ("mlp", 2), ("regression", 1), ("value", 1)])
def test_other_heads_are_unchanged(head, width):
    model = tiny_model(ALL_HEADS[head])
    with step_outputs(model, ALL_HEADS[head], None):
        assert model(IDS).logits.shape == (1, 4, width)


class TestModels:
    def test_two_layers(self):
        """Linear, ReLU, linear on the last hidden states."""
        model = tiny_model(ALL_HEADS["mlp"])
        names = {name for name in model.state_dict() if not name.startswith("model.")}
        assert names == {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"}
        weights = [model.state_dict()[name] for name in sorted(names, key=lambda name: (name[6], "bias" in name))]
        hidden = model.model(IDS).last_hidden_state @ weights[0].T + weights[1]
        expected = hidden.clamp(min=0) @ weights[2].T + weights[3]
        torch.testing.assert_close(model(IDS).logits, expected)
        assert type(model).__name__ == "Qwen2ForProcessRewardModel"

    def test_value(self):
        model = tiny_model(ALL_HEADS["value"])
        names = {name for name in model.state_dict() if not name.startswith("model.")}
        assert names == {"lm_head.weight", "v_head.summary.weight", "v_head.summary.bias"}
        weights = model.state_dict()
        hidden = model.model(IDS).last_hidden_state
        expected = hidden @ weights["v_head.summary.weight"].T + weights["v_head.summary.bias"]
        torch.testing.assert_close(model(IDS).logits, expected)
        assert type(model).__name__ == "Qwen2ForPrmModel"

    def test_one_class_per_architecture(self):
        """`from_pretrained` and the trainer compare classes."""
        for head in ("mlp", "value"):
            classes = {type(tiny_model(ALL_HEADS[head], architecture)) for architecture in ("qwen2", "llama")}
            assert len(classes) == 2 and type(tiny_model(ALL_HEADS[head])) in classes

    @pytest.mark.parametrize(
        ("head", "config", "message"),
        [
            ("mlp", ViTConfig(), "'vit' does not support the head 'mlp'"),
            ("value", ViTConfig(), "'vit' does not support the head 'value'"),
        ],
    )
    def test_other_architectures(self, head, config, message):
        with pytest.raises(ValueError, match=message):
            model_class(ALL_HEADS[head], config)

    def test_a_classifier_without_a_linear_score(self):
        config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
        with pytest.raises(ValueError, match="BertForTokenClassification has no linear layer `score`"):
            model_class(ALL_HEADS["mlp"], config)(config)


def test_gather_steps_reads_flat_positions():
    logits = torch.arange(2 * 3 * 2).view(2, 3, 2)
    assert gather_steps(logits, torch.tensor([[2, 0], [4, 3]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [6, 7]]]


class TestCheck:
    def test_fitting_models(self):
        for step_format in ALL_HEADS.values():
            check_head(tiny_model(step_format), step_format)

    @pytest.mark.parametrize(
        ("model", "head"),
        [
            ("classification", "mlp"),
            ("mlp", "classification"),
            ("regression", "value"),
            ("lm", "value"),
            ("value", "regression"),
            ("lm", "classification"),
            ("lm", "mlp"),
        ],
    )
    def test_another_head(self, model, head):
        with pytest.raises(ValueError, match=f"does not have the head '{head}'. Pass the model name"):
            check_head(tiny_model(ALL_HEADS[model]), ALL_HEADS[head])

    def test_mean_logits_without_output_embeddings(self):
        with pytest.raises(ValueError, match="no output embeddings, but `head='lm_mean'`"):
            check_head(tiny_model(), ALL_HEADS["lm_mean"])

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
