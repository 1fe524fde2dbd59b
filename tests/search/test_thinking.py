"""Steps of thinking models: hand-written traces, properties of random texts, and a run from the log to the scores."""

import asyncio
import json
import random
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from datasets import load_dataset

from trl_hrm import BestOfNConfig, ExportConfig, StepTree, best_of_n, export
from trl_hrm.data.candidate_sources import read_candidates, read_pool, reading_settings
from trl_hrm.data.candidates_config import CandidatesConfig
from trl_hrm.grading.extraction import THINKING_TAG, untagged_parts
from trl_hrm.search.engines.base import CharTokenizer, ScriptedEngine, continued_text
from trl_hrm.search.inspection import page_data
from trl_hrm.search.log import EventLog
from trl_hrm.search.nodes import read_trees as read_nodes
from trl_hrm.search.nodes import write_nodes
from trl_hrm.search.open_tree import OpenTree
from trl_hrm.search.policies import FullTree, Rollouts
from trl_hrm.search.policy_config import PromptConfig
from trl_hrm.search.run_folder import check_manifest, finish_shard, node_files
from trl_hrm.search.scheduler import Scheduler, SchedulerConfig
from trl_hrm.search.steps import BLANK, RULES, Cut, StepRule, cut_steps, cut_text, step_spans
from trl_hrm.search.thinking import MARKS, ThinkingRule, begins_thought, dropped_tag, thought_length
from trl_hrm.search.tree import ROOT, Problem, SearchTree
from trl_hrm.tiny_model import make_tokenizer

from ..helpers import save_checkpoint, tiny_tokenizer
from .scripted import FINAL, PROMPT, ExactGrader, make_problems, read_trees, run_scripted
from .trees import inspection_of


TRACES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "fixtures" / "thinking_traces.jsonl").read_text("utf-8").splitlines()
]
FRAGMENTS = [
    *("<think>", "</think>", "[THINK]", "[/THINK]", "◁think▷", "◁/think▷", "</thinking>"),
    *(
        "\n",
        "\n\n",
        "\n \n\n",
        " ",
        "---\n\n",
        "**",
        "- ",
        "# ",
        "$$",
        "\\[x\n\ny\\]",
        "\n```\na\n\nWait, b\n```\n",
        "\n```",
    ),
    *(
        "Wait",
        "wait, ",
        "Hmm. ",
        "Alternatively, ",
        "等等，",
        "不对。",
        "The waiter. ",
        "x = 3. ",
        "三加四等于七。",
        "e.g. ",
        "1. ",
    ),
    *(
        "a long piece of text that has no full stop ",
        "Done! ",
        "word" * 30,
        "é",
        "\u3000",
        "\xa0",
        "\u2028",
        "|---|\n",
    ),
]


def rule_of(trace: dict) -> ThinkingRule:
    return ThinkingRule(**trace.get("options", {}))


def random_rule(rng: random.Random) -> ThinkingRule:
    least = rng.choice((1, 10, 80))
    return ThinkingRule(min_characters=least, max_characters=least + rng.choice((5, 40, 2000)))


def pieces_of(text: str, rule: StepRule, start: int = 0) -> list[str]:
    ends = rule.ends(text, start)
    return [text[a:b] for a, b in zip([start, *ends], ends, strict=False)]


def check_spans(text: str, rule: ThinkingRule) -> list[str]:
    """Check that steps and the gaps between them join to the text, and that no step has a tag. Return the steps."""
    spans = step_spans(text, rule)
    steps = [text[start:end] for start, end in spans]
    gaps = [
        text[a:b]
        for a, b in zip([0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)], strict=True)
    ]
    assert not any(THINKING_TAG.sub("", gap).strip(BLANK) for gap in gaps)
    assert all(step == step.strip() and step.strip(BLANK) for step in steps)
    assert not any(THINKING_TAG.search(step) for step in steps)
    assert cut_text(text, rule) == cut_text(text, rule, keep_thinking=True) == steps
    return steps


@pytest.mark.parametrize("trace", TRACES, ids=[trace["name"] for trace in TRACES])
def test_traces_of_known_models(trace):
    """The expected steps were written by hand."""
    text, rule = trace["text"], rule_of(trace)
    assert check_spans(text, rule) == trace["steps"]
    assert "".join(pieces_of(text, rule)) == text


@pytest.mark.parametrize("seed", range(6))
def test_pieces_of_random_texts(seed):
    rng, num_steps, num_long = random.Random(seed), 0, 0
    for _ in range(150):
        rule = random_rule(rng)
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 30)))
        steps = check_spans(text, rule)
        pieces = pieces_of(text, rule)
        assert "".join(pieces) == text
        assert len(steps) == len(pieces) or not steps  # a text without any step is one piece
        parts = [(text[a:b], thinks) for a, b, thinks in untagged_parts(text)]
        thoughts = [part for part, thinks in parts if thinks]
        for step in steps:
            owners = [thinks for part, thinks in parts if step in part]
            assert owners  # each step is in one part, so thinking and answer are never mixed
            num_long += all(owners) and len(step.strip(BLANK)) > rule.max_characters
        num_steps += len(steps)
        for first, later in zip(steps, steps[1:], strict=False):
            if len(first) < rule.min_characters and first in "\0".join(thoughts) and not begins_thought(later):
                # Only a tag or a cut of a long text ends a short step that no mark follows
                place = text.index(first) + len(first)
                assert THINKING_TAG.search(text[place:]) or len(later) > rule.max_characters // 3
        if len(pieces) > 1:  # after the first step, the rest has the same steps
            first = len(pieces[0])
            assert rule.ends(text, first) == rule.ends(text)[1:]
    assert num_steps > 500 and num_long == 0


def test_a_long_text_is_split_at_sentences_then_lines_then_white_space():
    rule = ThinkingRule(min_characters=1, max_characters=20)
    for body, expected in (
        ("One two three. Four five six. Seven", ["One two three.", "Four five six. Seven"]),
        ("A. One two three four five six", ["A. One two three", "four five six"]),
        ("1 2 3 4 5 6\n7 8 9 10 11 12", ["1 2 3 4 5 6", "7 8 9 10 11 12"]),
        ("x" * 45, ["x" * 20, "x" * 20, "x" * 5]),
        ("三加四等于七。五加六等于十一。所以是十一。对", ["三加四等于七。五加六等于十一。", "所以是十一。对"]),
        ("Is e.g. 3 more than 2?", ["Is e.g. 3 more than", "2?"]),
    ):
        assert cut_text(f"<think>{body}</think>", rule) == expected


def test_a_long_code_block_is_split_at_its_lines():
    """Steps end inside code only if the code alone is too long."""
    lines = [f"line {i}" for i in range(12)]
    code = "```\n" + "\n".join(lines) + "\n```"
    assert cut_text(f"<think>Now:\n\n{code}\n\nDone.</think>", ThinkingRule(min_characters=1)) == [
        "Now:",
        code,
        "Done.",
    ]
    parts = cut_text(f"<think>{code}</think>", ThinkingRule(min_characters=1, max_characters=40))
    assert "\n".join(parts) == code and len(parts) == 3


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        *((mark, True) for mark in MARKS),
        *((f"**{mark.upper()}** no", True) for mark in ("Wait", "hold on")),
        ("- Wait: 3", True),
        ("> hmm", True),
        ("1. Wait", False),
        ("Waiting", False),
        ("So wait", False),
        ("Hmmmmm", False),
        ("Actual", False),
        ("", False),
    ],
)
def test_begins_thought(step, expected):
    assert begins_thought(step) == expected


def test_own_marks():
    assert begins_thought("Mooment: 3", ["Mooment"]) and not begins_thought("Wait", ["Mooment"])
    text = "<think>It is 3. Mooment, it is 4. Wait, no.</think>"
    assert cut_text(text, ThinkingRule(marks=("mooment",), min_characters=1)) == [
        "It is 3.",
        "Mooment, it is 4. Wait, no.",
    ]


@pytest.mark.parametrize(
    ("steps", "most", "expected"),
    [
        (["a", "b", "Wait, c"], 16, 3),
        (["a", "Wait, b", "c", "d", "Hmm, e"], 16, 4),
        (["a", "Wait, b", "Wait, c"], 16, 2),
        (["a", "b", "c", "Wait, d"], 3, 3),
        (["a", "b"], 16, 1),
        (["Wait, a"], 16, 1),
        ([], 16, 1),
    ],
)
def test_thought_length(steps, most, expected):
    assert thought_length(steps, max_steps=most) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"marks": ()}, "marks"),
        ({"marks": ("Wait", " ")}, "marks"),
        ({"min_characters": 0}, "minimum length"),
        ({"min_characters": 10, "max_characters": 9}, "minimum length"),
        ({"answer": "words"}, "'words'.*blank_line"),
    ],
)
def test_invalid_rules_raise(options, message):
    with pytest.raises(ValueError, match=message):
        ThinkingRule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segmentation": "blank_line", "thinking_marks": ["Wait"]}, "`thinking_marks`.*`segmentation='thinking'`"),
        ({"min_step_characters": 3}, "`min_step_characters` is 3.*no effect"),
        ({"segmentation": "thinking", "min_step_characters": 30, "max_step_characters": 20}, "30 characters.*20"),
        ({"segmentation": "thinking", "step_pattern": "x"}, "`step_pattern`"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        PromptConfig(**options)


def test_options():
    """The settings of the manifest give the same rule again."""
    given = {
        "thinking_marks": ["Wait"],
        "min_step_characters": 5,
        "max_step_characters": 50,
        "answer_segmentation": "sentence",
    }
    _, rule = PromptConfig(segmentation="thinking", **given).make_prompt()
    assert rule == ThinkingRule(marks=("Wait",), min_characters=5, max_characters=50, answer="sentence")
    assert ThinkingRule(**json.loads(json.dumps(asdict(rule)))) == rule
    assert PromptConfig(segmentation="thinking").make_prompt()[1] == ThinkingRule()
    with pytest.raises(ValueError, match="one at a time.*whole solutions"):
        FullTree(rule, FINAL).start(OpenTree(SearchTree(Problem("p", "q", "7")), "root", 0))


def slow_cuts(rule: StepRule, tokenizer, ids: list[int], text: str, before: str) -> list[Cut]:
    """Return the cuts by decoding every prefix of the tokens."""
    cuts = []
    for end in rule.ends(before + text, len(before))[:-1]:
        end -= len(before)
        for number in range(len(ids) + 1):
            found = continued_text(tokenizer, [], ids[:number])
            if len(found) >= end and text.startswith(found):
                if number < len(ids) and (not cuts or number > cuts[-1].tokens):
                    cuts.append(Cut(number, len(found), len(found) - end))
                break
    return [*cuts, Cut(len(ids), len(text), 0)]


TOKENIZERS = {
    "characters": lambda text: CharTokenizer(),
    "bytes": lambda text: make_tokenizer([text] * 2, 260),
    "words": lambda text: make_tokenizer([text] * 3, 700),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("trace", TRACES, ids=[trace["name"] for trace in TRACES])
def test_steps_of_a_tree_equal_the_steps_of_the_text(tmp_path, trace, kind):
    """For every tokenizer, also after the tree was written to a file and read without its manifest."""
    text, rule = trace["text"], rule_of(trace)
    tokenizer = TOKENIZERS[kind](text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    cuts = cut_steps(rule, tokenizer, [], ids, text)
    assert cuts == slow_cuts(rule, tokenizer, ids, text, "")
    event = {
        "event": "problem",
        "problem_id": "p",
        "position": 0,
        "root_id": "r",
        "prompt": "q",
        "answer": "7",
        "prompt_ids": [],
    }
    opened = OpenTree.from_event(event | {"thinking": "kept"})
    sample = {"token_ids": ids, "text": text, "num_cached": 0, "finish": "eos", "stop_reason": None, "is_final": True}
    opened.apply(
        {
            "event": "samples",
            "problem_id": "p",
            "above": "r",
            "round": 0,
            "role": "rollout",
            "cut": True,
            "weight": 1.0,
            "seed": 1,
        }
        | {"samples": [sample | {"answer": None, "cuts": cuts}]}
    )
    tree = opened.tree.canonical()
    assert tree.thinking == "kept"
    write_nodes([tree], tmp_path / "nodes.parquet")
    for one in (tree, *read_nodes(tmp_path / "nodes.parquet")):
        steps = [one.step_text(i) for i, node in enumerate(one.nodes) if node.role == "segment"]
        assert [step for step in steps if step] == trace["steps"]
        assert [" ".join(step.split()) for step in steps if step] == [
            " ".join(step.split()) for step in trace["steps"]
        ]
        [whole] = [one.step_text(i) for i, node in enumerate(one.nodes) if node.role == "rollout"]
        assert "".join(whole.split()) == "".join("".join(trace["steps"]).split())


def test_files_of_trees_without_thinking_say_nothing(tmp_path):
    """Their bytes are the same as before, and one file has only one kind of trees."""
    import pyarrow.parquet as pq

    tree = SearchTree(Problem("p", "q", "7"), status="done")
    write_nodes([tree], tmp_path / "a.parquet")
    assert b"thinking" not in (pq.ParquetFile(tmp_path / "a.parquet").metadata.metadata or {})
    other = replace(tree, problem=Problem("o", "q", "7"), thinking="kept")
    with pytest.raises(ValueError, match="problem 'o' has thinking kept"):
        write_nodes([tree, other], tmp_path / "b.parquet")
    assert not (tmp_path / "b.parquet").exists()


# A run, from the samples to the scores

RULE = ThinkingRule(min_characters=10)
SEARCH = Rollouts(FINAL, num_solutions=6, num_completions=4, max_solution_tokens=400)


def write_thinking(prefix: str, rng: random.Random) -> str:
    """Think in two steps, correct the second one or not, and answer. Sometimes the thinking does not end."""
    written = prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1]
    parts = [
        "<think>\nI add all of the numbers.",
        f"\n\nThat gives {rng.choice((7, 8))} in total.",
        "\n\nWait, it is {}.",
    ]
    text = "".join(parts[written.count(".") :])
    if written.count(".") < 3:
        text = text.format(rng.choice((7, 8)))
        if rng.random() < 0.1:
            return text + "\n\nand so on" * 60
    value = re.findall(r"Wait, it is (\d)", written + text)[0]
    return f"{text}\n</think>\n\nThe answer is below.\n\n# Answer\n\n{value}\n# END!".lstrip(
        "\n" if written[-1:] == "\n" else ""
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_scripted(folder, SEARCH, make_problems(8), script=write_thinking, rule=RULE)
    settings = {
        "prompt": asdict(PROMPT),
        "search": SEARCH.describe(),
        "steps": asdict(RULE),
        "seed": 42,
        "versions": {},
    }
    settings["engine"] = {"engine": "scripted", "model": "scripted", "temperature": 1.0}
    check_manifest(folder, settings)
    finish_shard(folder, 0, 1)
    return folder


def test_the_log_and_the_nodes_keep_thinking(run):
    trees = read_trees(run)
    saved = {tree.problem.problem_id: tree for file in node_files(run) for tree in read_nodes(file)}
    assert saved == trees and {tree.thinking for tree in trees.values()} == {"kept"}
    steps = Counter(
        tree.step_text(i) for tree in trees.values() for i, node in enumerate(tree.nodes) if node.role == "segment"
    )
    assert {
        "I add all of the numbers.",
        "That gives 7 in total.",
        "Wait, it is 8.",
        "The answer is below.",
    } <= steps.keys()
    assert not any("think" in step for step in steps)
    shown = page_data(inspection_of(next(iter(trees.values()))), {})["nodes"]["text"]
    assert "I add all of the numbers." in shown and not any("<think>" in text for text in shown)


@pytest.mark.parametrize("single_file", [False, True])
def test_export_of_merged_thoughts(run, tmp_path, single_file):
    """The merged step joins the correction with the whole thought before it, and has the label of its last step."""
    [nodes] = node_files(run)
    source = str(nodes) if single_file else str(run)
    report = export(
        ExportConfig(
            inputs=[source], output_dir=str(tmp_path / "data"), view="hrm", merge="thoughts", test_size=0, num_proc=1
        )
    )
    assert "--merge thoughts" in report["command"]
    rows = load_dataset(
        "parquet",
        data_files=str(next((tmp_path / "data").rglob("train*.parquet"))),
        split="train",
        cache_dir=str(tmp_path),
    )
    num_merged = Counter()
    for row in rows:
        tree = StepTree.from_row(
            {name: row[name] for name in ("prompt", "completions", "labels", "parents", "num_merged")}
        )
        singles = [i for i, count in enumerate(tree.num_merged) if count == 1]
        assert not any("think>" in text for text in tree.completions)
        expected = Counter()
        for i in singles:
            if tree.labels[i] is not None and tree.completions[i].startswith("Wait"):
                path = [*tree.path(i)]
                expected["\n".join(tree.completions[j] for j in path), tree.labels[i], len(path)] += 1
        found = Counter(
            (text, label, count)
            for text, label, count in zip(tree.completions, tree.labels, tree.num_merged, strict=True)
            if count > 1
        )
        assert found.keys() == expected.keys()
        num_merged.update(count for *_, count in found)
    assert num_merged[3] > 10 and set(num_merged) == {3}


def test_export_with_own_marks_of_a_run_without_marks(tmp_path):
    """Such a run has other steps, which own marks can merge."""
    write_nodes([SearchTree(Problem("p", "q", "7"), status="done")], tmp_path / "nodes.parquet")
    options = {"view": "hrm", "merge": "thoughts", "thinking_marks": ["Stop"], "output_dir": str(tmp_path / "data")}
    with pytest.raises(ValueError, match="0 of 1 records were kept"):
        export(ExportConfig(inputs=[str(tmp_path / "nodes.parquet")], num_proc=1, **options))


def test_export_refuses_other_marks(run, tmp_path):
    config = ExportConfig(
        inputs=[str(run)], output_dir=str(tmp_path / "data"), view="hrm", merge="thoughts", thinking_marks=["Stop"]
    )
    with pytest.raises(ValueError, match="other marks.*Wait.*`thinking_marks`"):
        export(config)
    assert not (tmp_path / "data").exists()


def test_candidates_keep_the_steps_of_the_run(run):
    config = CandidatesConfig(candidates=str(run))
    settings = reading_settings(config)
    assert (settings["segmentation"], settings["keep_thinking"], settings["min_step_characters"]) == (
        "thinking",
        True,
        10,
    )
    counts = Counter()
    pool = read_pool(config, None, None, counts)
    assert not counts["candidates_with_thinking_left_out"]
    cut_off = 0
    for candidate in (candidate for problem in pool for candidate in problem.candidates):
        assert candidate.steps == cut_text(candidate.text, RULE)
        is_closed = "</think>" in candidate.text
        cut_off += not is_closed
        assert (candidate.answer is not None) == is_closed
    assert cut_off > 1
    finished = [one for problem in read_candidates(config, Counter()) for one in problem.candidates]
    assert finished and all(one.steps == cut_text(one.text, RULE) for one in finished)
    for name, value in (("keep_thinking", False),):
        with pytest.raises(ValueError, match="`keep_thinking` is False.*run with `segmentation='thinking'`"):
            reading_settings(CandidatesConfig(candidates=str(run), **{name: value}))
    again = CandidatesConfig(candidates=str(run), segmentation="blank_line")
    assert not reading_settings(again)["keep_thinking"]
    texts = [one.steps for problem in read_pool(again, None, None, Counter()) for one in problem.candidates]
    assert ["The answer is below.", "# Answer\n\n7\n# END!"] in texts


def test_best_of_n_with_thoughts(run, tmp_path):
    model = save_checkpoint(tmp_path / "model", max_position_embeddings=2048)
    found = {}
    for name, spans in (("single", [1]), ("thought", [1, "thought"])):
        config = BestOfNConfig(
            candidates=str(run),
            reward_model=model,
            spans=spans,
            n=[1, 6],
            aggregate=["mean"],
            output_dir=str(tmp_path / name),
        )
        results = best_of_n(config)
        assert results.settings["segmentation"] == "thinking" and results.settings["spans"] == spans
        lines = (tmp_path / name / "candidates.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[name] = [(one["steps"], one["scores"]) for row in rows for one in row["candidates"]]
    assert found["single"] != found["thought"]
    for (steps, single), (same, thought) in zip(found["single"], found["thought"], strict=True):
        assert steps == same and not any("think>" in step for step in steps)
        for step, one, more in zip(steps, single or [], thought or [], strict=True):
            assert more == pytest.approx(one, abs=1e-5) or (step.startswith("Wait") and more > one)


def test_a_thinking_that_the_prompt_opens(tmp_path):
    """The tag is in the prompt and not in the text. A solution that only thinks has steps, but no answer."""

    def script(prefix: str, rng: random.Random) -> str:
        assert "<think>" in prefix
        return "I add them. It is 7.\n\nWait, no." + rng.choice(("</think>\n\n\\boxed{7}", " \\boxed{8}"))

    prompt = replace(PROMPT, template="{question}\n<think>\n")
    search = Rollouts(FINAL, num_solutions=6, num_completions=0, max_solution_tokens=400)
    with EventLog(tmp_path / "log-00000-of-00001.jsonl", write=True) as log:
        scheduler = Scheduler(
            ScriptedEngine(script), search, ExactGrader(), prompt, RULE, log, seed=1, config=SchedulerConfig()
        )
        asyncio.run(scheduler.run(make_problems(2)))
    check_manifest(tmp_path, {"prompt": asdict(prompt), "search": search.describe(), "steps": asdict(RULE)})
    finish_shard(tmp_path, 0, 1)
    pool = read_pool(CandidatesConfig(candidates=str(tmp_path)), None, None, Counter())
    found = {(tuple(one.steps), one.answer) for problem in pool for one in problem.candidates}
    first = ("I add them. It is 7.",)
    assert found == {((*first, "Wait, no.", "\\boxed{7}"), "7"), ((*first, "Wait, no. \\boxed{8}"), None)}
    tree = next(iter(read_trees(tmp_path).values()))
    assert tree.thinking == "opened"
    assert {node.parent for node in tree.nodes if node.role == "rollout"} == {ROOT}


@pytest.mark.parametrize("special", [False, True])
def test_tags_that_are_special_tokens(special):
    """They are left out of sampled texts, so thinking would be split like the answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=special)
    assert dropped_tag(tokenizer) == ("[/THINK]" if special else None)
    prompt = replace(PROMPT, rule="blank_line")
    assert prompt.for_tokenizer(tokenizer) is prompt  # only steps in thinking need the tags
    thinking = replace(PROMPT, rule="thinking")
    if special:
        with pytest.raises(ValueError, match=r"\[/THINK\] is a special token"):
            thinking.for_tokenizer(tokenizer)
    else:
        assert thinking.for_tokenizer(tokenizer) is thinking


def test_candidates_of_a_file(tmp_path):
    """Texts are split like samples of a policy, also after a prompt that opens the thinking."""
    rows = [
        {"prompt": "q", "completion": TRACES[0]["text"], "correct": True},
        {"prompt": "p\n<think>\n", "completion": TRACES[1]["text"], "correct": True},
        {"prompt": "r\n<think>\n", "completion": "It is \\boxed{3}. Wait, no.", "correct": False},
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CandidatesConfig(candidates=str(file), segmentation="thinking")
    pool = read_pool(config, None, None, Counter())
    assert [problem.candidates[0].steps for problem in pool] == [
        TRACES[0]["steps"],
        TRACES[1]["steps"],
        ["It is \\boxed{3}.", "Wait, no."],
    ]
    assert [problem.candidates[0].answer for problem in pool] == ["100", None, None]
    with pytest.raises(ValueError, match="`keep_thinking` is False.*'thinking'"):
        CandidatesConfig(candidates=str(file), segmentation="thinking", keep_thinking=False)
    assert set(RULES) == {"step_header", "blank_line", "sentence", "formula"}  # each has stop strings
