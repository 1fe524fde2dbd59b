"""Worst-judged steps and calibration after an evaluation: against slow scores, with planted scores, and what trackers get."""

import json
import os
import random
import re
import subprocess
import sys
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerControl, TrainerState

from trl_hrm import HRMRewardTrainer, StepTableCallback, StepTree, hrm_view
from trl_hrm.losses import step_loss, step_score
from trl_hrm.step_metrics import expected_calibration_error
from trl_hrm.trainer.step_trainer import EvaluatedSteps, StepSources
from trl_hrm.training.model_card import metrics_at

from ..helpers import HEADS, dataset_of, make_trainer, path_logits, random_tree, tiny_model
from ..implicit_models import implicit_trainer, save_models
from ..prm_training import FORMAT, chains_of, make_prm_trainer, rows_of


CLASSIFICATION = HEADS["classification"]
EVIL = "</p><script>alert(1)</script>‮"


def record_of(trainer, name="eval", step=0) -> dict:
    path = f"{trainer.args.output_dir}/_evaluations/{name}_{step:05d}"
    with open(f"{path}.html", encoding="utf-8") as page:
        assert page.read().count("<article") == len(json.loads(open(f"{path}.json").read())["worst_steps"])
    return json.loads(open(f"{path}.json").read())


def slow_rows(model, trees: list[StepTree], step_format=CLASSIFICATION) -> list[dict]:
    """Return all misjudged steps, scored one path at a time, with the fields of the table. A step in several rows is listed once."""
    found = {}
    for row, tree in enumerate(trees):
        for step, logits in path_logits(model, step_format, tree).items():
            path = [tree.completions[i] for i in tree.path(step)]
            score = step_score(logits[None], step_format).item()
            label = tree.labels[step]
            if (score >= 0.5) == (label >= 0.5):
                continue
            loss = step_loss(logits[None], torch.tensor([label]), step_format).item()
            one = {
                "kind": "false positive" if score >= 0.5 else "false negative",
                "problem": tree.prompt,
                "step": path[-1],
                "label": pytest.approx(label),
                "score": pytest.approx(score, abs=1e-5),
                "error": pytest.approx(abs(score - label), abs=1e-5),
                "loss": pytest.approx(loss, abs=1e-4),
                "num_merged": tree.num_merged[step] if tree.num_merged else 1,
                "row": row,
                "step_index": step,
                "steps_before": path[:-1],
            }
            found.setdefault((tree.prompt, *path, one["num_merged"]), one)
    return list(found.values())


def place(one: dict) -> tuple:
    return one["row"], one["step_index"]


@pytest.fixture(scope="module")
def trees() -> list[StepTree]:
    """Ten trees with single and merged steps, of which two have the same prompt and share a first step."""
    rng = random.Random(1)
    trees = [random_tree(rng, f"{i}", max_steps=6) for i in range(9)]
    steps, labels = [trees[2].completions[0], "more"], [trees[2].labels[0], 1.0]
    return [hrm_view(tree) for tree in [*trees, StepTree(trees[2].prompt, steps, labels, [-1, 0])]]


@pytest.fixture(scope="module")
def model():
    return tiny_model(initializer_range=0.3)


class TestAgainstSlowScores:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"packing": True, "max_length": 100, "per_device_eval_batch_size": 2},  # trees share rows
            {"packing": True, "max_length": 45},  # trees are split
            {"shared_prefix": False},
        ],
        ids=["trees", "packed", "split", "chains"],
    )
    def test_every_misjudged_step(self, tmp_path, trees, model, settings):
        """
        Rows are joined by prompt, packed and split, so the place of a score in the predictions says nothing about its step: a table
        could show the right scores with the texts of other steps.
        """
        trainer = make_trainer(tmp_path, trees[:2], model, evaluation=trees, log_worst_steps=1000, **settings)
        metrics = trainer.evaluate()
        record = record_of(trainer)
        kept = metrics["eval_num_steps"]
        assert trainer.reports["eval_dataset"].labels_too_long == 0 and kept == record["num_labels"]
        expected = slow_rows(model, trees)
        assert {one["kind"] for one in expected} == {"false positive", "false negative"}
        assert any(one["num_merged"] > 1 for one in expected) and any(one["steps_before"] for one in expected)
        assert sorted(record["worst_steps"], key=place) == sorted(expected, key=place)
        for kind in ("false positive", "false negative"):
            errors = [one["error"] for one in record["worst_steps"] if one["kind"] == kind]
            assert errors == sorted(errors, reverse=True)
            assert len(errors) == record[f"num_{kind.replace(' ', '_')}s"]
        assert record["ece"] == pytest.approx(metrics["eval_ece"])
        assert sum(one["count"] for one in record["calibration"]) == kept

    def test_conversational_rows(self, tmp_path, trees, model):
        """The table has the texts of the messages, as the model was shown them."""
        rows = [tree.to_row() for tree in trees[:3]]
        chat = [
            row
            | {
                "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}],
                "completions": [[{"role": "assistant", "content": step}] for step in row["completions"]],
            }
            for row in rows
        ]
        found = []
        for name, data in (("plain", rows), ("chat", chat)):
            trainer = make_trainer(
                tmp_path / name, trees[:1], model, evaluation=Dataset.from_list(data), log_worst_steps=50
            )
            trainer.evaluate()
            found.append(record_of(trainer)["worst_steps"])
        assert found[0] == found[1] and found[0]

    def test_rows_in_another_order_are_refused_at_the_start(self, tmp_path, trees, model):
        with pytest.raises(ValueError, match="`train_sampling_strategy` is 'group_by_length'"):
            make_trainer(
                tmp_path,
                trees[:2],
                model,
                evaluation=trees,
                log_worst_steps=5,
                train_sampling_strategy="group_by_length",
            )

    def test_named_datasets(self, tmp_path, trees, model):
        """Each dataset has its own files, also with a name that cannot be part of a path."""
        parts = {"a/b": dataset_of(trees[:3]), "rest": dataset_of(trees[3:])}
        trainer = make_trainer(tmp_path, trees[:2], model, evaluation=parts, log_worst_steps=1000)
        trainer.evaluate()
        for name, part in (("eval_a%2Fb", trees[:3]), ("eval_rest", trees[3:])):
            found = record_of(trainer, name)["worst_steps"]
            assert sorted(found, key=place) == sorted(slow_rows(model, part), key=place)

    def test_another_dataset_and_prefix(self, tmp_path, trees, model):
        trainer = make_trainer(tmp_path, trees[:2], model, evaluation=trees[:1], log_worst_steps=1000)
        trainer.evaluate(dataset_of(trees[4:]), metric_key_prefix="test")
        assert sorted(record_of(trainer, "test")["worst_steps"], key=place) == sorted(
            slow_rows(model, trees[4:]), key=place
        )
        trainer.evaluate()  # the first dataset still has its own sources
        found = record_of(trainer)["worst_steps"]
        assert sorted(found, key=place) == sorted(slow_rows(model, trees[:1]), key=place)

    def test_unpaired_preference_rows(self, tmp_path, model):
        """Completions are cut into steps when they are prepared, and the table shows the last step, which has the label."""
        rows = [
            {"prompt": f"{i} 1+2?", "completion": "first\n\nsecond\n\nlast", "label": bool(i % 2)} for i in range(4)
        ]
        trainer = make_trainer(
            tmp_path, Dataset.from_list(rows), model, evaluation=Dataset.from_list(rows), log_worst_steps=9
        )
        trainer.evaluate()
        found = record_of(trainer)["worst_steps"]
        assert found
        for one in found:
            assert (one["problem"], one["step"]) == (rows[one["row"]]["prompt"], "last")
            assert (one["steps_before"], one["step_index"]) == (["first", "second"], 2)
            assert one["label"] == rows[one["row"]]["label"]

    def test_prm_trainer(self, tmp_path):
        """Steps without a label and truncated steps are not in the table, and do not shift the texts of the others."""
        chains = chains_of(0.0, 1.0, None)
        model = tiny_model(FORMAT, initializer_range=0.3)
        trainer = make_prm_trainer(tmp_path, rows_of(chains[:2]), model, rows_of(chains), max_length=22)
        trainer.add_callback(StepTableCallback(trainer, 1000))
        trainer.evaluate()
        record, report = record_of(trainer), trainer.reports["eval_dataset"]
        assert report.labels_too_long > 0 and record["num_labels"] == report.labels_kept
        expected = {place(one): one for one in slow_rows(model, chains, FORMAT)}
        found = record["worst_steps"]
        assert len(found) >= len(expected) - report.labels_too_long > 0
        for one in found:
            assert one == expected[place(one)]

    def test_implicit_prm(self, tmp_path, trees):
        """The reference is precomputed into new datasets, which have the same sources."""
        policy, reference = save_models(tmp_path)
        single = [random_tree(random.Random(2), f"{i}") for i in range(4)]
        records = []
        for precompute in (False, True):
            folder = tmp_path / f"{precompute}"
            trainer = implicit_trainer(
                folder,
                single[:2],
                policy,
                evaluation=single,
                ref_model=reference,
                precompute_ref_log_probs=precompute,
                log_worst_steps=100,
            )
            metrics = trainer.evaluate()
            records.append(record_of(trainer))
            assert records[-1]["ece"] == pytest.approx(metrics["eval_ece"], abs=1e-6)
        assert records[0]["worst_steps"]
        for one in records[0]["worst_steps"]:
            tree = single[one["row"]]
            assert (one["problem"], one["step"]) == (tree.prompt, tree.completions[one["step_index"]])
            assert one["label"] == tree.labels[one["step_index"]]
            assert one["loss"] == pytest.approx(-np.log(1 - one["error"]), abs=1e-4)
        places = [[place(one) for one in record["worst_steps"]] for record in records]
        assert places[0] == places[1]


@pytest.fixture(scope="module")
def planted(tmp_path_factory, model):
    """A trainer with planted scores of 10 steps in two rows. Two errors are equal, and two steps are judged well."""
    texts = [f"step {i}" for i in range(5)]
    rows = [StepTree(f"{EVIL} {i}?", texts, [1.0] * 5, [-1, 0, 1, 2, 3]) for i in range(2)]
    trainer = make_trainer(tmp_path_factory.mktemp("planted"), rows, model, evaluation=rows)
    labels = np.array([0, 0, 0, 0, 0.25, 1, 1, 1, 0.75, 1])
    scores = np.array([0.5, 0.75, 0.75, 0.25, 1, 0, 0.25, 0.49, 0.25, 0.99])
    sources = StepSources(dataset_of(rows), np.repeat([0, 1], 5), np.tile(np.arange(5), 2))
    steps = EvaluatedSteps(scores, np.arange(10) / 8, labels, np.array([1] * 9 + [2]), sources, "eval_math")
    trainer.evaluated_steps = lambda: steps
    return trainer


def planted_log(trainer, tmp_path, num_steps=20, report_to=(), is_main=True) -> StepTableCallback:
    callback = StepTableCallback(trainer, num_steps)
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=list(report_to))
    trainer.state = state = TrainerState(global_step=7, is_world_process_zero=is_main)
    callback.on_evaluate(args, state, TrainerControl(), metrics={})
    return callback


class TestPlanted:
    def test_the_logged_table(self, planted, tmp_path, trackers):
        planted_log(planted, tmp_path, report_to=["trackio", "wandb"])
        [values] = trackers["trackio"].logged
        assert trackers["wandb"].logged == [values]
        columns = "kind problem step label score error loss num_merged row step_index".split()
        first, second = "</p><script>alert(1)</script>\\u202e 0?", "</p><script>alert(1)</script>\\u202e 1?"
        high, low = "false positive", "false negative"
        assert values["eval/math_worst_steps"] == (
            "table",
            columns,
            [
                [high, first, "step 1", 0.0, 0.75, 0.75, 0.125, 1, 0, 1],
                [high, first, "step 2", 0.0, 0.75, 0.75, 0.25, 1, 0, 2],
                [high, first, "step 4", 0.25, 1.0, 0.75, 0.5, 1, 0, 4],
                [high, first, "step 0", 0.0, 0.5, 0.5, 0.0, 1, 0, 0],
                [low, second, "step 0", 1.0, 0.0, 1.0, 0.625, 1, 1, 0],
                [low, second, "step 1", 1.0, 0.25, 0.75, 0.75, 1, 1, 1],
                [low, second, "step 2", 1.0, 0.49, 0.51, 0.875, 1, 1, 2],
                [low, second, "step 3", 0.75, 0.25, 0.5, 1.0, 1, 1, 3],
            ],
        )
        assert values["eval/math_calibration"] == (
            "table",
            ["low", "high", "count", "mean_score", "share_right"],
            [
                [0.0, 0.1, 1, 0.0, 1.0],
                [0.2, 0.3, 3, 0.25, pytest.approx(1.75 / 3)],
                [0.4, 0.5, 1, 0.49, 1.0],
                [0.5, 0.6, 1, 0.5, 0.0],
                [0.7, 0.8, 2, 0.75, 0.0],
                [0.9, 1.0, 2, pytest.approx(0.995), pytest.approx(0.625)],
            ],
        )
        assert values["eval/math_reliability"] == ("image", np.uint8, 4)
        assert values["train/global_step"] == 7
        assert values.keys() == {f"eval/math_{name}" for name in ("worst_steps", "calibration", "reliability")} | {
            "train/global_step"
        }

    def test_number_of_steps(self, planted, tmp_path):
        """The counts are of all steps, not only of those shown."""
        planted_log(planted, tmp_path, num_steps=2)
        record = record_of(SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path)), "eval_math", 7)
        assert [(one["kind"], one["step"]) for one in record["worst_steps"]] == [
            ("false positive", "step 1"),
            ("false positive", "step 2"),
            ("false negative", "step 0"),
            ("false negative", "step 1"),
        ]
        assert (record["num_labels"], record["num_false_positives"], record["num_false_negatives"]) == (10, 4, 4)
        steps = planted.evaluated_steps()
        assert record["ece"] == pytest.approx(expected_calibration_error(steps.scores, steps.labels))
        assert (record["dataset"], record["training_step"]) == ("eval_math", 7)

    def test_the_page(self, planted, tmp_path):
        planted_log(planted, tmp_path, num_steps=1)
        page = (tmp_path / "_evaluations" / "eval_math_00007.html").read_text(encoding="utf-8")
        assert "<script" not in page and "‮" not in page
        articles = [unescape(re.sub(r"<[^>]*>|\n", "", one)) for one in page.split("<article")[1:]]
        assert "label 0.00 · score 0.750 · loss 0.125 · row 0, step 1" in articles[0]
        assert articles[0].index("0?") < articles[0].index("step 0") < articles[0].index("0.750step 1")
        assert "label 1.00 · score 0.000 · loss 0.625 · row 1, step 0" in articles[1]

    def test_only_what_the_trainer_reports_to(self, planted, tmp_path, trackers):
        planted_log(planted, tmp_path, report_to=["tensorboard", "wandb"])
        assert len(trackers["wandb"].logged) == 1 and not trackers["trackio"].logged
        trackers["wandb"].run = None  # disabled by an environment variable
        planted_log(planted, tmp_path, report_to=["wandb"])
        assert len(trackers["wandb"].logged) == 1

    def test_only_the_main_process(self, planted, tmp_path, trackers):
        planted_log(planted, tmp_path, report_to=["trackio"], is_main=False)
        assert not trackers["trackio"].logged and not list(tmp_path.iterdir())


def test_the_best_checkpoint_keeps_its_step(tmp_path, trees):
    """After the training, the best checkpoint is evaluated again. The page of the last step must stay."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings = {**steps, "load_best_model_at_end": True, "max_steps": 3, "learning_rate": 0.1, "log_worst_steps": 5}
    trainer = make_trainer(tmp_path, trees, tiny_model(initializer_range=0.3), evaluation=trees, **settings)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 3
    records = [record_of(trainer, step=step) for step in (best, 3)]
    assert records[0]["worst_steps"] != records[1]["worst_steps"]
    trainer.evaluate()
    again = [record_of(trainer, step=step) for step in (best, 3)]
    assert again[1] == records[1]
    assert again[0]["training_step"] == best and again[0]["ece"] == pytest.approx(records[0]["ece"], abs=1e-5)


def test_the_checkpoint_before_the_best_step(tmp_path, trees):
    """The best step was not saved, so the checkpoint before it is loaded. The page of the best step must stay."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings = {**steps, "load_best_model_at_end": True, "metric_for_best_model": "planted", "greater_is_better": True}
    planted = iter([0.0, 0.5, 1.0, 0.2, 0.0])
    trainer = make_trainer(
        tmp_path,
        trees,
        tiny_model(initializer_range=0.3),
        evaluation=trees,
        compute_metrics=lambda _: {"planted": next(planted)},
        learning_rate=0.1,
        log_worst_steps=5,
        **settings,
    )
    trainer.train()
    assert trainer.state.best_global_step == 3 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    before = [record_of(trainer, step=step) for step in (2, 3)]
    assert before[0]["ece"] != before[1]["ece"]
    trainer.evaluate()
    after = [record_of(trainer, step=step) for step in (2, 3)]
    assert after[1] == before[1] and after[0]["ece"] == pytest.approx(before[0]["ece"], abs=1e-5)


def test_another_dataset_is_not_held_out(tmp_path, trees):
    """The metrics of the training rows would be published as held-out metrics."""
    trainer = make_trainer(tmp_path, trees, evaluation=trees[:2], log_worst_steps=5)
    expected = trainer.evaluate()
    record = record_of(trainer)
    found = trainer.evaluate(dataset_of(trees))
    assert found["eval_loss"] != expected["eval_loss"]
    assert record_of(trainer) == record and record_of(trainer, "eval_other")["num_labels"] > record["num_labels"]
    assert metrics_at(trainer, 0)[""]["loss"] == expected["eval_loss"]
    assert trainer.evaluate(trainer._eval_data)["eval_loss"] == pytest.approx(expected["eval_loss"])
    assert metrics_at(trainer, 0)[""]["loss"] == pytest.approx(expected["eval_loss"])


class TestErrors:
    def test_arguments(self, planted, tmp_path, trees, model):
        with pytest.raises(TypeError, match="SimpleNamespace"):
            StepTableCallback(SimpleNamespace())
        for number in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match="`num_steps`"):
                StepTableCallback(planted, number)
        with pytest.raises(ValueError, match="`prediction_loss_only`"):
            make_trainer(tmp_path, trees, model, evaluation=trees, log_worst_steps=1, prediction_loss_only=True)
        with pytest.raises(ValueError, match="`eval_dataset`"):
            make_trainer(tmp_path, trees, model, log_worst_steps=1)
        with pytest.raises(ValueError, match="`log_worst_steps`"):
            make_trainer(tmp_path, trees, model, log_worst_steps=-1)

    def test_prepared_rows_have_no_texts(self, tmp_path, trees, model):
        prepared = make_trainer(tmp_path, trees, model, evaluation=trees).eval_dataset
        with pytest.raises(ValueError, match="already prepared"):
            make_trainer(tmp_path, trees, model, evaluation=prepared, log_worst_steps=1)

    def test_an_evaluation_of_the_training_rows(self, tmp_path, trees, model, caplog):
        """Their texts were not kept, which must not lose the metrics."""
        trainer = make_trainer(tmp_path, trees, model, evaluation=trees, log_worst_steps=1)
        found = trainer.evaluate(trainer.train_dataset)
        assert found["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
        assert caplog.text.count("This evaluation has no table of worst steps") == 1

    def test_another_order(self, tmp_path, trees, model):
        """The scores would be shown with the texts of other steps."""

        class Shuffled(HRMRewardTrainer):
            def _get_eval_sampler(self, dataset):
                return range(len(dataset) - 1, -1, -1)

        trainer = make_trainer(tmp_path, trees, model, evaluation=trees, log_worst_steps=1, trainer_class=Shuffled)
        with pytest.raises(ValueError, match="another order"):
            trainer.evaluate()

    def test_outside_an_evaluation(self, tmp_path, trees, model):
        trainer = make_trainer(tmp_path, trees, model, evaluation=trees)
        trainer.evaluate()
        with pytest.raises(RuntimeError, match="on_evaluate"):
            trainer.evaluated_steps()


TRAINING = """
import os, sys
from tests.trainer.test_step_table_callback import *
rng = random.Random(1)
trees = [random_tree(rng, f"{i}", max_steps=6) for i in range(4)]
trainer = make_trainer(
    sys.argv[1], trees, tiny_model(initializer_range=0.3), evaluation=trees, log_worst_steps=3, report_to=sys.argv[2],
    eval_strategy="steps", eval_steps=1, max_steps=2, run_name="run", project="tables", log_level="error",
)
trainer.train()
"""


def train_with(tmp_path, tracker: str, **env) -> list[dict]:
    """Train for two steps with an evaluation after each, in a process of its own, and return what the JSON files say."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "home")} | env
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "out"), tracker]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    out = SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path / "out"))
    return [record_of(out, step=step) for step in (1, 2)]


@pytest.mark.slow
def test_trackio(tmp_path):
    """A local run of trackio has the table of each evaluation, as its dashboard reads it."""
    pytest.importorskip("trackio", reason="needs trackio; `make test-slow` installs it")
    records = train_with(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as storage; "
        "print(json.dumps(storage.get_logs('tables', 'run'), default=str))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    logs = [entry for entry in json.loads(done.stdout.splitlines()[-1]) if "eval/worst_steps" in entry]
    assert [entry["train/global_step"] for entry in logs] == [1, 2]
    for entry, record in zip(logs, records, strict=True):
        rows = entry["eval/worst_steps"]["_value"]
        expected = [{key: one[key] for key in one if key != "steps_before"} for one in record["worst_steps"]]
        assert expected and [dict(row) for row in rows] == expected
        assert [dict(row) for row in entry["eval/calibration"]["_value"]] == record["calibration"]
        assert entry["eval/reliability"]["_type"] == "trackio.image"


@pytest.mark.slow
def test_wandb(tmp_path):
    """An offline run of Weights & Biases saves the tables and pictures as files of its run folder."""
    pytest.importorskip("wandb", reason="needs wandb")
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    records = train_with(tmp_path, "wandb", **env)
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/eval/worst_steps_*.json"))
    found = [json.loads(table.read_text()) for table in tables]
    assert len(found) == 2
    for record in records:
        columns = [key for key in record["worst_steps"][0] if key != "steps_before"]
        data = [[one[key] for key in columns] for one in record["worst_steps"]]
        assert {"columns": columns, "data": data} in [{key: one[key] for key in ("columns", "data")} for one in found]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/eval/reliability_*.png"))) == 2
