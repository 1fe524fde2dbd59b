"""The metric `grid_exact_match` for `evaluate`. Its card is tested with the cards of the other metrics."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

import trl_hrm
from trl_hrm.reasoning.evaluate import cell_accuracy, exact


FOLDER = Path(trl_hrm.__file__).parent / "metrics" / "grid_exact_match"


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    init = evaluate.loading.init_dynamic_modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.loading, "init_dynamic_modules", lambda: init(hf_modules_cache=str(folder / "modules")))
        return evaluate.load(str(FOLDER), cache_dir=str(folder), keep_in_memory=True)


def test_by_hand(metric):
    """The padding cell of the first puzzle is not counted, though the answer is different there. Sizes differ."""
    found = metric.compute(predictions=[[2, 3, 9], [2, 4], [5]], references=[[2, 3, 0], [2, 3], [5]])
    assert found == {"num_puzzles": 3, "exact_match": pytest.approx(2 / 3), "cell_accuracy": pytest.approx(5 / 6)}


def test_equals_the_functions(metric):
    rng = np.random.default_rng(0)
    answers, solutions = rng.integers(0, 3, (2, 40, 4))
    solutions[:, 0] = 1
    found = metric.compute(predictions=answers.tolist(), references=solutions.tolist())
    assert found["exact_match"] == exact(answers, solutions).mean() > 0
    assert found["cell_accuracy"] == pytest.approx(cell_accuracy(answers, solutions).mean())


def test_labels(metric):
    """With the ignored id of labels, the id 0 is a cell as any other."""
    rows = {"predictions": [[1, 0, 7]], "references": [[0, 0, -100]]}
    found = metric.compute(**rows, ignore_id=-100)
    assert (found["exact_match"], found["cell_accuracy"]) == (0, 0.5)


def test_answers_with_other_ids(metric):
    """An answer with the id -1 is wrong at a counted cell, whatever the padding id."""
    assert metric.compute(predictions=[[-1]], references=[[3]])["exact_match"] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"predictions": [[1]], "references": [[1, 2]]}, "puzzle 0: .*shape"),
        ({"predictions": [[1], [1]], "references": [[1], [0]]}, "puzzle 1: .*only padding cells"),
        ({"predictions": [[1]], "references": [[-100]]}, "puzzle 0: the solution has the id -100"),
        ({"predictions": [], "references": []}, "`predictions` is empty"),
    ],
)
def test_bad_input(metric, rows, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**rows)
