"""The labels of the arithmetic world, computed again from the texts alone."""

import re

from trl_hrm.demo.world import MODULUS, step_trees


def labels_from_text(prompt: str, steps: list[str]) -> list[float]:
    """Right running values from the prompt; a step is right if the value it ends with is the one then due."""
    value = int(re.match(r"Start with (\d+)", prompt)[1])
    due = {}
    for name, op, operand in re.findall(r"([a-d])([-+*])(\d)", prompt):
        value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[op] % MODULUS
        due[name] = value
    labels = []
    for step in steps:
        answer = re.fullmatch(r"# Answer\n(\d+)", step)
        found = answer[1] if answer else step.split("=")[1]
        name = "d" if answer else step.removeprefix("Wait,")[0]
        labels.append(float(int(found) == due[name]))
    return labels


def test_labels():
    """A label that follows the slip instead of the value would call an uncorrected error right."""
    trees = step_trees(50, 8, seed=1)
    chains = [chain for tree in trees for chain in tree.chains()]
    for chain in chains:
        assert chain.labels == labels_from_text(chain.prompt, chain.completions)
    corrections = [
        label for c in chains for text, label in zip(c.completions, c.labels, strict=True) if "Wait" in text
    ]
    assert 0 < sum(corrections) < len(corrections)  # one that takes back a slip after another slip is not right
    assert 0.3 < sum(map(sum, (c.labels for c in chains))) / sum(len(c.labels) for c in chains) < 0.9


def test_seed():
    rows = [[tree.to_row() for tree in step_trees(10, 4, seed)] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert len({row["prompt"] for row in rows[0]}) == 10
