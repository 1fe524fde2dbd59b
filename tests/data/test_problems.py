"""Problems by normalised text: split, exclusion and grouping."""

import numpy as np
import pytest
from datasets import Dataset

from trl_hrm.data.problems import (
    exclusion_key,
    group_by_prompt,
    problem_key,
    problem_split,
    problem_text,
    read_problem_keys,
    unused_parts,
)


def test_letter_case_is_part_of_a_problem_and_whitespace_is_not():
    """If `$N$` and `$n$` were one problem, the second would be lost or graded with the wrong answer."""
    assert problem_key("What is\n 1+2? ") == problem_key("What is 1+2?")
    assert problem_key("Find $N + n$.") != problem_key("Find $n + N$.")
    assert problem_key("What is 1+2?") != problem_key("What is 1+3?")


def test_a_test_problem_is_excluded_in_any_letter_case():
    """Exclusion protects test sets, so it is stricter than identity."""
    assert exclusion_key("What is\n 1+2? ") == exclusion_key("what is 1+2?") != problem_key("What is 1+2?")


def test_split_is_by_problem():
    """Splitting by row would put annotations of one problem in both splits and inflate the test score."""
    texts = [f"What is {i}?" for i in range(4000)]
    splits = [problem_split(text, 0.1, 42) for text in texts]
    assert splits == [problem_split(text.upper().replace(" ", "\n "), 0.1, 42) for text in texts]
    assert 340 < splits.count("test") < 460  # 400 ± 3.2 standard deviations
    assert splits != [problem_split(text, 0.1, 43) for text in texts]
    assert {problem_split(text, 0, 42) for text in texts} == {"train"}


def test_a_larger_test_split_holds_the_smaller_one():
    texts = [f"What is {i}?" for i in range(500)]
    small = {text for text in texts if problem_split(text, 0.1, 0) == "test"}
    assert small < {text for text in texts if problem_split(text, 0.3, 0) == "test"}


def test_exclusion_files(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text(
        '{"problem": "A?"}\n{"question": "B?"}\n{"prompt": "C?"}\n{"question": {"problem": "D?"}, "label": {}}\n'
    )
    assert read_problem_keys([file]) == {exclusion_key(text) for text in ("a?", "b?", "c?", "d?")}
    assert read_problem_keys([]) == frozenset()


@pytest.mark.parametrize("line", ['{"text": "A?"}', '{"problem": ""}', '{"question": {"text": "A?"}}'])
def test_exclusion_file_without_problem(tmp_path, line):
    """A file that excludes nothing would leave the test set in the training data."""
    file = tmp_path / "test.jsonl"
    file.write_text('{"problem": "A?"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"test\.jsonl:2"):
        read_problem_keys([file])


def test_group_by_prompt():
    dataset = Dataset.from_dict({"prompt": ["a", "b", "a", "c", "b", "a"], "labels": [[1.0]] * 6})
    for rows, sizes in (group_by_prompt(dataset), group_by_prompt(dataset.with_format("numpy"))):
        assert (rows.tolist(), sizes.tolist()) == ([0, 2, 5, 1, 4, 3], [3, 2, 1])
    many = Dataset.from_dict({"prompt": [f"p{i % 7}" for i in range(2500)]})
    rows, sizes = group_by_prompt(many)
    assert [part.tolist() for part in np.split(rows, np.cumsum(sizes)[:-1])] == [
        list(range(i, 2500, 7)) for i in range(7)
    ]
    assert [part.tolist() for part in group_by_prompt(many.select([]))] == [[], []]


def test_real_test_sets(shared_data):
    """MATH500 calls its problems `problem`, GSM8K `question`. Neither repeats a problem."""
    assert len(read_problem_keys([shared_data / "math500" / "test.jsonl"])) == 500
    assert len(read_problem_keys([shared_data / "gsm8k" / "test.jsonl"])) == 1319


def test_choices_are_shown_unless_their_labels_are_in_the_problem():
    """Numbers in the problem are not a list of choices. Without the list, the answer's label would mean nothing."""
    row = {"problem": "A box holds 3 red, 4 blue and 5 green balls. How many blue ones?", "choices": ["3", "4", "5"]}
    assert problem_text(row) == row["problem"] + "\nA. 3\nB. 4\nC. 5"
    for listed in (
        "(A) 3 (B) 4 (C) 5",
        "A: 3\nB: 4\nC: 5",
        r"$\textbf{(A) } 3 \qquad \textbf{(B) } 4 \qquad \textbf{(C) } 5$",
    ):
        assert problem_text(row | {"problem": "How many? " + listed}) == "How many? " + listed


def test_the_body_of_a_question_is_named():
    row = {"Body": "Each pack costs 76.", "Question": "How much are two packs?", "Answer": "152"}
    assert unused_parts(row) == ["Body"]
