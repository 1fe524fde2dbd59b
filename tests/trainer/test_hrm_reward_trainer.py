"""HRMRewardTrainer for its users: errors, metrics, logs, hooks for subclasses, checkpoints, and learning."""

import json
import logging
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from trl_hrm import HRMRewardConfig, HRMRewardTrainer, StepFormat, StepScorer, StepTree, hrm_view
from trl_hrm.loading import load_reward_model
from trl_hrm.losses import step_score
from trl_hrm.step_metrics import judged_steps
from trl_hrm.training.checkpoints import RECORD_NAME

from ..checkpoints import drop, edit, save, two_layer_head, value_head
from ..helpers import (
    ALL_HEADS,
    HEADS,
    dataset_of,
    make_trainer,
    path_logits,
    random_tree,
    tiny_model,
    tiny_tokenizer,
    weights_of,
)


@pytest.fixture(scope="module")
def trees() -> list[StepTree]:
    rng = random.Random(4)
    return [hrm_view(random_tree(rng, name)) for name in "abcdef"]


def planted_trees(rng: random.Random, count: int, shuffled: bool = False) -> list[StepTree]:
    """Return trees of four steps where a step is wrong if and only if it says `thus`, whatever comes before it."""
    trees = []
    for number in range(count):
        texts = [" ".join(rng.choices(["add", "sub", "so", "x", "y"], k=3) + [str(i)]) for i in range(4)]
        labels = [float(rng.random() < 0.5) for _ in texts]
        for i, label in enumerate(labels):
            if not label:
                texts[i] = texts[i].replace(texts[i].split()[1], "thus", 1)
        if shuffled:
            labels = [float(rng.random() < 0.5) for _ in texts]
        trees.append(StepTree(f"{number} {rng.random()}", texts, labels, [-1, 0, 0, 1]))
    return trees


class TestLearning:
    @pytest.mark.parametrize("head", HEADS)
    def test_a_planted_rule_is_learned(self, tmp_path, head):
        """Labels at the wrong token or reversed classes would leave accuracy at chance, or below."""
        rng = random.Random(0)
        step_format = HEADS[head]
        trainer = self.train(tmp_path, rng, False, head=step_format.head, regression_loss=step_format.regression_loss)
        metrics = trainer.evaluate()
        assert metrics["eval_accuracy"] > 0.95 and metrics["eval_auroc"] > 0.95

    def test_shuffled_labels_are_not_learned(self, tmp_path):
        """Held-out accuracy above chance would mean that labels leak into the inputs."""
        metrics = self.train(tmp_path, random.Random(0), True).evaluate()
        assert 0.4 < metrics["eval_accuracy"] < 0.6 and 0.4 < metrics["eval_auroc"] < 0.6

    @staticmethod
    def train(tmp_path, rng, shuffled, **args) -> HRMRewardTrainer:
        trainer = make_trainer(
            tmp_path,
            planted_trees(rng, 200, shuffled),
            tiny_model(StepFormat(head=args.get("head", "classification")), initializer_range=0.02),
            evaluation=planted_trees(rng, 100, shuffled),
            optim="adamw_torch",
            learning_rate=3e-3,
            max_grad_norm=1.0,
            num_train_epochs=3,
            logging_steps=10,
            packing=True,
            max_length=256,
            per_device_train_batch_size=2,
            **args,
        )
        trainer.train()
        return trainer


class TestLogs:
    def test_training(self, tmp_path, trees):
        """Counts are exact: padding is not counted as tokens, and padded steps are not counted as labels."""
        long = StepTree("long", ["x", " ".join(["add"] * 200)], [1.0, 1.0], [-1, 0])
        trainer = make_trainer(
            tmp_path, [*trees, long], per_device_train_batch_size=2, logging_steps=2, max_length=150
        )
        seen = []
        count = trainer._count
        trainer._count = lambda inputs, *args: (seen.append(inputs["num_tokens"].sum().item()), count(inputs, *args))
        trainer.train()
        report = trainer.reports["train_dataset"]
        assert report.labels_too_long == 1
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert len(logs) == 2
        assert logs[-1]["num_labels"] == report.labels_kept
        assert all(log["dropped_labels"] == 1 for log in logs)
        assert all(log["labels_per_second"] > 0 for log in logs)
        assert sum(seen) == report.tokens
        for log, labels, tokens in zip(
            logs,
            (logs[0]["num_labels"], logs[1]["num_labels"] - logs[0]["num_labels"]),
            (sum(seen[:2]), sum(seen[2:])),
            strict=True,
        ):
            assert log["tokens_per_second"] / log["labels_per_second"] == pytest.approx(tokens / labels)
            assert log["accuracy"] * labels == pytest.approx(round(log["accuracy"] * labels))

    def test_a_second_training_resets_the_counts(self, tmp_path, trees):
        """Unlogged counts of the first training, and the time in between, would distort the second one's first log."""
        trainer = make_trainer(tmp_path, trees, per_device_train_batch_size=2, logging_steps=2)
        counts = []
        for _ in range(2):
            trainer.train()
            counts.append([log["num_labels"] for log in trainer.state.log_history if "loss" in log])
            trainer._counting_since -= 1e6  # as if the third step, which is not logged, was long ago
        assert counts[0] == counts[1]
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert len(logs) == 1 and logs[0]["labels_per_second"] > 1

    def test_a_log_of_the_user(self, tmp_path, trees):
        """`trainer.log` called by the user outside training must not add training counts."""
        trainer = make_trainer(tmp_path, trees)
        trainer.log({"loss": 1.0})
        assert trainer.state.log_history[-1]["loss"] == 1 and "accuracy" not in trainer.state.log_history[-1]

    def test_training_accuracy(self, tmp_path, trees):
        trainer = make_trainer(tmp_path, trees)
        expected = self.accuracy(trainer.model, trees)
        trainer.train()
        assert trainer.state.log_history[0]["accuracy"] == pytest.approx(expected)

    @staticmethod
    def accuracy(model, trees) -> float:
        hits = [
            (step_score(logits, HEADS["classification"]).item() >= 0.5) == (tree.labels[step] >= 0.5)
            for tree in trees
            for step, logits in path_logits(model, HEADS["classification"], tree).items()
        ]
        return sum(hits) / len(hits)


class TestEvaluation:
    def test_metrics_of_single_and_merged_steps(self, tmp_path, trees):
        metrics = make_trainer(tmp_path, trees, evaluation=trees).evaluate()
        singles = sum(tree.num_merged.count(1) for tree in trees)
        total = sum(len(tree.labels) for tree in trees)
        assert metrics["eval_num_steps"] == total
        assert metrics["eval_single_num_steps"] == singles and metrics["eval_merged_num_steps"] == total - singles
        for name in ("accuracy", "balanced_accuracy", "error_f1", "auroc", "ece"):
            assert {f"eval_{name}", f"eval_single_{name}", f"eval_merged_{name}"} <= metrics.keys()
        weighted = singles * metrics["eval_single_accuracy"] + (total - singles) * metrics["eval_merged_accuracy"]
        assert weighted / total == pytest.approx(metrics["eval_accuracy"])
        assert metrics["eval_accuracy"] == pytest.approx(TestLogs.accuracy(tiny_model(), trees))

    def test_without_merged_steps_there_is_no_split(self, tmp_path):
        metrics = make_trainer(tmp_path, [random_tree(random.Random(0))]).evaluate(
            dataset_of([random_tree(random.Random(1))])
        )
        assert not any("single" in name or "merged" in name for name in metrics)

    @pytest.mark.parametrize("container", [dict, DatasetDict])
    def test_several_datasets(self, tmp_path, trees, container):
        evaluation = container({"easy": dataset_of(trees[:3]), "hard": dataset_of(trees[3:])})
        trainer = make_trainer(tmp_path, trees, evaluation=evaluation, eval_strategy="epoch")
        assert set(trainer.reports) == {"train_dataset", "eval_dataset['easy']", "eval_dataset['hard']"}
        metrics = trainer.evaluate()
        assert metrics["eval_easy_num_steps"] + metrics["eval_hard_num_steps"] == sum(len(t.labels) for t in trees)
        assert {"eval_easy_loss", "eval_hard_loss", "eval_hard_merged_auroc"} <= metrics.keys()
        trainer.train()
        assert any("eval_hard_loss" in log for log in trainer.state.log_history)
        # and one of another type afterwards
        assert trainer.evaluate(dataset_of(trees))["eval_num_steps"] == sum(len(t.labels) for t in trees)

    def test_the_best_model_is_chosen_by_a_metric(self, tmp_path, trees):
        trainer = make_trainer(
            tmp_path,
            trees,
            evaluation=trees,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="best",
            metric_for_best_model="auroc",
            greater_is_better=True,
            per_device_train_batch_size=2,
        )
        trainer.train()
        assert trainer.state.best_metric == max(
            log["eval_auroc"] for log in trainer.state.log_history if "eval_auroc" in log
        )

    def test_predict(self, tmp_path, trees):
        output = make_trainer(tmp_path, trees).predict(dataset_of(trees))
        logits, labels, weights, num_merged = judged_steps(output.predictions, output.label_ids)
        assert logits.shape == (len(labels), 2) and set(num_merged) == {1, 2} and set(weights) == {1}
        assert output.metrics["test_num_steps"] == len(labels)

    def test_a_metrics_function(self, tmp_path, trees):
        """A metrics function passed by the user gets the same argument as the overridable method."""

        def mean_label(prediction):
            return {"mean_label": judged_steps(prediction.predictions, prediction.label_ids)[1].mean()}

        metrics = make_trainer(tmp_path, trees, evaluation=trees, compute_metrics=mean_label).evaluate()
        assert metrics["eval_mean_label"] == pytest.approx(np.mean([y for tree in trees for y in tree.labels]))
        assert "eval_accuracy" not in metrics and "eval_loss" in metrics


class TestSubclass:
    def test_loss_and_metrics(self, tmp_path, trees):
        """If an override were never called, the trainer would silently use the stock loss."""

        class OnlyMerged(HRMRewardTrainer):
            def compute_step_loss(self, logits, labels, num_merged):
                assert logits.shape == (len(labels), 2) and labels.shape == num_merged.shape
                return super().compute_step_loss(logits, labels, num_merged) * (num_merged > 1) * 7

            def compute_metrics(self, eval_prediction):
                return super().compute_metrics(eval_prediction) | {"mine": 1.0}

        losses = {
            name: make_trainer(tmp_path / name, trees, evaluation=trees, trainer_class=trainer_class)
            for name, trainer_class in (("stock", HRMRewardTrainer), ("mine", OnlyMerged))
        }
        metrics = {name: trainer.evaluate() for name, trainer in losses.items()}
        assert metrics["mine"]["eval_mine"] == 1 and "eval_mine" not in metrics["stock"]
        merged = sum(count > 1 for tree in trees for count in tree.num_merged)
        expected = [
            7 * torch.nn.functional.cross_entropy(logits, torch.tensor(int(tree.labels[step]))).item()
            for tree in trees
            for step, logits in path_logits(tiny_model(), HEADS["classification"], tree).items()
            if tree.num_merged[step] > 1
        ]
        assert len(expected) == merged
        expected = sum(expected) / metrics["mine"]["eval_num_steps"]
        assert metrics["mine"]["eval_loss"] == pytest.approx(expected, abs=1e-5)
        for trainer in losses.values():
            trainer.train()
        logged = [log["loss"] for log in losses["mine"].state.log_history if "loss" in log]
        assert logged == pytest.approx([expected], abs=1e-5)
        mine, stock = weights_of(losses["mine"].model), weights_of(losses["stock"].model)
        assert any(not torch.allclose(mine[name], stock[name]) for name in mine)


class TestRefusals:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"error_weight": 0.0}, "`error_weight` is 0.0"),
            ({"error_weight": -1.0}, "`error_weight` is -1.0"),
            ({"error_weight": float("nan")}, "`error_weight` is nan"),
            ({"label_weighting": "twice"}, "`label_weighting` is 'twice'"),
            ({"batch_eval_metrics": True}, "`batch_eval_metrics`"),
            ({"eval_do_concat_batches": False}, "`eval_do_concat_batches`"),
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
            ({"head": "binary"}, "`head` is 'binary'"),
            ({"system_prompt": "Sum."}, "`system_prompt`"),
        ],
    )
    def test_settings(self, tmp_path, args, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            HRMRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **args)

    def test_no_dataset(self, tmp_path):
        with pytest.raises(ValueError, match="`train_dataset`"):
            HRMRewardTrainer(tiny_model(), HRMRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"))

    def test_streams(self, tmp_path, trees):
        stream = IterableDataset.from_generator(lambda: (tree.to_row() for tree in trees))
        with pytest.raises(TypeError, match="`train_dataset` is a `IterableDataset`.*`streaming"):
            HRMRewardTrainer(
                tiny_model(),
                HRMRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
                train_dataset=stream,
                processing_class=tiny_tokenizer(),
            )
        with pytest.raises(TypeError, match=r"`eval_dataset\['a'\]` is a `IterableDataset`"):
            make_trainer(tmp_path, trees, evaluation={"a": stream})
        with pytest.raises(TypeError, match="`list`.*Convert the rows with `Dataset.from_list`"):
            make_trainer(tmp_path, trees, evaluation={"a": [tree.to_row() for tree in trees]})
        with pytest.raises(TypeError, match="Pass one of its splits, such as 'easy'"):
            make_trainer(tmp_path, trees, evaluation={"a": DatasetDict(easy=dataset_of(trees))})

    def test_a_bad_row_is_named_with_its_dataset(self, tmp_path, trees):
        bad = dataset_of([*trees[:2], StepTree("q", ["a", "b"], [1.0], [-1, 0])])
        with pytest.raises(ValueError, match="train_dataset row 2: .*`labels`"):
            make_trainer(tmp_path, bad)
        with pytest.raises(ValueError, match=r"eval_dataset\['x'\] row 2: .*`labels`"):
            make_trainer(tmp_path, trees, evaluation={"x": bad})

    def test_outcomes_with_weights_of_steps(self, tmp_path):
        row = {"prompt": "1+2?", "completion": "= 3", "label": True, "label_weights": [1.0]}
        with pytest.raises(ValueError, match="train_dataset has the columns `completion` and `label`, but"):
            make_trainer(tmp_path, Dataset.from_list([row]), label_weighting="column")

    def test_a_long_prompt(self, tmp_path, trees):
        with pytest.raises(ValueError, match="row 0: the prompt .*`max_length` 3"):
            make_trainer(tmp_path, trees, max_length=3)

    def test_a_swallowed_separator(self, tmp_path, trees):
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
        with pytest.raises(ValueError, match=r"`step_separator` '\\n\\n'"):
            make_trainer(tmp_path, trees, tokenizer=tokenizer)

    def test_equal_separators(self, tmp_path, trees):
        """The merged step has the same ids as the single steps and is joined with them, which must not hide the error."""
        with pytest.raises(ValueError, match="encode to the same ids"):
            make_trainer(
                tmp_path,
                [hrm_view(StepTree("q", ["a", "b"], [1.0, 0.0], [-1, 0]), merge_separator="\n\n")],
                merge_separator="\n\n",
            )

    def test_merged_with_another_separator(self, tmp_path, trees):
        with pytest.raises(ValueError, match=r"train_dataset row \d: .* `merge_separator` ' ; '"):
            make_trainer(tmp_path, trees, merge_separator=" ; ")

    def test_last_step_only_with_merged_steps(self, tmp_path, trees):
        with pytest.raises(ValueError, match="`train_on_last_step_only`"):
            make_trainer(tmp_path, trees, train_on_last_step_only=True)

    def test_chat_without_a_template(self, tmp_path, trees):
        with pytest.raises(ValueError, match="no chat template"):
            make_trainer(tmp_path, trees, prompt_style="chat")

    def test_label_tokens_of_several_tokens(self, tmp_path, trees):
        with pytest.raises(ValueError, match="label token 'excellent'"):
            make_trainer(tmp_path, trees, head="lm", label_tokens=["+", "excellent"])

    def test_three_labels(self, tmp_path, trees):
        model = tiny_model()
        model.config.num_labels = 3
        with pytest.raises(ValueError, match="num_labels=3"):
            make_trainer(tmp_path, trees, model)

    def test_flash_attention_with_trees(self, tmp_path, trees):
        model = tiny_model()
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="'flash_attention_2' .*shared_prefix=Fal"):
            make_trainer(tmp_path, trees, model)
        make_trainer(tmp_path, trees, model, shared_prefix=False)

    @pytest.mark.parametrize("shared_prefix", [True, False])
    def test_layers_that_carry_state(self, tmp_path, trees, shared_prefix):
        """Also without shared prefixes, such a layer would pass its state from one sequence of a row to the next."""
        model = tiny_model()
        model.config.layer_types = ["linear_attention", "full_attention"]
        with pytest.raises(ValueError, match="linear_attention.*packed row"):
            make_trainer(tmp_path, trees, model, shared_prefix=shared_prefix)

    def test_model_init_kwargs_of_a_model(self, tmp_path, trees):
        with pytest.raises(ValueError, match="`model_init_kwargs`"):
            make_trainer(tmp_path, trees, model_init_kwargs={"dtype": "float32"})

    def test_a_tokenizer_that_cannot_pad(self, tmp_path, trees):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()._tokenizer)
        with pytest.raises(ValueError, match="padding token"):
            make_trainer(tmp_path, trees, tokenizer=tokenizer)

    def test_an_adapter_on_an_adapter(self, tmp_path, trees):
        model = make_trainer(tmp_path, trees, peft_config=LoraConfig(target_modules="all-linear")).model
        with pytest.raises(ValueError, match="`peft_config`"):
            make_trainer(tmp_path, trees, model, peft_config=LoraConfig(target_modules="all-linear"))

    @pytest.mark.parametrize("head", ["classification", "mlp", "value"])
    def test_an_adapter_without_the_head(self, tmp_path, trees, head):
        """The head would stay random, and would not be saved."""
        layer = "v_head.summary" if head == "value" else "score"

        def make(model, **config):
            make_trainer(
                tmp_path, trees, get_peft_model(model, LoraConfig(target_modules=["q_proj"], **config)), head=head
            )

        make(tiny_model(ALL_HEADS[head]), modules_to_save=[layer])
        with pytest.raises(ValueError, match=f"{layer}.* is not in the adapter, and not in the files of the base"):
            make(tiny_model(ALL_HEADS[head]))
        base = save(tmp_path / "base", tiny_model(ALL_HEADS[head]), ALL_HEADS[head])
        make(load_reward_model(str(base), ALL_HEADS[head]))  # a trained head may stay as it is

    def test_nothing_to_train(self, tmp_path, trees):
        """With gradient checkpointing, PyTorch would not notice."""
        trainer = make_trainer(tmp_path, trees, tiny_model().requires_grad_(False), gradient_checkpointing=True)
        with pytest.raises(ValueError, match="No weight of the model is trainable"):
            trainer.train()

    def test_a_peft_config_is_not_changed(self, tmp_path, trees):
        """Another trainer with the same configuration would save an adapter of another type."""
        config = LoraConfig(target_modules="all-linear")
        before = config.to_dict()
        make_trainer(tmp_path, trees, peft_config=config)
        assert config.to_dict() == before


class TestPadding:
    def test_padding_changes_no_logit(self, tmp_path, trees):
        """Neither the padding token nor the padding side nor the batch width may change a logit."""
        predictions = []
        for args in ({}, {"pad_to_multiple_of": 128}, {"per_device_eval_batch_size": 1}):
            trainer = make_trainer(tmp_path, trees, **args)
            trainer.data_collator.pad_token_id = len(predictions)
            output = trainer.predict(dataset_of(trees))
            predictions.append(judged_steps(output.predictions, output.label_ids)[0])
        np.testing.assert_allclose(predictions[1], predictions[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(predictions[2], predictions[0], rtol=0, atol=1e-5)

    def test_pad_to_multiple_of(self, tmp_path, trees):
        trainer = make_trainer(tmp_path, trees, pad_to_multiple_of=128)
        assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] % 128 == 0


class TestCheckpoint:
    @pytest.mark.parametrize("head", HEADS)
    def test_a_checkpoint_scores_as_the_trainer(self, tmp_path, trees, head):
        """Training at one token and scoring at the next, or a different encoding, would change the scores."""
        step_format = HEADS[head]
        trainer = make_trainer(
            tmp_path,
            trees,
            head=step_format.head,
            regression_loss=step_format.regression_loss,
            per_device_train_batch_size=3,
            save_strategy="steps",
            save_steps=1,
        )
        trainer.train()
        trainer.save_model()
        assert self.folders(tmp_path) == ["checkpoint-1", "checkpoint-2"]
        for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
            assert (folder / "step_format.json").read_text() == step_format.to_json() + "\n"
        output = trainer.predict(dataset_of(trees))
        logits, _, _, num_merged = judged_steps(output.predictions, output.label_ids)
        live = step_score(torch.from_numpy(logits), step_format).numpy()
        for folder in (tmp_path, tmp_path / "checkpoint-2"):
            scorer = StepScorer.from_pretrained(str(folder))
            assert scorer.step_format == step_format
            scores = [score for tree in trees for score in scorer.score_trees([tree])[0]]
            np.testing.assert_allclose(np.sort(scores), np.sort(live), rtol=0, atol=1e-6)
            plain = [
                step_score(logits, step_format).item()
                for tree in trees
                for logits in path_logits(trainer.model.eval(), step_format, tree).values()
            ]
            np.testing.assert_allclose(scores, plain, rtol=0, atol=1e-5)
        assert set(num_merged) == {1, 2}
        before = StepScorer.from_pretrained(str(tmp_path / "checkpoint-1")).score_trees(trees)
        assert np.abs(np.concatenate(before) - np.array(scores)).max() > 1e-4

    @staticmethod
    def folders(folder) -> list[str]:
        return sorted(path.name for path in folder.glob("checkpoint-*"))

    def test_model_card(self, tmp_path, trees):
        trainer = make_trainer(tmp_path, trees, save_strategy="epoch")
        trainer.train()
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "@article{wang2025hierarchical" in card and "2503.13551" in card
        assert f'StepScorer.from_pretrained("{tmp_path.name}")' in card  # an absolute path would reveal a user name
        assert "pipeline(" not in card and "huggingface.co/None" not in card
        for tag in ("trl-hrm", "step-reward-model"):
            assert f"- {tag}\n" in card
        assert "## Training procedure" in card and card.count("## Quick start") == 1

    def test_a_model_by_name(self, tmp_path):
        """The head for a language model's checkpoint is newly initialized, equal for equal seeds, with 1 or 2 labels."""
        rng = random.Random(0)
        trees = [random_tree(rng)]
        base = tmp_path / "base"
        tiny_model(HEADS["lm"]).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        found = {}
        for name, args in (
            ("a", {}),
            ("b", {}),
            ("seed", {"seed": 7}),
            ("regression", {"head": "regression"}),
            ("lm", {"head": "lm"}),
        ):
            args = args | {"model_init_kwargs": {"attn_implementation": "eager"}}
            found[name] = make_trainer(tmp_path / name, trees, str(base), **args).model
            assert found[name].config._attn_implementation == "eager" and found[name].dtype == torch.float32
        assert torch.equal(found["a"].score.weight, found["b"].score.weight)
        assert not torch.equal(found["a"].score.weight, found["seed"].score.weight)
        assert found["regression"].score.weight.shape[0] == 1
        assert not hasattr(found["lm"], "score")
        assert found["a"].config.id2label == {0: "wrong", 1: "correct"}  # shown by a pipeline

    @pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj"]])
    @pytest.mark.parametrize("head", ["classification", "regression", "lm"])
    def test_adapter(self, tmp_path, trees, head, target_modules):
        """The classifier of a LoRA run is new. If it is not trained and saved with the adapter, scores are random."""
        base = tmp_path / "base"
        tiny_model(HEADS["lm"]).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        trainer = make_trainer(
            tmp_path / "out",
            trees,
            str(base),
            head=head,
            peft_config=LoraConfig(r=4, target_modules=target_modules),
            save_strategy="epoch",
            gradient_checkpointing=True,
        )
        before = weights_of(trainer.model)
        trainer.train()
        moved = {name for name, weight in weights_of(trainer.model).items() if not torch.equal(weight, before[name])}
        assert any("lora_B" in name for name in moved) and not any("base_layer" in name for name in moved)
        assert any("score" in name for name in moved) == (head != "lm")
        output = trainer.predict(dataset_of(trees))
        live = step_score(
            torch.from_numpy(judged_steps(output.predictions, output.label_ids)[0]), trainer.step_format
        ).numpy()
        scorer = StepScorer.from_pretrained(str(tmp_path / "out" / "checkpoint-1"))
        scores = np.concatenate(scorer.score_trees(trees))
        np.testing.assert_allclose(np.sort(scores), np.sort(live), rtol=0, atol=1e-5)

    def test_resuming_a_mixture_of_experts(self, tmp_path, trees):
        """Parameter names in its files differ from the model's. `Trainer` alone resumes without the experts and only warns."""
        args = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
        make = partial(tiny_model, architecture="qwen2-moe-sliding")
        whole = make_trainer(tmp_path, trees, make(), **args)
        whole.train()
        resumed = make_trainer(tmp_path, trees, make(), **args)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for name, weight in weights_of(resumed.model).items():
            assert torch.equal(weight, whole.model.get_parameter(name)), name

    def test_resuming_with_tied_embeddings(self, tmp_path, trees):
        """Tied embeddings are not in the file, and must not be reported as missing."""
        model = partial(tiny_model, HEADS["lm"], tie_word_embeddings=True)
        args = {"head": "lm", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        whole = make_trainer(tmp_path, trees, model(), **args)
        whole.train()
        resumed = make_trainer(tmp_path, trees, model(), **args)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert torch.equal(resumed.model.lm_head.weight, whole.model.lm_head.weight)

    @pytest.mark.parametrize("change", [two_layer_head, drop("score.bias"), drop("model.norm.weight"), value_head])
    @pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
    def test_resuming_with_weights_that_do_not_fit(self, tmp_path, trees, change, max_shard_size):
        trainer = make_trainer(tmp_path, trees, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        folder = tmp_path / "checkpoint-1"
        weights = load_file(folder / "model.safetensors")
        change(weights)
        (folder / "model.safetensors").unlink()
        (folder / RECORD_NAME).unlink()  # it would notice that files changed
        files = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
        for name, keys in files.filename_to_tensors.items():
            save_file({key: weights[key] for key in keys}, folder / name, metadata={"format": "pt"})
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        trainer = make_trainer(tmp_path, trees, max_steps=2)
        with pytest.raises(ValueError, match=f"{folder}: .*(missing|unexpected) `"):
            trainer.train(resume_from_checkpoint=str(folder))
        assert trainer.state.global_step == 0

    @pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
    def test_resuming_with_another_head(self, tmp_path, trees, max_shard_size):
        save(tmp_path, tiny_model())
        tiny_model().save_pretrained(tmp_path, max_shard_size=max_shard_size)
        if max_shard_size == "60KB":
            (tmp_path / "model.safetensors").unlink(missing_ok=True)
        (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
        (tmp_path / "optimizer.pt").touch()
        trainer = make_trainer(tmp_path, trees, head="regression", accept_changes=["head"])
        with pytest.raises(ValueError, match=f"{tmp_path}: .* score.weight: .* `head`"):
            trainer.train(resume_from_checkpoint=str(tmp_path))

    @pytest.mark.parametrize("names", [("score.bias",), ("model.layers.0.self_attn.q_proj.lora_B.weight",)])
    def test_resuming_an_adapter_that_does_not_fit(self, tmp_path, trees, names):
        config = LoraConfig(target_modules=["q_proj"])
        args = {"save_strategy": "steps", "save_steps": 1}
        make_trainer(tmp_path, trees, peft_config=config, max_steps=1, **args).train()
        folder = tmp_path / "checkpoint-1"
        trainer = make_trainer(tmp_path / "other", trees, peft_config=config, max_steps=2)
        trainer.train(resume_from_checkpoint=str(folder))
        assert trainer.state.global_step == 2
        names = [f"base_model.model.{name}" for name in names]
        (folder / RECORD_NAME).unlink()  # it would notice that files changed
        edit(folder, drop(*names), "adapter_model.safetensors")
        trainer = make_trainer(tmp_path / "other", trees, peft_config=config, max_steps=2)
        with pytest.raises(ValueError, match=f"{folder}: .* missing `{names[0]}`"):
            trainer.train(resume_from_checkpoint=str(folder))

    def test_resuming_equals_an_unbroken_run(self, tmp_path, trees):
        """Rows, optimizer and scheduler continue where they stopped. tests/distributed also kills the process."""

        class StopAtTwo(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 2

        args = {
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        whole = make_trainer(tmp_path / "whole", trees, **args)
        whole.train()
        stopped = make_trainer(tmp_path / "stopped", trees, **args)
        stopped.add_callback(StopAtTwo())
        stopped.train()
        resumed = make_trainer(tmp_path / "stopped", trees, **args)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == whole.state.global_step == 6
        for name, weight in weights_of(resumed.model).items():
            assert torch.equal(weight, whole.model.get_parameter(name)), name


class TestTrainedModels:
    """A trained reward model, loaded by name to be evaluated or trained further."""

    NEW = "The head of the model is newly initialized and has not been trained"

    @pytest.fixture
    def base(self, tmp_path):
        tiny_model(HEADS["lm"]).save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    @pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules=["q_proj"])])
    def test_evaluation_equals_the_training_run(self, tmp_path, trees, base, caplog, peft_config):
        trainer = make_trainer(tmp_path / "hrm", trees, base, evaluation=trees, peft_config=peft_config)
        trainer.train()
        expected = trainer.evaluate()
        trainer.save_model()
        caplog.clear()
        loaded = make_trainer(tmp_path / "other", trees, str(tmp_path / "hrm"), evaluation=trees)
        found = loaded.evaluate()
        for name in ("eval_loss", "eval_auroc", "eval_ece"):
            assert found[name] == pytest.approx(expected[name], abs=1e-6)
        assert "newly initialized" not in caplog.text
        if peft_config is not None:  # the adapter stays trainable
            before = weights_of(loaded.model)
            loaded.train()
            changed = {n for n, weight in weights_of(loaded.model).items() if not torch.equal(weight, before[n])}
            assert changed and all("lora_" in n or "modules_to_save" in n for n in changed)

    def test_a_trained_model_without_its_head(self, tmp_path, trees):
        """The model has a step_format.json, so a missing head is an error and must not be newly initialized."""
        folder = save(tmp_path / "hrm", tiny_model())
        edit(folder, drop("score.weight", "score.bias"))
        with pytest.raises(ValueError, match="missing `score.bias`"):
            make_trainer(tmp_path / "out", trees, str(folder))
        (folder / "step_format.json").unlink()
        make_trainer(tmp_path / "out", trees, str(folder))

    def test_another_head(self, tmp_path, trees):
        folder = str(save(tmp_path / "hrm", tiny_model()))
        for head in ("regression", "lm"):
            with pytest.raises(ValueError, match="the weights do not fit"):
                make_trainer(tmp_path / "out", trees, folder, head=head)

    def test_another_format_warns(self, tmp_path, trees, caplog):
        folder = str(save(tmp_path / "hrm", tiny_model()))
        make_trainer(tmp_path / "out", trees, folder)
        assert "different step format" not in caplog.text
        make_trainer(tmp_path / "out", trees, folder, step_separator="\n", merge_separator=" ")
        assert r"hrm was trained with a different step format: `step_separator` '\n\n' (now '\n')" in caplog.text

    def test_evaluating_a_new_head_warns(self, tmp_path, trees, base, caplog):
        trainer = make_trainer(tmp_path / "out", trees, base, evaluation=trees)
        for measure in (trainer.evaluate, lambda: trainer.predict(dataset_of(trees))):
            caplog.clear()
            measure()
            assert self.NEW in caplog.text
        trainer.train()
        caplog.clear()
        trainer.evaluate()
        assert self.NEW not in caplog.text

    def test_evaluating_an_existing_head_does_not_warn(self, tmp_path, trees, caplog):
        tiny_model().save_pretrained(tmp_path / "model")
        make_trainer(tmp_path / "out", trees, str(tmp_path / "model"), evaluation=trees).evaluate()
        make_trainer(tmp_path / "out", trees, evaluation=trees).evaluate()  # the user created this head
        assert self.NEW not in caplog.text


class TestBestMetric:
    """Without this check, an undefined metric is a KeyError of `Trainer` after the first evaluation."""

    ONE_CLASS = [StepTree("p 1+2?", ["= 3", "so x"], [1.0, 1.0], [-1, 0])]
    ARGS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    ARGS |= {"load_best_model_at_end": True}

    @pytest.mark.parametrize(
        "metric", ["eval_auroc", "auroc", "balanced_accuracy", "error_f1", "merged_accuracy", "eval_single_auroc"]
    )
    def test_not_defined(self, tmp_path, trees, metric):
        trainer = make_trainer(tmp_path, trees, evaluation=self.ONE_CLASS, metric_for_best_model=metric, **self.ARGS)
        name = f"eval_{metric.removeprefix('eval_')}"
        with pytest.raises(ValueError, match=f"'{name}'.* 2 correct and 0 wrong steps"):
            trainer.train()
        assert trainer.state.global_step == 0

    @pytest.mark.parametrize("metric", ["loss", "eval_accuracy", "ece"])
    def test_defined_with_one_class(self, tmp_path, trees, metric):
        trainer = make_trainer(tmp_path, trees, evaluation=self.ONE_CLASS, metric_for_best_model=metric, **self.ARGS)
        trainer.train()
        assert trainer.state.best_metric is not None

    def test_defined_with_two(self, tmp_path, trees):
        trainer = make_trainer(tmp_path, trees, evaluation=trees, metric_for_best_model="eval_auroc", **self.ARGS)
        trainer.train()
        assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_auroc"])

    @pytest.mark.parametrize("metric", ["loss", "eval_auroc"])
    def test_several_sets_without_a_name(self, tmp_path, trees, metric):
        """Each metric has the name of its set, so this one would not exist."""
        sets = {"easy": dataset_of(trees), "hard": dataset_of(trees)}
        trainer = make_trainer(tmp_path, trees, evaluation=sets, metric_for_best_model=metric, **self.ARGS)
        with pytest.raises(ValueError, match="Name one, such as 'eval_easy_loss'"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_one_of_several_sets(self, tmp_path, trees):
        """Only the evaluation set that the metric names is checked."""
        sets = {"easy": dataset_of(self.ONE_CLASS), "hard": dataset_of(trees)}
        args = {"evaluation": sets, **self.ARGS}
        make_trainer(tmp_path / "a", trees, metric_for_best_model="eval_hard_auroc", **args).train()
        with pytest.raises(ValueError, match="'eval_easy_auroc'"):
            make_trainer(tmp_path / "b", trees, metric_for_best_model="eval_easy_auroc", **args).train()

    def test_metrics_of_the_user(self, tmp_path, trees):
        """The trainer cannot know what a user's own metrics need, so it does not check them."""
        trainer = make_trainer(
            tmp_path,
            trees,
            evaluation=self.ONE_CLASS,
            metric_for_best_model="auroc",
            compute_metrics=lambda _: {"auroc": 0.7},
            **self.ARGS,
        )
        trainer.train()
        assert trainer.state.best_metric == 0.7


def test_an_adapter_without_some_layers(tmp_path, trees):
    """The head is left out in addition to the layers that the user leaves out."""
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["q_proj"])
    trainer = make_trainer(tmp_path, trees, tiny_model(), peft_config=config)
    names = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert any("k_proj.lora_A" in name for name in names) and not any("q_proj" in name for name in names)
    assert not any("score" in name and "lora" in name for name in names)


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_formatted_datasets(tmp_path, trees, form):
    plain, formatted = (
        make_trainer(tmp_path / name, dataset_of(trees).with_format(kind)).train_dataset.to_list()
        for name, kind in (("plain", None), ("formatted", form))
    )
    assert plain == formatted


def test_steps_next_to_a_whole_completion(tmp_path, trees):
    """The labels of the steps are used, and not the label of the completion. The steps can be shown after an evaluation."""
    rows = [tree.to_row() | {"completion": "x", "label": True} for tree in trees]
    trainer = make_trainer(tmp_path, Dataset.from_list(rows), evaluation=Dataset.from_list(rows), log_worst_steps=1)
    assert trainer.reports["train_dataset"].labels_in == sum(len(tree.labels) for tree in trees)
    trainer.evaluate()


def test_another_evaluation_keeps_the_report(tmp_path, trees):
    trainer = make_trainer(tmp_path, trees, evaluation=trees)
    trainer.evaluate(dataset_of(trees[:2]))
    assert trainer.reports["eval_dataset"].rows_in == len(trees)


def test_a_new_training_next_to_older_checkpoints_warns(tmp_path, trees, caplog):
    make_trainer(tmp_path, trees, max_steps=1, save_strategy="steps", save_steps=1).train()
    caplog.set_level(logging.WARNING, "trl_hrm")
    make_trainer(tmp_path, trees, max_steps=1, save_strategy="no").train()
    assert "has checkpoints of an earlier training, such as checkpoint-1" in caplog.text


def test_dropping_long_labels_warns_with_a_remedy(tmp_path, trees, caplog):
    long = StepTree("long", ["x", " ".join(["add"] * 200)], [1.0, 1.0], [-1, 0])
    trainer = make_trainer(tmp_path, [*trees, long], max_length=150)
    report = trainer.reports["train_dataset"]
    needed = report.max_length_p99
    assert needed > 150
    assert (
        f"train_dataset: 1 of {report.labels_in} labels ({1 / report.labels_in:.1%}) are dropped because their path is longer "
        f"than `max_length` 150. `max_length={needed}` would keep 99 % of the labels."
    ) in caplog.text
    caplog.clear()
    make_trainer(tmp_path, [*trees, long], max_length=needed)
    assert "would keep" not in caplog.text
