"""Report of a build: counts of records, rows, labels by value and drops by reason."""

import json
from collections import Counter
from typing import Any

from ..step_tree import StepTree
from ..terminal import one_line, plain


SOLUTION_VIEWS = ("sft", "raft")
SHOWN_VALUES = 12  # if there are more distinct labels, they are grouped into tenths


def count_row(counts: Counter, split: str, tree: StepTree, source: str | None = None) -> None:
    """
    Add one written row and its labels to `counts`. The labels of single and merged steps are counted separately. In a mixture,
    `source` is the input of the row, whose rows and labels are counted too.
    """
    counts["rows", split] += 1
    if source is not None:
        counts["sources", source, "rows", split] += 1
        counts["sources", source, "labelled_steps", split] += sum(label is not None for label in tree.labels)
    num_merged = [1] * len(tree.labels) if tree.num_merged is None else tree.num_merged
    for (label, merged), count in Counter(zip(tree.labels, num_merged, strict=True)).items():
        kind = "merged" if merged > 1 else "single"
        counts["labels", split, kind, "null" if label is None else f"{label:.2f}"] += count


def dump_counts(counts: Counter) -> str:
    """Return counts as a JSON string, which can be passed between processes."""
    return json.dumps([[*key, count] for key, count in counts.items()])


def load_counts(dumps: list[str]) -> Counter:
    """Return the sum of counts that are given as JSON strings."""
    counts = Counter()
    for dump in dumps:
        for *key, count in json.loads(dump):
            counts[tuple(key)] += count
    return counts


def nest_counts(counts: Counter) -> dict[str, Any]:
    """
    Return counts as nested dictionaries with sorted keys, as in `build_report.json`.

    Example:

    ```python
    >>> nest_counts(Counter({("records_in",): 3, ("dropped", "excluded"): 1}))
    {'dropped': {'excluded': 1}, 'records_in': 3}
    ```
    """
    nested = {}
    for key, count in sorted(counts.items()):
        inner = nested
        for name in key[:-1]:
            inner = inner.setdefault(name, {})
        inner[key[-1]] = count
    return nested


def group_values(values: dict[str, int]) -> dict[str, int]:
    """
    Return label counts by value, grouped into tenths if there are many distinct values. `null` is always counted separately.

    Example:

    ```python
    >>> group_values({f"{i / 100:.2f}": 1 for i in range(101)})["0.9 to 1.0"]
    11
    ```
    """
    if len(values) <= SHOWN_VALUES:
        return values
    grouped = Counter()
    for value, count in sorted(values.items()):
        if value != "null":
            tenth = min(round(float(value) * 100) // 10, 9)
            value = f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"
        grouped[value] += count
    return dict(grouped)


def report_lines(report: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the report as `(name, count)` pairs, in display order."""
    lines = [("records in", report["records_in"]), ("records kept", report["records_kept"])]
    lines += [(f"records dropped: {reason}", count) for reason, count in report["dropped"].items()]
    lines += [(f"rows out: {split}", count) for split, count in report["rows"].items()]
    for path, found in report.get("sources", {}).items():
        name = path if len(path) <= 50 else f"…{path[-49:]}"
        lines += [
            (f"source {name}: {key.replace('_', ' ')}", found[key])
            for key in found
            if key not in ("rows", "labelled_steps")
        ]
        for key in ("rows", "labelled_steps"):
            lines += [
                (f"source {name}: {key.replace('_', ' ')}, {split}", n) for split, n in found.get(key, {}).items()
            ]
    is_scored = report["view"] in SOLUTION_VIEWS  # a row is a solution and its label is a score
    if not is_scored:
        lines.append(("labelled steps", report["labelled_steps"]))
    for split, kinds in report["labels"].items():
        for kind, values in kinds.items():
            name = f"scores: {split}" if is_scored else f"labels: {split}, {kind}"
            lines += [(f"{name}, {value}", count) for value, count in group_values(values).items()]
    return lines + [(f"note: {note}", count) for note, count in report["notes"].items()]


class BuildReport(dict[str, Any]):
    """
    Report of what a build read, wrote and dropped, with the content of `build_report.json`. Its `str()` is a short table, followed
    by how the solutions of each run ended and by the warnings.
    """

    def __str__(self) -> str:
        lines = [(one_line(name, 100), count) for name, count in report_lines(self)]
        width = max(len(name) for name, _ in lines)
        table = [f"{name:<{width}}  {count:>12,}" for name, count in lines]
        facts = self.get("facts", {})
        outcomes = [f"{plain(name)}: {line}" for name, line in facts.get("outcomes", {}).items()]
        consensus = facts.get("consensus")
        if consensus and consensus["compared"]:
            kappa = consensus["kappa_any_error"]
            outcomes.append(
                f"consensus with {plain(consensus['judge'])}: {consensus['compared']:,} of {consensus['solutions']:,} solutions compared, "
                f"{consensus['agreed']:,} agree ({consensus['agreement']:.1%}, 95 % interval {consensus['agreement_low']:.1%} to "
                f"{consensus['agreement_high']:.1%})"
                + (f", kappa {kappa:.2f} for whether there is a wrong step" if kappa is not None else "")
            )
        return "\n".join(table + outcomes + [f"warning: {one_line(warning)}" for warning in self["warnings"]])
