"""The notebooks run from top to bottom with the installed package alone, and what their text says is true."""

import json
from pathlib import Path
from typing import Any

import pytest


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def run_notebook(name: str, folder: Path, expressions: dict[str, str]) -> dict[str, Any]:
    """Run a notebook in a folder outside of the clone, and return the values of expressions after its last cell."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    values = ", ".join(f"{key!r}: {expression}" for key, expression in expressions.items())
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{values}}}))"))
    nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return json.loads(notebook.cells[-1].outputs[-1].text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stripped(path):
    """Outputs would differ with every run: versions, times, progress bars."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "pip install trl-hrm" in notebook.cells[0].source


@pytest.mark.slow
def test_train_and_score(tmp_path):
    found = run_notebook(
        "train_and_score.ipynb",
        tmp_path,
        {
            "first_errors": "first_errors",
            "located": "located",
            "auroc": "metrics['eval_auroc']",
            "accuracy": "list(accuracy.values())",
        },
    )
    assert found["first_errors"] == [-1, 2, 0]
    assert found["auroc"] > 0.99
    assert found["located"] > 0.95
    one, _, sixteen = found["accuracy"]
    assert sixteen > one + 0.4


@pytest.mark.slow
def test_annotate_export_inspect(tmp_path):
    found = run_notebook(
        "annotate_export_inspect.ipynb",
        tmp_path,
        {
            "pages": "len(list(Path('runs/tiny/inspect').glob('*.html')))",
            "num_rows": "len(dataset['train'])",
            "merged": "len(pairs)",
            "right": "[mean_labels[kind][True] for kind in kinds]",
            "wrong": "[mean_labels[kind][False] for kind in kinds]",
        },
    )
    assert found["pages"] == 1 and found["num_rows"] > 10 and found["merged"] > 0
    assert all(right > wrong + 0.2 for right, wrong in zip(found["right"], found["wrong"], strict=True))
    soft, hard, entropy = found["wrong"]
    assert soft < entropy < hard
