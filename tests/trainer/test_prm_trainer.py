"""One optimizer step and one evaluation of `PRMTrainer` against a slow reference, and the inputs of metrics."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    set_seed,
)
from transformers.trainer_pt_utils import LabelSmoother

from trl_hrm import StepTree
from trl_hrm.prm import PRMTrainer

from ..helpers import dataset_of, make_trainer, path_logits, tiny_model, tiny_tokenizer, weights_of
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


@pytest.fixture(scope="module")
def chains() -> list[StepTree]:
    """Return eight rows of one to six steps, right or wrong."""
    return chains_of(0.0, 1.0)


@pytest.fixture(scope="module")
def soft_chains() -> list[StepTree]:
    return chains_of(0.0, 0.3, 0.9, 1.0)


class TestLoss:
    @pytest.mark.parametrize("batch_size", [8, 4, 2, 1])
    @pytest.mark.parametrize("labels", ["hard", "soft"])
    def test_batch_size_times_accumulation(self, tmp_path, chains, soft_chains, labels, batch_size):
        """
        TRL's original recipe sums the means of micro-batches without dividing: gradients become 2, 4 and 8 times too
        large, and clipping hides it. Here nothing is clipped, so the weights show the size of the gradients.
        """
        chains = {"hard": chains, "soft": soft_chains}[labels]
        trainer = make_prm_trainer(
            tmp_path,
            rows_of(chains),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
        )
        assert_one_step(trainer, slow_step(chains))

    @pytest.mark.parametrize(
        "settings",
        [
            {"gradient_checkpointing": True},
            {"remove_unused_columns": False},
            {"max_length": None},
            {"max_length": 512},
        ],
        ids=str,
    )
    def test_settings_that_change_no_result(self, tmp_path, chains, settings):
        assert_one_step(make_prm_trainer(tmp_path, rows_of(chains), **settings), slow_step(chains))

    def test_padding_on_the_left(self, tmp_path, chains):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.padding_side = "left"
        assert_one_step(make_prm_trainer(tmp_path, rows_of(chains), tokenizer=tokenizer), slow_step(chains))

    def test_a_collator_of_the_user(self, tmp_path, chains):
        """A collator without an attention mask, which a causal model with right padding does not need."""

        def collate(features):
            batch = DataCollatorForTokenClassification(tiny_tokenizer(), pad_to_multiple_of=64)(features)
            seen.append(set(features[0]))
            return {"input_ids": batch["input_ids"], "labels": batch["labels"]}

        seen = []
        trainer = make_prm_trainer(tmp_path, rows_of(chains), given={"data_collator": collate})
        assert_one_step(trainer, slow_step(chains))
        assert seen == [{"input_ids", "labels"}]
        speeds = trainer.state.log_history[0]
        labels = sum(len(chain.labels) for chain in chains)
        width = -(-max(map(len, trainer.train_dataset["input_ids"])) // 64) * 64
        assert speeds["tokens_per_second"] / speeds["labels_per_second"] == pytest.approx(8 * width / labels)

    def test_equals_hrm_reward_trainer(self, tmp_path, soft_chains):
        """Also for rows with a shared prompt, which HRMRewardTrainer joins: in chains, each occurrence counts."""
        chains = soft_chains + [StepTree(soft_chains[0].prompt, ["sub so", "y"], [0.0, 1.0], [-1, 0])]
        chains.append(chains[0])
        mine = make_prm_trainer(
            tmp_path / "prm",
            rows_of(chains),
            evaluation=rows_of(chains[:3]),
            learning_rate=0.05,
            per_device_train_batch_size=16,
        )
        theirs = make_trainer(
            tmp_path / "hrm",
            dataset_of(chains),
            tiny_model(FORMAT),
            evaluation=chains[:3],
            tokenizer=tiny_tokenizer(),
            step_separator="\n",
            shared_prefix=False,
            packing=False,
            label_weighting="occurrence",
            learning_rate=0.05,
            per_device_train_batch_size=16,
        )
        before = [trainer.evaluate() for trainer in (mine, theirs)]
        for name in ("eval_loss", "eval_accuracy"):
            assert before[0][name] == pytest.approx(before[1][name], abs=1e-5)
        for trainer in (mine, theirs):
            trainer.train()
        logs = [trainer.state.log_history[0] for trainer in (mine, theirs)]
        for name in ("loss", "grad_norm"):
            assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-4), name
        for name, weight in weights_of(mine.model).items():
            torch.testing.assert_close(weight, theirs.model.get_parameter(name), rtol=0, atol=1e-5)

    def test_label_smoothing(self, tmp_path, chains):
        """`label_smoothing_factor` means what it means in transformers."""
        trainer = make_prm_trainer(tmp_path, rows_of(chains), label_smoothing_factor=0.2)
        batch = trainer.data_collator(list(trainer.train_dataset))
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        theirs = LabelSmoother(epsilon=0.2)({"logits": logits}, batch["labels"]).item()
        expected = slow_step(chains, smoothing=0.2)
        assert expected[0] == pytest.approx(theirs, abs=1e-5)
        assert_one_step(trainer, expected)

    def test_an_override_of_the_loss(self, tmp_path, chains):
        class Sevenfold(PRMTrainer):
            def compute_step_loss(self, logits, labels, num_merged):
                assert logits.shape == (len(labels), 2) and num_merged.tolist() == [1] * len(labels)
                return 7 * super().compute_step_loss(logits, labels, num_merged)

        trainer = make_prm_trainer(tmp_path, rows_of(chains), trainer_class=Sevenfold, evaluation=rows_of(chains))
        expected = 7 * slow_losses(tiny_model(FORMAT), chains).mean().item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)

    def test_an_override_of_compute_loss(self, tmp_path, chains):
        """An override written for transformers reads attributes of the outputs returned with the loss."""

        class Doubled(PRMTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                shapes.append((outputs.logits.shape[-1], outputs["logits"].shape[:2] == inputs["labels"].shape))
                return (2 * loss, outputs) if return_outputs else 2 * loss

        shapes = []
        trainer = make_prm_trainer(tmp_path, rows_of(chains), trainer_class=Doubled)
        trainer.train()
        expected = 2 * slow_losses(tiny_model(FORMAT), chains).mean().item()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        assert shapes == [(2, True)]

    def test_a_bidirectional_model(self, tmp_path):
        """In BERT every token sees the padding unless the mask is passed to the model."""
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        set_seed(0)
        model = BertForTokenClassification(BertConfig(vocab_size=16, **sizes)).eval()
        rows = Dataset.from_dict(
            {"input_ids": [[5, 8, 3], [5, 9, 10, 11, 8, 3]], "labels": [[-100] * 2 + [1], [-100] * 5 + [0]]}
        )
        alone = [
            F.cross_entropy(
                model(torch.tensor([row["input_ids"]])).logits[0, -1], torch.tensor(row["labels"][-1])
            ).item()
            for row in rows
        ]
        trainer = make_prm_trainer(tmp_path, rows, model, rows, word_tokenizer())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(alone), abs=1e-6)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(alone), abs=1e-6)


class TestLogs:
    def test_counts(self, tmp_path, chains):
        """Padding is not counted as tokens, and a step without a label is not counted as judged."""
        chains = [*chains, StepTree("q", ["x", "y"], [None, 1.0], [-1, 0])]
        trainer = make_prm_trainer(tmp_path, rows_of(chains), per_device_train_batch_size=16)
        trainer.train()
        log = trainer.state.log_history[0]
        labels = sum(label is not None for chain in chains for label in chain.labels)
        assert log["num_labels"] == labels and log["dropped_labels"] == 0
        tokens = sum(map(len, trainer.train_dataset["input_ids"]))
        assert log["tokens_per_second"] / log["labels_per_second"] == pytest.approx(tokens / labels)


class TestEvaluation:
    def test_the_loss_is_the_mean_over_steps(self, tmp_path, soft_chains):
        """TRL's loss was the mean over batches, which changed with the batch size."""
        expected = slow_losses(tiny_model(FORMAT), soft_chains).mean().item()
        for batch_size in (8, 3, 1):
            trainer = make_prm_trainer(
                tmp_path, rows_of(soft_chains), evaluation=rows_of(soft_chains), per_device_eval_batch_size=batch_size
            )
            assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)

    def test_accuracy(self, tmp_path, soft_chains):
        model = tiny_model(FORMAT)
        hits = [
            bool(logits.argmax()) == (chain.labels[step] >= 0.5)
            for chain in soft_chains
            for step, logits in path_logits(model, FORMAT, chain).items()
        ]
        trainer = make_prm_trainer(tmp_path, rows_of(soft_chains), evaluation=rows_of(soft_chains))
        metrics = trainer.evaluate()
        assert 0 < sum(hits) < len(hits)
        assert metrics["eval_accuracy"] == pytest.approx(np.mean(hits))
        speed = {name for name in metrics if "second" in name or "time" in name}
        assert metrics.keys() - speed == {"eval_loss", "eval_accuracy", "epoch"}

    def test_metrics_of_the_user(self, tmp_path, chains):
        """Users wrote them for these shapes, integer types and padding."""

        def metrics(prediction):
            seen.append((prediction.predictions, prediction.label_ids))
            return {"steps": int((prediction.label_ids != -100).sum())}

        seen = []
        trainer = make_prm_trainer(
            tmp_path,
            rows_of(chains),
            evaluation=rows_of(chains),
            given={"compute_metrics": metrics},
            per_device_eval_batch_size=3,
        )
        found = trainer.evaluate()
        [(predictions, labels)] = seen
        width = max(len(ids) for ids in trainer.eval_dataset["input_ids"])
        assert predictions.shape == (8, width, 2) and labels.shape == (8, width) and labels.dtype == np.int64
        for row, found_labels in zip(trainer.eval_dataset, labels, strict=True):
            assert found_labels.tolist() == row["labels"] + [-100] * (width - len(row["labels"]))
        assert found["eval_steps"] == sum(len(chain.labels) for chain in chains) and "eval_accuracy" not in found
        judged = torch.from_numpy(predictions[labels != -100])
        plain = [logits for chain in chains for logits in path_logits(tiny_model(FORMAT), FORMAT, chain).values()]
        torch.testing.assert_close(judged, torch.stack(plain), rtol=0, atol=1e-5)

    def test_preprocess_logits_for_metrics(self, tmp_path, chains):
        """The loss must not be computed from the preprocessed logits."""
        seen = []
        trainer = make_prm_trainer(
            tmp_path,
            rows_of(chains),
            evaluation=rows_of(chains),
            given={
                "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
                "compute_metrics": lambda prediction: (seen.append(prediction.predictions), {})[1],
            },
        )
        loss = trainer.evaluate()["eval_loss"]
        assert seen[0].ndim == 2 and set(np.unique(seen[0])) <= {-100, 0, 1}
        assert loss == pytest.approx(slow_losses(tiny_model(FORMAT), chains).mean().item(), abs=1e-5)

    def test_only_the_loss(self, tmp_path, chains):
        trainer = make_prm_trainer(tmp_path, rows_of(chains), evaluation=rows_of(chains), prediction_loss_only=True)
        metrics = trainer.evaluate()
        assert "eval_accuracy" not in metrics
        assert metrics["eval_loss"] == pytest.approx(slow_losses(tiny_model(FORMAT), chains).mean().item(), abs=1e-5)

    def test_an_override_of_the_prediction_step(self, tmp_path, chains):
        """The evaluation must use the losses that the override returns."""

        class Constant(PRMTrainer):
            def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
                return torch.tensor(3.0), torch.zeros(*inputs["labels"].shape, 2), inputs["labels"]

        trainer = make_prm_trainer(
            tmp_path, rows_of(chains), trainer_class=Constant, evaluation=rows_of(chains), per_device_eval_batch_size=3
        )
        metrics = trainer.evaluate()
        wrong = [label == 0 for chain in chains for label in chain.labels]
        assert metrics["eval_loss"] == 3 and metrics["eval_accuracy"] == pytest.approx(np.mean(wrong))

    def test_without_any_label(self, tmp_path, chains):
        """A user's collator may cut off all labels. Evaluation then reports an undefined mean instead of failing after hours."""

        def collate(features):
            batch = DataCollatorForTokenClassification(tiny_tokenizer())(features)
            return batch | {"labels": torch.full_like(batch["labels"], -100)}

        trainer = make_prm_trainer(
            tmp_path,
            rows_of(chains),
            evaluation=rows_of(chains),
            given={"data_collator": collate, "compute_metrics": lambda _: {}},
        )
        assert np.isnan(trainer.evaluate()["eval_loss"])

    def test_default_metrics_with_losses(self, tmp_path, chains):
        """With `include_for_metrics`, an `EvalPrediction` unpacks into more than two values."""
        trainer = make_prm_trainer(
            tmp_path, rows_of(chains), evaluation=rows_of(chains), include_for_metrics=["inputs", "loss"]
        )
        assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1

    def test_losses_for_metrics(self, tmp_path, chains):
        """`include_for_metrics` gives metrics the inputs and the loss of each batch, as TRL's trainer did."""
        trainer = make_prm_trainer(
            tmp_path,
            rows_of(chains),
            evaluation=rows_of(chains),
            given={"compute_metrics": lambda p: {"found": float(p.losses.mean()), "rows": len(p.inputs)}},
            include_for_metrics=["inputs", "loss"],
        )
        metrics = trainer.evaluate()
        assert metrics["eval_rows"] == 8 and metrics["eval_found"] == pytest.approx(metrics["eval_loss"], abs=1e-6)

    def test_other_datasets(self, tmp_path, chains):
        """TRL tokenised only the datasets passed to the constructor. One evaluation must not affect the next."""
        trainer = make_prm_trainer(tmp_path, rows_of(chains))
        first, second = (slow_losses(tiny_model(FORMAT), part).mean().item() for part in (chains[:4], chains[4:]))
        assert abs(first - second) > 1e-2
        assert trainer.evaluate(rows_of(chains[:4]))["eval_loss"] == pytest.approx(first, abs=1e-5)
        metrics = trainer.evaluate({"a": rows_of(chains[:4]), "b": rows_of(chains[4:])})
        assert [metrics["eval_a_loss"], metrics["eval_b_loss"]] == pytest.approx([first, second], abs=1e-5)
        output = trainer.predict(rows_of(chains[:4]))
        assert output.metrics["test_loss"] == pytest.approx(first, abs=1e-5)
        assert output.predictions.ndim == 3 and output.label_ids.ndim == 2


@pytest.mark.parametrize("column", ["label_weights", "other"])
def test_unused_weights_give_a_warning(tmp_path, chains, caplog, column):
    rows = rows_of(chains)
    rows = rows.add_column(column, [[1.0] * len(labels) for labels in rows["labels"]])
    make_prm_trainer(tmp_path, rows)
    assert ("`label_weights`, which `PRMTrainer` does not use" in caplog.text) == (column == "label_weights")
