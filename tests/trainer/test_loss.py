"""One optimizer step of the trainer against a slow reference: loss and weights for every way to split the batch."""

import random

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import TrainerCallback

from trl_hrm import HRMRewardTrainer, StepTree, hrm_view
from trl_hrm.data.export import export
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.losses import step_loss
from trl_hrm.search.nodes import write_nodes
from trl_hrm.trainer.forest_dataset import DataCollatorForForest

from ..helpers import ALL_HEADS, HEADS, dataset_of, make_trainer, path_logits, random_tree, tiny_model, weights_of
from ..search.random_trees import full_tree


LEARNING_RATE = 0.1


@pytest.fixture(scope="module")
def trees() -> list[StepTree]:
    """Return eight trees with very different numbers of labels, hard and soft."""
    rng = random.Random(1)
    trees = [hrm_view(random_tree(rng, name, max_steps=6)) for name in "abcdefgh"]
    trees[0].labels[0] = 0.9
    counts = [len(tree.labels) for tree in trees]
    assert min(counts) <= 2 and max(counts) > 7
    return trees


def expected_step(step_format, losses_and_weights) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the weights after one step of SGD. A function of the model gives losses and their weights."""
    model = tiny_model(step_format)
    losses, weights = losses_and_weights(model)
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:  # as for the output embeddings under a value head
                weight -= LEARNING_RATE * weight.grad
    return loss.item(), weights_of(model)


def slow_losses(model, step_format, trees, error_weight=1.0):
    losses, weights = [], []
    for tree in trees:
        for step, logits in path_logits(model, step_format, tree).items():
            label = torch.tensor(tree.labels[step])
            losses.append(step_loss(logits, label, step_format))
            weights.append(label + (1 - label) * error_weight)
    return torch.stack(losses), torch.stack(weights)


def assert_one_step(trainer, expected) -> None:
    trainer.train()
    loss, weights = expected
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss, abs=1e-5)
    moved = 0.0
    start = weights_of(tiny_model(trainer.step_format))
    for name, weight in weights_of(trainer.model).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        moved = max(moved, (weight - start[name]).abs().max().item())
    assert moved > 1e-3  # the comparison above accepts 1e-5


@pytest.mark.parametrize("batch_size", [8, 4, 2, 1])
@pytest.mark.parametrize("head", HEADS)
def test_batch_size_times_accumulation(tmp_path, trees, head, batch_size):
    """A mean per micro-batch would weight a step by the number of other steps in its micro-batch."""
    step_format = HEADS[head]
    expected = expected_step(step_format, lambda model: slow_losses(model, step_format, trees))
    trainer = make_trainer(
        tmp_path,
        trees,
        head=step_format.head,
        regression_loss=step_format.regression_loss,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
    )
    assert_one_step(trainer, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"shared_prefix": False, "packing": False, "per_device_train_batch_size": 64},
        {"shared_prefix": False, "packing": True, "per_device_train_batch_size": 64, "max_length": 60},
        {"packing": True, "max_length": 60, "per_device_train_batch_size": 64},
        {"packing": True, "max_length": 60, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 64},
        {"max_length": None},
        {"pad_to_multiple_of": 64},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "shared_prefix": False, "per_device_train_batch_size": 64},
        {"dataset_num_proc": 2},
        {"remove_unused_columns": False},
        {"label_weighting": "occurrence"},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()),
)
def test_settings_that_change_no_result(tmp_path, trees, settings):
    step_format = HEADS["classification"]
    expected = expected_step(step_format, lambda model: slow_losses(model, step_format, trees))
    assert_one_step(make_trainer(tmp_path, trees, **settings), expected)


@pytest.fixture(scope="module")
def search_run(tmp_path_factory) -> str:
    """Return a file of search trees with many different MC scores."""
    rng = random.Random(3)
    folder = tmp_path_factory.mktemp("run")
    write_nodes([full_tree(rng, f"{i}", num_children=4, depth=2) for i in range(2)], folder / "nodes.parquet")
    return str(folder / "nodes.parquet")


@pytest.mark.parametrize("head", ["classification", "regression"])
@pytest.mark.parametrize("view", ["hrm", "prm"])
def test_mc_labels(tmp_path, search_run, head, view):
    """
    Reward models on the labels of a search, with node compression in the HRM view. A step of several rows has the mean of their
    labels: the parent of a moved node has one score in the tree and one in the compressed tree.
    """
    options = {"hnc": True, "hnc_rule": "per_child"} if view == "hrm" else {}
    config = ExportConfig(
        inputs=[search_run], output_dir=str(tmp_path / "data"), view=view, test_size=0, num_proc=1, **options
    )
    export(config)
    rows = load_dataset(str(tmp_path / "data"), split="train").to_list()
    trees = [StepTree.from_row(row) for row in rows]
    labels = {label for tree in trees for label in tree.labels}
    assert len(labels) > 3 and not labels <= {0.0, 1.0}
    if view == "hrm":  # a merged step, also a moved node, has the label of its last step
        found = {"tree": {}, "hnc": {}}
        for row, tree in zip(rows, trees, strict=True):
            pairs = [i for i, count in enumerate(tree.num_merged) if count == 2]
            found[row["source"]] |= {(tree.prompt, tree.completions[i]): tree.labels[i] for i in pairs}
            if row["source"] == "tree":
                ids = tree.step_columns["node_ids"]
                alone = {ids[i]: label for i, label in enumerate(tree.labels) if tree.num_merged[i] == 1}
                assert [tree.labels[i] for i in pairs] == [alone[ids[i]] for i in pairs]
        assert found["hnc"] == found["tree"] and len(found["tree"]) == 32
    groups = {}
    for tree in trees:
        groups.setdefault(tree.prompt, []).append(tree)
    joined = [StepTree.from_chains(group)[0] for group in groups.values()]
    step_format = HEADS[head]
    expected = expected_step(step_format, lambda model: slow_losses(model, step_format, joined))
    trainer = make_trainer(tmp_path / "model", Dataset.from_list(rows), head=head)
    assert_one_step(trainer, expected)


@pytest.mark.parametrize("head", ["regression", "lm"])
def test_one_sequence_per_path(tmp_path, trees, head):
    expected = expected_step(HEADS[head], lambda model: slow_losses(model, HEADS[head], trees))
    trainer = make_trainer(tmp_path, trees, head=head, shared_prefix=False, per_device_train_batch_size=64)
    assert_one_step(trainer, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
        {"shared_prefix": False, "per_device_train_batch_size": 64},
    ],
)
@pytest.mark.parametrize("head", ["mlp", "value", "value-bce", "lm_mean"])
def test_heads_of_published_models(tmp_path, trees, head, settings):
    step_format = ALL_HEADS[head]
    expected = expected_step(step_format, lambda model: slow_losses(model, step_format, trees))
    args = {"head": step_format.head, "regression_loss": step_format.regression_loss}
    assert_one_step(make_trainer(tmp_path, trees, **args, **settings), expected)


def test_occurrence_weighting_equals_flat_rows(tmp_path):
    """
    Flat training: every chain is a plain sequence with all its labels, so a step above a branch counts once for each
    chain that contains it.
    """
    rng = random.Random(2)
    chains = [chain for name in "abcd" for chain in random_tree(rng, name).chains()]

    def flat_losses(model):
        losses = []
        for chain in chains:
            for step, logits in path_logits(model, HEADS["classification"], chain).items():
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(int(chain.labels[step]))))
        return torch.stack(losses), torch.ones(len(losses))

    trainer = make_trainer(tmp_path, chains, label_weighting="occurrence")
    assert trainer.reports["train_dataset"].labels_joined >= 3
    assert_one_step(trainer, expected_step(HEADS["classification"], flat_losses))


def test_error_weight(tmp_path, trees):
    """Σ w·ℓ / Σ w with w = 3 for wrong steps, with different shares of errors in the accumulation steps."""
    step_format = HEADS["classification"]
    expected = expected_step(step_format, lambda model: slow_losses(model, step_format, trees, error_weight=3.0))
    trainer = make_trainer(
        tmp_path, trees, error_weight=3.0, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert_one_step(trainer, expected)


@pytest.mark.parametrize("batch_size", [8, 2])
def test_weights_of_the_dataset(tmp_path, batch_size, caplog):
    """Σ w·ℓ / Σ w with the weights of the column `label_weights`, over the global batch. An evaluation uses them, too."""
    rng = random.Random(5)
    trees = [hrm_view(random_tree(rng, name, max_steps=6)) for name in "abcdefgh"]
    for tree in trees:
        tree.step_columns["label_weights"] = [rng.choice([0.0, 1 / 3, 2 / 3, 1.0, 5.0]) for _ in tree.labels]
    step_format = HEADS["classification"]

    def weighted(model):
        losses, _ = slow_losses(model, step_format, trees)
        return losses, torch.tensor([weight for tree in trees for weight in tree.step_columns["label_weights"]])

    model = tiny_model(step_format)
    losses, weights = weighted(model)
    expected = (losses * weights).sum() / weights.sum()
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
    trainer = make_trainer(tmp_path, trees, evaluation=trees, label_weighting="column", **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert_one_step(trainer, expected_step(step_format, weighted))
    # a dataset from elsewhere counts every step once
    plain = [StepTree(tree.prompt, tree.completions, tree.labels, tree.parents, tree.num_merged) for tree in trees]
    losses, ones = slow_losses(tiny_model(step_format), step_format, plain)
    trainer = make_trainer(tmp_path, trees, evaluation=plain, label_weighting="column")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses.mean().item(), abs=1e-6)
    assert "label_weights" not in caplog.text
    make_trainer(tmp_path, trees)
    assert "has the column `label_weights`, which is not used" in caplog.text
    assert "Do not use the weights of a dataset with `balance`" in caplog.text


def test_last_step_only(tmp_path):
    rng = random.Random(3)
    trees = [random_tree(rng, name) for name in "abcd"]
    leaves = [
        StepTree(t.prompt, t.completions, [y if i in t.leaves() else None for i, y in enumerate(t.labels)], t.parents)
        for t in trees
    ]
    step_format = HEADS["classification"]
    expected = expected_step(step_format, lambda model: slow_losses(model, step_format, leaves))
    trainer = make_trainer(tmp_path, trees, train_on_last_step_only=True, evaluation=trees)
    assert_one_step(trainer, expected)
    # evaluation judges every step
    assert trainer.evaluate()["eval_num_steps"] == sum(len(tree.labels) for tree in trees)


def test_clipping(tmp_path, trees):
    """The paper's `max_grad_norm` of 0.01 clips the gradient of the global mean."""
    trainer = make_trainer(
        tmp_path, trees, max_grad_norm=0.01, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    start = weights_of(trainer.model)
    trainer.train()
    moved = torch.stack([(w - start[name]).norm() for name, w in weights_of(trainer.model).items()]).norm()
    assert moved.item() == pytest.approx(LEARNING_RATE * 0.01, rel=1e-3)
    assert trainer.state.log_history[0]["grad_norm"] > 0.1


class TestSoftLabels:
    def test_a_soft_label_is_not_rounded(self, tmp_path):
        tree = StepTree("p", ["x"], [0.9], [-1])
        trainer = make_trainer(tmp_path, [tree])
        logits = path_logits(trainer.model, HEADS["classification"], tree)[0].double().log_softmax(-1)
        trainer.train()
        expected = -(0.9 * logits[1] + 0.1 * logits[0]).item()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-6)

    def test_labels_are_not_cast_to_the_dtype_of_the_model(self, tmp_path, monkeypatch):
        """With DeepSpeed in bf16, Trainer casts float inputs: a label of 0.9 would train as 0.8984."""
        trainer = make_trainer(tmp_path, [StepTree("p", ["x"], [0.9], [-1])])
        monkeypatch.setattr(
            HRMRewardTrainer, "_prepare_input", lambda self, data: {k: _to_bfloat16(v) for k, v in data.items()}
        )
        batch = next(iter(trainer.get_train_dataloader()))
        batch["other"] = torch.tensor([0.9])
        inputs = trainer._prepare_inputs(batch)
        assert inputs["other"].item() == 0.8984375  # the cast does happen
        assert inputs["labels"].item() == pytest.approx(0.9, abs=1e-7)
        assert inputs["label_weights"].dtype == torch.float32


def _to_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


class TestNoLabels:
    def test_rows_without_labels_are_dropped_and_counted(self, tmp_path, trees):
        unlabelled = [StepTree(f"no label {i}", ["x"], [None], [-1]) for i in range(3)]
        step_format = HEADS["classification"]
        expected = expected_step(step_format, lambda model: slow_losses(model, step_format, trees))
        trainer = make_trainer(tmp_path, [*unlabelled, *trees])
        assert trainer.reports["train_dataset"].trees_without_labels == 3
        assert_one_step(trainer, expected)

    @pytest.mark.parametrize("weightless", ["all", "one"])
    def test_weights_of_zero(self, tmp_path, trees, weightless):
        """A mean over no labels is 0 / 0: a single NaN would destroy the model."""

        class WithoutWeights(DataCollatorForForest):
            def torch_call(self, examples):
                batch = super().torch_call(examples)
                batch["label_weights"][: None if weightless == "all" else 1] = 0
                return batch

        model = tiny_model()
        start = weights_of(model)
        collator = WithoutWeights(0)
        trainer = make_trainer(
            tmp_path, trees, model, data_collator=collator, per_device_train_batch_size=2, max_grad_norm=1.0
        )
        trainer.train()
        assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history[:-1])
        changed = max((w - start[name]).abs().max().item() for name, w in weights_of(model).items())
        if weightless == "all":
            assert [log["loss"] for log in trainer.state.log_history[:-1]] == [0, 0, 0, 0]
            assert changed == 0
        else:
            assert 0 < changed < 10

    def test_batches_without_steps(self, tmp_path, trees):
        """A user's collator may produce rows without any judged step."""

        class WithoutSteps(DataCollatorForForest):
            def torch_call(self, examples):
                names = ("step_positions", "labels", "label_weights", "num_merged")
                return super().torch_call([example | {name: [] for name in names} for example in examples])

        trainer = make_trainer(tmp_path, trees, data_collator=WithoutSteps(0))
        start = weights_of(trainer.model)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == 0
        assert all(torch.equal(weight, start[name]) for name, weight in weights_of(trainer.model).items())


class TestEvaluation:
    @pytest.mark.parametrize("head", HEADS)
    def test_loss_does_not_depend_on_the_batch(self, tmp_path, trees, head):
        """Trainer's own mean over batches gives the steps of a small last batch more weight."""
        step_format = HEADS[head]
        model = tiny_model(step_format)
        with torch.no_grad():
            losses, weights = slow_losses(model, step_format, trees, error_weight=2.0)
        found = []
        for batch_size in (1, 3, 8):
            trainer = make_trainer(
                tmp_path,
                trees[:1],
                model,
                evaluation=trees,
                head=step_format.head,
                regression_loss=step_format.regression_loss,
                error_weight=2.0,
                per_device_eval_batch_size=batch_size,
            )
            found.append(trainer.evaluate())
        expected = ((losses * weights).sum() / weights.sum()).item()
        assert [metrics["eval_loss"] for metrics in found] == pytest.approx([expected] * 3, abs=1e-5)
        for name in ("eval_accuracy", "eval_auroc", "eval_merged_ece", "eval_num_steps"):
            assert [metrics[name] for metrics in found] == pytest.approx([found[0][name]] * 3, abs=1e-5)

    def test_shared_prefix_and_packing_change_no_metric(self, tmp_path, trees):
        model = tiny_model()
        found = []
        for settings in ({}, {"packing": True, "max_length": 64}, {"shared_prefix": False}):
            metrics = make_trainer(tmp_path, trees[:1], model, evaluation=trees, **settings).evaluate()
            found.append({k: v for k, v in metrics.items() if "second" not in k and "time" not in k})
        assert found[1] == pytest.approx(found[0], abs=1e-5) and found[2] == pytest.approx(found[0], abs=1e-5)
        assert found[0]["eval_single_num_steps"] + found[0]["eval_merged_num_steps"] == found[0]["eval_num_steps"]


def test_training_loss_is_in_evaluation_units(tmp_path, trees):
    """The logged training loss and `eval_loss` agree for the same rows and model."""

    class StopAtOnce(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.zero_grad()

    trainer = make_trainer(tmp_path, trees, evaluation=trees, per_device_train_batch_size=3)
    trainer.add_callback(StopAtOnce())
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history[:-1]]
    counts = torch.tensor([log["num_labels"] for log in trainer.state.log_history[:-1]])
    counts = torch.diff(counts, prepend=torch.tensor([0]))
    expected = trainer.evaluate()["eval_loss"]
    assert (torch.tensor(losses) * counts).sum().item() / counts.sum().item() == pytest.approx(expected, abs=1e-4)
    assert counts.sum() == sum(len(tree.labels) for tree in trees)
    assert len(dataset_of(trees)) == 8
