"""The code in the documentation runs as printed."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import trl_hrm
from trl_hrm import BuildStepwiseConfig, HRMRewardConfig, build_stepwise, hrm_view
from trl_hrm.cli import COMMANDS
from trl_hrm.command_parser import CommandParser
from trl_hrm.demo.world import step_trees
from trl_hrm.step_metrics import judged_steps
from trl_hrm.tiny_model import make_tiny_model, texts_of

from .helpers import ROOT, code_block


def test_first_errors_of_the_docs(tmp_path, monkeypatch):
    """The conversion of first errors, and the row with a merged step whose label no view makes."""
    monkeypatch.chdir(tmp_path)
    solutions = [
        {"problem": "1+2+3+4?", "steps": ["1+2=3.", "3+3=7.", "7+4=11."], "label": 1},
        {"problem": "1+2?", "steps": ["1+2=3."], "label": -1},
    ]
    Path("first_errors.jsonl").write_text("".join(json.dumps(solution) + "\n" for solution in solutions))
    exec(compile(code_block("docs/choosing.md", "first_errors.jsonl"), "docs", "exec"), {})
    [merged] = re.findall(r"```json\n(.*?)```", (ROOT / "docs/choosing.md").read_text(), flags=re.DOTALL)
    with open("rows.jsonl", "a") as file:
        file.write(json.dumps(json.loads(merged)) + "\n")
    report = build_stepwise(BuildStepwiseConfig(inputs="rows.jsonl", output_dir="data", test_size=0))
    assert report["labels"]["train"] == {"single": {"0.00": 3, "1.00": 2, "null": 1}, "merged": {"1.00": 1}}


def test_subclass_of_the_docs(tmp_path):
    """The example overrides loss and metrics. If a hook were renamed, both would silently be unused."""
    names = {}
    exec(compile(code_block("docs/hrm_reward_trainer.md", "class FocalTrainer"), "docs", "exec"), names)
    rows = [hrm_view(tree).to_row() for tree in step_trees(20, 4, seed=0)]
    make_tiny_model((text for row in rows for text in texts_of(row)), tmp_path / "model", num_layers=1, vocab_size=300)
    trainer = names["FocalTrainer"](
        str(tmp_path / "model"),
        HRMRewardConfig(
            str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_steps=2, logging_steps=1
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:5]),
    )
    trainer.train()
    metrics = trainer.evaluate()
    output = trainer.predict(Dataset.from_list(rows[:5]))
    logits, labels, _, num_merged = map(torch.from_numpy, judged_steps(output.predictions, output.label_ids))
    losses = torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none")
    focal = ((1 - torch.exp(-losses)) ** 2 * losses).mean().item()
    assert metrics["eval_loss"] == pytest.approx(focal, rel=1e-5)
    correct = (num_merged > 1) & (labels == 1)
    assert metrics["eval_merged_recall"] == pytest.approx((logits.argmax(-1) == 1)[correct].float().mean().item())


def command_lines() -> list[tuple[str, list[str]]]:
    """Return every complete `trl-hrm` command line in the documentation's code blocks and in the CI scripts."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / ".ci" / "run"]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ *(trl-hrm [a-z].*)$", text, flags=re.MULTILINE):
            words = shlex.split(line.replace("$work", "work").split(" > ")[0], comments=True)
            if words[1] in COMMANDS and "..." not in words:
                found.append((f"{page.name}: {line[:60]}", words[1:]))
    return found


@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in command_lines()])
def test_command_lines_of_the_docs_are_valid(words, tmp_path, monkeypatch):
    """A renamed option, or incompatible settings, would stop the first user who copies the line."""
    monkeypatch.chdir(tmp_path)
    name, *rest = words
    if "--config" in rest:
        pytest.skip("its file of settings is made by another command")
    parser = CommandParser(getattr(trl_hrm, COMMANDS[name].config), prog=name)
    config, _ = parser.read(rest)
    assert config is not None
