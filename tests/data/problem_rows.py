"""One problem in several formats, and functions that write and read it."""

import json

from trl_hrm.data.problem_sets import read_problems


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
