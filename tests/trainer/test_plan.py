"""The training plan has the numbers of the training that follows, and warns of one that hardly trains."""

import random
import re

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_hrm import HRMRewardConfig, StepFormat, plan_training
from trl_hrm.scripts import kl_self, reward
from trl_hrm.tiny_model import make_tiny_model

from ..helpers import dataset_of, make_trainer, random_tree, tiny_model, tiny_tokenizer, weights_of


CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": ((self.weight * x - labels) ** 2).mean(), "logits": x}


class Steps(TrainerCallback):
    """The steps after which the Trainer evaluates and saves."""

    def __init__(self):
        self.evaluations, self.checkpoints, self.rates = [], [], []

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations.append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.checkpoints.append(state.global_step)

    def on_step_end(self, args, state, control, lr_scheduler, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 2},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 9, "num_train_epochs": 3},
        {
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1.3,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
        },
        {"per_device_train_batch_size": 5, "max_steps": 13, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"per_device_train_batch_size": 3, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 2},
        {"per_device_train_batch_size": 3, "eval_strategy": "steps", "eval_steps": 0.3, "save_steps": 0.5},
        {"per_device_train_batch_size": 3, "eval_strategy": "steps", "eval_steps": 200, "save_steps": 200},
        {"per_device_train_batch_size": 3, "eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5},
        {"per_device_train_batch_size": 6, "num_train_epochs": 4, "eval_strategy": "epoch", "eval_delay": 1.5},
        {"per_device_train_batch_size": 3, "dataloader_drop_last": True, "eval_on_start": True, "save_strategy": "no"},
        {"per_device_train_batch_size": 1, "warmup_steps": 0.2, "num_train_epochs": 2},
    ],
    ids=str,
)
def test_numbers_of_the_trainer(tmp_path, options):
    rows = Dataset.from_dict({"x": [float(i) for i in range(23)], "labels": [1.0] * 23})
    args = TrainingArguments(
        str(tmp_path),
        **(
            CPU | {"num_train_epochs": 1, "learning_rate": 1e-6, "lr_scheduler_type": "constant_with_warmup"} | options
        ),
    )
    steps = Steps()
    trainer = Trainer(Line(), args, train_dataset=rows, eval_dataset=rows, callbacks=[steps])
    plan = plan_training(args, rows)
    assert plan == plan_training(args, 23, num_processes=1)
    trainer.train()
    assert plan.max_steps == trainer.state.max_steps == trainer.state.global_step
    assert plan.num_epochs == pytest.approx(trainer.state.max_steps / plan.steps_per_epoch)
    assert plan.evaluation_steps == tuple(sorted(set(steps.evaluations)))
    assert plan.checkpoint_steps == tuple(steps.checkpoints)
    assert plan.warmup_steps == sum(rate < 1e-6 for rate in steps.rates) + (plan.warmup_steps > 0)


@pytest.mark.parametrize("seed", range(60))
def test_several_processes(seed):
    """The batches of a process, as Accelerate's sampler counts them."""
    rng = random.Random(seed)
    num_rows, batch_size, num_processes = rng.randint(1, 60), rng.randint(1, 5), rng.randint(1, 5)
    accumulation, drop_last, splits = rng.randint(1, 4), rng.random() < 0.5, rng.random() < 0.3
    batch_size *= num_processes if splits else 1  # Accelerate requires a multiple
    batches = BatchSampler(range(num_rows), batch_size, drop_last)
    shard = BatchSamplerShard(batches, num_processes=num_processes, process_index=0, split_batches=splits)
    args = TrainingArguments(
        "out",
        **CPU,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=3,
        dataloader_drop_last=drop_last,
        accelerator_config={"split_batches": splits},
    )
    if not len(shard):
        with pytest.raises(ValueError, match=f"{num_rows} rows.* {num_processes} processes"):
            plan_training(args, num_rows, num_processes=num_processes)
        return
    plan = plan_training(args, num_rows, num_processes=num_processes)
    assert plan.steps_per_epoch == -(-len(shard) // accumulation)
    assert plan.max_steps == 3 * plan.steps_per_epoch
    used = len(shard) * batch_size * (1 if splits else num_processes)
    assert plan.dropped_rows == (num_rows - used if drop_last else 0)
    assert plan.rows_per_step == min(plan.batch_size * num_processes * accumulation, num_rows)


@pytest.mark.parametrize("kind", [GRPOConfig, RLOOConfig])
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4, "num_generations": 2},
        {"per_device_train_batch_size": 2, "num_generations": 2, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 2, "num_generations": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
        {"per_device_train_batch_size": 2, "num_generations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 3},
        {"per_device_train_batch_size": 3, "num_generations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "num_generations": 4, "generation_batch_size": 8, "num_train_epochs": 1.5},
        {"per_device_train_batch_size": 2, "num_generations": 2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 0.5},
        {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 3, "save_strategy": "epoch"},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_grpo(tmp_path, kind, options):
    """TRL repeats each prompt and each generation batch, and leaves out an incomplete generation batch."""
    rows = Dataset.from_dict({"prompt": [f"{i}+2?" for i in range(5)]})
    settings = {
        "max_completion_length": 1,
        "beta": 0.0,
        "per_device_eval_batch_size": options["num_generations"],
        "num_train_epochs": 1,
    }
    args = kind(str(tmp_path), **CPU | settings | options)
    steps = Steps()
    trainer = {GRPOConfig: GRPOTrainer, RLOOConfig: RLOOTrainer}[kind](
        tiny_model(StepFormat(head="lm")),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[steps],
    )
    sampled = list(trainer._get_train_sampler())
    plan = plan_training(args, rows)
    assert plan.dropped_rows == 5 - len(set(sampled))
    assert plan.num_prompts == args.generation_batch_size // args.num_generations
    trainer.train()
    assert plan.max_steps == trainer.state.max_steps == trainer.state.global_step
    assert plan.num_epochs == pytest.approx(trainer.state.epoch if "max_steps" not in options else plan.num_epochs)
    assert plan.evaluation_steps == tuple(sorted(set(steps.evaluations)))
    assert plan.checkpoint_steps == tuple(steps.checkpoints)


def test_text_of_grpo():
    """1,000 problems on 8 GPUs, computed by hand: 8 x 4 x 8 = 256 completions of 32 prompts, 31 times per epoch."""
    args = GRPOConfig(
        "out",
        **CPU,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        num_generations=8,
        num_iterations=2,
        num_train_epochs=2,
        save_strategy="no",
    )
    assert str(plan_training(args, 1000, num_processes=8)).splitlines() == [
        "training plan",
        "  rows                           1,000 (8 are left out of each epoch, less than a generation batch)",
        "  generation batch               256 completions (32 prompts x 8 generations), trained on 2 times",
        "  completions per optimizer step 64 (batch size 4 x accumulation 2 x processes 8)",
        "  optimizer steps per epoch      248",
        "  optimizer steps                496 (2 epochs)",
        "  warmup steps                   0",
        "  evaluations                    none",
        "  checkpoints                    none",
    ]
    with pytest.raises(ValueError, match="31 rows.* 32 prompts"):
        plan_training(args, 31, num_processes=8)
    args = GRPOConfig("out", **CPU, per_device_train_batch_size=2, num_generations=2)
    assert plan_training(args, 9, num_processes=3).steps_per_epoch == 3
    args.num_generations = 4  # as of a launch with 2 processes
    with pytest.raises(ValueError, match="6 completions.* multiple of `num_generations` 4"):
        plan_training(args, 9, num_processes=3)


def test_labels_and_rows_of_a_reward_model(tmp_path):
    """Long trees are split, trees without a label are dropped, and a label that is repeated counts once."""
    rng = random.Random(0)
    trees = [random_tree(rng, f"p{i}", max_steps=30) for i in range(12)]
    for tree in trees[:3]:
        tree.labels = [None] * len(tree.labels)
    args = {
        "max_length": 70,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
    }
    trainer = make_trainer(tmp_path, trees, **args)
    plan = plan_training(trainer.args, trainer.train_dataset)
    labels = [label for tree in trees[3:] for label in tree.labels]
    assert plan.num_rows == len(trainer.train_dataset) > len(trees)  # otherwise nothing was split
    assert trainer.reports["train_dataset"].trees_without_labels == 3
    assert (plan.num_labels, plan.num_correct, plan.num_wrong) == (len(labels), labels.count(1), labels.count(0))
    assert plan.mean_label == pytest.approx(sum(labels) / len(labels))
    assert f"{len(labels)} ({labels.count(1)} correct, {labels.count(0)} wrong)" in str(plan)
    trainer.train()
    assert trainer.state.max_steps == plan.max_steps

    soft = [tree for tree in trees[3:] if len(tree.labels) > 1]
    for tree in soft:
        tree.labels = [0.25, 1.0, *[None] * (len(tree.labels) - 2)]
    plan = plan_training(trainer.args, make_trainer(tmp_path, soft).train_dataset)
    assert f"{2 * len(soft)} (mean 0.625)" in str(plan) and plan.num_correct == len(soft)


def test_text():
    """The recipe of the HRM paper on 690 rows and 8 GPUs, computed by hand."""
    args = HRMRewardConfig(
        "out",
        **CPU,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=40,
        warmup_steps=0.03,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    plan = plan_training(args, 690, num_processes=8)  # 87 batches per process
    assert str(plan).splitlines() == [
        "training plan",
        "  rows                       690",
        "  rows per optimizer step    16 (batch size 1 x accumulation 2 x processes 8)",
        "  optimizer steps per epoch  44",
        "  optimizer steps            1,760 (40 epochs)",
        "  warmup steps               53",
        "  evaluations                40 (every 44 steps)",
        "  checkpoints                40 (every 44 steps). The best one by eval_loss is loaded at the end",
    ]


@pytest.mark.parametrize(
    ("options", "evaluations", "checkpoints"),
    [
        ({"eval_strategy": "steps", "eval_steps": 40, "save_strategy": "no"}, "3 (every 40 steps, and after step 100)", "none"),
        ({"eval_strategy": "no", "save_steps": 100}, "none", "1 (after step 100)"),
        (
            {"eval_strategy": "steps", "eval_steps": 50, "eval_on_start": True, "save_strategy": "best", "metric_for_best_model": "loss"},
            "3 (before the first step, and every 50 steps)",
            "after each evaluation that is the best so far",
        ),
        ({"eval_strategy": "steps", "eval_steps": 30, "eval_delay": 60}, "3 (after steps 60, 90, 100)", "1 (after step 100)"),
    ],
    ids=str,
)  # fmt: skip
def test_text_of_evaluations_and_checkpoints(options, evaluations, checkpoints):
    plan = plan_training(TrainingArguments("out", **CPU, max_steps=100, **options), 5)
    lines = {line[2:28].strip(): line[29:] for line in str(plan).splitlines()}
    assert (lines["evaluations"], lines["checkpoints"]) == (evaluations, checkpoints)


class TestWarnings:
    def test_none(self):
        args = HRMRewardConfig("out", **CPU, max_steps=100, save_steps=50, eval_strategy="steps", eval_steps=100)
        assert plan_training(args, 100).warnings == ()

    @pytest.mark.parametrize("steps", [99, 100])
    def test_few_steps(self, steps):
        """The recipes of an earlier version made 2 to 7 steps and ended without a warning."""
        args = HRMRewardConfig("out", **CPU, per_device_train_batch_size=4, num_train_epochs=1, save_strategy="no")
        warnings = plan_training(args, 4 * steps).warnings
        assert len(warnings) == (steps < 100)
        if warnings:
            for option in (
                "num_train_epochs",
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "packing",
            ):
                assert f"`{option}" in warnings[0]
        args = TrainingArguments("out", **CPU, max_steps=steps, save_strategy="no")
        assert ["`max_steps`" in warning for warning in plan_training(args, 4).warnings] == [True] * (steps < 100)

    def test_steps_that_are_never_reached(self):
        args = TrainingArguments("out", **CPU, max_steps=150, eval_strategy="steps", eval_steps=200, save_steps=151)
        warnings = plan_training(args, 4).warnings
        assert [re.match(r"`(\w+)` \d+ is never reached", warning)[1] for warning in warnings] == [
            "eval_steps",
            "save_steps",
        ]
        assert ["only the last one is saved" in warning for warning in warnings] == [False, True]

    def test_no_evaluation_for_the_best_model(self):
        args = {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}
        [warning] = plan_training(TrainingArguments("out", **CPU, max_steps=100, **args), 4).warnings
        assert warning.startswith("`load_best_model_at_end` has no effect")
        args = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
        assert plan_training(TrainingArguments("out", **CPU, max_steps=100, **args), 4).warnings == ()

    def test_batch_size_that_may_change(self):
        args = TrainingArguments("out", **CPU, max_steps=100, auto_find_batch_size=True, save_strategy="no")
        assert "`auto_find_batch_size`" in plan_training(args, 4).warnings[0]


@pytest.mark.parametrize(
    ("options", "num_rows"), [({"max_steps": 0}, 5), ({"num_train_epochs": 0}, 5), ({"dataloader_drop_last": True}, 7), ({}, 0)]
)  # fmt: skip
def test_nothing_to_train_on(options, num_rows):
    with pytest.raises(ValueError, match=next(iter(options), "nothing to train on")):
        plan_training(TrainingArguments("out", **CPU, **options), num_rows)


class TestCommands:
    """`--plan true` prints the plan that the training prints, without the weights of the model."""

    def run(self, script, capsys, **settings) -> str:
        capsys.readouterr()
        script.main(*script.make_parser().parse_dict(CPU | {"save_strategy": "no"} | settings))
        return capsys.readouterr().out

    def plan_of(self, shown: str) -> list[str]:
        lines = shown.splitlines()
        start = lines.index("training plan")
        return [line for line in lines[start:] if line.startswith(("training plan", "  ", "warning:"))]

    @pytest.mark.parametrize("trained", [False, True])
    def test_reward(self, tmp_path, capsys, trained):
        rng = random.Random(0)
        (tmp_path / "data").mkdir()
        trees = dataset_of(random_tree(rng, f"p{i}") for i in range(9))
        trees.to_parquet(tmp_path / "data" / "train.parquet")
        # the rows of a trained reward model are encoded in its own step format
        step_format = StepFormat(step_separator=" ### and so on ### ") if trained else StepFormat()
        model = tiny_model(step_format)
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        if trained:
            step_format.save(tmp_path / "model")
        settings = {
            "dataset_name": str(tmp_path / "data"),
            "model_name_or_path": str(tmp_path / "model"),
            "output_dir": str(tmp_path / "out"),
            "max_length": 128,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "gradient_checkpointing": False,
        }
        trained_plan = self.plan_of(self.run(reward, capsys, **settings))
        weights = tmp_path / "model" / "model.safetensors"
        weights.unlink()
        settings["output_dir"] = str(tmp_path / "planned")
        shown = self.run(reward, capsys, plan=True, **settings)
        assert self.plan_of(shown) == trained_plan and "warning: The training has only 2 optimizer steps, and" in shown
        assert not (tmp_path / "planned").exists()
        with pytest.raises(OSError, match=r"model\.safetensors"):
            self.run(reward, capsys, **settings)

    def test_kl_self(self, tmp_path, capsys):
        """Packing decides on the number of rows, and rows with an empty completion are dropped."""
        rows = [{"prompt": "1 + 2", "completion": " = 3" * (i % 5)} for i in range(40)]
        (tmp_path / "data").mkdir()
        Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
        make_tiny_model(
            ["1 + 2 = 3"], tmp_path / "policy", kind="causal", hidden_size=32, num_layers=1, vocab_size=270
        )
        settings = {
            "dataset_name": str(tmp_path / "data"),
            "model_name_or_path": str(tmp_path / "policy"),
            "output_dir": str(tmp_path / "out"),
            "packing": True,
            "max_length": 64,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 1,
        }
        trained_plan = self.plan_of(self.run(kl_self, capsys, **settings))
        assert 1 < int(re.search(r"rows +(\d+)", "\n".join(trained_plan))[1]) < 32
        (tmp_path / "policy" / "model.safetensors").unlink()
        settings["output_dir"] = str(tmp_path / "planned")
        assert self.plan_of(self.run(kl_self, capsys, plan=True, **settings)) == trained_plan
        assert not (tmp_path / "planned").exists()


def test_the_best_checkpoint_is_saved(tmp_path):
    """With the labels of the evaluation set flipped, each step of the training raises its loss, so the first checkpoint is best."""
    trees = [random_tree(random.Random(i), f"p{i}") for i in range(6)]
    flipped = [random_tree(random.Random(i), f"p{i}") for i in range(6)]
    for tree in flipped:
        tree.labels = [1 - label for label in tree.labels]
    trainer = make_trainer(
        tmp_path,
        trees,
        evaluation=flipped,
        learning_rate=0.01,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    kept = []
    keep = TrainerCallback()
    keep.on_step_end = lambda args, state, control, model, **kwargs: kept.append(weights_of(model))
    trainer.add_callback(keep)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses == sorted(losses) and len(set(losses)) == 2
    trainer.save_model(tmp_path / "final")
    saved = make_trainer(tmp_path / "again", trees, str(tmp_path / "final")).model
    for name, weight in saved.named_parameters():
        assert torch.equal(weight, kept[0][name]), name
    assert any(not torch.equal(weight, kept[-1][name]) for name, weight in saved.named_parameters())
