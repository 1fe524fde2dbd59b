"""Fixtures for the report tests."""

import pytest

from .report_runs import FINE, STEP_ROWS, benchmark, selection, write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A hacked reward model, a good one on the same candidates, and a benchmark. No test may change them."""
    tmp_path = tmp_path_factory.mktemp("results")
    return [
        write(tmp_path / "runs" / "bon", selection()),
        write(tmp_path / "runs" / "bon-prm", selection(FINE, -0.14, -0.06, reward_model={"model": "outputs/prm"})),
        write(tmp_path / "runs" / "processbench", benchmark(), STEP_ROWS, "scores.jsonl"),
    ]
