"""Fixtures that many tests share."""

import os
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on more


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real files: `$TRL_HRM_SHARED_DATA`, by default `shared/data` beside the repository."""
    folder = Path(os.environ.get("TRL_HRM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of real files at {folder}; set TRL_HRM_SHARED_DATA to one")
    return folder
