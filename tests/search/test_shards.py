"""Assign GPUs when several processes are launched on one machine."""

import os

import pytest

from trl_hrm.search.run_folder import show_own_gpu


@pytest.mark.parametrize(
    ("visible", "local", "own"),
    [(None, 0, "0"), (None, 3, "3"), ("", 1, "1"), ("4,6", 0, "4"), ("4,6", 1, "6"), ("GPU-a,GPU-b", 1, "GPU-b")],
)
def test_own_gpu(monkeypatch, visible, local, own):
    """Two processes on one GPU would run out of memory, or silently at half the speed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    show_own_gpu(local)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with pytest.raises(ValueError, match=r"'4,6'.*local rank 2.*at most 2"):
        show_own_gpu(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
