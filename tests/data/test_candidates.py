"""Candidates from files, datasets and runs, and the sources of their reference answers."""

import json
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from trl_hrm.data.candidate_sources import check_sizes, read_pool, reading_settings
from trl_hrm.data.candidates import Candidate, ProblemCandidates
from trl_hrm.data.candidates_config import CandidatesConfig
from trl_hrm.data.problem_sets import read_problems
from trl_hrm.grading import DEFAULT_EXTRACTORS
from trl_hrm.search.log import EventLog
from trl_hrm.search.policies import Rollouts, RootFilter
from trl_hrm.search.run_folder import check_manifest, finish_shard
from trl_hrm.search.steps import RULES, cut_text

from ..fakes import write_rows
from ..search.scripted import FINAL, PROMPT, SEARCHES, ExactGrader, make_problems, run_scripted


EXTRACTORS = ("marker", "boxed", "hash")
SOLUTIONS = Rollouts(FINAL, num_solutions=8, num_completions=0, max_solution_tokens=60)


def solution(answer: int) -> str:
    return f"# Step 1\nWe think.\n\n# Step 2\nIt is so.\n\n# Answer\n\n{answer}\n# END!"


def read(source: str, problems=None, **options) -> tuple[list[ProblemCandidates], Counter]:
    counts = Counter()
    return read_pool(CandidatesConfig(candidates=source, **options), EXTRACTORS, problems, counts), counts


def test_rows_with_answers(tmp_path):
    """Solutions are samples, so they keep their order and repetitions."""
    rows = [
        {"prompt": "2+3?", "answer": 5, "completion": solution(5)},
        {"prompt": "1+1?", "answer": "2", "candidates": [solution(2), "", solution(2), ["a", "b"]]},
        {"prompt": "2+3?", "answer": 5, "completion": "no idea"},
    ]
    pool, counts = read(write_rows(tmp_path / "in.jsonl", rows))
    assert [(p.problem, p.answer, len(p.candidates)) for p in pool] == [("2+3?", "5", 2), ("1+1?", "2", 4)]
    assert [c.answer for c in pool[0].candidates] == ["5", None]
    assert [c.answer for c in pool[1].candidates] == ["2", None, "2", None]
    assert pool[0].candidates[0].steps == ["# Step 1\nWe think.", "# Step 2\nIt is so.\n\n# Answer\n\n5\n# END!"]
    assert pool[1].candidates[1].steps == [] and pool[1].candidates[3].steps == ["a", "b"]
    assert pool[1].candidates[3].text == "a\n\nb" and pool[1].candidates[0].finish is None
    assert +counts == Counter() and pool[0].where.endswith("in.jsonl:1")


@pytest.mark.parametrize("answers", [(3, 3.0), ("$3$", "3"), ("1,000", 1000)])
def test_one_answer_in_two_spellings(tmp_path, answers):
    """Readers of problems treat these answers as equal, too."""
    rows = [{"prompt": "1+2?", "answer": answer, "completion": solution(3)} for answer in answers]
    pool, _ = read(write_rows(tmp_path / "in.jsonl", rows))
    assert [(p.answer, len(p.candidates)) for p in pool] == [(str(answers[0]), 2)]


def test_ids_may_be_integers(tmp_path):
    rows = [{"prompt": "1+2?", "answer": "3", "completion": "x", "problem_id": one} for one in (7, "7")]
    pool, _ = read(write_rows(tmp_path / "in.jsonl", rows))
    assert [(p.problem_id, len(p.candidates)) for p in pool] == [("7", 2)]
    file = write_rows(tmp_path / "in.jsonl", [rows[0] | {"problem_id": 1.5}])
    with pytest.raises(ValueError, match="`problem_id` is 1.5, expected a string or an integer"):
        read(file)


@pytest.mark.parametrize("answer", ["Paris", "B", "(B)", 1])
def test_choices(tmp_path, answer):
    """The answer becomes the label of a choice, which solutions state."""
    row = {"prompt": "What is the capital of France?", "choices": ["Rome", "Paris"], "answer": answer}
    file = write_rows(tmp_path / "in.jsonl", [row | {"completion": r"It is \boxed{B}."}])
    [problem], _ = read(file)
    assert (
        problem.answer == "B" and problem.problem.endswith("A. Rome\nB. Paris") and problem.candidates[0].answer == "B"
    )
    file = write_rows(tmp_path / "in.jsonl", [row | {"answer": "Lyon", "completion": r"It is \boxed{B}."}])
    with pytest.raises(
        ValueError, match=r"in.jsonl:1: `answer` is 'Lyon'. It must identify exactly one of the choices"
    ):
        read(file)


def test_messages_with_content_blocks(tmp_path):
    """Rows with content as a string and as text blocks are equal. Other blocks are errors."""

    def row(blocks) -> dict:
        prompt, answer = (
            {"role": role, "content": blocks(text)} for role, text in (("user", "1+1?"), ("assistant", solution(2)))
        )
        return {"prompt": [prompt], "answer": 2, "candidates": [[answer], solution(2)]}

    plain, _ = read(write_rows(tmp_path / "plain.jsonl", [row(str)]))
    parts, _ = read(write_rows(tmp_path / "parts.jsonl", [row(lambda text: [{"type": "text", "text": text}])]))
    assert [asdict(one) | {"where": ""} for one in parts] == [asdict(one) | {"where": ""} for one in plain]
    assert plain[0].problem == "1+1?" and plain[0].candidates[0] == plain[0].candidates[1]
    image = row(lambda text: [{"type": "image", "url": text}])
    with pytest.raises(ValueError, match=r"in.jsonl:1: `prompt`: a message has content of type \['image'\]"):
        read(write_rows(tmp_path / "in.jsonl", [image]))
    with pytest.raises(ValueError, match=r"in.jsonl:1: `candidates\[0\]`: a message has content of type \['image'\]"):
        read(write_rows(tmp_path / "in.jsonl", [image | {"prompt": "1+1?"}]))


def test_answers_in_the_format_of_gsm8k(tmp_path):
    """Using the whole solution as the answer would make every candidate wrong."""
    row = {"prompt": "1+1?", "answer": "1 + 1 is 2.\n#### 2", "completion": solution(2)}
    assert read(write_rows(tmp_path / "in.jsonl", [row]))[0][0].answer == "2"


def test_answers_from_problems(tmp_path):
    rows = [{"prompt": f"{i}+1?", "completion": solution(i + 1), "answer": "of the solution"} for i in range(4)]
    known = [{"problem": f" {i}+1? ", "answer": str(i + 1)} for i in (0, 2, 3, 8)]
    problems = read_problems(write_rows(tmp_path / "problems.jsonl", known))
    pool, counts = read(write_rows(tmp_path / "in.jsonl", rows), problems)
    assert [(p.problem, p.answer) for p in pool] == [("0+1?", "1"), ("2+1?", "3"), ("3+1?", "4")]
    assert counts == {"problems_without_answer": 1, "problems_without_candidates": 1}


def test_problems_without_an_answer(tmp_path):
    """Some are dropped and counted. If no problem has an answer, a curve of zeros would look like a result."""
    rows = [{"prompt": f"{i}?", "completion": "x", "answer": answer} for i, answer in enumerate(["1", None, " ", "2"])]
    pool, counts = read(write_rows(tmp_path / "some.jsonl", rows))
    assert [p.problem for p in pool] == ["0?", "3?"] and counts["problems_without_answer"] == 2
    source = write_rows(
        tmp_path / "none.jsonl", [{"prompt": "1?", "completion": "x"}, {"prompt": "2?", "completion": "x"}]
    )
    with pytest.raises(ValueError, match=r"none.jsonl:1: no reference answer .*--problems"):
        read(source)
    problems = read_problems(write_rows(tmp_path / "problems.jsonl", [{"problem": "7?", "answer": "7"}]))
    with pytest.raises(ValueError, match="same text"):
        read(source, problems)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt": "1?", "answer": "3", "completion": "x"}, r"in.jsonl:2: `answer` is '3', but .*in.jsonl:1 has '2'"),
        ({"prompt": "1?", "completion": "x"}, "`answer` is None"),
        (
            {"prompt": "2?", "answer": ["3"], "completion": "x"},
            r"in.jsonl:2: `answer` is \['3'\]",
        ),
        ({"prompt": "2?", "answer": True, "completion": "x"}, "`answer` is True"),
        (
            {"prompt": "Do: 1?", "problem": "1?", "answer": "2", "completion": "x"},
            "in.jsonl:2: `prompt` is 'Do: 1\\?', but .*in.jsonl:1 has '1\\?' for the same problem",
        ),
    ],
)
def test_faulty_answers(tmp_path, second, message):
    rows = [{"prompt": "1?", "answer": "2", "completion": "x"}, second]
    with pytest.raises(ValueError, match=message):
        read(write_rows(tmp_path / "in.jsonl", rows))


@pytest.mark.parametrize(
    "rows",
    [
        [{"candidates": [solution(5), solution(6)], "correct": [False, True]}],
        [{"candidates": [solution(5), solution(6)], "is_correct": [0, 1]}],
        [{"candidates": [solution(5), solution(6)], "labels": [0.0, 1.0]}],
        [{"completion": solution(5), "correct": False}, {"completion": solution(6), "is_correct": 1}],
        [{"completions": ["a"], "correct": False, "labels": [True]}, {"completions": ["b"], "correct": True}],
    ],
)
@pytest.mark.parametrize("answer", [{}, {"answer": "5"}])
def test_grades_that_are_given(tmp_path, rows, answer):
    """They replace the reference answer, which may be missing. Step labels are not grades."""
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "2+3?"} | answer | row for row in rows])
    pool, counts = read(source)
    assert [[c.correct for c in p.candidates] for p in pool] == [[False, True]] and pool[0].graded
    assert counts["problems_with_given_grades"] == 1 and not counts["problems_without_answer"]
    read_back = ProblemCandidates.from_row(json.loads(json.dumps(pool[0].to_row())), pool[0].where)
    assert read_back == replace(pool[0], prompt=None, num_cut=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"candidates": ["a", "b"], "correct": [True]}, "in.jsonl:2: `correct` has 1"),
        ({"candidates": ["a", "b"], "correct": True}, "in.jsonl:2: `correct` has True"),
        ({"candidates": ["a"], "labels": [0.5]}, "in.jsonl:2: `labels` has 0.5"),
        ({"completion": "a", "correct": "yes"}, "in.jsonl:2: `correct` has 'yes', expected true or false"),
        ({"completion": "a"}, "in.jsonl:2: the candidates have no grades, but .*in.jsonl:1 has grades"),
    ],
)
def test_faulty_grades(tmp_path, row, message):
    """Reading a score as a grade would make every solution with a non-zero score right."""
    rows = [{"prompt": "q?", "completion": "x", "correct": True}, {"prompt": "q?"} | row]
    with pytest.raises(ValueError, match=message):
        read(write_rows(tmp_path / "in.jsonl", rows))


def test_renamed_columns_blank_steps_and_unused_columns(tmp_path):
    rows = [{"q": "2+3?", "gold": "5", "samples": [["a", " ", "b"], solution(5)], "image": "x.png"}]
    columns = {"prompt": "q", "answer": "gold", "candidates": "samples"}
    pool, counts = read(write_rows(tmp_path / "in.jsonl", rows), columns=columns)
    assert (pool[0].problem, pool[0].answer) == ("2+3?", "5")
    assert pool[0].candidates[0].steps == ["a", "b"]
    assert +counts == {"blank_steps_left_out": 1, "rows_with_unused_column_image": 1}


def test_an_empty_list_of_candidates_does_not_stop_the_others(tmp_path):
    """An empty list has nothing to choose from. If it counted, no N would be small enough."""
    rows = [{"prompt": f"{i}?", "answer": "1", "candidates": [solution(1)] * (i % 2)} for i in range(4)]
    pool, counts = read(write_rows(tmp_path / "in.jsonl", rows))
    assert [p.problem for p in pool] == ["1?", "3?"] and counts["problems_without_candidates"] == 2
    with pytest.raises(ValueError, match="in.jsonl:1: no candidates"):
        read(write_rows(tmp_path / "in.jsonl", rows[:1]))


def test_a_dataset(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": str(i), "completion": solution(i)} for i in range(3)]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "test.parquet")
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    for name in ("data", "saved"):
        pool, _ = read(str(tmp_path / name), split="test")
        assert [(p.answer, p.candidates[0].answer) for p in pool] == [("0", "0"), ("1", "1"), ("2", "2")]


def test_grades_that_are_all_null(tmp_path):
    """They were an error only after all candidates had been scored, with the advice to give the grader more time."""
    rows = [{"prompt": f"{i}?", "candidates": ["a", "b"], "correct": [None, None]} for i in range(2)]
    with pytest.raises(ValueError, match="in.jsonl:1: all given grades are null.*Complete"):
        read(write_rows(tmp_path / "in.jsonl", rows))
    rows[1]["correct"] = [None, False]
    assert len(read(write_rows(tmp_path / "in.jsonl", rows))[0]) == 2


def run(folder: Path, search, problems=None, settings=None, **more) -> Path:
    run_scripted(folder, search, problems or make_problems(6), **more)
    check_manifest(folder, {"prompt": asdict(PROMPT), "search": search.describe()} | (settings or {}))
    finish_shard(folder, 0, 1)
    return folder


@pytest.mark.parametrize("num_completions", [0, 2])
def test_a_run(tmp_path, num_completions):
    """Samples keep the order of their seeds, including those cut off. Without them, the policy would look too good."""
    search = Rollouts(FINAL, num_solutions=8, num_completions=num_completions, max_solution_tokens=60)
    folder = run(tmp_path / "run", search)
    pool, _ = read(str(folder))
    assert [(p.problem_id, p.answer, len(p.candidates)) for p in pool] == [(f"p{i:03d}", "7", 8) for i in range(6)]
    finishes = Counter()
    with EventLog(folder / "log-00000-of-00001.jsonl") as log:
        for problem in pool:
            opened = log.read(problem.problem_id)
            samples = [opened.tree.nodes[i] for i in opened.brought[opened.root_id, 0]]
            assert [c.text for c in problem.candidates] == [node.text for node in samples]
            assert [c.answer for c in problem.candidates] == [node.answer for node in samples]
            assert [c.num_tokens for c in problem.candidates] == [len(node.token_ids) for node in samples]
            finishes.update(c.finish for c in problem.candidates)
    assert finishes["length"] >= 2 and finishes["eos"] + finishes["stop"] > 20
    for candidate in (candidate for problem in pool for candidate in problem.candidates):
        assert candidate.steps and "".join("".join(candidate.steps).split()) == "".join(candidate.text.split())
        assert len(candidate.steps) == candidate.text.count("# Step ")
        assert candidate.answer is None or candidate.finish != "length"


def test_a_run_with_problems_and_solutions_without_an_end(tmp_path):
    """
    A solution that was cut off has no answer, as in the run, even if it states one earlier. A problem without solutions is
    skipped, because without candidates no N would be small enough.
    """

    def script(prefix: str, rng: random.Random) -> str:
        return "# Step 1\nIt is \\boxed{7}" + (", and so on" * 40 if rng.random() < 0.5 else ".\n# END!")

    problems = [(i, replace(problem, answer="?" if i == 2 else "7")) for i, problem in make_problems(6)]
    grader = ExactGrader(unreadable=("?",))
    folder = run(tmp_path / "run", SOLUTIONS, problems, script=script, grader=grader)
    pool, _ = read(str(folder))
    assert [p.problem_id for p in pool] == ["p000", "p001", "p003", "p004", "p005"]
    answers = Counter((c.finish, c.answer) for p in pool for c in p.candidates)
    assert set(answers) == {("length", None), ("stop", "7")} and min(answers.values()) > 10


LONG = Rollouts(FINAL, num_solutions=8, num_completions=0, max_solution_tokens=200)


def write_paragraphs(prefix: str, rng: random.Random) -> str:
    """Write steps of two paragraphs and an answer that no default extractor finds. Half start with thinking."""
    thought = "<think>\n# Step 1\nIs it 8?\n\n# Step 2\n</think>\n\n" if rng.random() < 0.5 else ""
    return f"{thought}# Step 1\nAdd.\n\nThat is all.\n\n# Step 2\nIt is {rng.choice((7, 8))}\n# END!"


def test_run_is_read_with_its_settings(tmp_path):
    """Extractors, prompt style and steps come from the run's manifest, unless the options override them."""
    settings = {"extractors": ["last_number"], "steps": asdict(RULES["step_header"])}
    folder = run(tmp_path / "run", LONG, settings=settings, script=write_paragraphs)
    config = CandidatesConfig(candidates=str(folder))
    used = {"segmentation": "step_header", "prompt_style": "plain", "keep_thinking": False}
    assert reading_settings(config) == {"extractors": ["last_number"], **used}
    assert reading_settings(config, ["boxed"]) == {"extractors": ["boxed"], **used}
    counts = Counter()
    pool = read_pool(config, None, None, counts)
    candidates = [candidate for problem in pool for candidate in problem.candidates]
    finished = [candidate for candidate in candidates if candidate.finish == "stop"]
    assert {candidate.answer for candidate in finished} == {"7", "8"}
    assert {tuple(candidate.steps) for candidate in finished} == {
        ("# Step 1\nAdd.\n\nThat is all.", f"# Step 2\nIt is {n}\n# END!") for n in (7, 8)
    }
    num_thinking = sum("<think>" in candidate.text for candidate in candidates)
    assert counts["candidates_with_thinking_left_out"] == num_thinking > 5
    assert {c.answer for problem in read_pool(config, ["boxed"], None, Counter()) for c in problem.candidates} == {
        None
    }


def test_run_can_be_split_again(tmp_path):
    settings = {"extractors": ["last_number"], "steps": asdict(RULES["step_header"])}
    folder = run(tmp_path / "run", LONG, settings=settings, script=write_paragraphs)
    for options, most in (({"segmentation": "blank_line"}, 3), ({"keep_thinking": True}, 4)):
        config = CandidatesConfig(candidates=str(folder), **options)
        assert reading_settings(config)["segmentation"] == options.get("segmentation", "step_header")
        counts = Counter()
        pool = read_pool(config, None, None, counts)
        for candidate in (candidate for problem in pool for candidate in problem.candidates):
            rule, kept = RULES[reading_settings(config)["segmentation"]], "keep_thinking" in options
            assert candidate.steps == cut_text(candidate.text, rule, kept)
        assert max(len(candidate.steps) for problem in pool for candidate in problem.candidates) == most
        assert (counts["candidates_with_thinking_left_out"] == 0) == ("keep_thinking" in options)
    pattern = reading_settings(CandidatesConfig(candidates=str(folder), segmentation="regex", step_pattern="x"))
    assert (pattern["segmentation"], pattern["step_pattern"]) == ("regex", "x")


def test_rows_are_read_with_the_defaults(tmp_path):
    config = CandidatesConfig(candidates=write_rows(tmp_path / "in.jsonl", [{"prompt": "q", "completion": "x"}]))
    assert reading_settings(config) == {
        "extractors": list(DEFAULT_EXTRACTORS),
        "segmentation": "step_header",
        "keep_thinking": False,
    }


def test_answers_inside_thinking_do_not_count(tmp_path):
    thought = "<think>\nIs it \\boxed{1}?\n</think>\n\n"
    texts = [thought + "\\boxed{2}", thought + "No.", "Is it \\boxed{1}?</think>No.", "<think>\\boxed{1}"]
    rows = [{"prompt": "q", "answer": "2", "candidates": texts}]
    source = write_rows(
        tmp_path / "in.jsonl", [*rows, {"prompt": "q<think>", "answer": "2", "completion": "\\boxed{1}"}]
    )
    pool, counts = read(source)
    assert [[c.answer for c in problem.candidates] for problem in pool] == [["2", None, None, None], [None]]
    assert counts["candidates_with_thinking_left_out"] == 5
    pool, counts = read(source, keep_thinking=True)
    assert [[c.answer for c in problem.candidates] for problem in pool] == [["2", "1", "1", "1"], ["1"]]
    assert not counts["candidates_with_thinking_left_out"]


def test_outputs_of_search_and_learn(tmp_path):
    row = {
        "problem": "q",
        "answer": "7",
        "completions": ["## Step 1\nA.\n\n## Step 2\n\\boxed{7}", "## Step 1\n\\boxed{1}"],
    }
    [problem], counts = read(write_rows(tmp_path / "in.jsonl", [row]))
    assert [(len(c.steps), c.answer) for c in problem.candidates] == [(2, "7"), (1, "1")]
    assert (problem.problem, problem.answer, counts["rows_of_whole_solutions"]) == ("q", "7", 1)


def test_runs_without_independent_samples(tmp_path):
    """Leaves of a tree share their beginnings, and a root filter skips problems that are always or never solved."""
    folder = run(tmp_path / "tree", SEARCHES["full_tree"])
    with pytest.raises(ValueError, match="--search full_tree.*--search rollouts"):
        read(str(folder))
    folder = run(tmp_path / "filter", RootFilter(SOLUTIONS, 3, FINAL, max_solution_tokens=60))
    with pytest.raises(ValueError, match="--root_filter"):
        read(str(folder))


def test_options_without_effect_on_a_run(tmp_path):
    folder = str(run(tmp_path / "run", SOLUTIONS))
    with pytest.raises(ValueError, match="`join_steps` is 'x'"):
        read(folder, join_steps="x")
    problems = read_problems(write_rows(tmp_path / "problems.jsonl", [{"problem": "7?", "answer": "7"}]))
    with pytest.raises(ValueError, match="Remove the problems"):
        read(folder, problems)


def test_check_sizes():
    pool = [
        ProblemCandidates(f"p{i}", "?", "1", [Candidate("x", ["a"])] * size, where=f"file:{i}")
        for i, size in enumerate((5, 3, 4))
    ]
    check_sizes(pool, 3)
    with pytest.raises(ValueError, match="file:1: problem 'p1' has 3 candidates.*--n .at most 3"):
        check_sizes(pool, 4)
    with pytest.raises(ValueError, match="`problems` is empty"):
        check_sizes([], 1)


def test_rows_of_results():
    candidate = Candidate("t", ["t"], "1", "eos", 3, True, [0.5])
    problem = ProblemCandidates("p", "q?", "1", [candidate], "here")
    row = problem.to_row()
    assert list(row) == ["problem_id", "problem", "answer", "candidates"]
    assert list(row["candidates"][0]) == ["text", "steps", "answer", "correct", "finish", "scores", "num_tokens"]
    assert ProblemCandidates.from_row(json.loads(json.dumps(row)), "here") == problem
