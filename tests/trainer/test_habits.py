"""What users of `transformers.Trainer` do with the trainers of this package, where the Trainer itself would give a wrong result."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BloomConfig,
    ConvBertConfig,
    DebertaV2Config,
    EvalPrediction,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    MPNetConfig,
    MptConfig,
    RemBertConfig,
    TrainingArguments,
)

from tests.helpers import dataset_of, make_trainer, random_tree, tiny_model, tiny_tokenizer
from tests.prm_training import chains_of, make_prm_trainer, rows_of
from tests.trainer.kl_training import make_kl_trainer, random_rows
from trl_hrm import HRMRewardConfig, HRMRewardTrainer, KLSelfConfig, StepFormat, StepScorer, StepTree, hrm_view
from trl_hrm.prm import PRMConfig, PRMTrainer
from trl_hrm.step_format import STEP_FORMAT_NAME
from trl_hrm.step_metrics import judged_steps
from trl_hrm.training.model_card import metrics_at


CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
VOCABULARY = {"vocab_size": 320, "num_labels": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NEO = {**VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
UNSUITABLE = {
    "falcon": (FalconConfig(**VOCABULARY, **SMALL), "FalconForTokenClassification takes no `position_ids`"),
    "mpt": (MptConfig(**VOCABULARY, d_model=32, n_layers=2, n_heads=2), "takes no `position_ids`"),
    "bloom": (BloomConfig(**VOCABULARY, hidden_size=32, n_layer=2, n_head=2), "takes no `position_ids`"),
    "bert": (BertConfig(**VOCABULARY, **SMALL, intermediate_size=64), "is not causal"),
    # encoders whose layers have no attribute `is_causal`
    "deberta": (DebertaV2Config(**VOCABULARY, **SMALL, intermediate_size=64), "is not causal"),
    "mpnet": (MPNetConfig(**VOCABULARY, **SMALL, intermediate_size=64), "is not causal"),
    "convbert": (ConvBertConfig(**VOCABULARY, **SMALL, intermediate_size=64), "is not causal"),
    "rembert": (RemBertConfig(**VOCABULARY, **SMALL, intermediate_size=64), "is not causal"),
    "gpt-neo": (GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 1]]), "layers of type .'local'."),
}
SUITABLE = {
    "gpt-neo": GPTNeoConfig(**NEO, attention_types=[[["global"], 2]]),
    "gpt2": GPT2Config(**VOCABULARY, n_embd=32, n_layer=2, n_head=2),
    "bert decoder": BertConfig(**VOCABULARY, **SMALL, intermediate_size=64, is_decoder=True),
}


@pytest.fixture(scope="module")
def trees():
    rng = random.Random(0)
    return [hrm_view(random_tree(rng, f"{i}")) for i in range(8)]


class TestModels:
    @pytest.mark.parametrize("name", UNSUITABLE)
    def test_models_whose_scores_would_depend_on_other_candidates(self, name, trees, tmp_path):
        """They ignore the positions or the mask, so a step was scored with the tokens of other candidates, without an error."""
        config, message = UNSUITABLE[name]
        model = AutoModelForTokenClassification.from_config(config)
        with pytest.raises(ValueError, match=message):
            StepScorer(copy.deepcopy(model), tiny_tokenizer(), StepFormat())
        for shared_prefix in (True, False):
            with pytest.raises(ValueError, match=message):
                make_trainer(tmp_path, trees, copy.deepcopy(model), shared_prefix=shared_prefix)

    @pytest.mark.parametrize("name", SUITABLE)
    def test_models_whose_scores_do_not(self, name):
        model = AutoModelForTokenClassification.from_config(SUITABLE[name]).eval()
        scorer = StepScorer(model, tiny_tokenizer(), StepFormat())
        steps = ["a b c d e", "f g"]
        [together] = scorer.score_trees([StepTree("p", steps, [None] * 2, [-1, -1])])
        assert together == pytest.approx([scorer.score(["p"], [[[step]]])[0][0][0] for step in steps], abs=1e-5)

    def test_a_compiled_model(self):
        model = tiny_model().eval()
        compiled = torch.compile(model, backend="eager")
        scores = [
            StepScorer(one, tiny_tokenizer(), StepFormat()).score(["p"], [[["a", "b"]]]) for one in (model, compiled)
        ]
        assert scores[0][0][0] == pytest.approx(scores[1][0][0], abs=1e-6)

    @pytest.mark.parametrize("name", ["bert", "deberta"])
    def test_an_encoder_with_the_prm_trainer(self, name, tmp_path):
        """It scores a step with the steps after it, which `StepScorer` does not have, so it must not look like a step reward model."""
        config = UNSUITABLE[name][0]
        rows = rows_of(chains_of(0, 1))
        trainer = make_prm_trainer(tmp_path, rows, AutoModelForTokenClassification.from_config(config), max_steps=1)
        trainer.train()
        trainer.save_model()
        assert not (tmp_path / STEP_FORMAT_NAME).exists() and (tmp_path / "model.safetensors").exists()
        assert "StepScorer" not in (tmp_path / "README.md").read_text()

    def test_a_plain_module(self, tmp_path):
        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.out = torch.nn.Embedding(400, 8), torch.nn.Linear(8, 2)

            def forward(self, input_ids, attention_mask=None):
                return SimpleNamespace(logits=self.out(self.embed(input_ids)))

        args = PRMConfig(str(tmp_path), **CPU, max_steps=1, gradient_checkpointing=False, save_strategy="no")
        rows = rows_of(chains_of(0, 1))
        trainer = PRMTrainer(Plain(), args, train_dataset=rows, processing_class=tiny_tokenizer())
        assert trainer.train().global_step == 1

    def test_a_second_trial_of_a_search(self, tmp_path):
        """`hyperparameter_search` deletes the model after each trial."""
        args = PRMConfig(str(tmp_path), **CPU, max_steps=1, save_strategy="no")
        rows = rows_of(chains_of(0, 1))
        trainer = PRMTrainer(
            None, args, train_dataset=rows, processing_class=tiny_tokenizer(), model_init=lambda: tiny_model()
        )
        first = trainer.train().training_loss
        trainer.model = trainer.model_wrapped = None
        assert trainer.train().training_loss == first

    @pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
    def test_virtual_tokens(self, config, trees, tmp_path):
        with pytest.raises(ValueError, match="virtual tokens"):
            make_trainer(tmp_path, trees, peft_config=config(num_virtual_tokens=2))


class TestEvaluation:
    def test_the_last_batch(self, trees, tmp_path):
        """`dataloader_drop_last` is for training. Labels were missing in the evaluation, or all of them, and so `eval_loss`."""
        found = [
            make_trainer(
                tmp_path,
                trees,
                evaluation=trees[:3],
                per_device_eval_batch_size=size,
                dataloader_drop_last=drops,
                log_worst_steps=3,
            ).evaluate()
            for drops, size in ((False, 2), (True, 2), (True, 8))
        ]
        for one in found[1:]:
            assert one["eval_num_steps"] == found[0]["eval_num_steps"]
            assert one["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-5)

    @pytest.mark.parametrize("scaling", ["log1p", "none"])
    def test_the_loss_of_kl_self_is_its_objective(self, scaling, tmp_path):
        """The Trainer's mean over batches depends on their size, and so did the choice of the best checkpoint."""
        rows, losses = random_rows(7), []
        for size in (1, 3, 7):
            trainer = make_kl_trainer(
                tmp_path, rows, eval_rows=rows, per_device_eval_batch_size=size, kl_coef=0.5, kl_scaling=scaling
            )
            with torch.no_grad():
                for weight in trainer.model.parameters():  # away from the reference
                    weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            metrics = trainer.evaluate()
            kl = metrics["eval_log_kl" if scaling == "log1p" else "eval_kl"]
            assert kl > 0.01
            assert metrics["eval_loss"] == pytest.approx(metrics["eval_lm_loss"] + 0.5 * kl, rel=1e-5)
            losses.append(metrics["eval_loss"])
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)

    def test_another_dataset_with_kl_self(self, tmp_path):
        """See the test of the same name of the step table: the card must not show the metrics of the training rows."""
        rows = random_rows(7)
        trainer = make_kl_trainer(tmp_path, rows, eval_rows=rows[:2])
        expected = trainer.evaluate()
        trainer.evaluate(trainer.train_dataset)
        assert metrics_at(trainer, 0)[""]["loss"] == expected["eval_loss"]

    def test_several_own_datasets(self, trees, tmp_path):
        """In a copy of the `dict`, they are still the trainer's own, so their metrics are on the card."""
        own = {"a": dataset_of(trees[:2]), "b": dataset_of(trees[2:5])}
        trainer = make_trainer(tmp_path, trees, evaluation=own)
        for asked in (None, own, dict(own), trainer.eval_dataset, dict(trainer.eval_dataset)):
            trainer.state.log_history.clear()
            trainer.evaluate(asked)
            assert metrics_at(trainer, 0).keys() == {"a", "b"}
        expected = metrics_at(trainer, 0)["a"]["loss"]
        trainer.evaluate({"a": dataset_of(trees[5:]), "b": own["b"]})
        assert metrics_at(trainer, 0)["a"]["loss"] == expected

    def test_own_metrics(self, trees, tmp_path):
        """What docs/migrating_from_trl_prm.md says of functions written for PRMTrainer."""

        def accuracy(found: EvalPrediction) -> dict[str, float]:
            logits, labels, *_ = judged_steps(found.predictions, found.label_ids)
            return {"own": float((logits.argmax(-1) == (labels >= 0.5)).mean())}

        expected = make_trainer(tmp_path, trees, evaluation=trees).evaluate()["eval_accuracy"]
        found = make_trainer(tmp_path, trees, evaluation=trees, compute_metrics=accuracy).evaluate()["eval_own"]
        assert found == pytest.approx(expected)


class TestSettings:
    @pytest.mark.parametrize(
        "config, metric, is_better",
        [
            (HRMRewardConfig, "eval_merged_ece", False),
            (HRMRewardConfig, "auroc", True),
            (PRMConfig, "ece", False),
            (KLSelfConfig, "eval_log_kl", False),
            (KLSelfConfig, "kl_max", False),
        ],
    )
    def test_the_better_value_of_a_metric(self, config, metric, is_better, tmp_path):
        """transformers takes the largest value of all metrics but losses, so the worst checkpoint was loaded as the best one."""
        saved = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
        args = config(str(tmp_path), **CPU, **saved, metric_for_best_model=metric)
        assert args.greater_is_better is is_better
        args = config(str(tmp_path), **CPU, **saved, metric_for_best_model=metric, greater_is_better=not is_better)
        assert args.greater_is_better is not is_better

    @pytest.mark.parametrize(
        "settings", [{"max_length": -3}, {"max_completion_length": 0}, {"eval_do_concat_batches": False}]
    )
    def test_settings_of_the_prm_trainer(self, settings, tmp_path):
        """A negative limit cut rows from the end, as in a slice."""
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
            PRMConfig(str(tmp_path), **CPU, **settings)

    def test_padding_to_a_multiple(self, tmp_path):
        with pytest.raises(ValueError, match="`pad_to_multiple_of` is -8"):
            HRMRewardConfig(str(tmp_path), **CPU, pad_to_multiple_of=-8)

    @pytest.mark.parametrize("config", [TrainingArguments, PRMConfig, HRMRewardConfig])
    @pytest.mark.parametrize("trainer", [HRMRewardTrainer, PRMTrainer])
    def test_arguments_of_another_class(self, config, trainer, trees, tmp_path):
        if config.__name__.replace("Config", "Trainer") == trainer.__name__:
            pytest.skip("its own class")
        args = config(str(tmp_path), **(CPU | {"report_to": "none"}))
        with pytest.raises(TypeError, match=f"`args` is a `{config.__name__}`"):
            trainer(tiny_model(), args, train_dataset=dataset_of(trees), processing_class=tiny_tokenizer())

    def test_counts_of_an_attempt_that_did_not_fit(self, trees, tmp_path):
        """The labels of the discarded attempt of `auto_find_batch_size` were counted too."""
        attempts = []

        class Small(HRMRewardTrainer):
            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                attempts.append(self._train_batch_size)
                if len(attempts) == 2:
                    raise RuntimeError("CUDA out of memory. Tried to allocate")
                return loss

        settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "num_train_epochs": 1}
        trainer = make_trainer(tmp_path, trees, trainer_class=Small, **settings)
        trainer.train()
        assert attempts[0] == 4 and attempts[-1] < 4
        counted = [log["num_labels"] for log in trainer.state.log_history if "num_labels" in log]
        assert counted[-1] == trainer.reports["train_dataset"].labels_kept
