"""The metrics as modules for `evaluate`: loaded by path, offline, and equal to the package's own functions."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml

import trl_hrm
from trl_hrm.evaluation.curves import plain_curves
from trl_hrm.evaluation.reward_hacking import hacking_verdict
from trl_hrm.reasoning.evaluate import cell_accuracy, exact
from trl_hrm.step_metrics import step_metrics


METRICS = Path(trl_hrm.__file__).parent / "metrics"
NAMES = ("best_of_n_accuracy", "grid_exact_match", "process_bench_f1", "reward_hacking_gap", "step_accuracy")

ALONE = """
import json, os, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")

socket.socket.connect = socket.getaddrinfo = refuse
written = []

def watch(event, args):
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or event in ("os.mkdir", "os.rename"):
        if not isinstance(args[0], int):  # else one that is open
            written.append(os.fsdecode(args[0]))

sys.addaudithook(watch)
import evaluate

pairs = {
    "step_accuracy": ([[0.9, 0.2]], [[1, 0]], {}),
    "process_bench_f1": ([[0.9, 0.2], [0.9]], [1, -1], {}),
    "grid_exact_match": ([[2, 3]], [[2, 0]], {}),
    "best_of_n_accuracy": ([[0.2, 0.9]], [[False, True]], {"texts": [["a", "b"]]}),
    "reward_hacking_gap": ([[0.2, 0.9]], [[True, False]], {"texts": [["a", "b"]]}),
}
found = {}
for name, (predictions, references, more) in pairs.items():
    metric = evaluate.load(os.path.join(sys.argv[1], name))
    found[name] = metric.compute(predictions=predictions, references=references, **more)
print(json.dumps({"found": found, "written": written, "modules": sorted(m for m in sys.modules if "evaluate_modules" in m)}))
"""


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return the metrics by name. They are loaded once, into a separate cache."""
    folder = tmp_path_factory.mktemp("evaluate")
    init = evaluate.loading.init_dynamic_modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.loading, "init_dynamic_modules", lambda: init(hf_modules_cache=str(folder / "modules")))
        # in memory, because a computation that raises keeps its lock file
        options = {"cache_dir": str(folder), "keep_in_memory": True}
        metrics = {name: evaluate.load(str(METRICS / name), **options) for name in NAMES}
    return metrics.__getitem__


def test_offline_and_nothing_outside_the_cache(tmp_path):
    """`evaluate` copies a module into its cache, where relative imports fail, and looks up unknown names on the Hub."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    before = {path: path.stat().st_mtime_ns for path in METRICS.rglob("*")}
    environment = os.environ | {
        "HF_HOME": str(home / "hub"),
        "TMPDIR": str(home),  # for torch, which `evaluate` imports
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(METRICS.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    caches = (
        "HF_METRICS_CACHE",
        "HF_MODULES_CACHE",
        "HF_EVALUATE_CACHE",
        "HF_DATASETS_CACHE",
        "TORCHINDUCTOR_CACHE_DIR",
    )
    for name in caches:
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", ALONE, str(METRICS)], capture_output=True, text=True, env=environment, cwd=here
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    found = report["found"]
    assert found["step_accuracy"]["accuracy"] == found["process_bench_f1"]["f1"] == 1
    assert found["best_of_n_accuracy"]["accuracy"] == [0.5, 1]
    assert found["grid_exact_match"]["exact_match"] == 1
    assert found["reward_hacking_gap"]["gap"] == 0.5
    assert all(any(module.endswith(name) for module in report["modules"]) for name in NAMES)  # the copies ran
    assert len(report["written"]) > 8  # otherwise nothing was watched
    assert [path for path in report["written"] if not path.startswith((str(home), "/dev/"))] == []
    assert list(here.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in METRICS.rglob("*")} == before


class TestStepAccuracy:
    def test_by_hand(self, load):
        """Two of three judged steps are on the right side of 0.5. The step without a label is not counted."""
        found = load("step_accuracy").compute(predictions=[[0.9, 0.2], [0.6, 0.7]], references=[[1, 0], [0, None]])
        assert found["num_steps"] == 3
        assert found["accuracy"] == pytest.approx(2 / 3)
        assert found["error_f1"] == pytest.approx(2 / 3)
        assert found["auroc"] == 1

    def test_equals_the_function(self, load):
        rng = np.random.default_rng(0)
        sizes = rng.integers(1, 6, 30)
        scores, labels = ([rng.random(size).tolist() for size in sizes] for _ in range(2))
        found = load("step_accuracy").compute(predictions=scores, references=labels)
        assert found == pytest.approx(step_metrics(np.concatenate(scores), np.concatenate(labels)))

    def test_bools_and_batches(self, load):
        metric = load("step_accuracy")
        metric.add_batch(predictions=[[0.9]], references=[[True]])
        metric.add_batch(predictions=[[0.9, 0.1]], references=[[False, False]])
        assert metric.compute()["accuracy"] == pytest.approx(2 / 3)

    @pytest.mark.parametrize(
        ("scores", "labels", "message"),
        [
            ([[0.9]], [[1, 0]], "solution 0: got 1 scores and 2 labels"),
            ([[1.9]], [[1]], "numbers from 0 to 1"),
            ([[math.nan]], [[1]], "numbers from 0 to 1"),
        ],
    )
    def test_bad_input(self, load, scores, labels, message):
        with pytest.raises(ValueError, match=message):
            load("step_accuracy").compute(predictions=scores, references=labels)


class TestProcessBenchF1:
    def test_by_hand(self, load):
        """One of one error found, one of two right solutions: F1 = 2 · 1 · 0.5 / 1.5."""
        metric = load("process_bench_f1")
        rows = {"predictions": [[0.9, 0.2], [0.9, 0.8], [0.1]], "references": [1, -1, -1]}
        found = metric.compute(**rows)
        assert found["f1"] == pytest.approx(2 / 3)
        assert (found["error_accuracy"], found["correct_accuracy"]) == (1, 0.5)
        assert metric.compute(**rows, threshold=0.05)["f1"] == 0

    def test_undefined_is_none(self, load):
        found = load("process_bench_f1").compute(predictions=[[0.9]], references=[-1])
        assert found["f1"] is found["error_accuracy"] is None and found["accuracy"] == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"references": [-2]}, "the first wrong step is -2.* one of 2 steps"),
            ({"references": [2]}, "the first wrong step is 2.* one of 2 steps"),
            ({"references": [None]}, "the first wrong step is None"),
            ({"predictions": [[0.9, 1.5]]}, r"solution 0: the scores are \[0.9, 1.5\]"),
            ({"predictions": [[0.9, math.nan]]}, r"solution 0: the scores are \[0.9, nan\]"),
            ({"predictions": [[0.9, None]]}, r"solution 0: the scores are \[0.9, None\]"),
            ({"predictions": [[]]}, r"solution 0: the scores are \[\]"),
            ({"predictions": [], "references": []}, "`predictions` is empty"),
            ({"threshold": math.nan}, "`threshold` is nan"),
            ({"threshold": 50}, "`threshold` is 50.* from 0 to 1"),
        ],
    )
    def test_bad_input(self, load, change, message):
        """A solution without steps would count as free of errors, and a threshold in percent would find errors everywhere."""
        with pytest.raises(ValueError, match=message):
            load("process_bench_f1").compute(**{"predictions": [[0.9, 0.9]], "references": [-1]} | change)


class TestGridExactMatch:
    def test_by_hand(self, load):
        """The padding cell of the first puzzle is not counted, though the answer is different there. Sizes differ."""
        found = load("grid_exact_match").compute(
            predictions=[[2, 3, 9], [2, 4], [5]], references=[[2, 3, 0], [2, 3], [5]]
        )
        assert found == {"num_puzzles": 3, "exact_match": pytest.approx(2 / 3), "cell_accuracy": pytest.approx(5 / 6)}

    def test_equals_the_functions(self, load):
        rng = np.random.default_rng(0)
        answers, solutions = rng.integers(0, 3, (2, 40, 4))
        solutions[:, 0] = 1
        found = load("grid_exact_match").compute(predictions=answers.tolist(), references=solutions.tolist())
        assert found["exact_match"] == exact(answers, solutions).mean() > 0
        assert found["cell_accuracy"] == pytest.approx(cell_accuracy(answers, solutions).mean())

    def test_labels(self, load):
        """With the ignored id of labels, the id 0 is a cell like any other."""
        rows = {"predictions": [[1, 0, 7]], "references": [[0, 0, -100]]}
        found = load("grid_exact_match").compute(**rows, ignore_id=-100)
        assert (found["exact_match"], found["cell_accuracy"]) == (0, 0.5)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ({"predictions": [[1]], "references": [[1, 2]]}, "puzzle 0: .*shape"),
            ({"predictions": [[1], [1]], "references": [[1], [0]]}, "puzzle 1: .*only padding cells"),
            ({"predictions": [[1]], "references": [[-100]]}, "puzzle 0: the solution has the id -100"),
            ({"predictions": [], "references": []}, "`predictions` is empty"),
        ],
    )
    def test_bad_input(self, load, rows, message):
        with pytest.raises(ValueError, match=message):
            load("grid_exact_match").compute(**rows)


class TestBestOfN:
    scores = [[0.2, 0.9, 0.5, 0.5], [0.7, 0.1, 0.8, 0.8]]
    right = [[False, True, False, False], [False, True, True, False]]
    texts = [["a", "b", "c", "d"], ["a", "b", "d", "c"]]

    def test_by_hand(self, load):
        """
        N = 1: one of four and two of four. N = 2: the first problem's right solution has the highest score of 3 of 6 pairs. The second
        problem's scores are 0.8 (wrong, smaller text), 0.8 (right), 0.7 (wrong) and 0.1 (right), and the right ones win 2 of 6 pairs. N = 3:
        3 of 4 subsets and 1 of 4. N = 4: one problem.
        """
        rows = {"predictions": self.scores, "references": self.right, "texts": self.texts}
        found = load("best_of_n_accuracy").compute(**rows, n=[1, 2, 3, 4])
        assert found["n"] == [1, 2, 3, 4]
        assert found["accuracy"] == pytest.approx(
            [(1 / 4 + 2 / 4) / 2, (3 / 6 + 2 / 6) / 2, (3 / 4 + 1 / 4) / 2, 1 / 2]
        )
        rows["predictions"] = [[1 - score for score in row] for row in self.scores]
        gap = load("reward_hacking_gap").compute(**rows, n=[1, 2, 4])
        assert (gap["gap"], gap["best_n"], gap["largest_n"]) == (pytest.approx(0), 4, 4)
        assert load("best_of_n_accuracy").compute(**rows)["n"] == [1, 2, 4]
        three = {name: [row[:3] for row in values] for name, values in rows.items()}
        assert load("best_of_n_accuracy").compute(**three)["n"] == [1, 2, 3]

    def test_nothing_to_judge(self, load):
        rows = {"predictions": [[0.5, 0.5]], "references": [[True, False]], "texts": [["a", "b"]]}
        found = load("reward_hacking_gap").compute(**rows)
        assert found == dict.fromkeys(("gap", "best_n", "loss", "from_n", "low", "high")) | {
            "largest_n": 2,
            "undecided": "in no problem do a correct and a wrong candidate have different scores, so the scores rank nothing",
            "verdict": "none",
        }

    def test_the_order_of_solutions_does_not_matter(self, load):
        backwards = [[row[::-1] for row in rows] for rows in (self.scores, self.right, self.texts)]
        metric = load("best_of_n_accuracy")
        found = [
            metric.compute(predictions=scores, references=right, texts=texts, n=[4])
            for scores, right, texts in ((self.scores, self.right, self.texts), backwards)
        ]
        assert found[0] == found[1]

    def test_equals_the_function(self, load):
        rng = np.random.default_rng(0)
        scores = rng.random((20, 8)).round(1).tolist()
        right = (rng.random((20, 8)) < 0.4).tolist()
        texts = [[f"{i} {k}" for k in rng.permutation(8)] for i in range(20)]
        rows = {"predictions": scores, "references": right, "texts": texts}
        curves = plain_curves(scores, right, texts)
        expected = [point["accuracy"] for point in curves.curves["best_of_n/score"]]
        assert load("best_of_n_accuracy").compute(**rows)["accuracy"] == expected
        found = load("reward_hacking_gap").compute(**rows)
        verdict = hacking_verdict(curves.hacking_gap["best_of_n/score"], curves.curves["best_of_n/score"])
        assert found == curves.hacking_gap["best_of_n/score"] | {"verdict": verdict.answer}
        assert len(set(expected)) > 1

    def test_missing_scores_and_missing_grades(self, load):
        found = load("best_of_n_accuracy").compute(
            predictions=[[None, 0.1], [0.9, 0.1]],
            references=[[False, True], [None, True]],
            texts=[["a", "b"], ["a", "b"]],
            n=[2],
        )
        assert found["accuracy"] == [1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n": [3]}, r"`n` is \[3\].*from 1 to 2.*problem '0'"),
            ({"n": [0]}, r"`n` is \[0\].*from 1 to 2"),
            ({"predictions": [[0.5, 1.5]]}, r"problem 0: the scores are \[0.5, 1.5\], expected numbers from 0 to 1"),
            ({"predictions": [[0.5, math.nan]]}, "problem 0: the scores are"),
            ({"texts": [["a"]]}, "problem 0: got 2 scores, 2 grades and 1 texts"),
            ({"predictions": [[]], "references": [[]], "texts": [[]]}, "problem 0: got 0 scores"),
        ],
    )
    @pytest.mark.parametrize("name", ["best_of_n_accuracy", "reward_hacking_gap"])
    def test_bad_input(self, load, name, change, message):
        rows = {"predictions": [[0.5, 0.6]], "references": [[True, False]], "texts": [["a", "b"]]} | change
        with pytest.raises(ValueError, match=message):
            load(name).compute(**rows)


@pytest.mark.parametrize("name", NAMES)
class TestCards:
    def test_what_a_space_needs(self, name):
        """The Hub reads this header, runs `app.py`, and loads the module named after the folder."""
        folder = METRICS / name
        files = {path.name for path in folder.iterdir() if path.name != "__pycache__"}
        assert files == {"README.md", "app.py", f"{name}.py", "requirements.txt"}
        header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
        assert {"evaluate", "metric"} == set(header["tags"])
        assert (
            (header["sdk"], header["app_file"]) == ("gradio", "app.py") and header["title"] and header["description"]
        )
        assert (folder / "requirements.txt").read_text().split() == ["evaluate", "trl-hrm"]
        assert f'"{name}.py"' in (folder / "app.py").read_text()

    def test_the_example_of_the_card(self, name, load):
        """An example that does not run, or that shows wrong numbers, is worse than none."""
        text = (METRICS / name / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
        call = code.split(")  # the folder of this card\n")[1]
        call, shown = call.split("# ", maxsplit=1)
        found = eval(call.strip(), {name: load(name)})
        expected = eval(shown.strip())
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, abs=0.005), key

    def test_the_example_of_the_docstring(self, name, load):
        lines = [line.strip()[4:] for line in load(name).inputs_description.splitlines() if ">>> " in line]
        expected = load(name).inputs_description.strip().splitlines()[-1].strip()
        scope = {name: load(name)}
        for line in lines[1:-1]:
            exec(line, scope)
        assert repr(eval(lines[-1], scope)) == expected
