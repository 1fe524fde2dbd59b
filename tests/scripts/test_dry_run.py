"""What `annotate --dry_run` says about the cost of a run: the arithmetic, and how close it comes to a real run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from trl_hrm import AnnotateConfig, annotate
from trl_hrm.search.nodes import read_totals, read_trees
from trl_hrm.search.run_folder import node_files

from ..pipeline_program import annotate_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, policy) -> tuple[AnnotateConfig, list]:
    """Config of a finished run, and its trees."""
    folder = tmp_path_factory.mktemp("run")
    config = annotate_config(policy, folder, problems=str(folder / "problems.jsonl"), output_dir=str(folder / "run"))
    annotate(config)
    trees = [tree for file in node_files(config.output_dir) for tree in read_trees(file)]
    assert len(trees) == 9
    return config, trees


def lengths_of(trees: list, num_children: int, max_depth: int) -> list[int]:
    """Return numbers of steps that give the trees' number of nodes at each depth. Solutions that were cut off are one step longer."""
    counts = [0] * (max_depth + 2)  # of the full tree's branches that go through the nodes of each depth
    for tree in trees:
        for i, node in enumerate(tree.nodes):
            counts[tree.depth(i)] += num_children ** (max_depth - tree.depth(i))
            counts[max_depth + 1] += tree.depth(i) == max_depth and not node.is_final
    ended = [counts[depth] - counts[depth + 1] for depth in range(1, max_depth + 1)] + [counts[max_depth + 1]]
    return [depth for depth, count in enumerate(ended, 1) for _ in range(count)]


def printed(config: AnnotateConfig, **options) -> str:
    return annotate(replace(config, dry_run=True, **options))


def number(text: str, pattern: str) -> float:
    return float(re.search(pattern.replace("#", r"([\d,.]+\d)"), text)[1].replace(",", ""))


def test_expected_tokens_are_the_tokens_of_a_run_with_these_lengths(run):
    """With the mean length of a step and the lengths of all branches of a run, the expected numbers are its numbers."""
    config, trees = run
    totals = read_totals(node_files(config.output_dir))
    mean = totals["num_tokens"] / totals["num_nodes"]
    text = printed(config, step_tokens=mean, solution_steps=lengths_of(trees, 3, 4), tokens_per_second=0.5)
    total = number(text, "# sampled tokens: ")
    assert total == totals["num_tokens"]
    assert number(text, "# GPU hours\\.$") == round(total / 0.5 / 3600, 2)
    assert number(text, "# samples, ") == pytest.approx(totals["num_nodes"] / 9, abs=0.06)
    # from a third of the problems, for all of them
    part = trees[::3]
    lengths, nodes = lengths_of(part, 3, 4), [node for tree in part for node in tree.nodes]
    text = printed(config, step_tokens=sum(len(node.token_ids) for node in nodes) / len(nodes), solution_steps=lengths)
    error = number(text, "labels \\([^)]*\\), # sampled tokens") / totals["num_tokens"] - 1
    print(f"estimated from 3 of 9 problems: {error:+.1%} sampled tokens")
    assert abs(error) < 0.5


def test_extrapolation_from_a_pilot(run, tmp_path):
    config, trees = run
    totals = read_totals(node_files(config.output_dir))
    rows = [{"problem": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(45)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = replace(config, problems=str(tmp_path / "more.jsonl"), output_dir=str(tmp_path / "run"))
    text = printed(more, pilot=config.output_dir, tokens_per_second=100)
    assert f"Extrapolated from 9 problems of {config.output_dir}" in text
    total = number(text, "# in total: [\\d.]+ GPU hours\\.$")
    assert total == pytest.approx(5 * totals["num_tokens"], abs=1)
    assert "warning" not in text
    summary = Path(config.output_dir, "summary-00000-of-00001.json")
    whole = summary.read_text()
    summary.write_text(whole.replace('"problems": {', '"problems": {"error": 2,'))
    text = printed(more, pilot=config.output_dir)
    assert text.endswith(f"warning: 2 problems of {config.output_dir} have failed requests and are left out.")
    summary.write_text(whole)
    with pytest.raises(ValueError, match=r"search\.num_children was 3 and is 2"):
        printed(replace(more, num_children=2), pilot=config.output_dir)
    with pytest.raises(ValueError, match="search.root_filter was None and is"):
        printed(replace(more, root_filter=4), pilot=config.output_dir)
    with pytest.raises(FileNotFoundError, match="manifest.json does not exist"):
        printed(more, pilot=str(tmp_path))
    log = Path(config.output_dir, "log-00000-of-00001.jsonl")
    whole = log.read_bytes()
    log.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="shards 0 have not finished"):
        printed(more, pilot=config.output_dir)
    log.write_bytes(whole)


def test_hours_of_the_maximum(run):
    text = printed(run[0], tokens_per_second=1000)
    assert f"in total: {9 * (3 + 9 + 27 + 81) * 40 / 1000 / 3600:.2f} GPU hours." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_second": 5.0}, "`tokens_per_second` is set, but `dry_run` is false"),
        ({"dry_run": True, "step_tokens": 5.0}, "Set the first two, or only `pilot`"),
        ({"dry_run": True, "solution_steps": [5], "pilot": "run"}, "Set the first two, or only `pilot`"),
        ({"dry_run": True, "solution_steps": [0], "step_tokens": 5.0}, "`solution_steps`"),
        ({"dry_run": True, "tokens_per_second": 0.0}, "`tokens_per_second` is 0"),
        ({"dry_run": True, "solution_steps": [5], "step_tokens": 5.0, "pilot": "run"}, "only `pilot`"),
    ],
)
def test_options_that_do_not_fit(run, options, message):
    with pytest.raises(ValueError, match=message):
        replace(run[0], **options)
