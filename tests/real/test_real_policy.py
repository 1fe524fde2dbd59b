"""`annotate` with its default prompt and a real instruction model: what it reads, where it stops, and what the end of a run says."""

import json

import pytest

from trl_hrm import AnnotateConfig, annotate
from trl_hrm.search.prompts import PROMPTS


pytestmark = pytest.mark.real_model

PROBLEMS = [
    ("Tom has 3 apples. He buys 4 more apples. How many apples does Tom have?", "7"),
    ("Lisa read 10 pages on Monday and 15 pages on Tuesday. How many pages did she read in total?", "25"),
    ("Mia has 4 red balls and 5 blue balls. How many balls does she have?", "9"),
]


def run(real_folder, tmp_path, **options):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": text, "answer": answer}) + "\n" for text, answer in PROBLEMS))
    given = {
        "policy": str(real_folder("smollm2")),
        "engine": "transformers",
        "search": "rollouts",
        "num_completions": 0,
    }
    return annotate(AnnotateConfig(problems=str(problems), output_dir=str(tmp_path / "run"), **given, **options))


def events(tmp_path, kind):
    lines = (tmp_path / "run" / "log-00000-of-00001.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_limit_that_is_too_low(real_folder, tmp_path):
    """The end of the run must say how many solutions were cut off, and name the option to change."""
    result = run(real_folder, tmp_path, num_solutions=2, max_solution_tokens=8)
    assert result.summary["solutions"] == {"cut_off_by_tokens": 6}
    assert (
        "\nwarning: 6 of 6 solutions (100.0 %) have no grade: 6 cut off. Most of them (6) are cut off at the maximum number of tokens. "
        "Raise --max_solution_tokens (now 8) in a new --output_dir.\n" in str(result)
    )


def test_the_default_prompt_leads_to_ended_solutions(real_folder, tmp_path):
    """SmolLM2 solves few problems, but it must read its chat template, and stop."""
    from transformers import AutoTokenizer

    result = run(real_folder, tmp_path, num_solutions=1, temperature=0, max_solution_tokens=160)
    tokenizer = AutoTokenizer.from_pretrained(real_folder("smollm2"))
    for event, (text, _) in zip(events(tmp_path, "problem"), PROBLEMS, strict=True):
        written = tokenizer.decode(event["prompt_ids"])
        assert written.endswith(f"<|im_start|>user\n{PROMPTS['boxed'].text(text)}<|im_end|>\n<|im_start|>assistant\n")
    samples = [sample for event in events(tmp_path, "samples") for sample in event["samples"]]
    assert sum(sample["finish"] == "eos" for sample in samples) >= 2
    assert not any("<|im_" in sample["text"] for sample in samples if sample["finish"] == "length")
    assert sum(result.summary["solutions"].values()) == 3
