"""Log tables, pages and pictures to trackio and Weights & Biases."""

import importlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

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
        if _has_run(backend):
            backend.log({key: _converted(backend, value) for key, value in values.items()})


def check_trackers(names: Iterable[str]) -> None:
    """Raise `ImportError` if a tracker is not installed, before any work is done."""
    for name in names:
        if find_spec(name) is None:
            raise ImportError(
                f"`report_to` has {name!r}, which is not installed. Run `pip install {name}`, or remove it."
            )


@contextmanager
def tracked_run(names: Iterable[str], project: str, run_name: str | None, config: Mapping[str, Any]) -> Iterator[None]:
    """
    Context manager that starts a run of trackio and Weights & Biases, and ends it. A run that the program has already started is used
    and stays open.

    Args:
        names (`Iterable[str]`):
            `"trackio"` and `"wandb"`.
        project (`str`):
            Name of the project.
        run_name (`str`, *optional*):
            Name of the run. By default, the tracker chooses it. A run of trackio with the same name is continued.
        config (`Mapping[str, Any]`):
            Settings to save with the run.
    """
    started = []
    try:
        for name in names:
            backend = importlib.import_module(name)
            if not _has_run(backend):
                resume = {"resume": "allow"} if name == "trackio" else {}
                backend.init(project=project, name=run_name, config=dict(config), **resume)
                started.append(backend)
        yield
    finally:
        for backend in started:
            backend.finish()


def _has_run(backend: Any) -> bool:
    """Return whether a tracker has a current run."""
    run = backend.run if backend.__name__ == "wandb" else backend.context_vars.current_run.get()
    return run is not None


def _converted(backend: Any, value: Any) -> Any:
    """Return a value as an object of the backend. Both backends have the same classes."""
    if isinstance(value, TrackedTable):
        return backend.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
    if isinstance(value, TrackedPage):
        return backend.Html(value.html, inject=False)
    if isinstance(value, Picture):
        import numpy as np
        from matplotlib.image import imread

        return backend.Image(np.rint(255 * imread(io.BytesIO(value.images["light"]), "png")).astype(np.uint8))
    return value
