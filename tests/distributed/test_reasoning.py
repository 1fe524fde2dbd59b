"""`HRMReasoningTrainer` in one process and in two."""

import pytest
import torch
from safetensors.torch import load_file

from ..reasoning.grids import grid_model, sudoku_rows
from .launching import ROOT, Run, largest_difference, launch


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """
    Each rank carries its own slots. Rows that are drawn by rank, losses that are averaged over a batch, puzzle vectors that only move by
    the rows of one rank, or averages that differ between ranks would give other weights. The 5 evaluation rows do not fill both ranks.
    """
    model = grid_model(seed=3, num_puzzle_ids=4)  # whose puzzles halt at different times
    model.puzzle_index = {f"task{i}": i + 1 for i in range(3)}
    model.save_pretrained(tmp_path)
    for split, num, seed in (("train", 20, 0), ("test", 5, 1)):
        sudoku_rows(num, seed, puzzle_ids=3).to_json(tmp_path / f"{split}.jsonl")
    runs = {}
    for name, config, size, env in (
        ("single", None, "4", {}),
        ("double", "cpu_2proc.yaml", "2", {}),
        ("resumed", None, "4", {"PROBE_RESUME": str(tmp_path / "double" / "checkpoint-5")}),
    ):
        args = [str(tmp_path), str(tmp_path / name), size]
        launch(ROOT / "tests" / "distributed" / "reasoning_probe.py", args, tmp_path / f"{name}.log", config, **env)
        runs[name] = Run(tmp_path / name)
    facts = runs["double"].facts(rank=1)
    assert (facts["num_processes"], facts["wrapper"]) == (2, "DistributedDataParallel")
    logged = ("loss", "grad_norm", "lm_loss", "num_puzzles", "eval_exact_accuracy", "eval_cell_accuracy")
    for name in logged:
        assert runs["double"].logged(name) == pytest.approx(runs["single"].logged(name), rel=1e-4, abs=1e-6), name
    assert len(runs["single"].logged("loss")) == 10 and len(runs["single"].logged("eval_cell_accuracy")) == 2
    for name in ("double", "resumed"):  # resumed in one process, from the files of two
        assert largest_difference(runs[name].weights(), runs["single"].weights()) < 1e-5
    assert runs["single"].weights()["puzzle_emb.weight"].abs().max() > 0.05
    slots = [load_file(tmp_path / "double" / "checkpoint-10" / f"slots_{rank}.safetensors") for rank in range(2)]
    assert [one["index"].tolist() for one in slots] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    whole = load_file(tmp_path / "single" / "checkpoint-10" / "slots_0.safetensors")
    assert torch.equal(torch.cat([one["refills"] for one in slots])[[0, 1, 4, 5, 2, 3, 6, 7]], whole["refills"])
    assert len(whole["refills"].unique()) > 1
