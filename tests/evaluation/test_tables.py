"""Tables of papers: cells, intervals, missing runs, and layouts that are refused."""

import json
from pathlib import Path

import pytest
import yaml

from trl_hrm import TableConfig, table
from trl_hrm.evaluation.results import Results, write_results
from trl_hrm.evaluation.tables import draw_table, fill_table, format_table, read_layout


POINTS = [
    {"n": 1, "accuracy": 0.5, "low": 0.4, "high": 0.6},
    {"n": 4, "accuracy": 0.75, "low": 0.65, "high": 0.83},
]
LAYOUT = {
    "title": "Best of N",
    "source": "https://example.org/paper",
    "points": [1, 4, 8],
    "series": [
        {"label": "PRM", "results": "prm", "curve": "best_of_n/min", "paper": [0.7, None, 0.9]},
        {"label": "HRM", "results": "hrm", "curve": "best_of_n/min", "paper": [0.55, 0.8, 0.9]},
    ],
}


@pytest.fixture
def runs(tmp_path):
    for name in ("hrm", "policy"):
        (tmp_path / name).mkdir()
        curves = {"hrm": {"best_of_n/min": POINTS}, "policy": {"greedy": POINTS[:1]}}[name]
        results = Results(
            strategy="best_of_n",
            reward_model={"model": "me/hrm"},
            policy={"model": "me/policy"},
            settings={},
            versions={},
            seed=1,
            date="2026-01-01T00:00:00+00:00",
            num_problems=90,
            counts={},
            n=[1, 4],
            curves=curves,
            estimate={"method": "subsets", "min_candidates": 4, "max_candidates": 4},
        )
        write_results(tmp_path / name, results)
    return tmp_path


def layout_file(folder, **changes):
    (folder / "layout.yaml").write_text(yaml.safe_dump(LAYOUT | changes), encoding="utf-8")
    return folder / "layout.yaml"


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_points_in_columns(runs):
    text = format_table(fill_table(read_layout(layout_file(runs)), runs))
    assert rows_of(text)[0] == ["", "N=1", "N=4", "N=8"]
    assert rows_of(text)[2:] == [
        ["PRM", "– (0.700)", "–", "– (0.900)"],
        ["HRM", "0.500 [0.400, 0.600] (0.550)", "0.750 [0.650, 0.830] (0.800)", "– (0.900)"],
    ]
    assert "The interval contains the paper's number in 2 of 2 cells." in text
    assert text.count("warning: ") == 1
    assert "warning: hrm has best_of_n/min at N = 1, 4 only. The other cells are empty." in text
    assert "`hrm`: policy me/policy; reward model me/hrm; 90 problems; 2026-01-01" in text
    assert f"`prm`: no results, `{runs / 'prm' / 'results.json'}` is missing" in text


def test_points_in_rows_in_percent_with_a_named_point(runs):
    series = {
        "label": ["GSM8K", "Ours"],
        "results": {"4": "hrm", "Top1": "policy"},
        "curve": {"4": "best_of_n/min", "Top1": "greedy"},
        "paper": [74.9, 50.0],
    }
    path = layout_file(
        runs, points=[4, "Top1"], points_in="rows", unit="percent", series=[series], num_problems={"GSM8K": 1319}
    )
    text = format_table(fill_table(read_layout(path), runs))
    assert rows_of(text)[0] == ["", "GSM8K / Ours"]
    assert rows_of(text)[2:] == [["N=4", "75.0 [65.0, 83.0] (74.9)"], ["Top1", "50.0 [40.0, 60.0] (50.0)"]]
    assert "warning: hrm has 90 problems, the paper 1,319." in text


def test_results_of_an_earlier_version(runs):
    """Their accuracies at a small N depend on few candidates."""
    path = runs / "hrm" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"estimate": {}}))
    text = format_table(fill_table(read_layout(layout_file(runs)), runs))
    assert "warning: hrm: An earlier version selected from the first N candidates of each problem." in text


def test_one_key_for_all_numbers(runs):
    """The paper's numbers are not rounded, although they have more decimals."""
    series = {
        "label": "Ours",
        "results": {"N": "hrm", "Top1": "policy"},
        "curve": {"N": "best_of_n/min", "Top1": "greedy"},
        "paper": [55, 74.85, 50.0],
    }
    path = layout_file(runs, points=[1, 4, "Top1"], unit="percent", series=[series])
    expected = ["Ours", "50.0 [40.0, 60.0] (55.0)", "75.0 [65.0, 83.0] (74.85)", "50.0 [40.0, 60.0] (50.0)"]
    assert rows_of(format_table(fill_table(read_layout(path), runs)))[2] == expected


def test_keys_of_points_may_be_numbers(runs):
    """YAML reads `4: hrm` as a number."""
    path = layout_file(runs, points=[4], series=[{"label": "a", "results": {4: "hrm"}, "curve": "best_of_n/min"}])
    assert fill_table(read_layout(path), runs).cells[0][0].value == 0.75


def test_a_picture_for_each_outer_heading(runs):
    series = [LAYOUT["series"][1] | {"label": [name, "HRM"]} for name in ("MATH", "GSM8K")]
    pictures = draw_table(fill_table(read_layout(layout_file(runs, series=series)), runs))
    assert [picture.title for picture in pictures] == ["Best of N (MATH)", "Best of N (GSM8K)"]
    assert "HRM: 50.0 % at N = 1, 75.0 % at N = 4; HRM, paper: 55.0 % at N = 1" in pictures[0].text


def test_logs_of_a_training(tmp_path):
    for name, values in {"small": [0.0, 900.0, 400.0], "large": [0.0, 2.0, 1.0]}.items():
        (tmp_path / name).mkdir()
        logs = [{"step": step, "epoch": 1.0, "kl": value} for step, value in enumerate(values)]
        logs.append({"step": 2, "kl": 1e6, "is_other_dataset": True})  # of another dataset than the trainer's
        state = {"global_step": 2, "log_history": [*logs, {"step": 2, "train_runtime": 1.0}]}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    series = [{"label": f"λ {name}", "results": name} for name in ("small", "large", "none")]
    path = layout_file(tmp_path, kind="training", points=["kl"], series=series)
    filled = fill_table(read_layout(path), tmp_path)
    rows = rows_of(format_table(filled))
    assert rows[2:] == [["λ small", "400 [0, 900]"], ["λ large", "1 [0, 2]"], ["λ none", "–"]]
    [picture] = draw_table(filled)
    assert picture.text == "kl over optimizer steps. λ small: 0 to 400; λ large: 0 to 1"
    by_point = [{"label": "λ", "results": {"kl": "small", "train_runtime": "large"}}]
    path = layout_file(tmp_path, kind="training", points=["kl", "train_runtime"], series=by_point)
    [logs] = fill_table(read_layout(path), tmp_path).logs
    assert logs == {"kl": [(0, 0.0), (1, 900.0), (2, 400.0)], "train_runtime": [(2, 1.0)]}
    with pytest.raises(ValueError, match="found the metrics kl, train_runtime, expected 'loss'"):
        fill_table(read_layout(layout_file(tmp_path, kind="training", points=["loss"], series=series)), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": []}, "It must have at least one point"),
        ({"points": [1, 1, 2]}, "each once"),
        ({"points": [1, 4]}, r"`series\[0\].paper` has 3 numbers, expected one for each of the 2 points"),
        ({"series": []}, "`series` is empty"),
        ({"series": [{"label": "a", "results": "hrm"}]}, r"`series\[0\].curve` is missing"),
        ({"series": [{"label": "a", "results": {"9": "hrm"}, "curve": "b"}]}, "has the points .'9'., which are not"),
        ({"series": [{"label": "a", "curve": "b"}]}, r"`series\[0\].results` is missing"),
        ({"unit": "points"}, "`unit` is 'points'"),
        ({"colour": "red"}, "`colour` is not a known key"),
        ({"num_problems": {"MATH": 5}}, r"`num_problems` has \['MATH'\], expected first labels"),
        ({"kind": "training", "num_problems": 5}, "have no effect with `kind: training`"),
        ({"kind": "training"}, r"`series\[0\].curve` has no effect"),
    ],
)
def test_layouts_that_are_refused(runs, changes, message):
    with pytest.raises(ValueError, match=f"{message}.*tables.Layout.* lists the keys"):
        read_layout(layout_file(runs, **changes))


def test_the_layout_of_the_docs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (tmp_path / "layout.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    [series] = read_layout(tmp_path / "layout.yaml").series
    assert (series.labels, series.curve) == (["Mistral", "PRM"], "best_of_n/min")


def test_a_curve_that_does_not_exist(runs):
    series = [{"label": "a", "results": "hrm", "curve": "best_of_n/last"}]
    with pytest.raises(ValueError, match="found the curves best_of_n/min, expected 'best_of_n/last'"):
        fill_table(read_layout(layout_file(runs, series=series)), runs)


def test_no_results_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="none of the 2 runs of the table has results"):
        fill_table(read_layout(layout_file(tmp_path)), tmp_path)


def test_files(runs):
    """The command replaces its own tables, and nothing else."""
    config = TableConfig(layout=str(layout_file(runs)), runs=str(runs), output=str(runs / "out" / "table.md"))
    assert table(config) == table(config)
    page = (runs / "out" / "table.md").read_text()
    assert "![Best of N](table_files/accuracy-1.png)" in page
    assert (runs / "out" / "table_files" / "accuracy-1.png").read_bytes()[:4] == b"\x89PNG"
    (runs / "notes.md").write_text("mine")
    config.output = str(runs / "notes.md")
    with pytest.raises(FileExistsError, match="is not a table of this command"):
        table(config)
    assert (runs / "notes.md").read_text() == "mine"
