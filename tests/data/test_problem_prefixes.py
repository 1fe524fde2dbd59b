"""Problems with prefixes: identity, ids, and errors with file and line."""

import pytest
from datasets import Dataset

from trl_hrm.data.problem_sets import read_problems
from trl_hrm.data.problems import exclusion_key
from trl_hrm.search.tree import Problem, make_id

from .problem_rows import GSM8K, MATH, PLAIN, PRM800K, counts, read, write


ONE, TWO = "1+2=4.\n\n", "1+2=5.\n\n"


@pytest.mark.parametrize("record", [GSM8K, MATH, PRM800K, PLAIN, PLAIN | {"id": 17}])
def test_prefix_keeps_its_whitespace(tmp_path, record):
    """Every format keeps the prefix's whitespace, and adds its hash to the id, given or made from the text."""
    (problem,) = read(tmp_path, record | {"begun": ONE}, prefix_column="begun").problems
    (bare,) = read(tmp_path, record | {"begun": ONE}).problems
    assert problem == Problem(f"{bare.problem_id}-{make_id(ONE)}", "What is 1+2?", "3", ONE) and bare.prefix == ""


@pytest.mark.parametrize("record", [MATH, PLAIN])
def test_one_problem_with_two_prefixes_is_two(tmp_path, record):
    """Even with the same id, the second must not be dropped as a repetition of the first."""
    rows = [record | {"begun": prefix} for prefix in (ONE, TWO)]
    found = read(tmp_path, *rows, prefix_column="begun")
    assert counts(found) == (2, 2, 0, 0)
    assert [problem.prefix for problem in found.problems] == [ONE, TWO]
    assert len({problem.problem_id for problem in found.problems}) == 2


def test_repetitions_exclusion_and_limit(tmp_path):
    """The same problem and prefix count once, exclusion covers all prefixes, and `limit` counts each prefix."""
    rows = [PLAIN | {"begun": ONE}, PLAIN | {"begun": TWO, "problem": " What is\n1+2?"}, PLAIN | {"begun": ONE}]
    rows += [PLAIN | {"begun": ONE, "problem": "What is 2+1?"}]
    assert counts(read(tmp_path, *rows, prefix_column="begun")) == (4, 3, 1, 0)
    exclude = frozenset({exclusion_key("What is 1+2?")})
    assert counts(read(tmp_path, *rows, prefix_column="begun", exclude=exclude)) == (4, 1, 0, 3)
    assert counts(read(tmp_path, *rows, prefix_column="begun", limit=2)) == (2, 2, 0, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (PLAIN, r"'begun' is not among the keys \['answer', 'problem'\]"),
        (PLAIN | {"begun": None}, "'begun' is None"),
        (PLAIN | {"begun": " \n\n"}, r"'begun' is ' \\n\\n'. .* Fill the column, or remove"),
        (PLAIN | {"begun": ["a"]}, r"'begun' is \['a'\]"),
        (PLAIN | {"begun": "bad"}, "^{file}:3: the prefix is bad.$"),
        (
            PLAIN | {"begun": TWO, "answer": "4"},
            "the answer is '4', but {file}:1",
        ),
        (
            PLAIN | {"begun": ONE, "id": "a", "problem": "What is 2+1?"},
            "the id is 'a', but {file}:1",
        ),
    ],
)
def test_faults_name_file_and_line(tmp_path, bad, message):
    """A row without its prefix would be searched from the problem, and bias the comparison."""
    good = PLAIN | {"begun": ONE} | ({"id": "a"} if "id" in bad else {})
    file = write(tmp_path / "problems.jsonl", good, "", bad)
    faults = {"bad": "the prefix is bad."}
    with pytest.raises(ValueError, match=message.format(file=file)) as error:
        read_problems(file, prefix_column="begun", prefix_fault=faults.get, strict=True)
    assert str(error.value).startswith(f"{file}:3: ")


def test_faults_of_a_dataset_name_the_row(tmp_path):
    """A dataset has the column in every row, even if it is empty."""
    Dataset.from_list([PLAIN | {"begun": ONE}, PLAIN | {"begun": None}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=", dataset row 1: 'begun' is None"):
        read_problems(str(tmp_path), prefix_column="begun")
