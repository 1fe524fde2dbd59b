"""Conversational rows: one rule in every reader, and the token ids of the row with plain texts."""

import json
import logging
from collections import Counter

import pytest
from datasets import Dataset, load_dataset

from tests.helpers import tiny_model, tiny_tokenizer
from trl_hrm import HRMRewardConfig, StepFormat, StepScorer, StepTree
from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.candidate_sources import read_candidates
from trl_hrm.data.candidates_config import CandidatesConfig
from trl_hrm.data.problem_sets import read_problems
from trl_hrm.data.stepwise import build_stepwise
from trl_hrm.messages import plain_row, system_texts
from trl_hrm.trainer.forest_dataset import ForestBuilder
from trl_hrm.trainer.hrm_reward_trainer import prepare_rows


SYSTEM = {"role": "system", "content": "Reason step by step."}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


PLAIN = {"prompt": "x = 3?", "completions": ["add x", "so 3"], "labels": [1.0, 0.0]}
FORMS = {
    "prompt": PLAIN | {"prompt": [user("x = 3?")]},
    "system": PLAIN | {"prompt": [SYSTEM, user("x = 3?")]},
    "blocks": PLAIN | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x = 3?"}]}]},
    "steps": PLAIN | {"prompt": [user("x = 3?")], "completions": [assistant("add x"), assistant("so 3")]},
    "lists": PLAIN | {"prompt": [user("x = 3?")], "completions": [[assistant("add x")], [assistant("so 3")]]},
}
WRONG = {
    "turns": (
        {"prompt": [user("a"), assistant("b"), user("c")]},
        "roles ['user', 'assistant', 'user'], expected exactly one user",
    ),
    "system only": ({"prompt": [SYSTEM]}, "roles ['system'], expected exactly one user message"),
    "image": ({"prompt": [user([{"type": "image"}])]}, "content of type ['image']"),
    "no content": ({"prompt": [{"role": "user"}, {"text": "x"}]}, "expected `role` and `content`"),
    "user step": ({"completions": [user("add x"), assistant("so 3")]}, "a step has messages with the roles ['user']"),
    "two messages": ({"completions": [[assistant("a"), assistant("b")], "so 3"]}, "roles ['assistant', 'assistant']"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_conversational_row_is_its_texts(form):
    assert plain_row(FORMS[form], "row") == PLAIN
    assert StepTree.from_row(FORMS[form]) == StepTree.from_row(PLAIN)


@pytest.mark.parametrize("form", WRONG)
def test_what_is_not_one_problem_with_its_steps(tmp_path, form):
    """A single turn of a dialogue would be judged without the others."""
    row, message = WRONG[form]
    row = PLAIN | row
    with pytest.raises(ValueError) as error:
        StepTree.from_row(row, "rows.jsonl:3")
    assert str(error.value).startswith("rows.jsonl:3: ") and message in str(error.value)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError) as error:
        build_stepwise(BuildStepwiseConfig(inputs=str(file), output_dir=str(tmp_path / "out")))
    assert str(error.value).startswith(f"{file}:1: ") and message in str(error.value)


def test_other_values_are_left_to_the_readers():
    """Their errors name the column and the index."""
    for row in ({"prompt": 3, "completions": [1, None]}, {"prompt": [], "completions": "abc"}, {"prompt": ["a"]}):
        assert plain_row(row, "row") == row
    with pytest.raises(ValueError, match="column `prompt` holds"):
        StepTree.from_row(PLAIN | {"prompt": ["a"]})


@pytest.mark.parametrize("step_format", [StepFormat(), StepFormat(prompt_style="chat")])
@pytest.mark.parametrize("form", FORMS)
def test_token_ids_of_the_trainer(form, step_format):
    """Rows of a prompt are joined, also if only some of them are messages in a dataset of their own."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    builder = ForestBuilder(tokenizer, step_format, max_length=100)
    other = {"prompt": "y?", "completions": ["y"], "labels": [1.0]}
    more = PLAIN | {"completions": ["add x", "so 7"]}
    question = user([{"type": "text", "text": "y?"}] if form == "blocks" else "y?")
    as_messages = [FORMS[form], other | {"prompt": [question]}, more | {"prompt": FORMS[form]["prompt"]}]
    if form in ("steps", "lists"):
        wrap = assistant if form == "steps" else lambda text: [assistant(text)]
        as_messages = [
            row if i == 0 else row | {"completions": [wrap(step) for step in row["completions"]]}
            for i, row in enumerate(as_messages)
        ]
    expected, report = builder(Dataset.from_list([PLAIN, other, more]), "data")
    found, other_report = builder(Dataset.from_list(as_messages), "data")
    assert found.to_list() == expected.to_list() and other_report == report and report.labels_joined == 1


def test_left_out_system_messages_are_counted(tmp_path, caplog):
    """Unless the step format has the same one, which is then shown."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = Dataset.from_list([FORMS["system"], FORMS["prompt"], FORMS["system"] | {"prompt": [SYSTEM, user("y?")]}])
    args = HRMRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    caplog.set_level(logging.WARNING, "trl_hrm")
    prepare_rows(rows, tokenizer, StepFormat(), args, "train_dataset")
    assert "the system messages of 2 of 3 prompts are left out" in caplog.text
    caplog.clear()
    shown = StepFormat(prompt_style="chat", system_prompt=SYSTEM["content"])
    prepare_rows(rows, tokenizer, shown, args, "train_dataset")
    assert "system messages" not in caplog.text
    assert system_texts(FORMS["system"]["prompt"]) == [SYSTEM["content"]]


def test_outcomes_as_conversations(tmp_path):
    """TRL's unpaired preference format."""
    args = HRMRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    plain = {"prompt": "x = 3?", "completion": "add x\n\nso 3", "label": True}
    wrapped = plain | {"prompt": [SYSTEM, user("x = 3?")], "completion": [assistant("add x\n\nso 3")]}
    found = [
        prepare_rows(Dataset.from_list([row]), tiny_tokenizer(), StepFormat(), args, "train_dataset")[0].to_list()
        for row in (plain, wrapped)
    ]
    assert found[0] == found[1]


def test_the_scorer():
    scorer = StepScorer(tiny_model(), tiny_tokenizer(), StepFormat())
    steps = PLAIN["completions"]
    expected = scorer.score(["x = 3?", "y?"], [[steps, ["x"]], []])
    found = scorer.score(
        [[SYSTEM, user("x = 3?")], [user("y?")]], [[[assistant(step) for step in steps], [[assistant("x")]]], []]
    )
    assert found == expected
    with pytest.raises(ValueError, match="^prompt 1: the prompt has messages with the roles"):
        scorer.score(["x?", [user("a"), user("b")]], [[], []])


def test_texts_of_the_scorer():
    scorer = StepScorer(tiny_model(), tiny_tokenizer(), StepFormat())
    texts = ["<think>hm</think>add x\n\nso 3", "", "# Step 1\nx\n\ny"]
    found = scorer.score_texts(["x?"] * 3, texts, rule="blank_line")
    steps = [["add x", "so 3"], [], ["# Step 1\nx", "y"]]
    assert [[step for step, _ in one] for one in found] == steps
    expected = scorer.score(["x?"] * 3, [[one] for one in steps])
    assert [[score for _, score in one] for one in found] == [one for [one] in expected]
    assert [step for step, _ in scorer.score_texts(["x?"], ["# Step 1\nx\n# Step 2\ny"])[0]] == [
        "# Step 1\nx",
        "# Step 2\ny",
    ]
    with pytest.raises(ValueError, match="`rule` is 'lines'"):
        scorer.score_texts(["x?"], ["x"], rule="lines")
    with pytest.raises(ValueError, match="Each solution must be a string"):
        scorer.score_texts(["x?"], [["x"]])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_built_datasets_are_plain(tmp_path, kind):
    """They are the same from messages and from texts, whose problems have the same split. The system message is named."""
    rows = [row | {"prompt": [SYSTEM, user(f"{i}?")]} for i, row in enumerate([FORMS["lists"]] * 3)]
    source = tmp_path / "rows"
    if kind == "file":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(source / "train.parquet")
    config = BuildStepwiseConfig(inputs=str(source), output_dir=str(tmp_path / "out"), view="prm", test_size=0.0)
    report = build_stepwise(config)
    found = load_dataset(config.output_dir, split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert [(row["prompt"], row["completions"]) for row in found] == [(f"{i}?", ["add x", "so 3"]) for i in range(3)]
    assert any("3 rows have a column `prompt (message of role system)`" in warning for warning in report["warnings"])


def test_a_blank_message_is_a_blank_step(tmp_path):
    """As with plain texts, the row is dropped and counted, and does not stop the build."""
    rows = [FORMS["lists"], FORMS["lists"] | {"completions": [[assistant("add x")], [assistant(" ")]]}]
    rows += [FORMS["prompt"] | {"prompt": [user(" ")]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = build_stepwise(BuildStepwiseConfig(inputs=str(file), output_dir=str(tmp_path / "out"), test_size=0.0))
    assert report["dropped"] == {"blank_step": 1, "blank_prompt": 1}


def test_problems_and_candidates(tmp_path):
    """Their readers have the same rule. A list of messages under `completion` is one text, under `completions` it is steps."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": [SYSTEM, user("x = 3?")], "answer": "3"}) + "\n")
    assert [problem.prompt for problem in read_problems(str(file)).problems] == ["x = 3?"]
    rows = [
        {"prompt": [SYSTEM, user("x = 3?")], "completions": [assistant("add x"), assistant("so 3")]},
        {"prompt": [SYSTEM, user("x = 3?")], "completion": [assistant("add x")]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [problem] = read_candidates(CandidatesConfig(candidates=str(file)), Counter())
    assert problem.problem == "x = 3?"
    assert [candidate.steps for candidate in problem.candidates] == [["add x", "so 3"], ["add x"]]
