"""Readers of problems: real files with exact counts, each format by hand, and errors."""

import json
import os
import random
from contextlib import contextmanager

import pytest
from datasets import Dataset

from trl_hrm.data.problem_sets import read_problems, refuse_caseless_ids
from trl_hrm.data.problems import exclusion_key, problem_key, read_problem_keys
from trl_hrm.data.problems_config import ProblemsConfig
from trl_hrm.search.tree import Problem

from .problem_rows import GSM8K, MATH, PLAIN, PRM800K, counts, read, write


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
    """A reader that skips what it does not understand would silently annotate fewer problems."""
    found = read_problems(str(shared_data / file))
    assert counts(found) == expected
    assert (found.problems[0].answer, found.problems[-1].answer) == (first_answer, last_answer)
    assert len({problem.problem_id for problem in found.problems}) == len(found.problems)


def test_answers_by_a_plain_reading(gsm8k):
    """GSM8K's answers contain `####` once, and commas and signs that a pattern for digits would cut."""
    lines = gsm8k.read_text(encoding="utf-8").split("\n")[:-1]
    answers = [json.loads(line)["answer"].split("\n#### ")[1] for line in lines]
    assert [problem.answer for problem in read_problems(str(gsm8k)).problems] == answers
    assert any("," in answer for answer in answers) and any(answer.startswith("-") for answer in answers)


def test_real_test_problems_are_excluded(shared_data):
    """PRM800K's test problems are part of MATH-500."""
    exclude = read_problem_keys([shared_data / "math500" / "test.jsonl"])
    with pytest.raises(ValueError, match=r"0 of 106 records.*106 excluded"):
        read_problems(str(shared_data / "prm800k" / "phase1_test.jsonl"), exclude=exclude)


@pytest.mark.parametrize(
    ("format", "record"), [("gsm8k", GSM8K), ("math", MATH), ("prm800k", PRM800K), ("plain", PLAIN)]
)
def test_formats(tmp_path, format, record):
    """Recognise formats by name and by the first record's keys. An id in the record replaces the text hash."""
    problem_id = record.get("unique_id", problem_key("What is  1+2?").hex())
    for name in (format, "auto"):
        assert read(tmp_path, record, format=name).problems == [Problem(problem_id, "What is 1+2?", "3")]


@pytest.mark.parametrize(
    ("record", "problem_id", "answer"),
    [
        (PLAIN | {"problem_id": "a"}, "a", "3"),
        (PLAIN | {"id": 17}, "17", "3"),
        (GSM8K | {"id": 17}, "17", "3"),
        (MATH | {"problem_id": "aime-1"}, "aime-1", "3"),
        (PLAIN | {"id": None}, problem_key(PLAIN["problem"]).hex(), "3"),
        (PLAIN | {"answer": 72}, None, "72"),
        (PLAIN | {"answer": 0}, None, "0"),
        (PLAIN | {"answer": -0.5}, None, "-0.5"),
        (PLAIN | {"answer": " x\n"}, None, "x"),
        ({"prompt": " What is 1+2?\n", "answer": "3"}, None, "3"),
        ({"question": "What is 1+2?", "answer": "3"}, None, "3"),
        # The original MATH has the answer only in the solution's last box
        ({"problem": "What is 1+2?", "solution": r"$\boxed{1}+2$ is $\boxed{\frac{6}{2}}$."}, None, r"\frac{6}{2}"),
        ({"problem": "What is 1+2?", "solution": "See the figure.", "final_answer": "3"}, None, "3"),
        ({"problem": "What is 1+2?", "unique_id": "u", "expected_answer": "3"}, "u", "3"),
        ({"problem": "What is 1+2?", "solution": r"It is $\boxed{3}$.", "answer": None}, None, "3"),
        ({"problem": "What is 1+2?", "solution": r"It is $\boxed{3}$.", "answer": ""}, None, "3"),
        ({"question": "What is 1+2?", "solution": r"It is $\boxed{3}$.", "answer": " "}, None, "3"),
        ({"Problem": "What is 1+2?", "Answer": 3, "ID": "2024-I-1"}, "2024-I-1", "3"),
        ({"question": "What is 1+2?", "final_answer": ["3"]}, None, "3"),
        ({"question": "What is 1+2?", "final_answer": ["3", "$3$"]}, None, "3"),
        ({"question": "What is 1+2?", "ground_truth": "#### 3"}, None, "3"),
        ({"prompt": [{"role": "user", "content": "What is 1+2?"}], "answer": "3"}, None, "3"),
        (
            {"prompt": [{"role": "user", "content": "What is 1+2?"}], "reward_model": {"ground_truth": "3"}},
            None,
            "3",
        ),
        (
            {"question": [{"role": "user", "content": [{"type": "text", "text": "What is 1+2?"}]}], "answer": 3},
            None,
            "3",
        ),
    ],
)
def test_accepted_records(tmp_path, record, problem_id, answer):
    problem_id = problem_id or problem_key("What is 1+2?").hex()
    assert read(tmp_path, record).problems == [Problem(problem_id, "What is 1+2?", answer)]


@pytest.mark.parametrize("record", [GSM8K, MATH | {"unique_id": None}, PRM800K, PLAIN])
def test_the_same_problem_twice_is_counted(tmp_path, record):
    """A problem annotated twice would count twice, and its two trees would share one id."""
    again = json.loads(json.dumps(record).replace("What is", "What  is"))
    found = read(tmp_path, record, again, record)
    assert counts(found) == (3, 1, 2, 0)
    assert found.problems[0].prompt == "What is 1+2?"


def test_limit_and_exclusion_are_counted(tmp_path):
    rows = [PLAIN | {"problem": f"What is {i}+2?", "answer": i + 2} for i in (1, 1, 2, 3, 4)]
    exclude = frozenset({exclusion_key("what is 2+2?")})
    assert counts(read(tmp_path, *rows)) == (5, 4, 1, 0)
    assert counts(read(tmp_path, *rows, exclude=exclude)) == (5, 3, 1, 1)
    found = read(tmp_path, *rows, exclude=exclude, limit=2)
    assert counts(found) == (4, 2, 1, 1)
    assert [problem.answer for problem in found.problems] == ["3", "5"]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (
            PLAIN,
            {"problem": "What is 1+3?"},
            "no answer to the problem 'What is 1+3?'",
        ),
        (PLAIN, PLAIN | {"answer": None}, "no answer to the problem 'What is 1+2?'"),
        (PLAIN, PLAIN | {"answer": " "}, "found no answer"),
        (PLAIN, PLAIN | {"answer": True}, "found no answer"),
        (PLAIN, PLAIN | {"answer": "proof"}, "found no answer"),
        (PLAIN, PLAIN | {"answer": "N/A"}, "found no answer"),
        (PLAIN, PLAIN | {"answer": []}, "found no answer"),
        (PLAIN, PLAIN | {"answer": {"value": "3"}}, "found no answer"),
        (PLAIN, PLAIN | {"answer": ["3", "4"]}, "the answers '3', '4'"),
        (PLAIN, '{"problem": "What is 1+2?", "answer": NaN}', "found no answer"),
        (PLAIN, {"answer": "3"}, "the problem is None"),
        (PLAIN, PLAIN | {"problem": " "}, "the problem is ' '"),
        (PLAIN, PLAIN | {"problem": ["q"]}, "the problem is ['q']"),
        (PLAIN, PLAIN | {"id": ""}, "the id is ''"),
        (PLAIN, PLAIN | {"id": 1.5}, "the id is 1.5, expected a non-empty string or an integer"),
        (PLAIN, PLAIN | {"answer": "4"}, "the answer is '4', but {file}:1"),
        (
            PLAIN | {"id": 7},
            PLAIN | {"problem": "What is 1+3?", "id": "7"},
            "the id is '7', but {file}:1",
        ),
        (GSM8K, GSM8K | {"answer": "3"}, "The format 'gsm8k'"),
        (GSM8K, GSM8K | {"answer": "it is 3\n#### "}, "found no answer"),
        (GSM8K, GSM8K | {"answer": None}, "found no answer"),
        (GSM8K, GSM8K | {"answer": "#### 4"}, "the answer is '4', but {file}:1"),
        (GSM8K, MATH, "the problem is None"),
        (MATH, MATH | {"problem": "What is 1+3?"}, "the id is 'test/sums/1.json', but {file}:1"),
        (MATH, MATH | {"answer": "", "solution": ""}, "found no answer"),
        (MATH, MATH | {"answer": "proof"}, "found no answer"),
        ({"problem": "q", "solution": "\\boxed{3}"}, {"problem": "r", "solution": "\\boxed{3"}, "found no answer"),
        (PRM800K, PRM800K | {"question": "What is 1+2?"}, "the problem is None"),
        (PRM800K, {"question": {"problem": "What is 1+2?"}}, "found no answer"),
        (PRM800K, {"question": {"problem": "What is 1+2?", "ground_truth_answer": "4"}}, "the answer is '4', but"),
    ],
)
def test_faults_name_file_and_line(tmp_path, good, bad, message):
    """A problem with a missing or wrong answer gives a tree of wrong labels. `strict` raises at the first."""
    file = write(tmp_path / "problems.jsonl", good, "", bad)
    with pytest.raises(ValueError) as error:
        read_problems(file, strict=True)
    assert str(error.value).startswith(f"{file}:3: ")
    assert message.format(file=file) in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "What', "invalid JSON (Unterminated string"),
        ('{"problem": "\\ud800", "answer": "3"}', "a string has half of a surrogate pair"),
        ('{"problem": "What is 1+3?", "answer": "\\udc00"}', "a string has half of a surrogate pair"),
        ('{"problem": "What is 1+3?", "answer": "4", "id": "\\uD800x"}', "a string has half of a"),
    ],
)
def test_damaged_file_raises(tmp_path, line, message):
    """In a damaged file, more rows than one may be missing."""
    file = write(tmp_path / "problems.jsonl", PLAIN, "", line)
    with pytest.raises(ValueError) as error:
        read_problems(file)
    assert str(error.value).startswith(f"{file}:3: ") and message in str(error.value)


BAD = {
    "no_answer": [{"problem": "What is 1+4?"}, PLAIN | {"problem": "What is 1+5?", "answer": None}],
    "no_problem": [{"answer": "3"}, PLAIN | {"problem": " \n"}],
    "several_answers": [PLAIN | {"problem": "What is 1+6?", "answer": ["7", "8"]}],
    "bad_id": [PLAIN | {"problem": "What is 1+7?", "id": 1.5}],
    "answer_not_among_choices": [PLAIN | {"problem": "Which is 1+8?", "choices": ["8", "10"]}],
}


@pytest.mark.parametrize("first", [True, False])
def test_rows_with_faults_are_left_out_counted_and_named_all_at_once(tmp_path, first):
    """One bad row among thousands, even the first, must not stop the others, and must be reported."""
    bad = [row for rows in BAD.values() for row in rows]
    rows = [*bad, PLAIN] if first else [PLAIN, *bad]
    file = write(tmp_path / "problems.jsonl", *rows)
    found = read_problems(file)
    assert [problem.prompt for problem in found.problems] == ["What is 1+2?"]
    assert {reason: len(places) for reason, places in found.faults.left_out.items()} == {
        reason: len(rows) for reason, rows in BAD.items()
    }
    assert found.num_records == len(rows) == 1 + found.faults.num_left_out
    start = 1 if first else 2
    assert found.faults.left_out["no_answer"] == [f"{file}:{start}", f"{file}:{start + 1}"]
    assert f"warning: 2 rows dropped (no answer): {file}:{start}, {file}:{start + 1}" in found.describe()
    assert "8 records: 1 problems, 0 repeated, 0 excluded, 7 dropped." in found.describe()
    with pytest.raises(ValueError, match="problems.jsonl:"):
        read_problems(file, strict=True)


def test_problem_with_two_answers_is_dropped(tmp_path):
    """It is unknown which answer is right, so keeping the first would be a guess."""
    other = PLAIN | {"problem": "What is 2+2?", "answer": "4"}
    rows = [PLAIN, PLAIN, other, PLAIN | {"answer": "4"}, PLAIN, other | {"answer": " $4.0$"}]
    found = read(tmp_path, *rows)
    assert [problem.prompt for problem in found.problems] == ["What is 2+2?"]
    assert counts(found) == (6, 1, 1, 0) and found.faults.num_left_out == 4
    assert set(found.faults.left_out) == {"several_answers"}


def test_two_problems_with_one_id_get_two_ids(tmp_path):
    """Both are problems of the benchmark. With one id, their trees would be merged."""
    rows = [PLAIN | {"id": 7}, PLAIN | {"id": 7, "problem": "What is 1+3?", "answer": "4"}, PLAIN | {"id": 7}]
    found = read(tmp_path, *rows)
    key = problem_key("What is 1+3?").hex()
    assert [(one.problem_id, one.answer) for one in found.problems] == [("7", "3"), (f"7-{key}", "4")]
    assert counts(found) == (3, 2, 1, 0)
    assert found.faults.kept == {"repeated_id": [f"{tmp_path / 'problems.jsonl'}:2"]}
    assert "1 row kept (repeated id)" in found.describe()


def test_letter_case_makes_two_problems(tmp_path):
    """`$N$` and `$n$` are different variables. As one problem, they would have two answers."""
    rows = [PLAIN | {"problem": f"Find ${name}$ of $N + 2n$.", "answer": name} for name in "Nn"]
    found = read(tmp_path, *rows)
    assert [problem.answer for problem in found.problems] == ["N", "n"]
    assert len({problem.problem_id for problem in found.problems}) == 2 and not found.faults.left_out


def test_a_run_with_caseless_ids_is_not_resumed(tmp_path):
    """All its problems would be searched again with other ids, and an export would have both trees."""
    problem = read(tmp_path, PLAIN).problems[0]
    earlier = exclusion_key(problem.prompt).hex()
    refuse_caseless_ids([problem], {problem.problem_id, "other"}, "log")
    refuse_caseless_ids([problem], {}, "log")
    refuse_caseless_ids([Problem("17", problem.prompt, "3")], {earlier}, "log")
    with pytest.raises(ValueError, match=f"^log: .*{earlier}"):
        refuse_caseless_ids([problem], {earlier}, "log")
    prefixed = Problem(f"{problem.problem_id}-abc", problem.prompt, "3", "x")
    with pytest.raises(ValueError, match=f"{earlier}-abc"):
        refuse_caseless_ids([prefixed], {f"{earlier}-abc"}, "log")


@pytest.mark.parametrize(
    ("choices", "answer", "text", "expected"),
    [
        (["5", "3"], "B", "A. 5\nB. 3", "B"),
        (["5", "3"], "(B)", "A. 5\nB. 3", "B"),
        (["5", "3"], "3", "A. 5\nB. 3", "B"),
        (["five", "three"], 1, "A. five\nB. three", "B"),
        (["A) 5", "B) 3"], "B", "A. 5\nB. 3", "B"),
        ({"A": "5", "B": "3"}, "B", "A. 5\nB. 3", "B"),
        ({"label": ["1", "2"], "text": ["five", "three"]}, "2", "1. five\n2. three", "2"),
    ],
)
def test_choices_are_part_of_the_problem(tmp_path, choices, answer, text, expected):
    """Without its choices, a multiple-choice problem cannot be solved, and every answer would be wrong."""
    found = read(tmp_path, {"question": "What is 1+2?", "choices": choices, "answer": answer})
    assert found.problems == [Problem(problem_key(f"What is 1+2?\n{text}").hex(), f"What is 1+2?\n{text}", expected)]
    assert not found.unused


def test_choices_that_the_problem_has_already(tmp_path):
    row = {"question": "Which is 1+2? (A) 5 (B) 3", "options": ["5", "3"], "answer": "B"}
    assert read(tmp_path, row).problems[0].prompt == row["question"]


def test_index_that_is_also_a_choice_is_ambiguous(tmp_path):
    """As a 0-based index, 1 means the choice 2. As text, it means the choice 1."""
    found = read(tmp_path, PLAIN, {"problem": "Which?", "choices": ["1", "2"], "answer": 1})
    assert set(found.faults.left_out) == {"answer_not_among_choices"}


def test_columns_that_carry_part_of_a_problem_are_named(tmp_path):
    """The user must learn what the policy does not see. Otherwise its wrong answers would be our fault."""
    row = PLAIN | {"image": "a.png", "context": "Tom has a pen.", "hints": [], "source": "x", "options": "A or B"}
    found = read(
        tmp_path,
        row,
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]} | {"answer": 1},
    )
    assert found.unused == {"image": 1, "context": 1, "options": 1, "prompt (message of role system)": 1}
    assert "warning: 1 row has a column `image`" in found.describe()


def test_columns_under_other_names(tmp_path):
    rows = [{"Q": {"text": f"What is {i}+2?"}, "gold": [i + 2], "answer": "a long text"} for i in range(3)]
    file = write(tmp_path / "problems.jsonl", *rows)
    columns = {"problem": "Q.text", "answer": "gold.0"}
    found = read_problems(file, columns=columns)
    assert [(one.prompt, one.answer) for one in found.problems] == [(f"What is {i}+2?", str(i + 2)) for i in range(3)]
    with pytest.raises(ValueError, match=r"problems.jsonl:1: .*Gold.*Q.text, gold, answer\.$"):
        read_problems(file, columns={"answer": "Gold"})
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    assert read_problems(str(tmp_path / "data"), columns=columns).problems == found.problems


VERL = {
    "prompt": [{"role": "user", "content": "What is 3 + 4?"}],
    "reward_model": {"style": "rule", "ground_truth": "7"},
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("aime.jsonl", json.dumps({"Problem": "What is 3 + 4?", "Answer": 7})),
        ("olympiad_bench.jsonl", json.dumps({"question": "What is 3 + 4?", "final_answer": ["7"]})),
        ("openr.json", json.dumps([{"problem": "What is 3 + 4?", "final_answer": "7"}], indent=1)),
        ("verl.jsonl", json.dumps(VERL)),
    ],
)
def test_formats_of_the_field(tmp_path, name, text):
    found = read_problems(write(tmp_path / name, text))
    assert [(one.prompt, one.answer) for one in found.problems] == [("What is 3 + 4?", "7")]
    assert not found.faults.left_out and found.num_records == 1


@pytest.mark.parametrize("prm800k", ["prm800k"], indirect=True)
def test_solutions_of_prm800k_are_problems_once(prm800k):
    """The 21 solutions belong to 17 problems. One has no answer, and the others must be read."""
    found = read_problems(str(prm800k))
    assert counts(found) == (21, 16, 4, 0)
    assert (found.problems[0].answer, found.problems[-1].answer) == ("4", "52")
    assert found.faults.left_out == {"no_answer": [f"{prm800k}:18"]}
    with pytest.raises(ValueError, match="prm800k.jsonl:18: found no answer"):
        read_problems(str(prm800k), strict=True)


@pytest.mark.parametrize("seed", range(5))
def test_rows_in_are_rows_out_and_rows_left_out(tmp_path, seed):
    """For any mix of rows, no row may be lost or counted twice."""
    rng = random.Random(seed)
    bad = [row for rows in BAD.values() for row in rows]
    rows = []
    for _ in range(200):
        number = rng.randrange(40)
        good = PLAIN | {"problem": f"What is {number}+2?", "answer": number + 2 + (number < 5 and rng.randrange(2))}
        good |= {"id": rng.randrange(60)} if rng.random() < 0.5 else {}
        rows.append(rng.choice(bad) if rng.random() < 0.2 else good)
    exclude = frozenset(exclusion_key(f"What is {number}+2?") for number in (7, 8))
    found = read(tmp_path, *rows, exclude=exclude)
    assert found.num_records == 200
    assert 200 == len(found.problems) + found.num_repeated + found.num_excluded + found.faults.num_left_out
    assert (
        len({one.problem_id for one in found.problems})
        == len({one.prompt for one in found.problems})
        == len(found.problems)
    )
    assert found.num_excluded > 0 and found.num_repeated > 0 and found.faults.kept["repeated_id"]


@pytest.mark.parametrize(
    "record", [{"text": "What is 1+2?", "label": "3"}, {"question": "What is 1+2?"}, {"prompt": "What is 1+2?"}]
)
def test_unknown_format(tmp_path, record):
    with pytest.raises(ValueError) as error:
        read(tmp_path, record)
    assert f"problems.jsonl:1: the keys {sorted(record)} match no format. Expected plain: `problem`" in str(
        error.value
    )
    assert "0 of 1 records were kept (0 excluded, 1 dropped)" in str(error.value)
    assert all(f"{name}: " in str(error.value) for name in ("gsm8k", "math", "prm800k"))


def test_options_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="`format` is 'gsm'.*auto, plain, gsm8k, math, prm800k"):
        read(tmp_path, PLAIN, format="gsm")
    with pytest.raises(ValueError, match="`limit` is 0"):
        read(tmp_path, PLAIN, limit=0)
    with pytest.raises(ValueError, match="`problems_config` is 'main', but .* is a file"):
        read(tmp_path, PLAIN, config="main")
    with pytest.raises(ValueError, match="no records found"):
        read(tmp_path, "")
    with pytest.raises(FileNotFoundError, match="nothing.jsonl: file not found"):
        read_problems(str(tmp_path / "nothing.jsonl"))


def test_dataset(tmp_path):
    """If a directory were rewritten within one clock tick, a shared cache would return its old content."""
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
    assert read_problems(str(tmp_path)).faults.left_out == {"no_answer": [f"{tmp_path}, dataset row 1"]}
    with pytest.raises(ValueError, match=", dataset row 1: .*'What is 1"):
        read_problems(str(tmp_path), strict=True)


class TestWhere:
    """`where` keeps the records with a value. What it filters must be visible, and a wrong name or value must be an error."""

    def test_problems_of_the_paper(self, shared_data):
        """The 90 test problems of HRM Tables 3 to 5: 106 solutions of 101 problems, 16 of which were given up, for 11 problems."""
        file = str(shared_data / "prm800k" / "phase1_test.jsonl")
        found = read_problems(file, where={"label.finish_reason": "solution"})
        assert (found.num_records, found.num_filtered, len(found.problems), found.num_repeated) == (106, 16, 90, 0)
        rows = [json.loads(line) for line in open(file, encoding="utf-8")]
        kept = [row["question"]["problem"] for row in rows if row["label"]["finish_reason"] == "solution"]
        assert [problem.prompt for problem in found.problems] == [text.strip() for text in kept]
        assert found.describe().splitlines()[0] == (
            "106 records: 90 problems, 0 repeated, 0 excluded, 0 dropped, 16 without label.finish_reason=solution."
        )

    @pytest.mark.parametrize(
        ("value", "expected", "is_kept"),
        [
            ("a", "a", True),
            ("a", "A", False),
            ("5", "5", True),
            (5, "5", True),
            (5, "5.0", True),
            (5, "6", False),
            (0.5, "0.5", True),
            (True, "true", True),
            (True, "True", False),
            (True, "1", False),
            (1, "true", False),
            (None, "null", True),
            (["a", 1], '["a", 1]', True),
        ],
    )
    def test_values(self, tmp_path, value, expected, is_kept):
        rows = [PLAIN | {"info": {"x": value}}, PLAIN | {"problem": "Other?", "info": {"x": expected + "!"}}]
        if is_kept:
            found = read(tmp_path, *rows, where={"info.x": expected})
            assert [one.prompt for one in found.problems] == ["What is 1+2?"] and found.num_filtered == 1
        else:
            with pytest.raises(ValueError, match="none of the 2 records has info.x="):
                read(tmp_path, *rows, where={"info.x": expected})

    def test_several_columns(self, tmp_path):
        """All of them must have their value."""
        rows = [PLAIN | {"problem": f"{a}{b}?", "a": a, "b": b} for a in (1, 2) for b in (1, 2)]
        found = read(tmp_path, *rows, where={"a": "1", "b": "2"})
        assert [one.prompt for one in found.problems] == ["12?"] and found.num_filtered == 3
        assert "3 without a=1 b=2." in found.describe()

    def test_renamed_columns(self, tmp_path):
        """A column can be named as in the file or as in `columns`."""
        rows = [{"Question": f"{i}?", "Gold": i, "Level": {"n": i}} for i in range(3)]
        columns = {"problem": "Question", "answer": "Gold", "level": "Level.n"}
        for where in ({"Gold": "1"}, {"answer": "1"}, {"level": "1"}, {"Level.n": "1"}):
            assert [one.prompt for one in read(tmp_path, *rows, columns=columns, where=where).problems] == ["1?"]

    def test_columns_below_a_renamed_one(self, tmp_path):
        rows = [{"Task": {"problem": f"{i}?", "kind": "ab"[i % 2]}, "gold": str(i)} for i in range(4)]
        columns = {"extra": "Task", "problem": "Task.problem", "answer": "gold"}
        found = read(tmp_path, *rows, columns=columns, where={"Task.kind": "a"})
        assert [one.prompt for one in found.problems] == ["0?", "2?"]

    def test_invalid_records(self, tmp_path):
        """An invalid record with the value is reported, one without it is not needed."""
        rows = [
            PLAIN | {"kind": "a"},
            {"problem": "No answer?", "kind": "a"},
            {"problem": "Nor here?", "kind": "b"},
            PLAIN,
        ]
        found = read(tmp_path, *rows, where={"kind": "a"})
        assert (found.num_filtered, found.num_incomplete, found.faults.num_left_out) == (2, 1, 1)
        assert found.faults.left_out == {"no_answer": [f"{tmp_path / 'problems.jsonl'}:2"]}
        assert "1 of the 2 records without kind=a do not have this column" in found.describe()
        with pytest.raises(ValueError, match="problems.jsonl:2: "):
            read(tmp_path, *rows, where={"kind": "a"}, strict=True)

    def test_errors(self, tmp_path):
        rows = [PLAIN | {"kind": kind, "label": {"end": "x"}} for kind in "abcdefg"]
        with pytest.raises(ValueError, match="--where names knd, but none of the 7 .* only has .*kind, label.end"):
            read(tmp_path, *rows, where={"knd": "a"})
        with pytest.raises(
            ValueError, match="none of the 7 records has kind=z, but the first values of kind are 'a', 'b', 'c'"
        ):
            read(tmp_path, *rows, where={"kind": "z"})

    def test_config(self, tmp_path):
        """Words, a dictionary and the values of YAML mean the same."""
        rows = [PLAIN | {"problem": f"{i}?", "level": i, "ok": i == 1} for i in range(3)]
        file = write(tmp_path / "problems.jsonl", *rows)
        for where in (["level=1", "ok=true"], {"level": 1, "ok": True}, {"level": "1", "ok": "true"}):
            config = ProblemsConfig(problems=file, where=where)
            assert config.where == {"level": "1", "ok": "true"}
            assert [one.prompt for one in config.read_problems().problems] == ["1?"]
        with pytest.raises(ValueError, match="--where: found 'level', expected NAME=VALUE"):
            ProblemsConfig(problems=file, where=["level"])


class TestNamedSets:
    @pytest.fixture
    def asked(self, monkeypatch) -> list:
        """What the reader would load from the Hub."""
        asked = []

        @contextmanager
        def loaded(name, split=None, config=None):
            asked.append((name, config, split))
            yield Dataset.from_list([PLAIN])

        monkeypatch.setattr("trl_hrm.data.problem_sets.loaded_dataset", loaded)
        return asked

    def test_datasets(self, asked):
        ProblemsConfig(problems="math500").read_problems()
        ProblemsConfig(problems="gsm8k").read_problems()
        ProblemsConfig(problems="gsm8k", split="train").read_problems()
        ProblemsConfig(problems="me/problems", problems_config="hard").read_problems()
        assert asked == [
            ("HuggingFaceH4/MATH-500", None, "test"),
            ("openai/gsm8k", "main", "test"),
            ("openai/gsm8k", "main", "train"),
            ("me/problems", "hard", "train"),
        ]

    def test_a_folder_takes_precedence(self, asked, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "math500", PLAIN)
        assert len(read_problems("math500").problems) == 1 and asked == []
        (tmp_path / "gsm8k").mkdir()
        read_problems("gsm8k")
        assert asked == [("gsm8k", None, "train")]
