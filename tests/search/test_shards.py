"""Which GPU is whose, when several processes are launched on one machine."""

import os

import pytest

from trl_hrm.search.run_folder import show_own_gpu


@pytest.mark.parametrize(
    ("visible", "local", "own"),
    [(None, 0, "0"), (None, 3, "3"), ("", 1, "1"), ("4,6", 0, "4"), ("4,6", 1, "6"), ("GPU-a,GPU-b", 1, "GPU-b")],
)
def test_own_gpu(monkeypatch, visible, local, own):
    """Two processes on one GPU run out of memory, or at half the speed without a word."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    show_own_gpu(local)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with pytest.raises(
        ValueError, match=r"is '4,6', which has no GPU for .* local rank 2\. Launch at most 2 processes"
    ):
        show_own_gpu(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
