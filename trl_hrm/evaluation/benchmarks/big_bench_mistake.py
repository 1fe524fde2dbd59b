r"""
BIG-Bench Mistake: find the first wrong step of a chain of thought
([Tyen et al., 2023](https://huggingface.co/papers/2311.08516)). Five tasks beyond mathematics.

```json
{"input": "(1 + 2) * 3 =", "steps": ["1 + 2 = 3.", "3 * 3 = 6. So the answer is 6"], "target": "9", "answer": "6", "mistake_index": 1}
```

`mistake_index` is the index, from 0, of the first wrong step, null if there is none. A file is a task and becomes a subset. Rows
have no id: they are counted from 0 in their file.

The rows are judged as those of ProcessBench, F1 included, which is this package's choice. The paper's own measure of finding
mistakes is `accuracy`: the share of rows whose place was found exactly, "none" being a place.

Checked against the authors' description of their data: the columns, the index from 0, the null. Checked on their five files
(986 rows of `dyck_languages`, 300 of each other): every index lies within the steps. One row of `dyck_languages` has a blank step,
which is judged as it stands, for indices count it. Few rows are free of errors (6 of 300 in `logical_deduction`), so that the
accuracy on them, and F1, are uncertain: see the intervals.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

from .process_bench import PROCESS_BENCH
from .suite import Place, Solution, as_it_is, first_error_labels, steps_of, text_of


def parse(record: dict[str, Any], place: Place, notes: Counter) -> list[Solution]:
    """The solution of one row."""
    steps = steps_of(record, "steps", place.where)
    problem = text_of(record, "input", place.where)
    labels = first_error_labels(record["mistake_index"], steps, None, "mistake_index", place)
    return [Solution(place.where, place.name, f"{place.name}-{place.row}", problem, steps, labels, origin=problem)]


BIG_BENCH_MISTAKE = replace(
    PROCESS_BENCH,
    name="bigbenchmistake",
    columns=("input", "steps", "mistake_index"),
    parse=parse,
    adapt=as_it_is,
)
