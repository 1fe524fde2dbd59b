r"""
BIG-Bench Mistake: find the first wrong step of a chain of thought
([Tyen et al., 2023](https://huggingface.co/papers/2311.08516)). It has five tasks, not all of them mathematical.

```json
{"input": "(1 + 2) * 3 =", "steps": ["1 + 2 = 3.", "3 * 3 = 6. So the answer is 6"], "target": "9", "answer": "6", "mistake_index": 1}
```

`mistake_index` is the index of the first wrong step, from 0, or null if no step is wrong. Each file is one task and
becomes a subset. Rows have no id, so the index of the row in the file is used.

The rows are evaluated like ProcessBench, including F1, which is a choice of this package. The paper's own metric is
`accuracy`: the share of rows where the mistake, or its absence, is predicted exactly.

Checked against the authors' description of their data: the columns, the index from 0, the null. Checked on their five
files (986 rows of `dyck_languages`, 300 of each other task): every index lies within the steps. One row of
`dyck_languages` has a blank step, which is kept because the index counts it. Few rows have no error (6 of 300 in
`logical_deduction`), so the accuracy on these rows and F1 are uncertain, as the intervals show.
"""

from dataclasses import replace

from ...data.benchmark_rows import BIG_BENCH_MISTAKE_COLUMNS, parse_big_bench_mistake
from .process_bench import PROCESS_BENCH
from .suite import as_it_is


BIG_BENCH_MISTAKE = replace(
    PROCESS_BENCH,
    name="bigbenchmistake",
    columns=BIG_BENCH_MISTAKE_COLUMNS,
    parse=parse_big_bench_mistake,
    adapt=as_it_is,
)
