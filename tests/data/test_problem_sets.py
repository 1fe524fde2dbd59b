"""Readers of problems: the real files by exact counts, each format by hand, and what is refused."""

import json
import os

import pytest
from datasets import Dataset

from trl_hrm.data.problem_sets import read_problems
from trl_hrm.data.problems import problem_key, read_problem_keys
from trl_hrm.search.tree import Problem


GSM8K = {"question": "What is 1+2?", "answer": "1+2=<<1+2=3>>3\n#### 3"}
MATH = {"problem": "What is 1+2?", "solution": "It is $\\boxed{3}$.", "answer": "3", "unique_id": "test/sums/1.json"}
PRM800K = {"question": {"problem": "What is 1+2?", "ground_truth_answer": "3"}, "label": {"steps": []}}
PLAIN = {"problem": "What is 1+2?", "answer": "3"}


def write(file, *records) -> str:
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return str(file)


def read(tmp_path, *records, **options):
    return read_problems(write(tmp_path / "problems.jsonl", *records), **options)


def counts(found):
    return found.num_records, len(found.problems), found.num_repeated, found.num_excluded


@pytest.mark.parametrize(
    ("file", "expected", "first_answer", "last_answer"),
    [
        ("gsm8k/train.jsonl", (7473, 7473, 0, 0), "72", "50"),
        ("gsm8k/test.jsonl", (1319, 1319, 0, 0), "18", "14"),
        ("math500/test.jsonl", (500, 500, 0, 0), r"\left( 3, \frac{\pi}{2} \right)", r"106^\circ"),
        # 106 annotated solutions of 101 problems
        ("prm800k/phase1_test.jsonl", (106, 101, 5, 0), "29", "0"),
    ],
)
def test_real_files(shared_data, file, expected, first_answer, last_answer):
    """A reader that skips what it does not understand would annotate fewer problems, and nobody would see."""
    found = read_problems(str(shared_data / file))
    assert counts(found) == expected
    assert (found.problems[0].answer, found.problems[-1].answer) == (first_answer, last_answer)
    assert len({problem.problem_id for problem in found.problems}) == len(found.problems)


def test_real_answers_by_a_plain_reading(shared_data):
    """GSM8K's answers hold `####` once, and commas and signs that a pattern for digits would cut."""
    file = shared_data / "gsm8k" / "train.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    answers = [json.loads(line)["answer"].split("\n#### ")[1] for line in lines]
    assert [problem.answer for problem in read_problems(str(file)).problems] == answers
    assert any("," in answer for answer in answers) and any(answer.startswith("-") for answer in answers)


def test_real_test_problems_are_excluded(shared_data):
    """PRM800K's test problems are among those of MATH-500."""
    exclude = read_problem_keys([shared_data / "math500" / "test.jsonl"])
    with pytest.raises(ValueError, match=r"no problem is left of 106 records \(106 of them excluded\)"):
        read_problems(str(shared_data / "prm800k" / "phase1_test.jsonl"), exclude=exclude)


@pytest.mark.parametrize(
    ("format", "record"), [("gsm8k", GSM8K), ("math", MATH), ("prm800k", PRM800K), ("plain", PLAIN)]
)
def test_formats(tmp_path, format, record):
    """By name and by the keys of the first record alike. An id in the record wins over the hash of the text."""
    problem_id = record.get("unique_id", problem_key("what is  1+2?").hex())
    for name in (format, "auto"):
        assert read(tmp_path, record, format=name).problems == [Problem(problem_id, "What is 1+2?", "3")]


@pytest.mark.parametrize(
    ("record", "problem_id", "answer"),
    [
        (PLAIN | {"problem_id": "a"}, "a", "3"),
        (PLAIN | {"id": 17}, "17", "3"),
        (PLAIN | {"id": None}, problem_key(PLAIN["problem"]).hex(), "3"),
        (PLAIN | {"answer": 72}, None, "72"),
        (PLAIN | {"answer": 0}, None, "0"),
        (PLAIN | {"answer": -0.5}, None, "-0.5"),
        (PLAIN | {"answer": " x\n"}, None, "x"),
        ({"prompt": " What is 1+2?\n", "answer": "3"}, None, "3"),
        ({"question": "What is 1+2?", "answer": "3"}, None, "3"),
        # The original MATH has the answer in the solution's last box only
        ({"problem": "What is 1+2?", "solution": r"$\boxed{1}+2$ is $\boxed{\frac{6}{2}}$."}, None, r"\frac{6}{2}"),
    ],
)
def test_what_is_accepted(tmp_path, record, problem_id, answer):
    problem_id = problem_id or problem_key("What is 1+2?").hex()
    assert read(tmp_path, record).problems == [Problem(problem_id, "What is 1+2?", answer)]


@pytest.mark.parametrize("record", [GSM8K, MATH | {"unique_id": None}, PRM800K, PLAIN])
def test_the_same_problem_twice_is_counted(tmp_path, record):
    """Annotated twice, a problem would weigh twice, and its two trees would have one id."""
    again = json.loads(json.dumps(record).replace("What is", "what  is"))
    found = read(tmp_path, record, again, record)
    assert counts(found) == (3, 1, 2, 0)
    assert found.problems[0].prompt == "What is 1+2?"


def test_limit_and_exclusion_are_counted(tmp_path):
    rows = [PLAIN | {"problem": f"What is {i}+2?", "answer": i + 2} for i in (1, 1, 2, 3, 4)]
    exclude = frozenset({problem_key("what is 2+2?")})
    assert counts(read(tmp_path, *rows)) == (5, 4, 1, 0)
    assert counts(read(tmp_path, *rows, exclude=exclude)) == (5, 3, 1, 1)
    found = read(tmp_path, *rows, exclude=exclude, limit=2)
    assert counts(found) == (4, 2, 1, 1)
    assert [problem.answer for problem in found.problems] == ["3", "5"]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (PLAIN, '{"problem": "What', "the line is not valid JSON (Unterminated string"),
        (
            PLAIN,
            {"problem": "What is 1+3?"},
            "found no answer to the problem 'What is 1+3?'. The format 'plain' expects",
        ),
        (PLAIN, PLAIN | {"answer": None}, "found no answer to the problem 'What is 1+2?'"),
        (PLAIN, PLAIN | {"answer": " "}, "found no answer"),
        (PLAIN, PLAIN | {"answer": True}, "found no answer"),
        (PLAIN, PLAIN | {"answer": ["3"]}, "found no answer"),
        (PLAIN, '{"problem": "What is 1+2?", "answer": NaN}', "found no answer"),
        (PLAIN, '{"problem": "\\ud800", "answer": "3"}', "a string holds half of a surrogate pair"),
        (PLAIN, '{"problem": "What is 1+3?", "answer": "\\udc00"}', "a string holds half of a surrogate pair"),
        (PLAIN, '{"problem": "What is 1+3?", "answer": "4", "id": "\\uD800x"}', "a string holds half of a"),
        (PLAIN, {"answer": "3"}, "the problem is None, expected a non-empty string"),
        (PLAIN, PLAIN | {"problem": " "}, "the problem is ' ', expected a non-empty string"),
        (PLAIN, PLAIN | {"problem": ["q"]}, "the problem is ['q'], expected a non-empty string"),
        (PLAIN, PLAIN | {"id": ""}, "the id is '', expected a non-empty string or an integer"),
        (PLAIN, PLAIN | {"id": 1.5}, "the id is 1.5, expected a non-empty string or an integer"),
        (PLAIN, PLAIN | {"answer": "4"}, "the answer is '4', and '3' at {file}:1, where the same problem stands"),
        (PLAIN | {"id": 7}, PLAIN | {"id": "7"}, "the id '7' stands at {file}:1 too, expected one record per id"),
        (GSM8K, GSM8K | {"answer": "3"}, "found no answer to the problem 'What is 1+2?'. The format 'gsm8k' expects"),
        (GSM8K, GSM8K | {"answer": "it is 3\n#### "}, "found no answer"),
        (GSM8K, GSM8K | {"answer": None}, "found no answer"),
        (GSM8K, GSM8K | {"answer": "#### 4"}, "the answer is '4', and '3' at {file}:1"),
        (GSM8K, MATH, "the problem is None, expected a non-empty string. The format 'gsm8k' expects"),
        (MATH, MATH | {"problem": "What is 1+3?"}, "the id 'test/sums/1.json' stands at {file}:1 too"),
        (MATH, MATH | {"answer": ""}, "found no answer"),
        ({"problem": "q", "solution": "\\boxed{3}"}, {"problem": "r", "solution": "\\boxed{3"}, "found no answer"),
        (PRM800K, PRM800K | {"question": "What is 1+2?"}, "the problem is None"),
        (PRM800K, {"question": {"problem": "What is 1+2?"}}, "found no answer"),
        (PRM800K, {"question": {"problem": "What is 1+2?", "ground_truth_answer": "4"}}, "the answer is '4', and '3'"),
    ],
)
def test_faults_name_file_and_line(tmp_path, good, bad, message):
    """A problem without its answer, or with another's, gives a whole tree of false labels."""
    file = write(tmp_path / "problems.jsonl", good, "", bad)
    with pytest.raises(ValueError) as error:
        read_problems(file)
    assert str(error.value).startswith(f"{file}:3: ")
    assert message.format(file=file) in str(error.value)


@pytest.mark.parametrize(
    "record", [{"text": "What is 1+2?", "label": "3"}, {"question": "What is 1+2?"}, {"prompt": "What is 1+2?"}]
)
def test_unknown_format(tmp_path, record):
    with pytest.raises(ValueError) as error:
        read(tmp_path, record)
    assert f"problems.jsonl:1: no format has the keys {sorted(record)}. Expected plain: `problem`" in str(error.value)
    assert all(f"{name}: " in str(error.value) for name in ("gsm8k", "math", "prm800k"))


def test_options_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="format is 'gsm', expected one of auto, plain, gsm8k, math, prm800k"):
        read(tmp_path, PLAIN, format="gsm")
    with pytest.raises(ValueError, match="limit is 0, expected 1 or more"):
        read(tmp_path, PLAIN, limit=0)
    with pytest.raises(ValueError, match="this is a file, which has no configuration 'main'"):
        read(tmp_path, PLAIN, config="main")
    with pytest.raises(ValueError, match="no problem is left of 0 records"):
        read(tmp_path, "")
    with pytest.raises(FileNotFoundError, match="nothing.jsonl: there is no such file"):
        read_problems(str(tmp_path / "nothing.jsonl"))


def test_dataset(tmp_path):
    """Rewritten within the resolution of its time stamp, a directory would come out of a shared cache as it was."""
    for number in (2, 5):
        rows = [PLAIN | {"problem": f"What is {number}+{i}?", "answer": str(number + i)} for i in range(3)]
        for split, written in (("train", rows), ("test", rows[:1])):
            Dataset.from_list(written).to_parquet(tmp_path / f"{split}.parquet")
            os.utime(tmp_path / f"{split}.parquet", (1000, 1000))
            found = read_problems(str(tmp_path), split=split)
            assert [problem.answer for problem in found.problems] == [row["answer"] for row in written]
            assert counts(found) == (len(written), len(written), 0, 0)


def test_faults_of_a_dataset_name_the_row(tmp_path):
    Dataset.from_list([PLAIN, PLAIN | {"answer": None}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="^dataset row 1: found no answer to the problem 'What is 1"):
        read_problems(str(tmp_path))
