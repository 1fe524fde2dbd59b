"""From rows of steps to rows of tokens: exact rows, exact counts, and errors that name the row."""

import random
import re

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_hrm import HRMRewardConfig, HRMRewardTrainer, StepFormat, StepTree, hrm_view
from trl_hrm.trainer.forest_dataset import DataCollatorForForest, ForestBuilder

from ..fakes import byte_level
from ..helpers import dataset_of, random_tree, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word: `;` is 0, `|` is 1, `+` is 2, `p` is 3, `a` is 4, `b` is 5, ..."""
    vocab = {word: i for i, word in enumerate([";", "|", "+", "p", *"abcdefgh", "[UNK]"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")


@pytest.fixture
def build(words):
    """Return a function that builds rows, with `;` after steps and ` | ` within merged steps."""

    def build(rows, max_length=100, num_proc=None, **settings):
        dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        step_format = settings.pop("step_format", StepFormat(step_separator=";", merge_separator=" | "))
        settings = {"packing": False} | settings
        return ForestBuilder(words, step_format, max_length, **settings)(dataset, "train_dataset", num_proc)

    return build


def row(completions: str, labels, prompt="p", **columns):
    others = {"parents": None, "num_merged": None} | columns
    return {"prompt": prompt, "completions": completions.split(","), "labels": labels, **others}


class TestRows:
    def test_exact_row(self, build):
        """`a b ;` and `a c ;` share `a`. The third step is dropped because neither it nor a descendant has a label."""
        rows, _ = build([row("a b,a c,d,e", [1.0, 0.25, None, None], parents=[-1, -1, 0, 2])])
        assert len(rows) == 1
        assert rows[0]["input_ids"] == [3, 4, 5, 0, 6, 0]
        assert rows[0]["position_ids"] == [0, 1, 2, 3, 2, 3]
        assert rows[0]["subtree_end"] == [6, 6, 4, 4, 6, 6]
        assert rows[0]["step_positions"] == [3, 5]
        assert rows[0]["labels"] == [1.0, 0.25]
        assert rows[0]["label_weights"] == [1.0, 1.0]
        assert rows[0]["num_merged"] == [1, 1]

    def test_a_merged_step_shares_tokens_with_its_single_steps(self, build):
        """`p a ; b ;` and `p a | b ;` share `p a`."""
        tree = hrm_view(StepTree("p", ["a", "b"], [1.0, 0.0], [-1, 0]), merge_separator=" | ")
        rows, report = build(dataset_of([tree]))
        assert rows[0]["input_ids"] == [3, 4, 0, 5, 0, 1, 5, 0]
        assert rows[0]["num_merged"] == [1, 1, 2]
        assert rows[0]["labels"] == [1.0, 0.0, 0.0]
        assert (report.labels_kept, report.labels_merged) == (3, 1)

    def test_rows_of_a_prompt_are_joined_in_any_order(self, build):
        rows, report = build([row("a,b", [1, 1]), row("c", [1], prompt="d"), row("a,c", [1, 0])])
        assert [r["input_ids"] for r in rows] == [[3, 4, 0, 5, 0, 6, 0], [7, 6, 0]]
        assert (report.rows_in, report.rows_out, report.labels_joined) == (3, 2, 1)

    def test_num_proc_changes_nothing(self, build):
        """Rows that are packed by each process on its own would change a resumed training in silence."""
        rng = random.Random(0)
        rows = [row("a " * rng.randint(1, 60), [1], prompt=f"p{i % 50}") for i in range(60)]
        first, other = (build(rows, 128, num_proc, packing=True)[0].to_list() for num_proc in (None, 3))
        assert len(first) < 40 and other == first

    def test_long_trees_are_split_and_short_ones_packed(self, build):
        """`p a ; b ; c ; d ;` needs rows of 7 and 5 tokens; the small tree fits into the second row."""
        chains = row("a,b,c,d", [1, 1, 0, 0.25], parents=[-1, 0, 0, 0])
        small = row("a", [0.5], prompt="e")
        rows, report = build([chains, small], max_length=8, packing=True)
        assert [r["input_ids"] for r in rows] == [[3, 4, 0, 5, 0, 6, 0], [3, 4, 0, 7, 0, 8, 4, 0]]
        assert [r["position_ids"] for r in rows] == [[0, 1, 2, 3, 4, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]]
        assert [r["labels"] for r in rows] == [[1, 1, 0], [0.25, 0.5]]
        assert [r["step_positions"] for r in rows] == [[2, 4, 6], [4, 7]]
        assert report.rows_out == 2


class TestReport:
    def test_every_label_is_accounted_for(self, build):
        """One dataset with joined, contradicting, too long, merged and unlabelled steps."""
        rows, report = build(
            [
                row("a,b", [1.0, 1.0]),
                row("a,b,c", [1.0, 0.0, 1.0]),  # a is joined; b contradicts; c fits in 7 tokens
                row("a,b,c d,e", [None, None, 0.0, 1.0]),  # c d is 8 tokens and e 10: too long
                row("a,b", [None, None], prompt="d"),  # no label at all
                row("a b c d e f g", [1.0], prompt="e"),  # all too long
                row("a,b,a | b", [1.0, 1.0, 0.0], prompt="f", parents=[-1, 0, -1], num_merged=[1, 1, 2]),
            ],
            max_length=7,
        )
        found = vars(report)
        assert found.pop("tokens_unshared") == (3 + 5) + (3 + 5 + 7) + (8 + 10) + 9 + (3 + 5 + 5)
        assert found.pop("tokens") == 7 + 8
        assert found == {
            "rows_in": 6,
            "rows_out": len(rows),
            "labels_in": 2 + 3 + 2 + 0 + 1 + 3,
            "labels_kept": 3 + 3,
            "labels_merged": 1,
            "labels_joined": 2,
            "labels_too_long": 3,
            "labels_contradicting": 1,
            "trees_without_labels": 2,
            "prompts_with_control_text": 0,
            "steps_with_control_text": 0,
            "steps_with_separator": 0,
            "tokens_in_rows": 17,  # 2 extra, because a tree is split
            "labels_per_row_p10": pytest.approx(1.2),  # of 1, 2 and 3
            "labels_per_row_median": 2,
            "max_length_p99": 10,
        }
        assert report.labels_in == report.labels_kept + report.labels_joined + report.labels_too_long
        assert "labels too long 3" in str(report)

    def test_control_text_and_separators_are_counted(self):
        step_format = StepFormat(merge_separator=" | ")
        builder = ForestBuilder(byte_level(), step_format, max_length=None)
        rows = [
            row("a</s>,b,a | b", [1.0, 0.0, 0.0], prompt="1<｜User｜>", parents=[-1, 0, -1], num_merged=[1, 1, 2]),
            row("a | b,c\n\nd,<think>", [1.0, 0.0, 1.0], prompt="im_end"),
        ]
        rows[1] |= {"parents": [-1, 0, 1], "num_merged": [1, 1, 1]}
        _, report = builder(Dataset.from_list(rows), "rows")
        counts = (report.prompts_with_control_text, report.steps_with_control_text, report.steps_with_separator)
        assert counts == (1, 2, 2)
        assert "prompts with control text 1, steps with control text 2, steps with separator 2" in str(report)

    def test_tokens_in_rows_of_split_trees(self, build):
        """A prompt of 3 tokens and three steps of 4 are split in three, so the prompt occurs three times."""
        tree = row("a b c,b c d,c d e", [1.0, 0.0, 1.0], parents=[-1, -1, -1])
        whole, report = build([tree], max_length=None)
        prefix = whole[0]["step_positions"][0] + 1 - 4
        assert report.tokens == report.tokens_in_rows == prefix + 3 * 4
        assert (report.labels_per_row_p10, report.labels_per_row_median) == (3, 3)
        _, report = build([tree], max_length=prefix + 4)
        assert report.tokens == prefix + 3 * 4 and report.tokens_in_rows == 3 * (prefix + 4)
        assert (report.labels_per_row_p10, report.labels_per_row_median) == (1, 1)
        _, report = build([tree], max_length=None, shared_prefix=False)
        assert report.tokens_in_rows == 3 * (prefix + 4)

    @pytest.mark.parametrize("num_labels", [1, 2, 99, 100, 101, 200, 300, 1000])
    def test_the_length_that_keeps_99_percent(self, build, num_labels):
        """The smallest such length: with one token less, fewer labels are kept."""
        rng = random.Random(num_labels)
        rows = [
            row(" ".join(["a"] * rng.randint(1, 60)), [1.0], prompt=f"{'b ' * (i % 7)}{i}") for i in range(num_labels)
        ]
        _, report = build(rows, max_length=None)
        limit = report.max_length_p99
        assert report.dropped_by_length(None) is None
        _, kept = build(rows, max_length=limit)
        assert 100 * kept.labels_kept >= 99 * num_labels and kept.max_length_p99 == limit
        assert kept.dropped_by_length(limit) is None
        if num_labels > 2:
            _, less = build(rows, max_length=limit - 1)
            assert 100 * less.labels_kept < 99 * num_labels
            assert less.dropped_by_length(limit - 1).endswith(f"`max_length={limit}` would keep 99 % of the labels.")

    def test_contradicting_labels_are_averaged(self, build):
        rows, _ = build([row("a", [1.0]), row("a", [0.0]), row("a", [None]), row("a", [0.5])])
        assert rows[0]["labels"] == [0.5] and rows[0]["label_weights"] == [1.0]


class TestWeights:
    def test_unique_and_occurrence(self, build):
        rows = [row("a,b", [1, 1]), row("a,c", [1, 0]), row("a", [1])]
        weights = {w: build(rows, label_weighting=w)[0][0]["label_weights"] for w in ("unique", "occurrence")}
        assert weights == {"unique": [1, 1, 1], "occurrence": [3, 1, 1]}

    def test_error_weight(self, build):
        """A soft label counts as a partial error: y + (1 − y)·3."""
        rows, _ = build([row("a,b,c", [1.0, 0.0, 0.25])], error_weight=3.0)
        assert rows[0]["label_weights"] == [1.0, 3.0, 2.5]

    def test_column(self, build):
        """A step in several rows has the mean of its weights, and its labels are averaged by them."""
        rows, report = build(
            [
                row("a,b", [1.0, 0.5], label_weights=[0.5, 0.0]),
                row("a,c", [0.5, None], label_weights=[1.5, None]),
                row("d", [0.25], label_weights=[0.25]),
            ],
            label_weighting="column",
            error_weight=3.0,
        )
        # a: label (0.5·1 + 1.5·0.5) / 2, weight (0.5 + 1.5) / 2, times y + (1 − y)·3
        assert rows[0]["labels"] == [0.625, 0.5, 0.25]
        assert rows[0]["label_weights"] == [0.625 + 0.375 * 3, 0, 0.25 * (0.25 + 0.75 * 3)]
        assert report.labels_contradicting == 1 and report.labels_kept == 3

    def test_column_of_weights_that_are_all_0_in_some_rows(self, build):
        """Labels without weight are averaged like others."""
        rows, _ = build(
            [row("a", [w], label_weights=[0.0]) for w in (1.0, 0.5)] + [row("b", [1.0], label_weights=[2.0])],
            label_weighting="column",
        )
        assert rows[0]["labels"] == [0.75, 1] and rows[0]["label_weights"] == [0, 2]

    def test_column_is_not_used_by_default(self, build):
        rows, _ = build([row("a,b", [1.0, 0.0], label_weights=[0.5, 2.0])])
        assert rows[0]["label_weights"] == [1, 1]

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({}, "`label_weighting='column'` requires the column `label_weights`"),
            ({"label_weights": None}, "row 1: `label_weights` is missing"),
            ({"label_weights": [1.0, None]}, "row 1: `label_weights[1]` is None"),
            ({"label_weights": [1.0, -0.5]}, "row 1: `label_weights[1]` is -0.5"),
            ({"label_weights": [1.0, float("inf")]}, "row 1: `label_weights[1]` is inf"),
            ({"label_weights": [1.0]}, "row 1: column `label_weights` has 1 entries"),
        ],
    )
    def test_invalid_columns(self, build, columns, message):
        first = {"label_weights": [1.0, 1.0]} if columns else {}
        with pytest.raises(ValueError, match=re.escape(message)):
            build([row("a,b", [1, 0], **first), row("c,d", [1, 0], "b", **columns)], label_weighting="column")

    def test_column_without_positive_weight(self, build):
        with pytest.raises(ValueError, match="all `label_weights` of labelled steps are 0"):
            build([row("a,b", [1, None], label_weights=[0.0, 1.0])], label_weighting="column")

    def test_last_step_only(self, build):
        """Every leaf of the tree is trained, even if it is not the last step in its row."""
        rows, report = build([row("a,b,c,d", [1, 0, 1, 0], parents=[-1, 0, 0, 2])], train_on_last_step_only=True)
        assert rows[0]["labels"] == [0, 0] and report.labels_in == 2
        assert rows[0]["input_ids"] == [3, 4, 0, 5, 0, 6, 0, 7, 0]


class TestRefusals:
    """Each error names the dataset and the row, what was found, and what to do."""

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"labels": [1.0]}, "column `labels` has 1 entries"),
            ({"labels": [1.0, 1.5]}, "`labels[1]` is 1.5"),
            ({"parents": [1, -1]}, "`parents[0]` is 1"),
            ({"parents": [-1, 1]}, "`parents[1]` is 1"),
            ({"parents": [-1]}, "column `parents` has 1 entries"),
            ({"completions": ["a", " "]}, "`completions[1]` is ' '"),
            ({"prompt": " "}, "column `prompt` holds ' '"),
        ],
    )
    @pytest.mark.parametrize("num_proc", [None, 2])
    def test_malformed_rows(self, build, bad, message, num_proc):
        good = row("a,b", [1.0, 0.0], parents=[-1, 0])
        with pytest.raises(ValueError, match=re.escape(f"train_dataset row 2: {message}")):
            build([good, good | {"prompt": "d"}, good | {"prompt": "e"} | bad], num_proc=num_proc)

    def test_a_malformed_row_that_is_joined(self, build):
        """The error names the row itself, not the tree it is joined to."""
        with pytest.raises(ValueError, match=re.escape("train_dataset row 1: `labels[0]` is -1.0")):
            build([row("a", [1.0]), row("b", [-1.0])])

    def test_missing_columns(self, build):
        with pytest.raises(ValueError, match=r"train_dataset .*\['text'\].* `prompt`"):
            build(Dataset.from_dict({"text": ["a"]}))

    def test_a_prompt_without_room(self, build):
        with pytest.raises(ValueError, match="row 1: .* 7 tokens.* `max_length` 7"):
            build([row("a", [1]), row("a", [1], prompt="p p p p p p p")], max_length=7)

    def test_no_label_left(self, build):
        with pytest.raises(ValueError, match="train_dataset: no labelled step .*too long 1.* labels 2"):
            build([row("a", [None]), row("a b c d", [1.0], prompt="d")], max_length=4)

    def test_an_empty_dataset(self, build):
        with pytest.raises(ValueError, match="train_dataset has no rows"):
            build(dataset_of([StepTree("p", ["a"], [1.0], [-1])]).select([]))

    def test_merged_steps_with_equal_separators(self, build):
        step_format = StepFormat(step_separator=";", merge_separator=";")
        build([row("a,b", [1, 1])], step_format=step_format)
        with pytest.raises(ValueError, match="encode to the same ids"):
            build([row("a,b,a ; b", [1, 1, 1], parents=[-1, 0, -1], num_merged=[1, 1, 2])], step_format=step_format)

    def test_merged_steps_of_another_merge_separator(self, build):
        """Merged steps trained with one separator and scored with another would get meaningless scores."""
        with pytest.raises(ValueError, match=r"row 0: `completions\[2\]` .* ' \| '"):
            build([row("a,b,a + b", [1, 1, 1], parents=[-1, 0, -1], num_merged=[1, 1, 2])])

    def test_last_step_only_with_merged_steps(self, build):
        with pytest.raises(ValueError, match=r"row 0: `train_on_last_step_only` .*view='orm'"):
            build(
                [row("a,b,a | b", [1, 1, 1], parents=[-1, 0, -1], num_merged=[1, 1, 2])], train_on_last_step_only=True
            )


class TestCollator:
    ROWS = [
        {"input_ids": [7, 8, 9], "position_ids": [0, 1, 2], "subtree_end": [3, 3, 3], "step_positions": [1, 2]}
        | {"labels": [1.0, 0.9], "label_weights": [1.0, 2.0], "num_merged": [1, 2]},
        {"input_ids": [7, 9], "position_ids": [0, 1], "subtree_end": [2, 2], "step_positions": [1]}
        | {"labels": [0.0], "label_weights": [1.0], "num_merged": [1]},
    ]

    def test_padded(self):
        batch = DataCollatorForForest(pad_token_id=5, pad_to_multiple_of=4)(self.ROWS)
        assert batch["input_ids"].tolist() == [[7, 8, 9, 5], [7, 9, 5, 5]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
        assert batch["subtree_end"].tolist() == [[3, 3, 3, 4], [2, 2, 3, 4]]
        assert batch["step_positions"].tolist() == [[1, 2], [5, 4]]
        torch.testing.assert_close(batch["labels"], torch.tensor([[1.0, 0.9], [0.0, -100.0]]))
        assert batch["label_weights"].tolist() == [[1, 2], [1, 0]]
        assert batch["num_merged"].tolist() == [[1, 2], [1, -100]]
        assert batch["num_tokens"].tolist() == [3, 2]

    def test_padding_free(self):
        batch = DataCollatorForForest(pad_token_id=5, padding_free=True)(self.ROWS)
        assert batch["input_ids"].tolist() == [[7, 8, 9, 7, 9]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
        assert batch["subtree_end"].tolist() == [[3, 3, 3, 5, 5]]
        assert batch["step_positions"].tolist() == [[1, 2], [4, 3]]
        assert batch["labels"].shape == (2, 2)

    def test_a_row_without_steps(self):
        empty = self.ROWS[1] | {name: [] for name in ("step_positions", "labels", "label_weights", "num_merged")}
        batch = DataCollatorForForest(pad_token_id=5)([empty, empty])
        assert batch["labels"].shape == (2, 0)
        batch = DataCollatorForForest(pad_token_id=5)([self.ROWS[0], empty])
        assert batch["labels"][1].tolist() == [-100, -100]


def test_cache_is_of_this_version(words, tmp_path):
    """`datasets` hashes methods by name. Without the version in the hash, an upgrade would reuse the cached old rows."""
    Dataset.from_list([{"prompt": "p", "completions": ["a"], "labels": [1.0]}]).to_parquet(tmp_path / "rows.parquet")
    dataset = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    settings = {"tokenizer": words, "step_format": StepFormat(step_separator=";"), "max_length": 100}
    fingerprints = [
        ForestBuilder(**settings, **version)(dataset, "dataset")[0]._fingerprint
        for version in ({}, {}, {"version": "0.0.0"})
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_training_on_prebuilt_rows(tmp_path):
    """Prebuilt rows have no build report. Training once failed at the first log for that reason."""
    trees = [random_tree(random.Random(seed), f"{seed}") for seed in range(4)]
    builder = ForestBuilder(tokenizer=tiny_tokenizer(), step_format=StepFormat(), max_length=200)
    rows, _ = builder(dataset_of(trees), "dataset")
    args = HRMRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", logging_steps=1, max_steps=1)
    trainer = HRMRewardTrainer(tiny_model(), args, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["num_labels"] > 0 and "dropped_labels" not in logged
