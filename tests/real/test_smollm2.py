"""A real language model as policy and as reward model: annotate, export, train, score and choose, with SmolLM2-135M."""

import json

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForTokenClassification, AutoTokenizer

from trl_hrm import HRMRewardConfig, HRMRewardTrainer, StepFormat, StepScorer
from trl_hrm.cli import main
from trl_hrm.evaluation.results import load_candidates, load_results
from trl_hrm.search.nodes import read_trees
from trl_hrm.search.run_folder import node_files

from ..search.serving import ENVIRONMENT, serve


pytestmark = pytest.mark.real_model

PROBLEMS = [  # a model of this size solves about half of them
    {"problem": "What is 2 + 2?", "answer": "4"},
    {"problem": "How many days are in a week?", "answer": "7"},
    {"problem": "Tom has 3 apples and buys 4 more. How many apples does Tom have now?", "answer": "7"},
]
PROMPT = "Solve this problem in at most three short sentences: {question}"
SETTINGS = ["--segmentation", "sentence", "--extractors", "last_number", "--temperature", "0.7"]
SETTINGS += ["--max_solution_tokens", "48"]
SEARCH = ["--search", "rollouts", "--num_solutions", "2", "--num_completions", "2"]
TRANSFORMERS = ["--engine", "transformers", "--policy_dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    (folder / "prompt.txt").write_text(PROMPT)
    return folder


@pytest.fixture(scope="module")
def policy(real_folder):
    return str(real_folder("smollm2"))


@pytest.fixture(scope="module")
def tokenizer(policy):
    return AutoTokenizer.from_pretrained(policy)


@pytest.fixture(scope="module")
def command(folder, policy):
    """Options of `annotate` and `best-of-n`."""
    return [
        "--problems",
        str(folder / "problems.jsonl"),
        "--policy",
        policy,
        "--prompt",
        str(folder / "prompt.txt"),
        *SETTINGS,
    ]


@pytest.fixture(scope="module")
def run(folder, command):
    """Searched trees."""
    assert main(["annotate", *command, *SEARCH, *TRANSFORMERS, "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def dataset(folder, run):
    words = ["--view", "hrm", "--labels", "soft", "--test_size", "0", "--output_dir", str(folder / "dataset")]
    assert main(["export", str(run), *words]) == 0
    return load_dataset(str(folder / "dataset"), split="train")


@pytest.fixture(scope="module")
def reward_model(folder, policy, dataset):
    """Two training steps, with the solutions as chat messages."""
    args = HRMRewardConfig(
        output_dir=str(folder / "hrm"),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_length=512,
        prompt_style="chat",
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = HRMRewardTrainer(model=policy, args=args, train_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 5 for loss in losses)
    trainer.save_model()
    return folder / "hrm"


def test_the_policy_answers(run):
    """A model that does not see the problem, or sees no chat, does not."""
    trees = [tree for file in node_files(run) for tree in read_trees(file)]
    assert sorted(tree.problem.prompt for tree in trees) == sorted(row["problem"] for row in PROBLEMS)
    nodes = [node for tree in trees for node in tree.nodes]
    assert any(node.correct for node in nodes) and any(node.answer is not None for node in nodes)
    assert any(node.finish == "eos" for node in nodes)  # it knows where its turn ends
    assert not any("<|im_" in node.text for node in nodes)


def test_the_policy_reads_its_chat_template(policy, command, folder, capsys):
    assert main(["annotate", *command, *SEARCH, *TRANSFORMERS, "--dry_run", "--output_dir", str(folder / "dry")]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>user\nSolve this problem in at most three short sentences: What is 2 + 2?" in shown
    assert shown.count("<|im_start|>assistant") == 1


def test_labels(dataset):
    labels = [label for row in dataset for label in row["labels"] if label is not None]
    assert labels and all(0 <= label <= 1 for label in labels) and len(set(labels)) > 1


def test_scores_are_those_of_one_sequence_per_step(reward_model, tokenizer, dataset):
    """The tree of all solutions against one forward pass per prefix, by the rules of the text format."""
    row = max(dataset, key=lambda row: len(row["completions"]))
    solutions = [["Tom has 3 apples.", "3 + 4 = 7.", "So he has 7 apples."], ["Tom has 3 apples.", "3 + 4 = 12."]]
    scorer = StepScorer.from_pretrained(str(reward_model))
    assert scorer.step_format == StepFormat(prompt_style="chat")
    [scores] = scorer.score([row["prompt"]], [solutions])

    model = AutoModelForTokenClassification.from_pretrained(reward_model, dtype=torch.float32).eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
    )
    for steps, found in zip(solutions, scores, strict=True):
        ids = tokenizer.encode(chat, add_special_tokens=False)
        for step, score in zip(steps, found, strict=True):
            ids += tokenizer.encode(step, add_special_tokens=False) + tokenizer.encode(
                "\n\n", add_special_tokens=False
            )
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            assert score == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-5)
    assert len({round(score, 4) for found in scores for score in found}) > 2


def test_training_changed_the_model(reward_model, policy):
    """The body too: a frozen body would pass the other tests."""
    trained = AutoModelForTokenClassification.from_pretrained(reward_model, dtype=torch.float32)
    before = AutoModelForTokenClassification.from_pretrained(policy, dtype=torch.float32)
    change = (trained.model.layers[0].mlp.down_proj.weight - before.model.layers[0].mlp.down_proj.weight).abs().max()
    assert 1e-5 < change < 1e-2 and trained.score.weight.isfinite().all()


def test_the_score_command(reward_model, folder, capsys):
    rows = [
        {"prompt": row["problem"], "completions": ["Let us add.", f"The answer is {row['answer']}."]}
        for row in PROBLEMS
    ]
    (folder / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["score", str(folder / "solutions.jsonl"), "--reward_model", str(reward_model)]
    assert main([*words, "--output", str(folder / "scores.jsonl")]) == 0
    scores = [json.loads(line)["scores"] for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 3 and all(len(one) == 2 and 0 < min(one) <= max(one) < 1 for one in scores)


def best_of_n(command, reward_model, folder, name, *options):
    words = ["--n", "1", "2", "--aggregate", "min", "--reward_model", str(reward_model), *options]
    assert main(["best-of-n", *command, *words, "--output_dir", str(folder / name)]) == 0
    results, problems = load_results(folder / name), list(load_candidates(folder / name))
    assert results.num_problems == 3 and results.n == [1, 2]
    candidates = [candidate for problem in problems for candidate in problem.candidates]
    assert len(candidates) == 6 and any(candidate.correct for candidate in candidates)
    scorer = StepScorer.from_pretrained(str(reward_model))
    for problem in problems:
        [expected] = scorer.score([problem.problem], [[candidate.steps for candidate in problem.candidates]])
        for candidate, scores in zip(problem.candidates, expected, strict=True):
            assert candidate.scores == pytest.approx(scores, abs=1e-4)


def test_best_of_n(command, reward_model, folder):
    best_of_n(command, reward_model, folder, "bon", *TRANSFORMERS)


@pytest.mark.slow
def test_served_by_vllm(command, reward_model, policy, folder):
    """The same commands against `vllm serve`: trees and best-of-N, with steps that stop at the same places."""
    pytest.importorskip("vllm", reason="needs vLLM; `make test-slow` installs it")
    flags = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--block-size", "32"]
    flags += ["--kv-cache-memory-bytes", str(256 << 20), "--served-model-name", policy]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with serve(folder, "vllm.entrypoints.cli.main", "serve", policy, *flags) as server:
            options = ["--engine", "openai", "--policy_urls", server]
            assert main(["annotate", *command, *SEARCH, *options, "--output_dir", str(folder / "served")]) == 0
            best_of_n(command, reward_model, folder, "served-bon", *options)
    trees = [tree for file in node_files(folder / "served") for tree in read_trees(file)]
    assert len(trees) == 3 and any(node.correct for tree in trees for node in tree.nodes)


def test_judge(run, policy):
    """A model of this size follows few instructions, so most responses are unreadable. All are counted, and none becomes a label."""
    words = ["--judge", policy, "--engine", "transformers", "--judge_dtype", "float32", "--num_votes", "2"]
    assert main(["judge", str(run), *words, "--max_response_tokens", "48", "--max_solutions", "2"]) == 0
    folder = run / "judges" / "judge"
    rows = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    votes = [vote for row in rows for vote in row["judge_votes"]]
    assert 0 < len(rows) <= 2 * len(PROBLEMS) and len(votes) == 2 * len(rows) == summary["votes"]
    assert sum(vote is None for vote in votes) == sum(summary["unreadable"].values()) == summary["cost"]["unreadable"]
    kinds = ("without_error", "with_error", "undecided", "unreadable_solutions")
    assert sum(summary[kind] for kind in kinds) == len(rows) == summary["solutions"]
    for row in rows:
        if all(vote is None for vote in row["judge_votes"]):
            assert set(row["labels"]) == {None}
