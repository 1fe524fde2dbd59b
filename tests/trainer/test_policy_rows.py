"""Self-training rows without anything to learn from, and chat templates that print the date."""

import pytest
from datasets import Dataset

from tests.helpers import tiny_model
from tests.trainer.kl_training import LM, make_kl_trainer
from trl_hrm import KLSelfConfig
from trl_hrm.trainer.kl_self_trainer import drop_empty_completions

from ..fakes import LLAMA, byte_level


GOOD = {"prompt": "add x", "completion": " = 3"}
LONG = {"prompt": "add x y " * 20, "completion": " = 3"}
EMPTY = {"prompt": "add x", "completion": " \n"}


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def messages(prompt: str, completion: str, **more: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion, **more}],
    }


class TestEmptyCompletions:
    def test_they_are_dropped_and_counted(self, tmp_path, caplog):
        """Empty completions train the model to end the sequence at the first token of an answer."""
        trainer = make_kl_trainer(tmp_path, [GOOD, EMPTY, GOOD, GOOD | {"completion": ""}])
        assert len(trainer.train_dataset) == 2
        assert any(
            "train: 2 of 4 rows have an empty completion and are dropped" in line for line in warnings_of(caplog)
        )

    def test_of_the_evaluation(self, tmp_path, caplog):
        trainer = make_kl_trainer(tmp_path, [GOOD], eval_rows=[EMPTY, GOOD])
        assert len(trainer.eval_dataset) == 1
        assert any("eval: 1 of 2 rows have an empty completion" in line for line in warnings_of(caplog))

    @pytest.mark.parametrize(
        ("rows", "kept"),
        [
            ([messages("a", "b"), messages("a", " ")], [True, False]),
            ([messages("a", "", reasoning_content="so"), messages("a", "", reasoning_content="")], [True, False]),
            ([{"messages": [{"role": "user", "content": "a"}]}], [True]),
            (
                [{"messages": messages("a", "b")["completion"]}, {"messages": messages("a", "")["completion"]}],
                [True, False],
            ),
            ([{"text": "a"}, {"text": ""}, {"text": None}], [True, False, False]),
            ([{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}], [False, True]),
            ([{"prompt": [], "completion": []}, messages("a", "b")], [False, True]),
            ([{"input_ids": [1, 2]}, {"input_ids": []}], [True, True]),
        ],
    )
    def test_in_every_format(self, rows, kept):
        dataset = Dataset.from_list(rows)
        assert drop_empty_completions(dataset, "train").to_list() == [
            row for row, keep in zip(dataset.to_list(), kept, strict=True) if keep
        ]

    def test_no_row_is_left(self, tmp_path):
        with pytest.raises(ValueError, match="train: all 2 completions are empty"):
            make_kl_trainer(tmp_path, [EMPTY, EMPTY])

    def test_no_rows(self):
        with pytest.raises(ValueError, match="train has no rows"):
            drop_empty_completions(Dataset.from_list([GOOD]).select([]), "train")

    def test_in_a_stream(self, tmp_path):
        """Rows dropped from a stream would not be counted anywhere."""
        stream = Dataset.from_list([GOOD, EMPTY]).to_iterable_dataset()
        trainer = make_kl_trainer(tmp_path, stream, max_steps=2, per_device_train_batch_size=1)
        with pytest.raises(ValueError, match="empty completion: .*add x"):
            trainer.train()


class TestTrainedRows:
    @pytest.mark.parametrize("packing", [False, True])
    def test_no_row_has_a_trained_token(self, tmp_path, packing):
        """TRL would pass an empty dataset to the sampler, which fails with `num_samples=0`."""
        with pytest.raises(ValueError, match="none of 2 rows .*`max_length` 8"):
            make_kl_trainer(tmp_path, [LONG, LONG], max_length=8, packing=packing, padding_free=False)

    @pytest.mark.parametrize("packing", [False, True])
    def test_some_have_none(self, tmp_path, caplog, packing):
        make_kl_trainer(tmp_path, [LONG, GOOD, LONG], max_length=24, packing=packing)
        [line] = [line for line in warnings_of(caplog) if "token to train on" in line]
        assert "2 of 3 rows have no token to train on and are ignored. The prompts alone fill `max_length` 24" in line

    @pytest.mark.parametrize("packing", [False, True])
    def test_no_warning_if_all_rows_are_trained(self, tmp_path, caplog, packing):
        make_kl_trainer(tmp_path, [GOOD] * 3, max_length=64, packing=packing)
        assert not [line for line in warnings_of(caplog) if "token to train on" in line]


CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


class TestUnfinishedRows:
    """Rows of `export --prefixes`. If the end of sequence after a prefix were trained, the policy would learn to stop there."""

    PREFIXES = [GOOD | {"is_complete": True}, GOOD | {"is_complete": False}, {**GOOD, "is_complete": None}]

    def test_text(self, tmp_path):
        trainer = make_kl_trainer(tmp_path, self.PREFIXES)
        plain = make_kl_trainer(tmp_path / "plain", [GOOD])
        (whole,) = plain.train_dataset
        eos = plain.processing_class.eos_token_id
        complete, prefix, unknown = trainer.train_dataset
        assert complete["labels"] == unknown["labels"] == whole["labels"]
        assert whole["labels"][-1] == eos and whole["labels"].count(eos) == 1
        assert prefix["labels"] == whole["labels"][:-1] + [-100]
        assert complete["input_ids"] == prefix["input_ids"] == whole["input_ids"]

    @pytest.mark.parametrize(("value", "kind"), [(False, "numpy"), (False, "torch"), (0, None)])
    def test_other_forms_of_false(self, tmp_path, value, kind):
        rows = Dataset.from_list([GOOD | {"is_complete": value}]).with_format(kind)
        (row,) = make_kl_trainer(tmp_path, rows).train_dataset
        assert row["labels"][-1] == -100 != row["labels"][-2]

    def test_text_is_no_boolean(self, tmp_path):
        with pytest.raises(ValueError, match="train: `is_complete` is 'false'"):
            make_kl_trainer(tmp_path, [GOOD | {"is_complete": "false"}])

    def test_one_column(self, tmp_path):
        """Rows of texts or of conversations, in which the loss covers the prompt, too."""
        (row,) = make_kl_trainer(tmp_path, [{"text": "add x = 3", "is_complete": False}]).train_dataset
        assert row["labels"] == row["input_ids"][:-1] + [-100]
        tokenizer = byte_level()
        tokenizer.chat_template = CHAT
        tokenizer.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
        both = messages("1+1?", "= 2")
        rows = [{"messages": both["prompt"] + both["completion"], "is_complete": False}]
        model = tiny_model(LM, vocab_size=len(tokenizer))
        trainer = make_kl_trainer(tmp_path, rows, model=model, trainer_args={"processing_class": tokenizer})
        trained = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
        assert tokenizer.decode(trained) == "<|user|>1+1?<|end|>\n<|assistant|>= 2"

    @pytest.mark.parametrize("trims", [False, True])
    def test_chat(self, tmp_path, trims):
        tokenizer = byte_level()
        tokenizer.chat_template = CHAT.replace("m.content", "m.content | trim") if trims else CHAT
        tokenizer.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
        rows = [messages("1+1?", " = 2\n\n") | {"is_complete": value} for value in (True, False)]
        model = tiny_model(LM, vocab_size=len(tokenizer))
        trainer = make_kl_trainer(tmp_path, rows, model=model, trainer_args={"processing_class": tokenizer})
        trained = [
            tokenizer.decode([label for label in row["labels"] if label != -100]) for row in trainer.train_dataset
        ]
        text = "= 2" if trims else " = 2\n\n"
        assert trained == [f"{text}<|end|>\n", text]

    def test_packed_and_cut(self, tmp_path):
        """Ends are masked before rows are packed or cut."""
        eos = make_kl_trainer(tmp_path / "plain", [GOOD]).processing_class.eos_token_id
        for options in ({"packing": True, "max_length": 64}, {"max_length": 64}, {"max_length": 3}):
            trainer = make_kl_trainer(tmp_path / "out", self.PREFIXES[:2], padding_free=False, **options)
            labels = [label for row in trainer.train_dataset for label in row["labels"]]
            assert labels.count(eos) == (options["max_length"] > 3)
            assert any(label != -100 for label in labels)

    def test_stream(self, tmp_path):
        stream = Dataset.from_list(self.PREFIXES[:2]).to_iterable_dataset()
        trainer = make_kl_trainer(tmp_path, stream, max_steps=1)
        labels = [row["labels"][-1] for row in trainer.train_dataset]
        assert labels == [trainer.processing_class.eos_token_id, -100]
        trainer.train()

    def test_the_end_is_unclear(self, tmp_path):
        """A template that renders an open message in another way hides where the text ends."""
        tokenizer = byte_level()
        tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content | length }}:{{ m.content }}")
        tokenizer.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
        rows = [messages("1+1?", " = 2") | {"is_complete": False}]
        model = tiny_model(LM, vocab_size=len(tokenizer))
        with pytest.raises(ValueError, match="unfinished row .* ends is unknown"):
            make_kl_trainer(tmp_path, rows, model=model, trainer_args={"processing_class": tokenizer})
        with pytest.raises(ValueError, match="Remove `formatting_func`"):
            make_kl_trainer(
                tmp_path,
                self.PREFIXES,
                completion_only_loss=False,
                trainer_args={"formatting_func": lambda row: row["prompt"] + row["completion"]},
            )


def test_rows_do_not_depend_on_the_day(tmp_path, on_day):
    """Rows use the same date as `trl-hrm annotate`, and the saved tokenizer keeps its template."""
    found = []
    for day in ("2024-07-26", "2025-03-04"):
        on_day(day)
        tokenizer = byte_level()
        tokenizer.chat_template = LLAMA
        tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "</s>"})
        rows = [{"messages": messages("1+1?", "2")["prompt"]}]
        trainer = make_kl_trainer(
            tmp_path / day,
            rows,
            model=tiny_model(LM, vocab_size=len(tokenizer)),
            trainer_args={"processing_class": tokenizer},
        )
        found.append(tokenizer.decode(trainer.train_dataset[0]["input_ids"]))
        assert trainer.processing_class.chat_template == LLAMA
    assert found[0] == found[1] and "26 Jul 2024" in found[0]


def test_an_invalid_date(tmp_path):
    for date in (None, "today"):
        with pytest.raises(ValueError, match=f"`chat_template_date` is {date!r}"):
            KLSelfConfig(str(tmp_path), use_cpu=True, bf16=False, chat_template_date=date)
