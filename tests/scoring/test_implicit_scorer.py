"""Scores of implicit process reward models: against full logits, by every way to load one, and in the commands that use scores."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_hrm import BestOfNConfig, ScoreConfig, StepFormat, StepReward, StepScorer, StepTree, best_of_n, score
from trl_hrm.cli import main
from trl_hrm.evaluation.results import load_candidates, load_results
from trl_hrm.identity import digest_of_checkpoint_weights
from trl_hrm.loading import check_checkpoint
from trl_hrm.scoring.tree_scorer import refuse_head
from trl_hrm.step_format import STEP_FORMAT_NAME

from ..fakes import CHAT, write_rows
from ..helpers import random_tree, tiny_model, tiny_tokenizer
from ..implicit_models import BETA, LM, save_models, slow_ratios


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Folder `policy` with an implicit PRM, whose reference is in the folder `reference`."""
    root = tmp_path_factory.mktemp("implicit")
    policy, reference = save_models(root)
    StepFormat(
        head="implicit",
        beta=BETA,
        reference_model=reference,
        reference_weights=digest_of_checkpoint_weights(reference),
    ).save(policy)
    return Path(policy)


@pytest.fixture
def models(checkpoint):
    return [AutoModelForCausalLM.from_pretrained(checkpoint.parent / name) for name in ("policy", "reference")]


def expected_scores(models, step_format: StepFormat, trees: list[StepTree], tokenizer=None) -> list[list[float]]:
    scores = []
    for tree in trees:
        scores.append([])
        for step in range(len(tree.completions)):
            with torch.no_grad():
                ratios = slow_ratios(*models, step_format, tree, step, tokenizer)
            span = ratios[-1] if step_format.score_span == "step" else torch.cat(ratios)
            scores[-1].append((BETA * span.sum()).sigmoid().item())
    return scores


@pytest.fixture(scope="module")
def trees() -> list[StepTree]:
    rng = random.Random(0)
    return [random_tree(rng, name) for name in "abcdef"]


@pytest.mark.parametrize("span", ["step", "prefix"])
@pytest.mark.parametrize("settings", [{}, {"max_length": 30, "batch_size": 2}])
def test_scores_equal_full_logits(checkpoint, models, trees, span, settings):
    step_format = replace(StepFormat.from_pretrained(checkpoint), score_span=span)
    scorer = StepScorer.from_pretrained(str(checkpoint), step_format=step_format, **settings)
    found = scorer.score_trees(trees)
    for one, other in zip(found, expected_scores(models, step_format, trees), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert torch.tensor(sum(found, [])).std() > 0.05


@pytest.mark.parametrize(
    "text_format",
    [
        {"step_separator": " so", "score_position": "before_separator"},  # the separator belongs to the next step
        {"prompt_style": "chat"},
        {
            "prompt_style": "turns",
            "step_separator": "+",
            "tokenization": "string",
            "score_position": "before_separator",
        },
        {"tokenization": "string", "step_separator": " ки", "step_prefix": "Step {number}: ", "step_suffix": "\n"},
    ],
    ids=lambda text_format: ",".join(map(str, text_format.values())),
)
@pytest.mark.parametrize("span", ["step", "prefix"])
def test_step_formats(models, trees, text_format, span):
    """A step has the tokens after the previous step token, up to its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    step_format = StepFormat(head="implicit", beta=BETA, score_span=span, **text_format)
    scorer = StepScorer(models[0], tokenizer, step_format, reference=models[1])
    expected = expected_scores(models, step_format, trees, tokenizer)
    for one, other in zip(scorer.score_trees(trees), expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_solutions_that_are_split_into_different_steps(models):
    """Two steps with the same tokens can begin at different places, and a token can belong to steps that overlap."""
    step_format = StepFormat(head="implicit", beta=BETA)
    scorer = StepScorer(models[0], tiny_tokenizer(), step_format, reference=models[1], max_length=12)
    candidates = [["add x", "so y"], ["add x\n\nso y"], ["add x", "so y\n\nthen", "sum"], ["add x\n\nso", "sum"]]
    found = scorer.score(["x ?"], [candidates])[0]
    for steps, scores in zip(candidates, found, strict=True):
        chain = StepTree("x ?", steps, [None] * len(steps), list(range(-1, len(steps) - 1)))
        assert scores == pytest.approx(expected_scores(models, step_format, [chain])[0], abs=1e-5)


def test_the_last_prefix_is_the_sum_of_the_steps(checkpoint, trees):
    steps, prefixes = (
        StepScorer.from_pretrained(
            str(checkpoint), step_format=replace(StepFormat.from_pretrained(checkpoint), score_span=span)
        ).score_trees(trees)
        for span in ("step", "prefix")
    )
    for tree, by_step, by_prefix in zip(trees, steps, prefixes, strict=True):
        rewards = torch.tensor(by_step, dtype=torch.float64).logit()
        for leaf in tree.leaves():
            total = rewards[tree.path(leaf)].sum().sigmoid()
            assert by_prefix[leaf] == pytest.approx(total.item(), abs=1e-5)


def test_merged_steps_and_vllm_are_refused(checkpoint, trees):
    scorer = StepScorer.from_pretrained(str(checkpoint))
    with pytest.raises(ValueError, match="merged steps"):
        scorer.score_trees(trees, spans=(1, 2))
    with pytest.raises(ValueError, match="second model"):
        refuse_head(scorer.step_format)


def copy_of(checkpoint: Path, folder: Path, **changes) -> str:
    shutil.copytree(checkpoint, folder)
    step_format = json.loads((folder / STEP_FORMAT_NAME).read_text()) | changes
    (folder / STEP_FORMAT_NAME).write_text(json.dumps(step_format))
    return str(folder)


class TestReference:
    def test_missing_or_moved(self, checkpoint, trees, tmp_path):
        moved = copy_of(checkpoint, tmp_path / "moved", reference_model=str(tmp_path / "gone"))
        for call in (
            StepScorer.from_pretrained,
            lambda path: check_checkpoint(path, StepFormat.from_pretrained(path)),
        ):
            with pytest.raises(FileNotFoundError, match=f"{moved}.*{tmp_path / 'gone'}.*`reference_model`"):
                call(moved)
        reference = str(checkpoint.parent / "reference")
        found = StepScorer.from_pretrained(moved, reference_model=reference).score_trees(trees)
        assert found == StepScorer.from_pretrained(str(checkpoint)).score_trees(trees)

    def test_other_weights(self, checkpoint, tmp_path):
        with pytest.raises(ValueError, match=f"{checkpoint}.*trained with.*`reference_model`"):
            StepScorer.from_pretrained(str(checkpoint), reference_model=str(checkpoint))
        with pytest.raises(ValueError, match="trained with"):
            check_checkpoint(str(checkpoint), StepFormat.from_pretrained(checkpoint), reference_model=str(checkpoint))

    def test_damaged(self, checkpoint, tmp_path):
        shutil.copytree(checkpoint.parent / "reference", tmp_path / "reference")
        weights = tmp_path / "reference" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        for call in (
            StepScorer.from_pretrained,
            lambda path, **kwargs: check_checkpoint(path, StepFormat.from_pretrained(path), **kwargs),
        ):
            with pytest.raises(ValueError, match=f"{weights}.*damaged"):
                call(str(checkpoint), reference_model=str(tmp_path / "reference"))

    def test_a_clone_with_weights_in_another_format(self, checkpoint, tmp_path):
        """The cache of the Hub does not have such files, because transformers does not load them."""
        clone = shutil.copytree(checkpoint.parent / "reference", tmp_path / "clone")
        (clone / "consolidated.safetensors").write_bytes(b"other")
        StepScorer.from_pretrained(str(checkpoint), reference_model=str(clone))

    def test_unnamed(self, checkpoint, tmp_path):
        with pytest.raises(ValueError, match="no name of the reference"):
            StepScorer.from_pretrained(copy_of(checkpoint, tmp_path / "x", reference_model=None))

    def test_without_a_digest_any_reference_of_the_same_vocabulary(self, checkpoint, models, tmp_path):
        """As for a published model, whose format is written by hand."""
        folder = copy_of(checkpoint, tmp_path / "x", reference_weights=None, reference_model=str(checkpoint))
        scorer = StepScorer.from_pretrained(folder)
        assert scorer.score(["x"], [[["add", "so"]]]) == [[[0.5, 0.5]]]
        with pytest.raises(ValueError, match="vocabulary of"):
            StepScorer(models[0], tiny_tokenizer(), scorer.step_format, reference=tiny_model(LM, vocab_size=400))

    def test_arguments_without_effect(self, checkpoint, models):
        with pytest.raises(ValueError, match="needs a `reference`"):
            StepScorer(models[0], tiny_tokenizer(), StepFormat(head="implicit"))
        with pytest.raises(ValueError, match="no effect"):
            StepScorer(models[0], tiny_tokenizer(), LM, reference=models[1])
        with pytest.raises(ValueError, match="no effect with head 'lm'"):
            StepScorer.from_pretrained(str(checkpoint), step_format=LM, reference_model=str(checkpoint))


def test_an_adapter_has_its_base_as_reference(checkpoint, trees, tmp_path):
    base = str(checkpoint.parent / "reference")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "lora")
    tiny_tokenizer().save_pretrained(tmp_path / "lora")
    step_format = StepFormat(
        head="implicit", beta=BETA, reference_model=base, reference_weights=digest_of_checkpoint_weights(base)
    )
    step_format.save(tmp_path / "lora")
    scorer = StepScorer.from_pretrained(str(tmp_path / "lora"))
    assert scorer.reference is None
    plain = AutoModelForCausalLM.from_pretrained(base)
    for one, other in zip(scorer.score_trees(trees), expected_scores((model, plain), step_format, trees), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    with pytest.raises(ValueError, match="adapter_config.json"):
        StepScorer.from_pretrained(str(tmp_path / "lora"), reference_model=base)
    shutil.copytree(checkpoint, tmp_path / "other")  # another model at the place of the base
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "other")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained with"):
        StepScorer.from_pretrained(str(tmp_path / "lora"))


class TestUse:
    def test_the_command_line_of_score(self, checkpoint, tmp_path, capsys):
        rows = [{"prompt": "1+2?", "completions": ["add 1", "so = 3"]}]
        file = write_rows(tmp_path / "solutions.jsonl", rows)
        assert main(["score", "--reward_model", str(checkpoint), "--input", file]) == 0
        capsys.readouterr()
        output = str(tmp_path / "scores.jsonl")
        score(ScoreConfig(reward_model=str(checkpoint), input=file, output=output))
        [row] = map(json.loads, Path(output).read_text().splitlines())
        expected = StepScorer.from_pretrained(str(checkpoint)).score(["1+2?"], [[rows[0]["completions"]]])[0][0]
        assert row["scores"] == pytest.approx(expected, abs=1e-5)

    def test_the_option_for_the_reference(self, checkpoint, tmp_path, capsys):
        moved = copy_of(checkpoint, tmp_path / "moved", reference_model=str(tmp_path / "gone"))
        file = write_rows(tmp_path / "solutions.jsonl", [{"prompt": "1+2?", "completions": ["add 1"]}])
        words = ["score", "--reward_model", moved, "--input", file]
        assert main(words) == 1
        assert "reference_model" in capsys.readouterr().err
        assert main([*words, "--reference_model", str(checkpoint.parent / "reference")]) == 0
        with pytest.raises(ValueError, match="engine transformers"):
            ScoreConfig(reward_model=moved, input=file, reward_model_engine="vllm", reference_model="x")

    def test_best_of_n(self, checkpoint, tmp_path):
        """With the prefix score and the aggregate `last`, the chosen solution has the highest reward of all its tokens."""
        folder = copy_of(checkpoint, tmp_path / "model", score_span="prefix")
        solutions = [[f"add {i}", f"so = {i}", f"The answer is \\boxed{{{i}}}"] for i in range(6)]
        rows = [{"prompt": f"{name} 1+2?", "answer": "3", "candidates": solutions} for name in "ab"]
        file = write_rows(tmp_path / "candidates.jsonl", rows)
        output = tmp_path / "out"
        best_of_n(
            BestOfNConfig(candidates=file, reward_model=folder, aggregate=["last"], n=[1, 6], output_dir=str(output))
        )
        found = [[one.scores for one in problem.candidates] for problem in load_candidates(output)]
        scorer = StepScorer.from_pretrained(folder)
        expected = scorer.score([row["prompt"] for row in rows], [solutions] * 2)
        for one, other in zip(sum(found, []), sum(expected, []), strict=True):
            assert one == pytest.approx(other, abs=1e-5)
        chosen = [max(range(6), key=lambda i: scores[i][-1]) for scores in expected]
        [point] = [point for point in load_results(output).curves["best_of_n/last"] if point["n"] == 6]
        assert point["accuracy"] == sum(i == 3 for i in chosen) / 2

    def test_a_reward_for_reinforcement_learning(self, checkpoint):
        reward = StepReward(str(checkpoint), aggregate="min", device_map=None)
        completions = ["add 1\n\nso = 3", "add 1\n\nso = 7"]
        found = reward(prompts=["1+2?"] * 2, completions=completions)
        scores = StepScorer.from_pretrained(str(checkpoint)).score(
            ["1+2?"], [[text.split("\n\n") for text in completions]]
        )[0]
        assert found == pytest.approx([min(steps) for steps in scores], abs=1e-5)
