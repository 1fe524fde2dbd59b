"""Log tables, pages and pictures to trackio and Weights & Biases."""

import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .pages.pictures import Picture


TRACKERS = ("trackio", "wandb")


class TrackedTable(NamedTuple):
    """A table to log: names of the columns, and rows of texts, numbers and `None`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class TrackedPage(NamedTuple):
    """A self-contained HTML page to log."""

    html: str


def log_to_trackers(names: Iterable[str], values: Mapping[str, TrackedTable | TrackedPage | Picture | float]) -> None:
    """
    Log values to the current runs of trackio and Weights & Biases. Call it on one process.

    Args:
        names (`Iterable[str]`):
            Names of trackers, such as `report_to` of a trainer. Other names than `"trackio"` and `"wandb"` are skipped, and so is a
            tracker that has no current run, for example because an environment variable disables it.
        values (`Mapping[str, TrackedTable, TrackedPage, Picture or float]`):
            Values by name. Pictures are logged in the light theme.
    """
    for name in TRACKERS:
        if name not in names:
            continue
        backend = importlib.import_module(name)
        run = backend.run if name == "wandb" else backend.context_vars.current_run.get()
        if run is not None:
            backend.log({key: _converted(backend, value) for key, value in values.items()})


def _converted(backend: Any, value: Any) -> Any:
    """Return a value as an object of the backend. Both backends have the same classes."""
    if isinstance(value, TrackedTable):
        return backend.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
    if isinstance(value, TrackedPage):
        return backend.Html(value.html, inject=False)
    if isinstance(value, Picture):
        from matplotlib.image import imread

        return backend.Image(np.rint(255 * imread(io.BytesIO(value.images["light"]), "png")).astype(np.uint8))
    return value
