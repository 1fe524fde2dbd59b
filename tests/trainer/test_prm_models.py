"""What TRL's users build on `PRMTrainer`: custom models, `model_init`, PEFT, checkpoints, axolotl's classes, the docs."""

import functools
import json
import random
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForSeq2Seq,
    TrainerCallback,
    set_seed,
)

import trl_hrm
from trl_hrm import HRMRewardConfig, HRMRewardTrainer, StepScorer, StepTree
from trl_hrm._compat import BaseConfig
from trl_hrm.prm import PRMConfig, PRMTrainer, prm_trainer
from trl_hrm.trainer.step_trainer import StepTrainer

from ..helpers import code_block, tiny_model, tiny_tokenizer, weights_of
from ..prm_training import (
    FORMAT,
    assert_one_step,
    chains_of,
    make_prm_trainer,
    rows_of,
    slow_losses,
    slow_step,
    word_tokenizer,
)


PAGE = "docs/migrating_from_trl_prm.md"


@pytest.fixture(scope="module")
def chains() -> list[StepTree]:
    """Return eight rows of one to six steps, right or wrong."""
    return chains_of(0.0, 1.0)


class TestModels:
    def test_it_shares_a_base_class_with_hrm_reward_trainer(self):
        assert issubclass(PRMTrainer, StepTrainer) and issubclass(HRMRewardTrainer, StepTrainer)

    def test_default_arguments(self, tmp_path, chains, monkeypatch):
        """TRL's trainer failed by reading `args.disable_dropout` of None."""
        monkeypatch.chdir(tmp_path)
        cpu = functools.partial(PRMConfig, use_cpu=True, bf16=False, report_to="none")
        monkeypatch.setattr(prm_trainer, "PRMConfig", cpu)
        model = tiny_model(FORMAT)
        model.config._name_or_path = "me/small"
        trainer = PRMTrainer(model, train_dataset=rows_of(chains), processing_class=tiny_tokenizer())
        assert trainer.args.output_dir == "small-PRM" and trainer.args.max_length == 1024

    def test_tags(self, tmp_path, chains):
        """The tags are set on the model, which keeps them wherever it is pushed from."""
        assert make_prm_trainer(tmp_path, rows_of(chains)).model.model_tags == PRMTrainer._tag_names == ["trl", "prm"]

    @pytest.mark.parametrize("disable", [True, False])
    def test_dropout(self, tmp_path, chains, disable):
        trainer = make_prm_trainer(tmp_path, rows_of(chains), disable_dropout=disable)
        rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates == ({0} if disable else {0.1})

    def test_model_init(self, tmp_path, chains):
        """With TRL's defaults this failed on the dropout of None. Dropout would show in the weights."""
        made = []

        def model_init():
            made.append(tiny_model(FORMAT))
            return made[-1]

        trainer = make_prm_trainer(tmp_path, rows_of(chains), given={"model": None, "model_init": model_init})
        assert_one_step(trainer, slow_step(chains))
        assert len(made) == 2 and trainer.model is made[1]  # the second is created when training starts

    def test_model_init_with_an_adapter(self, tmp_path, chains):
        config = LoraConfig(r=2, target_modules=["q_proj"])
        given = {"model": None, "model_init": lambda: tiny_model(FORMAT), "peft_config": config}
        trainer = make_prm_trainer(tmp_path, rows_of(chains), given=given)
        trainer.train()
        assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in weights_of(trainer.model).items())

    def test_optimizers_and_callbacks(self, tmp_path, chains):
        """If these were not passed on to Trainer, the run would use the default ones."""

        class Counter(TrainerCallback):
            steps = 0

            def on_step_end(self, args, state, control, **kwargs):
                self.steps += 1

        model, counter = tiny_model(FORMAT), Counter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        given = {"optimizers": (optimizer, None), "callbacks": [counter]}
        start = weights_of(model)
        trainer = make_prm_trainer(tmp_path, rows_of(chains), model, given=given)
        trainer.train()
        assert counter.steps == trainer.state.global_step == 1
        assert all(torch.equal(weight, start[name]) for name, weight in weights_of(trainer.model).items())

    def test_a_new_adapter_is_drawn_from_the_seed(self, tmp_path, chains):
        """Without seeding, two runs of one script would draw different adapters."""
        drawn = []
        for number, seed in enumerate((1, 1, 2)):
            model = tiny_model(FORMAT)
            set_seed(number)
            given = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
            trainer = make_prm_trainer(tmp_path, rows_of(chains), model, given=given, seed=seed)
            drawn.append(next(w for name, w in weights_of(trainer.model).items() if "lora_A" in name))
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

    def test_a_module_of_the_user(self, tmp_path, chains):
        """Any module whose output has logits. It takes no labels, so transformers finds no label names."""

        class Wrapped(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = tiny_model(FORMAT)
                self.config = self.inner.config

            def forward(self, input_ids, attention_mask=None):
                return self.inner(input_ids=input_ids, attention_mask=attention_mask)

        trainer = make_prm_trainer(tmp_path, rows_of(chains), Wrapped(), evaluation=rows_of(chains))
        trainer.train()
        trainer.save_model()
        saved = load_file(tmp_path / "model.safetensors")
        assert torch.equal(saved["inner.score.weight"], trainer.model.inner.score.weight)
        expected = slow_losses(tiny_model(FORMAT), chains).mean().item()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
        assert trainer.evaluate()["eval_loss"] != pytest.approx(expected, abs=1e-2)

    def test_a_planted_rule_is_learned(self, tmp_path):
        """Labels at the wrong token or reversed classes would leave accuracy at chance, or below."""
        rng = random.Random(0)
        chains = []
        for number in range(250):
            labels = [float(rng.random() < 0.5) for _ in range(3)]
            texts = [" ".join(["x", rng.choice(["add", "so"]) if label else "thus", "y"]) for label in labels]
            chains.append(StepTree(f"{number}", texts, labels, [-1, 0, 1]))
        trainer = make_prm_trainer(
            tmp_path,
            rows_of(chains[:200]),
            tiny_model(FORMAT, initializer_range=0.02),
            evaluation=rows_of(chains[200:]),
            optim="adamw_torch",
            learning_rate=3e-3,
            max_grad_norm=1.0,
            num_train_epochs=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        assert trainer.evaluate()["eval_accuracy"] > 0.95


class TestFiles:
    def test_a_checkpoint_scores_as_in_training(self, tmp_path, chains):
        """TRL's documentation scored with a separator after the prompt, which the model never saw in training."""
        trainer = make_prm_trainer(
            tmp_path,
            rows_of(chains),
            evaluation=rows_of(chains),
            save_strategy="steps",
            save_steps=1,
            per_device_train_batch_size=4,
        )
        trainer.train()
        trainer.save_model()
        output = trainer.predict(rows_of(chains))
        live = torch.from_numpy(output.predictions[output.label_ids != -100]).softmax(-1)[:, 1].numpy()
        for folder in (tmp_path, tmp_path / "checkpoint-2"):
            assert json.loads((folder / "step_format.json").read_text())["step_separator"] == "\n"
            scorer = StepScorer.from_pretrained(str(folder))
            found = scorer.score([chain.prompt for chain in chains], [[chain.completions] for chain in chains])
            np.testing.assert_allclose(np.concatenate([scores[0] for scores in found]), live, rtol=0, atol=1e-5)
            loaded = AutoModelForTokenClassification.from_pretrained(folder)
            for name, weight in loaded.named_parameters():
                assert torch.equal(weight, trainer.model.get_parameter(name)), name

    @pytest.mark.parametrize("separator", ["\n", ";"])
    def test_the_format_of_given_tokens_is_saved_if_it_is_theirs(self, tmp_path, caplog, separator):
        """A saved format with a different separator than in training would spoil every score without an error."""
        rows = Dataset.from_dict(
            {"input_ids": [[5, 8, 3], [5, 3, 9, 3]], "labels": [[-100, -100, 1], [-100, 0, -100, 1]]}
        )
        trainer = make_prm_trainer(
            tmp_path, rows, tiny_model(FORMAT, vocab_size=16), tokenizer=word_tokenizer(), step_separator=separator
        )
        trainer.train()
        trainer.save_model()
        assert (tmp_path / "model.safetensors").exists()
        known = separator == "\n"
        assert (tmp_path / "step_format.json").exists() == known
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert ("StepScorer.from_pretrained" in card) == ("step_format.json" in card) == known
        assert ("whose step format is unknown" in card) != known
        assert "| labels | 3 |" in card
        assert ("3 of 3 labelled tokens are not at the end of the `step_separator` ';'" in caplog.text) != known

    def test_adapter(self, tmp_path, chains):
        """Without a task type, the classifier of a LoRA run stayed random and was not saved."""
        base = tmp_path / "base"
        tiny_model(FORMAT).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        model = AutoModelForTokenClassification.from_pretrained(base)
        trainer = make_prm_trainer(
            tmp_path / "out",
            rows_of(chains),
            model,
            given={"peft_config": LoraConfig(r=4, target_modules="all-linear")},
            gradient_checkpointing=True,
            # without gradients at its inputs nothing would be trained
            gradient_checkpointing_kwargs={"use_reentrant": True},
            save_strategy="epoch",
        )
        before = weights_of(trainer.model)
        trainer.train()
        moved = {name for name, weight in weights_of(trainer.model).items() if not torch.equal(weight, before[name])}
        assert any("lora_B" in name for name in moved) and any("score" in name for name in moved)
        assert not any("base_layer" in name for name in moved)
        output = trainer.predict(rows_of(chains))
        live = torch.from_numpy(output.predictions[output.label_ids != -100]).softmax(-1)[:, 1].numpy()
        scores = StepScorer.from_pretrained(str(tmp_path / "out" / "checkpoint-1")).score_trees(chains)
        np.testing.assert_allclose(np.concatenate(scores), live, rtol=0, atol=1e-5)

    def test_model_card(self, tmp_path, chains):
        trainer = make_prm_trainer(tmp_path, rows_of(chains), save_strategy="epoch")
        trainer.train()
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "@article{uesato2022solving" in card and "2211.14275" in card and "with PRM" in card
        assert "- trl\n" in card and "- prm\n" in card and "wang2025" not in card


class TestAsAxolotlUsesIt:
    def test_mixins_tokens_and_collator(self, tmp_path):
        """Mixin classes before PRMTrainer, pretokenized rows with a mask, a collator with long padding and integer labels."""

        class Mixin:
            def __init__(self, *args, **kwargs):
                self.mixed = True
                super().__init__(*args, **kwargs)

            def create_optimizer(self):
                self.optimizers_made = getattr(self, "optimizers_made", 0) + 1
                return super().create_optimizer()

        class Trainer(Mixin, PRMTrainer):
            tag_names = ["axolotl", "prm"]

        @dataclass
        class Config(PRMConfig):
            sample_packing: bool = False

        rows = [{"input_ids": [5, 8, 3], "labels": [-100, -100, 1]}, {"input_ids": [8, 3], "labels": [-100, 0]}] * 4
        rows = Dataset.from_list([row | {"attention_mask": [1] * len(row["input_ids"]), "length": 3} for row in rows])
        args = make_prm_trainer(tmp_path, rows, tokenizer=word_tokenizer(), gradient_accumulation_steps=4).args
        trainer = Trainer(
            model=tiny_model(FORMAT, vocab_size=16),
            train_dataset=rows,
            eval_dataset=rows,
            args=Config(
                **{
                    name: getattr(args, name)
                    for name in ("output_dir", "use_cpu", "bf16", "report_to", "optim", "save_strategy")
                }
            ),
            data_collator=DataCollatorForSeq2Seq(
                word_tokenizer(), padding=True, pad_to_multiple_of=64, return_tensors="pt"
            ),
            callbacks=[],
            processing_class=word_tokenizer(),
        )
        plain = make_prm_trainer(tmp_path, rows, tiny_model(FORMAT, vocab_size=16), rows, word_tokenizer())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)
        trainer.train()
        assert trainer.mixed and trainer.optimizers_made == 1

    def test_configuration_of_another_class(self, tmp_path, chains):
        """A copy of TRL's `PRMConfig` has its fields and none of ours."""
        other = dataclass(type("PRMConfig", (BaseConfig,), {}))(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no"
        )
        for name in ("max_length", "max_completion_length", "disable_dropout", "train_on_last_step_only"):
            setattr(other, name, getattr(PRMConfig, name))
        other.step_separator, other.dataset_num_proc = "\n", None
        trainer = PRMTrainer(
            tiny_model(FORMAT), other, train_dataset=rows_of(chains), processing_class=tiny_tokenizer()
        )
        trainer.train()
        assert trainer.state.global_step == 1


class TestDocs:
    """The code of docs/migrating_from_trl_prm.md runs as printed."""

    def test_scoring_and_the_other_trainer(self, tmp_path, chains, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_prm_trainer("outputs/prm", rows_of(chains)).save_model()
        names = {}
        exec(compile(code_block(PAGE, "StepScorer.from_pretrained"), PAGE, "exec"), names)
        assert [[len(steps) for steps in candidates] for candidates in names["scores"]] == [[2, 2]]
        cpu = functools.partial(
            HRMRewardConfig, use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=64
        )
        monkeypatch.setattr(trl_hrm, "HRMRewardConfig", cpu, raising=False)
        names = {"model": tiny_model(FORMAT), "dataset": rows_of(chains), "tokenizer": tiny_tokenizer()}
        exec(compile(code_block(PAGE, "HRMRewardTrainer("), PAGE, "exec"), names)
        names["trainer"].evaluate(rows_of(chains))

    def test_the_alias(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "trl.experimental.prm", None)  # restored after the test
        exec(compile(code_block(PAGE, "sys.modules"), PAGE, "exec"), {})
        from trl.experimental.prm import PRMTrainer as aliased

        assert aliased is PRMTrainer
