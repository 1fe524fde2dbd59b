"""Training that starts from a published reward model keeps its format: its text, its head and the names of its weights."""

import json
import logging
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from trl_hrm import HRMRewardConfig, HRMRewardTrainer, StepFormat, StepScorer, StepTree
from trl_hrm.loading import load_reward_model, load_tokenizer
from trl_hrm.published_formats import PUBLISHED_FORMATS
from trl_hrm.scoring.candidate_scores import score_steps
from trl_hrm.scoring.scoring_config import ScoringConfig
from trl_hrm.scoring.tree_scorer import TreeScorer
from trl_hrm.scripts.reward import main, make_parser
from trl_hrm.scripts.training import run_script
from trl_hrm.trainer.forest_dataset import ForestBuilder, ForestReport

from ..fakes import merging_tokenizer
from ..helpers import ALL_HEADS, HEADS, dataset_of, make_trainer, random_tree, tiny_model, tiny_tokenizer, weights_of
from ..scoring.published import PUBLISHED, Published


TREES = [
    StepTree(
        "What is 1+2, plus 3?",
        ["1+2 = 3.", "3+3 = 6.", "3+3 = 7.", "So it is 6", "1+2 = 4.", "4+3 = 7."],
        [1.0, 1.0, 0.0, 1.0, 0.0, None],
        [-1, 0, 0, 1, -1, 4],
    ),
    StepTree(r"Solve $\frac{x}{2} = 1$.", [r"So $x = 2 \cdot 1$,", "所以答案是 2。", "x is 1"], [1.0, 1.0, 0.0], [-1, 0, 0]),
]  # fmt: skip
PROBLEM, SOLUTIONS = "Add 2 to 3.", [["2 + 3 = 5", "So 5."], ["2 + 3 = 6."]]
EXAMPLES = {published.format_name: published for published in reversed(PUBLISHED.values())}
every = pytest.mark.parametrize("name", PUBLISHED_FORMATS)


@dataclass
class Trained:
    """A published model, and what a training that starts from it gives."""

    published: Published
    base: Path
    trainer: HRMRewardTrainer
    folder: Path


def make(model: Path, output_dir: Path, trees: list[StepTree] = TREES, peft_config=None, **args) -> HRMRewardTrainer:
    """Return a trainer that gets nothing but the folder of a model and the dataset."""
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options |= {"optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "max_steps": 2}
    config = HRMRewardConfig(str(output_dir), **(options | args))
    return HRMRewardTrainer(str(model), config, train_dataset=dataset_of(trees), peft_config=peft_config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Trained]:
    """Return the training of two steps that starts from the model of a published format."""
    root, found = tmp_path_factory.mktemp("trained"), {}

    def train(name: str) -> Trained:
        if name not in found:
            published = EXAMPLES[name]
            base = root / name / published.repository
            published.save(base)
            is_listed = published.repository in PUBLISHED_FORMATS[name][0]
            trainer = make(base, root / name / "out", step_format=None if is_listed else name)
            trainer.train()
            trainer.save_model()
            found[name] = Trained(published, base, trainer, root / name / "out")
        return found[name]

    return train


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


@every
class TestFormats:
    def test_the_first_loss(self, trained, name):
        """The loss of the first step is the cross-entropy of the scores of the authors' loop, each path in its own forward pass."""
        run = trained(name)
        losses = []
        for tree in TREES:
            steps = [step for step, label in enumerate(tree.labels) if label is not None]
            solutions = [[tree.completions[i] for i in tree.path(step)] for step in steps]
            scores = [path[-1] for path in run.published.scores(str(run.base), tree.prompt, solutions)]
            losses += [-np.log(p if tree.labels[i] else 1 - p) for i, p in zip(steps, scores, strict=True)]
        assert run.trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)

    def test_the_saved_files(self, trained, name):
        """The same format, the same names and shapes of weights, and a class that does not need remote code."""
        run = trained(name)
        assert run.trainer.step_format == StepFormat.from_pretrained(run.folder) == StepFormat.published(name)
        before, after = weights_in(run.base), weights_in(run.folder)
        assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        frozen = {"lm_head.weight"} if run.trainer.step_format.head == "value" else set()
        assert changed == before.keys() - frozen
        if (run.folder / "config.json").exists():
            configs = [json.loads((folder / "config.json").read_text()) for folder in (run.base, run.folder)]
            assert configs[0]["architectures"] == configs[1]["architectures"] and "auto_map" not in configs[1]

    def test_scores(self, trained, name):
        """The trained model, the saved one and the authors' loop, which loads the saved one, agree. Training changed the scores."""
        run = trained(name)
        trainer = run.trainer
        scorers = [
            StepScorer(trainer.model, trainer.processing_class, trainer.step_format),
            StepScorer.from_pretrained(str(run.folder)),
        ]
        expected = run.published.scores(str(run.folder), PROBLEM, SOLUTIONS)
        for scorer in scorers:
            [found] = scorer.score([PROBLEM], [SOLUTIONS])
            np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=0, atol=1e-6)
        before = run.published.scores(str(run.base), PROBLEM, SOLUTIONS)
        assert np.abs(np.concatenate(before) - np.concatenate(expected)).max() > 1e-3

    def test_the_card(self, trained, name, monkeypatch):
        """All of its code gives the scores of the authors' loop. Formats that the code without trl_hrm does not cover have none."""
        run = trained(name)
        monkeypatch.chdir(run.folder.parent)
        text = (run.folder / "README.md").read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        is_plain = name in ("pure-prm", "trl-prm")
        assert len(blocks) == (3 if is_plain else 1)
        assert ("With transformers only" in text) == ("vllm serve" in text) == ("other examples" in text) == is_plain
        expected = run.published.scores(str(run.folder), "1+2+3 = ?", [["1+2 = 3.", "3+3 = 6."]])[0]
        for block in blocks[:2]:
            found = {}
            exec(block, found)
            np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=1e-6)


class TestRecognition:
    @pytest.mark.parametrize("name", ["qwen2.5-math-prm", "skywork-o1-prm"])
    def test_by_the_names_of_the_weights(self, tmp_path, name):
        EXAMPLES[name].save(tmp_path / "my-copy")
        assert make(tmp_path / "my-copy", tmp_path / "out").step_format == StepFormat.published(name)

    def test_an_unknown_folder_is_a_base_model(self, tmp_path):
        """A causal language model has no names of its own."""
        EXAMPLES["math-shepherd"].save(tmp_path / "my-copy")
        trainer = make(tmp_path / "my-copy", tmp_path / "out")
        assert trainer.step_format == StepFormat() and trainer._has_new_head
        trainer = make(tmp_path / "my-copy", tmp_path / "out", step_format="math-shepherd")
        assert trainer.step_format == StepFormat.published("math-shepherd") and not trainer._has_new_head


class TestPrecedence:
    """Between the format of the model, `step_format` and the other arguments of the text format."""

    @pytest.fixture(scope="class")
    def skywork(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("models") / "skywork"
        EXAMPLES["skywork-o1-prm"].save(folder)
        return folder

    def test_own_checkpoint(self, tmp_path, caplog):
        step_format = StepFormat(step_separator="\n", merge_separator=" ", step_prefix="{number}. ")
        tiny_model().save_pretrained(tmp_path / "own")
        tiny_tokenizer().save_pretrained(tmp_path / "own")
        step_format.save(tmp_path / "own")
        assert make(tmp_path / "own", tmp_path / "out").step_format == step_format
        assert "different step format" not in caplog.text

    def test_another_name_warns(self, tmp_path, skywork, caplog):
        with caplog.at_level(logging.WARNING):
            trainer = make(skywork, tmp_path / "out", step_format=self.save(tmp_path, step_separator="\n\n"))
        assert trainer.step_format.step_separator == "\n\n" and trainer.step_format.head == "value"
        assert r"was trained with a different step format: `step_separator` '\n' (now '\n\n')" in caplog.text

    def test_the_same_format_does_not_warn(self, tmp_path, skywork, caplog):
        with caplog.at_level(logging.WARNING):
            make(skywork, tmp_path / "out", step_format="skywork-o1-prm")
        assert "different step format" not in caplog.text

    def test_changed_arguments_warn(self, tmp_path, skywork, caplog):
        with caplog.at_level(logging.WARNING):
            trainer = make(skywork, tmp_path / "out", head="value", regression_loss="bce")
        assert trainer.step_format == StepFormat(head="value", regression_loss="bce")
        assert "`prompt_template` '{problem}\\n' (now '{problem}')" in caplog.text

    def test_a_loaded_model_warns(self, tmp_path, skywork, caplog):
        """Its own format is unknown to the trainer, which trains in the format of its arguments."""
        step_format = StepFormat.published("skywork-o1-prm")
        model, tokenizer = load_reward_model(str(skywork), step_format), load_tokenizer(str(skywork))
        for is_own, folder in ((False, tmp_path / "Skywork-o1-Open-PRM-Qwen-2.5-7B"), (True, tmp_path / "own")):
            folder.mkdir()
            if is_own:
                step_format.save(folder)
            model.config._name_or_path = str(folder)
            for name, is_same in ((self.save(tmp_path, step_separator="\n\n"), False), ("skywork-o1-prm", True)):
                caplog.clear()
                args = HRMRewardConfig(str(tmp_path / "out"), step_format=name, use_cpu=True, bf16=False)
                with caplog.at_level(logging.WARNING):
                    HRMRewardTrainer(model, args, train_dataset=dataset_of(TREES), processing_class=tokenizer)
                assert (f"{folder} was trained with a different step format" in caplog.text) != is_same

    def test_a_step_format_that_is_not_a_name(self, tmp_path):
        with pytest.raises(ValueError, match="`step_format` is StepFormat.* must be the name of a published format"):
            HRMRewardConfig(str(tmp_path), step_format=StepFormat(), bf16=False)

    def test_changed_arguments_with_another_head(self, tmp_path, skywork):
        with pytest.raises(
            ValueError, match="skywork: the weights do not fit .*Set `head` of the step format to 'value'"
        ):
            make(skywork, tmp_path / "out", step_separator=";;")

    def test_both(self, tmp_path):
        message = "`step_format` is 'math-shepherd', but `step_separator`, `head` would change .* Remove either"
        with pytest.raises(ValueError, match=message):
            HRMRewardConfig(str(tmp_path), step_format="math-shepherd", head="lm", step_separator="\n", bf16=False)

    def test_neither_a_name_nor_a_file(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match="the file math-sheperd does not exist.*: qwen2.5-math-prm, .*math-"
        ):
            HRMRewardConfig(str(tmp_path), step_format="math-sheperd", bf16=False)

    @staticmethod
    def save(folder: Path, **changes) -> str:
        """Write a file with the format of Skywork's models and changes."""
        values = json.loads(StepFormat.published("skywork-o1-prm").to_json()) | changes
        (folder / "format.json").write_text(json.dumps(values))
        return str(folder / "format.json")


def test_steps_that_cannot_be_encoded_are_named():
    trees = [StepTree("p", [step], [1.0], [-1]) for step in ("a", "az")]
    builder = ForestBuilder(
        merging_tokenizer([("z", ";")]), StepFormat(step_separator=";", tokenization="string"), None
    )
    with pytest.raises(
        ValueError, match="eval_dataset row 1: The step 'az' ends with the token 'z;' instead of the step"
    ):
        builder(dataset_of(trees), "eval_dataset")
    scorer = TreeScorer(builder.tokenizer, builder.step_format)
    with pytest.raises(
        ValueError, match="rows.jsonl:7: The step 'az' ends .*Remove blank steps, and unusual characters"
    ):
        score_steps(scorer, ["p"], [[["a"], ["az"]]], ScoringConfig(), [["rows.jsonl:6", "rows.jsonl:7"]])


def test_replies_are_not_separators():
    """`+` in a step does not look like the end of the step."""
    step_format = StepFormat.published("rlhflow-prm")
    counts = {}
    for one in (step_format, StepFormat(step_separator="+", merge_separator=" ")):
        report = counts[one.prompt_style] = ForestReport()
        report.count_control_text(tiny_tokenizer(), one, "1+2?", ["1+2 = 3", "so 3"])
    assert counts["turns"].steps_with_separator == 0 and counts["plain"].steps_with_separator == 1


class TestNewHeads:
    """Heads of published models on a base model."""

    @pytest.fixture(scope="class")
    def base(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("models") / "base"
        tiny_model(HEADS["lm"]).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    @pytest.fixture(scope="class")
    def trees(self) -> list[StepTree]:
        rng = random.Random(3)
        return [random_tree(rng, name) for name in "abc"]

    @pytest.mark.parametrize("head", ["mlp", "value", "lm_mean"])
    def test_train_and_save(self, tmp_path, base, trees, head):
        trainer = make(base, tmp_path / "out", trees, head=head, regression_loss="bce")
        assert trainer._has_new_head == (head != "lm_mean")
        trainer.train()
        trainer.save_model()
        self.check_scores(trainer, tmp_path / "out", trees)
        again = make(tmp_path / "out", tmp_path / "again", trees)
        assert again.step_format == trainer.step_format and not again._has_new_head

    @pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj"]])
    @pytest.mark.parametrize(
        ("head", "names"),
        [
            ("mlp", {"score.0.bias", "score.0.weight", "score.2.bias", "score.2.weight"}),
            ("value", {"v_head.summary.bias", "v_head.summary.weight"}),
            ("lm", set()),
            ("lm_mean", set()),
        ],
    )
    def test_adapters(self, tmp_path, base, trees, head, names, target):
        """The adapter has the new head. It is trained, saved, loaded together with its base model, and trained further."""
        lora = LoraConfig(r=2, target_modules=target)
        trainer = make(
            base, tmp_path / "out", trees, lora, head=head, regression_loss="bce", gradient_checkpointing=True
        )
        before = weights_of(trainer.model)
        trainer.train()
        changed = {name for name, weight in weights_of(trainer.model).items() if not torch.equal(weight, before[name])}
        assert changed and all("lora_" in name or ".modules_to_save.default." in name for name in changed)
        trainer.save_model()
        saved = {name.removeprefix("base_model.model.") for name in weights_in(tmp_path / "out")}
        assert {name for name in saved if "lora_" not in name} == names
        assert ("mlp.up_proj" in " ".join(saved)) == (target == "all-linear")
        self.check_scores(trainer, tmp_path / "out", trees)
        again = make(tmp_path / "out", tmp_path / "again", trees)
        before = weights_of(again.model)
        again.train()
        assert {n for n, weight in weights_of(again.model).items() if not torch.equal(weight, before[n])} == changed

    @pytest.mark.parametrize("tied", [False, True])
    def test_output_embeddings_that_are_not_used(self, tmp_path, trees, tied):
        """They are frozen, because DistributedDataParallel fails for weights without a gradient, unless they are the embeddings."""
        model = tiny_model(ALL_HEADS["value"], tie_word_embeddings=tied)
        before = weights_of(model)
        trainer = make_trainer(tmp_path, trees, model, head="value")
        trainer.train()
        unchanged = {name for name, weight in weights_of(trainer.model).items() if torch.equal(weight, before[name])}
        frozen = {name for name, weight in trainer.model.named_parameters() if not weight.requires_grad}
        assert unchanged == frozen == (set() if tied else {"lm_head.weight"})

    @pytest.mark.parametrize("head", ["mlp", "value", "lm_mean"])
    def test_resume(self, tmp_path, base, trees, head):
        """The weights are the same as in a training that was not interrupted."""
        args = {"head": head, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}
        whole = make(base, tmp_path / "whole", trees, **args)
        whole.train()
        resumed = make(base, tmp_path / "resumed", trees, **args)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
        assert resumed.state.global_step == 2
        for name, weight in weights_of(resumed.model).items():
            assert torch.equal(weight, whole.model.get_parameter(name)), name

    def check_scores(self, trainer: HRMRewardTrainer, folder: Path, trees: list[StepTree]) -> None:
        """The saved model scores as the trained one, up to the order of sums in its matrix products."""
        found, expected = self.scores(folder, trees), self.scores(trainer, trees)
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=0, atol=1e-6)

    @staticmethod
    def scores(model: HRMRewardTrainer | Path, trees: list[StepTree]) -> list[list[float]]:
        if isinstance(model, Path):
            scorer = StepScorer.from_pretrained(str(model))
        else:
            scorer = StepScorer(model.model, model.processing_class, model.step_format)
        return scorer.score_trees(trees)


class TestResumeIdentity:
    """The step format of the training is compared, wherever it comes from."""

    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory) -> Path:
        """A training that started from a copy of Skywork's model."""
        root = tmp_path_factory.mktemp("runs")
        EXAMPLES["skywork-o1-prm"].save(root / "model")
        make(root / "model", root / "run", max_steps=1, save_strategy="steps", save_steps=1).train()
        return root

    def resume(self, run: Path, **args) -> None:
        trainer = make(run / "model", run / "run", **args)
        assert trainer._resolve(True)[0] == str(run / "run" / "checkpoint-1")

    def test_the_same_format(self, run, tmp_path):
        """From the model, by name and from a file."""
        self.resume(run)
        self.resume(run, step_format="skywork-o1-prm")
        self.resume(run, step_format=TestPrecedence.save(tmp_path))

    def test_another_format(self, run, tmp_path):
        file = TestPrecedence.save(tmp_path, step_prefix="{number}. ")
        with pytest.raises(ValueError, match='training: step_prefix was "" and is "{number}. "'):
            self.resume(run, step_format=file)
        self.resume(run, step_format=file, accept_changes=["step_prefix"])

    def test_records_of_earlier_versions(self, tmp_path, caplog):
        """They have fewer fields. A field that they lack had today's default."""
        rng = random.Random(3)
        trees = [random_tree(rng, name) for name in "abc"]
        args = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        tiny_model().save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        make(tmp_path / "base", tmp_path / "run", trees, **args).train()
        folder = tmp_path / "run" / "checkpoint-1"
        later = ["tokenization", "prompt_template", "step_prefix", "step_suffix", "score_position"]
        for name, values in (("trl_hrm_checkpoint.json", ["settings"]), ("step_format.json", [])):
            record = json.loads((folder / name).read_text())
            settings = record[values[0]] if values else record
            assert all(settings.pop(key) == getattr(StepFormat(), key) for key in later)
            if not values:
                record["version"] = 2
            else:
                size = (folder / "step_format.json").stat().st_size
                assert record["files"].pop("step_format.json") == size
            (folder / name).write_text(json.dumps(record))
        make(tmp_path / "base", tmp_path / "run", trees, **args)._resolve(True)
        changed = StepFormat(step_prefix="{number}. ")
        changed.save(tmp_path)
        other = make(
            tmp_path / "base", tmp_path / "run", trees, step_format=str(tmp_path / "step_format.json"), **args
        )
        with pytest.raises(ValueError, match='training: step_prefix was "" and is "{number}. "'):
            other._resolve(True)
        (folder / "trl_hrm_checkpoint.json").unlink()
        make(tmp_path / "base", tmp_path / "run", trees, **args)._resolve(True)
        with pytest.raises(ValueError, match='training: step_prefix was "" and is "{number}. "'):
            other._resolve(True)


class TestCommand:
    """`trl-hrm reward`, as `accelerate launch` runs it."""

    @pytest.fixture
    def options(self, tmp_path, monkeypatch) -> dict[str, str]:
        rng = random.Random(3)
        (tmp_path / "data").mkdir()
        rows = [json.dumps(random_tree(rng, name).to_row()) + "\n" for name in "abcd"]
        (tmp_path / "data" / "train.jsonl").write_text("".join(rows))
        monkeypatch.chdir(tmp_path)
        options = {
            "dataset_name": "data",
            "model_name_or_path": "tiny",
            "make_tiny_model": "true",
            "output_dir": "out",
        }
        return options | {"max_steps": "1", "use_cpu": "true", "bf16": "false", "report_to": "none"}

    @staticmethod
    def run(options: dict[str, str]) -> StepScorer:
        run_script(main, make_parser(), [part for key, value in options.items() for part in (f"--{key}", value)])
        return StepScorer.from_pretrained("out")

    def test_step_format(self, options):
        scorer = self.run(options | {"step_format": "math-shepherd"})
        assert scorer.step_format == StepFormat.published("math-shepherd")

    def test_step_format_in_a_file_of_settings(self, options, tmp_path):
        StepFormat.published("skywork-o1-prm").save(tmp_path)
        settings = {"step_format": str(tmp_path / "step_format.json"), "config": "reward.yaml"}
        (tmp_path / "reward.yaml").write_text(f"step_format: {settings.pop('step_format')}\n")
        assert self.run(options | settings).step_format == StepFormat.published("skywork-o1-prm")

    @pytest.mark.parametrize("head", ["mlp", "value", "lm_mean"])
    def test_heads(self, options, head):
        assert self.run(options | {"head": head}).step_format == StepFormat(head=head)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"step_format": "rlhflow-prm"}, "the tokenizer has no chat template"),
            ({"step_format": "qwen2.5-math-prm"}, "the tokenizer has no chat template"),
            ({"step_format": "math-shepherd", "head": "lm"}, "Remove either `step_format` or these arguments"),
            ({"step_format": "mathshepherd"}, "the file mathshepherd does not exist"),
        ],
    )
    def test_errors(self, options, capsys, changes, message):
        with pytest.raises(SystemExit) as end:
            self.run(options | changes)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert end.value.code == 1 and len(lines) == 1 and message in lines[0]
        assert not Path("out", "config.json").exists()
