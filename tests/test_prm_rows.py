"""Token ids and labels of `PRMTrainer`: equal to TRL 1.13, except where TRL silently lost labels."""

import re
from dataclasses import asdict

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, Sequence, Value
from transformers import DataCollatorForTokenClassification

from trl_hrm.prm import PRMTrainer
from trl_hrm.prm.token_rows import DataCollatorForStepLabels, _has_soft_labels

from .helpers import tiny_model
from .prm_training import make_prm_trainer, prm_config, word_tokenizer


ROW = {"prompt": "which is larger", "completions": ["so nine", "ten is larger"], "labels": [True, False]}
# <s> which is larger | so nine \n | ten is larger \n
IDS = [2, 5, 6, 7, 10, 8, 3, 9, 6, 7, 3]
LABELS = [-100, -100, -100, -100, -100, -100, 1, -100, -100, -100, 0]


def tokenize(row=ROW, bos=True, step_separator="\n", **settings) -> dict[str, list]:
    defaults = {
        "max_length": None,
        "max_completion_length": None,
        "train_on_last_step_only": False,
        "is_eval": False,
    }
    return PRMTrainer.tokenize_row(row, word_tokenizer(bos), step_separator, **(defaults | settings))


def prepared(tmp_path, rows: list[dict] | Dataset, **args) -> Dataset:
    return trainer_of(tmp_path, rows, **args).train_dataset


def trainer_of(tmp_path, rows: list[dict] | Dataset, **args) -> PRMTrainer:
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return make_prm_trainer(tmp_path, dataset, tiny_model(vocab_size=16), tokenizer=word_tokenizer(), **args)


class TestTokenizeRow:
    @pytest.mark.parametrize(
        ("settings", "ids", "labels"),
        [
            ({}, IDS, LABELS),
            ({"bos": False}, IDS[1:], LABELS[1:]),
            # a separator of several tokens: the label is on the last one
            (
                {"step_separator": "\n\n"},
                [2, 5, 6, 7, 10, 8, 3, 3, 9, 6, 7, 3, 3],
                [-100, -100, -100, -100, -100, -100, -100, 1, -100, -100, -100, -100, 0],
            ),
            ({"step_separator": ";"}, [2, 5, 6, 7, 10, 8, 4, 9, 6, 7, 4], LABELS),
            # the completion is truncated first, then the whole row; a truncated step keeps its tokens and loses its label
            ({"max_completion_length": 5}, IDS[:9], LABELS[:9]),
            ({"max_completion_length": 3}, IDS[:7], LABELS[:7]),
            ({"max_completion_length": 2}, IDS[:6], LABELS[:6]),
            ({"max_length": 10}, IDS[:10], LABELS[:10]),
            ({"max_length": 3}, IDS[:3], [-100] * 3),
            ({"max_length": 8, "max_completion_length": 3}, IDS[:7], LABELS[:7]),
            ({"max_length": 6, "max_completion_length": 3}, IDS[:6], LABELS[:6]),
            ({"max_length": 100, "max_completion_length": 100}, IDS, LABELS),
            # the last step only, in training
            ({"train_on_last_step_only": True}, IDS, [-100] * 10 + [0]),
            ({"train_on_last_step_only": True, "is_eval": True}, IDS, LABELS),
            ({"train_on_last_step_only": True, "max_length": 10}, IDS[:10], [-100] * 10),
            ({"is_eval": True}, IDS, LABELS),
        ],
        ids=str,
    )
    def test_ids_and_labels(self, settings, ids, labels):
        """With labels off by one token, the model would learn from wrong texts at a plausible loss."""
        found = tokenize(**settings)
        assert found == {"input_ids": ids, "labels": labels}
        assert all(type(label) is int for label in found["labels"])

    @pytest.mark.parametrize(
        ("labels", "expected", "types"),
        [
            ([1, 0], (1, 0), {int}),
            ([1.0, 0.0], (1, 0), {int}),
            ([0.9, 0.5], (0.9, 0.5), {float}),
            ([0.9, 0.0], (0.9, 0), {float, int}),
            ([None, True], (-100, 1), {int}),
            ([False, -100], (0, -100), {int}),
        ],
    )
    def test_kinds_of_labels(self, labels, expected, types):
        """`int(0.9)` is 0: TRL trained a step that is right in nine of ten rollouts as wrong."""
        found = tokenize(ROW | {"labels": labels})["labels"]
        assert (found[6], found[10]) == expected
        assert {type(found[6]), type(found[10])} == types
        assert {found[i] for i in range(11) if i not in (6, 10)} == {-100}

    def test_an_empty_step_is_only_its_separator(self):
        found = tokenize(ROW | {"completions": ["", "ten"]})
        assert found == {"input_ids": [2, 5, 6, 7, 3, 9, 3], "labels": [-100, -100, -100, -100, 1, -100, 0]}

    def test_a_tokenizer_that_takes_single_texts(self):
        """Custom tokenizers and test doubles may accept only one text at a time, which is how TRL called them."""

        class CharacterTokenizer:
            bos_token_id = 1

            def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
                return {"input_ids": [1] * add_special_tokens + [ord(character) for character in text]}

        row = {"prompt": "q", "completions": ["ab", "c"], "labels": [True, 0.5]}
        assert PRMTrainer.tokenize_row(row, CharacterTokenizer(), "\n\n", None, None, False, False) == {
            "input_ids": [1, 113, 97, 98, 10, 10, 99, 10, 10],
            "labels": [-100, -100, -100, -100, -100, 1, -100, -100, 0.5],
        }

    def test_an_override_is_used(self, tmp_path):
        class Shouting(PRMTrainer):
            @staticmethod
            def tokenize_row(features, tokenizer, **settings):
                return PRMTrainer.tokenize_row(features | {"prompt": "ten ten"}, tokenizer, **settings)

        assert prepared(tmp_path, [ROW], trainer_class=Shouting)[0]["input_ids"] == [2, 9, 9] + IDS[4:]


class TestDataset:
    def test_columns(self, tmp_path):
        rows = prepared(tmp_path, [ROW | {"id": 7}, ROW | {"labels": [False, True]}])
        assert rows.features == Features({"labels": Sequence(Value("int64")), "input_ids": Sequence(Value("int64"))})
        assert rows["input_ids"][:] == [IDS, IDS]
        assert [[row[6], row[10]] for row in rows["labels"]] == [[1, 0], [0, 1]]

    @pytest.mark.parametrize("labels", [[[1.0, 0.0], [0.0, 1.0]], [[1, 0], [0, 1]], [[1, None], [0, 1]]])
    def test_hard_labels_become_integers(self, tmp_path, labels):
        """Users' metrics and collators expect TRL's type, `int64`."""
        rows = prepared(tmp_path, [ROW | {"labels": row} for row in labels])
        assert rows.features["labels"].feature.dtype == "int64"
        assert rows[0]["labels"][6] == 1 and rows[1]["labels"][10] == 1

    def test_soft_labels_stay_soft(self, tmp_path):
        """Also if the first rows, which determine the inferred type of a column, have hard labels."""
        rows = prepared(tmp_path, [ROW | {"labels": [1.0, 0.0]}] * 3 + [ROW | {"labels": [0.9, 0.25]}])
        assert rows.features["labels"].feature.dtype == "float32"
        assert rows[3]["labels"] == pytest.approx([-100] * 6 + [0.9] + [-100] * 3 + [0.25])
        assert rows[0]["labels"] == LABELS

    def test_soft_labels_are_looked_for_in_the_rows_given(self, tmp_path):
        """The type must come from the given rows, not from the table they were selected from, and from all of its chunks."""
        soft = [ROW | {"labels": [1.0, 0.0]}] * 10_001 + [ROW | {"labels": [0.9, None]}]
        dataset = Dataset.from_list(soft)
        assert not _has_soft_labels(dataset.select(range(10_001)))
        assert _has_soft_labels(dataset) and _has_soft_labels(dataset.select([10_001, 0]))
        assert not _has_soft_labels(Dataset.from_list([ROW | {"labels": [None, None]}]))
        assert not _has_soft_labels(Dataset.from_list([ROW | {"labels": [-100, 1]}]))

    def test_settings_reach_the_rows(self, tmp_path):
        args = {"max_length": 9, "max_completion_length": 4, "step_separator": ";"}
        assert prepared(tmp_path, [ROW], **args)[0] == {
            "input_ids": [2, 5, 6, 7, 10, 8, 4, 9],
            "labels": [-100] * 6 + [1, -100],
        }

    def test_the_last_step_only(self, tmp_path):
        """In training only the last step is labelled. Evaluation judges all steps."""
        trainer = trainer_of(tmp_path, [ROW], evaluation=Dataset.from_list([ROW]), train_on_last_step_only=True)
        assert trainer.train_dataset[0]["labels"] == [-100] * 10 + [0]
        assert trainer.eval_dataset[0]["labels"] == LABELS
        assert trainer.reports["train_dataset"].labels_in == trainer.reports["train_dataset"].labels_kept == 1

    def test_two_processes(self, tmp_path):
        one = prepared(tmp_path, [ROW, ROW | {"labels": [False, True]}])
        two = prepared(tmp_path, [ROW, ROW | {"labels": [False, True]}], dataset_num_proc=2)
        assert two[:] == one[:]

    def test_rows_without_labels_are_dropped_and_counted(self, tmp_path, caplog):
        """The mean over no steps is NaN, and the optimizer would apply it."""
        long = ROW | {"prompt": "which is larger " * 4}
        halved = ROW | {"completions": ["so nine", "ten is larger so ten is larger"]}
        unknown = ROW | {"labels": [None, None]}
        trainer = trainer_of(
            tmp_path,
            [long, ROW, halved, unknown, ROW | {"completions": [], "labels": []}],
            max_length=11,
            evaluation=Dataset.from_list([ROW, long]),
        )
        assert trainer.train_dataset["input_ids"][:] == [IDS, IDS[:8] + [6, 7, 10]]
        assert len(trainer.eval_dataset) == 1
        report = asdict(trainer.reports["train_dataset"])
        assert report == {
            "rows_in": 5,
            "rows_out": 2,
            "labels_in": 6,
            "labels_kept": 3,
            "labels_too_long": 3,
            "trees_without_labels": 3,
            "labels_merged": 0,
            "labels_joined": 0,
            "labels_contradicting": 0,
            "tokens": 11 + 11 + 11 + 11 + 4,
            "tokens_unshared": 7 + 11 + 7,
            "labels_soft": 0,
            "labels_elsewhere": 0,
            "prompts_with_control_text": 0,
            "steps_with_control_text": 0,
            "steps_with_separator": 0,
            "tokens_in_rows": 11 + 11,
            "labels_per_row_p10": pytest.approx(1.1),
            "labels_per_row_median": 1.5,
            "max_length_p99": 0,
        }
        assert trainer.reports["eval_dataset"].trees_without_labels == 1
        warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert any("train_dataset: rows in 5, rows out 2" in line and "labels too long 3" in line for line in warned)

    def test_control_text_is_counted_and_plain(self, tmp_path, caplog):
        """`<s>` in a prompt would start the sequence a second time."""
        trainer = trainer_of(
            tmp_path, [ROW | {"prompt": "which <s> larger"}, ROW | {"completions": ["so", "<s> ten"]}]
        )
        assert all(row.count(2) == 1 for row in trainer.train_dataset["input_ids"])
        report = trainer.reports["train_dataset"]
        assert (report.prompts_with_control_text, report.steps_with_control_text) == (1, 1)
        warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert any("prompts with control text 1, steps with control text 1" in line for line in warned)

    def test_no_warning_if_nothing_is_lost(self, tmp_path, caplog):
        trainer_of(tmp_path, [ROW])
        assert not [r for r in caplog.records if r.levelname == "WARNING" and "train_dataset" in r.getMessage()]


class TestReports:
    def test_a_dataset_is_prepared_once(self, tmp_path):
        """A second preparation once discarded the report, so the model card claimed that nothing was dropped."""
        long = ROW | {"prompt": "which is larger " * 4}
        rows = Dataset.from_list([ROW, long])
        trainer = trainer_of(tmp_path, [ROW], max_length=11, evaluation=rows)
        report = asdict(trainer.reports["eval_dataset"])
        assert report["trees_without_labels"] == 1
        trainer.evaluate(trainer.eval_dataset)
        trainer.predict(trainer.eval_dataset)
        assert asdict(trainer.reports["eval_dataset"]) == report
        assert trainer.reports.keys() == {"train_dataset", "eval_dataset"}

    def test_several_datasets(self, tmp_path):
        """`Trainer.evaluate` calls itself for each dataset of a dict."""
        trainer = trainer_of(tmp_path, [ROW])
        trainer.evaluate({"a": Dataset.from_list([ROW] * 2), "b": Dataset.from_list([ROW])})
        assert {name: report.rows_in for name, report in trainer.reports.items()} == {
            "train_dataset": 1,
            "eval_dataset['a']": 2,
            "eval_dataset['b']": 1,
        }


class TestPretokenized:
    def test_rows_are_used_unchanged(self, tmp_path):
        given = Dataset.from_dict({"input_ids": [[5, 8, 3]], "labels": [[-100, -100, 1]], "length": [3]})
        trainer = trainer_of(tmp_path, given, max_length=2)
        assert trainer.train_dataset is given

    @pytest.mark.parametrize("tokenized", ["train", "eval"])
    def test_each_dataset_is_checked_for_tokens(self, tmp_path, tokenized):
        """TRL checked only the training rows, so evaluation rows of another kind were left as text or tokenized twice."""
        tokens = Dataset.from_dict({"input_ids": [[5, 8, 3]], "labels": [[-100, -100, 1]]})
        steps = Dataset.from_list([ROW])
        pair = (tokens, steps) if tokenized == "train" else (steps, tokens)
        trainer = trainer_of(tmp_path, pair[0], evaluation=pair[1])
        for dataset, given in zip((trainer.train_dataset, trainer.eval_dataset), pair, strict=True):
            assert dataset[0]["input_ids"] == ([5, 8, 3] if given is tokens else IDS)
        assert trainer.evaluate()["eval_accuracy"] in (0, 0.5, 1)

    @pytest.mark.parametrize("container", [dict, DatasetDict])
    def test_several_evaluation_sets(self, tmp_path, container):
        """TRL called `.map` on the dict."""
        tokens = Dataset.from_dict({"input_ids": [[5, 8, 3]], "labels": [[-100, -100, 1]]})
        trainer = trainer_of(tmp_path, [ROW], evaluation=container({"a": Dataset.from_list([ROW] * 2), "b": tokens}))
        assert trainer.eval_dataset["a"]["input_ids"][:] == [IDS, IDS]
        assert trainer.eval_dataset["b"][0]["input_ids"] == [5, 8, 3]
        metrics = trainer.evaluate()
        assert {"eval_a_loss", "eval_a_accuracy", "eval_b_loss", "eval_b_accuracy"} <= metrics.keys()

    def test_labels_elsewhere(self, tmp_path):
        """With a separator of two tokens, its last token alone does not mark the end of a step."""
        args = {"step_separator": "\n;"}
        assert trainer_of(tmp_path, [ROW], **args).reports["train_dataset"].labels_elsewhere == 0
        given = Dataset.from_dict({"input_ids": [[5, 3, 4, 8, 4], [4]], "labels": [[-100, -100, 1, -100, 0], [1]]})
        assert trainer_of(tmp_path, given, **args).reports["train_dataset"].labels_elsewhere == 2

    def test_rows_without_labels_stay_and_are_counted(self, tmp_path, caplog):
        given = Dataset.from_dict({"input_ids": [[5, 8], [5, 3]], "labels": [[-100, -100], [-100, 1]]})
        trainer = trainer_of(tmp_path, given, per_device_train_batch_size=1)
        assert len(trainer.train_dataset) == 2 and trainer.reports["train_dataset"].trees_without_labels == 1
        assert "trees without labels 1" in caplog.text
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert 0 in losses and all(loss == loss for loss in losses)  # not NaN
        assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())

    def test_without_a_tokenizer(self, tmp_path):
        """Pretokenized rows with a collator need no tokenizer."""
        given = Dataset.from_dict({"input_ids": [[5, 8, 3]] * 2, "labels": [[-100, -100, 1], [-100, -100, 0]]})
        trainer = PRMTrainer(
            tiny_model(vocab_size=16),
            make_prm_trainer(tmp_path, given).args,
            data_collator=DataCollatorForTokenClassification(word_tokenizer()),
            train_dataset=given,
        )
        trainer.train()
        assert trainer.processing_class is None and trainer.state.global_step == 1
        trainer.save_model()  # how the rows were made is unknown
        assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "step_format.json").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                {"labels": [1, -1]},
                "train_dataset row 1: the label at token 10 is -1. It must be a probability in [0, 1]",
            ),
            ({"labels": [2, 1]}, "train_dataset row 1: the label at token 6 is 2."),
            ({"labels": [1.0, 1.5]}, "train_dataset row 1: the label at token 10 is 1.5."),
            ({"labels": [float("nan"), 1.0]}, "train_dataset row 1: the label at token 6 is nan."),
            ({"labels": [1]}, "train_dataset row 1: `labels` has 1 entries, but `completions` has 2"),
        ],
        ids=str,
    )
    def test_labels(self, tmp_path, row, message):
        """TRL passed a label of -1 to the loss, which used it as a class index."""
        with pytest.raises(ValueError, match=re.escape(message)):
            good = ROW | {"labels": [type(label)(1) for label in (row["labels"] * 2)[:2]]}
            trainer_of(tmp_path, [good, ROW | row])

    def test_labels_of_tokens(self, tmp_path):
        good, bad = ([5, 3], [-100, 1]), ([8, 3], [-1, 0])
        ids, labels = zip(good, bad, strict=True)
        with pytest.raises(ValueError, match=re.escape("row 1: the label at token 0 is -1")):
            trainer_of(tmp_path, Dataset.from_dict({"input_ids": ids, "labels": labels}))
        with pytest.raises(ValueError, match="row 0: `labels` has 1 entries"):
            trainer_of(tmp_path, Dataset.from_dict({"input_ids": [[5, 3]], "labels": [[1]]}))
        with pytest.raises(ValueError, match="train_dataset .*`labels`"):
            trainer_of(tmp_path, Dataset.from_dict({"input_ids": [[5, 3]]}))

    def test_a_bad_row_of_an_evaluation_set_is_named(self, tmp_path):
        bad = Dataset.from_list([ROW, ROW | {"labels": [True]}])
        with pytest.raises(ValueError, match=re.escape("eval_dataset['x'] row 1: `labels` has 1 entries")):
            trainer_of(tmp_path, [ROW], evaluation={"x": bad})

    def test_no_label_left(self, tmp_path):
        with pytest.raises(ValueError, match="train_dataset: .*too long 2.*`max_length`"):
            trainer_of(tmp_path, [ROW], max_length=3)
        with pytest.raises(ValueError, match="train_dataset has no rows"):
            trainer_of(tmp_path, Dataset.from_list([ROW]).select([]))

    @pytest.mark.parametrize(
        ("row", "column"),
        [
            ({"prompt": None}, "prompt"),
            ({"completions": None}, "completions"),
            ({"completions": ["so nine", None]}, "completions"),
            ({"labels": None}, "labels"),
        ],
        ids=str,
    )
    def test_nulls(self, tmp_path, row, column):
        """The tokenizer's own error does not name the row."""
        with pytest.raises(ValueError, match=f"train_dataset row 1: `{column}` .*`None`"):
            trainer_of(tmp_path, [ROW, ROW | row])

    @pytest.mark.parametrize(("column", "value"), [("labels", 1), ("completions", "so nine")])
    def test_columns_without_lists(self, tmp_path, column, value):
        """A string instead of a list of steps would be read as a list of characters."""
        with pytest.raises(ValueError, match=f"`{column}` .*(int64|string)"):
            trainer_of(tmp_path, [ROW | {column: value}])

    def test_trees(self, tmp_path):
        """Read as chains, siblings would follow each other, at a plausible loss."""
        with pytest.raises(ValueError, match="`parents`.*Use HRMRewardTrainer"):
            trainer_of(tmp_path, [ROW | {"parents": [-1, -1]}])

    def test_other_columns(self, tmp_path):
        with pytest.raises(ValueError, match=r"columns \['text'\].* `prompt`, `completions`"):
            trainer_of(tmp_path, [{"text": "a"}])

    def test_streams(self, tmp_path):
        stream = IterableDataset.from_generator(lambda: iter([ROW]))
        with pytest.raises(TypeError, match="`train_dataset` is a `IterableDataset`"):
            make_prm_trainer(tmp_path, stream, tokenizer=word_tokenizer())

    @pytest.mark.parametrize(
        ("data", "error", "message"),
        [
            (
                DatasetDict(easy=Dataset.from_list([ROW])),
                TypeError,
                "`train_dataset` is a `DatasetDict`.* such as 'easy'",
            ),
            ([ROW], TypeError, "`train_dataset` is a `list`.*`Dataset.from_list`"),
            ({"prompt": [{"role": "user", "content": "x"}]}, ValueError, "row 0: .* in `prompt`, .*HRMRewardTrainer"),
            ({"completions": [[{"role": "assistant", "content": "x"}]] * 2}, ValueError, "row 0: .* in `completions`"),
            ({"completions": [1, 2]}, ValueError, "row 0: found 1 in `completions`, expected a text"),
            ({"labels": ["True", "False"]}, ValueError, "`labels` contains list<.*string>.*booleans"),
            ({"labels": [{"value": 1}, {"value": 0}]}, ValueError, "`labels` contains list<.*struct.*booleans"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_other_types(self, tmp_path, data, error, message):
        """Their errors did not name the column, or advised against streaming."""
        is_row = isinstance(data, dict) and not isinstance(data, DatasetDict)
        dataset = Dataset.from_list([ROW | data]) if is_row else data
        with pytest.raises(error, match=message):
            make_prm_trainer(tmp_path, dataset, tokenizer=word_tokenizer())

    def test_a_separator_without_a_token(self, tmp_path):
        """TRL put the label on the last word of the step."""
        with pytest.raises(ValueError, match="`step_separator` ' '"):
            trainer_of(tmp_path, [ROW], step_separator=" ")

    def test_no_tokenizer(self, tmp_path):
        args = make_prm_trainer(tmp_path, Dataset.from_list([ROW]), tokenizer=word_tokenizer()).args
        with pytest.raises(ValueError, match="`processing_class` .*`data_collator`"):
            PRMTrainer(tiny_model(), args, train_dataset=Dataset.from_list([ROW]))
        collator = DataCollatorForTokenClassification(word_tokenizer())
        with pytest.raises(ValueError, match="`processing_class` .*`input_ids`"):
            PRMTrainer(tiny_model(), args, data_collator=collator, train_dataset=Dataset.from_list([ROW]))

    def test_no_dataset(self, tmp_path):
        with pytest.raises(ValueError, match="`train_dataset`"):
            PRMTrainer(tiny_model(), None)

    def test_a_model_by_name(self):
        with pytest.raises(ValueError, match=r"from_pretrained\('a/b', num_labels=2\)"):
            PRMTrainer("a/b", train_dataset=Dataset.from_list([ROW]))

    def test_several_devices_in_one_process(self, tmp_path):
        """`nn.DataParallel` would split the batch and divide the loss of each part by the labels of the whole batch."""
        args = prm_config(tmp_path)
        assert args.n_gpu == 0  # accessing n_gpu detects the devices, and only once
        args._n_gpu = 2
        with pytest.raises(ValueError, match="`nn.DataParallel`.*`accelerate launch`"):
            PRMTrainer(
                tiny_model(vocab_size=16),
                args,
                train_dataset=Dataset.from_list([ROW]),
                processing_class=word_tokenizer(),
            )

    def test_three_classes(self, tmp_path):
        model = tiny_model(vocab_size=16)
        model.score = torch.nn.Linear(64, 3)
        trainer = make_prm_trainer(tmp_path, Dataset.from_list([ROW]), model, tokenizer=word_tokenizer())
        with pytest.raises(ValueError, match="3 outputs .*`num_labels=2`"):
            trainer.train()


class TestCollator:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_batches(self, side):
        tokenizer = word_tokenizer().__class__(tokenizer_object=word_tokenizer()._tokenizer, pad_token="[PAD]")
        tokenizer.padding_side = side
        collator = DataCollatorForStepLabels(tokenizer)
        rows = [{"input_ids": [5, 8, 3], "labels": [-100, -100, 0.9]}, {"input_ids": [8, 3], "labels": [-100, 0.25]}]
        batch = collator(rows)
        first = torch.tensor([-100, -100, 0.9])
        second = torch.tensor([-100, 0.25, -100] if side == "right" else [-100, -100, 0.25])
        assert torch.equal(batch["labels"], torch.stack([first, second])) and batch["labels"].dtype == torch.float32
        assert batch["input_ids"][1].tolist() == ([8, 3, 0] if side == "right" else [0, 8, 3])
        assert batch["attention_mask"].sum() == 5
        other = DataCollatorForStepLabels(tokenizer, label_pad_token_id=-1)(rows)
        assert (other["labels"][1] == -1).sum() == 1
        hard = [{"input_ids": row["input_ids"], "labels": [-100] * (len(row["labels"]) - 1) + [1]} for row in rows]
        expected = DataCollatorForTokenClassification(tokenizer)([dict(row) for row in hard])
        found = collator(hard)
        assert found["labels"].dtype == torch.int64 and found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_a_collator_that_truncates_soft_labels_is_refused(self, tmp_path):
        """It would convert 0.9 to `int64` without an error."""
        given = {"data_collator": DataCollatorForTokenClassification(word_tokenizer())}
        soft = [ROW, ROW | {"labels": [1.0, 0.9]}]
        soft = [row | {"labels": [float(label) for label in row["labels"]]} for row in soft]
        message = r"train_dataset has soft labels.*DataCollatorForTokenClassification\) casts labels to torch.int64"
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, soft, given=given)
        trainer = trainer_of(tmp_path, [ROW], given=given)
        with pytest.raises(ValueError, match="eval_dataset has soft labels"):
            trainer.evaluate(Dataset.from_list(soft))
        trainer_of(tmp_path, soft[:1], given=given)  # labels of 0 and 1 are unchanged

    def test_a_collator_that_keeps_soft_labels_is_accepted(self, tmp_path):
        """It is tested with a row as in training, without the columns that the model does not use."""
        tokens = Dataset.from_dict({"input_ids": [[5, 3]], "labels": [[-100, 0.9]], "text": ["a"]})
        given = {"data_collator": DataCollatorForStepLabels(word_tokenizer())}
        trainer_of(tmp_path, tokens, given=given).train()

        def collate(features):  # with all columns the collator would have to remove them
            seen.append(set(features[0]))
            return given["data_collator"]([{k: v for k, v in row.items() if k != "text"} for row in features])

        seen = []
        trainer_of(tmp_path, tokens, given={"data_collator": collate}, remove_unused_columns=False).train()
        assert seen == [{"input_ids", "labels", "text"}] * 2
