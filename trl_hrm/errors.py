"""Errors at the border of the command line: one line for what inputs can cause, a short report for a fault of this package."""

import os
import sys
from collections.abc import Sequence

from .terminal import one_line


MAX_LENGTH = 2000  # number of characters of an error message
# Errors that inputs, libraries or the machine can cause. A class is looked up only if its module is imported
FORESEEN = (
    "builtins.ImportError",
    "builtins.OSError",
    "builtins.ValueError",
    "builtins.MemoryError",
    "builtins.RecursionError",
    "builtins.EOFError",
    "re.error",
    "subprocess.SubprocessError",
    "concurrent.futures.BrokenExecutor",
    "pickle.UnpicklingError",
    "zipfile.BadZipFile",
    "zlib.error",
    "yaml.YAMLError",
    "pyarrow.ArrowException",
    "safetensors.SafetensorError",
    "jinja2.TemplateError",
    "aiohttp.ClientError",
    "httpx.HTTPError",
    "httpx2.HTTPError",
    "datasets.exceptions.DatasetsError",
    "huggingface_hub.errors.HfHubHTTPError",
    "huggingface_hub.errors.StrictDataclassError",
    "torch.OutOfMemoryError",
    "torch.AcceleratorError",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError",
    "trl_hrm.search.engines.base.EngineError",
)


def is_foreseen(error: Exception) -> bool:
    """Return whether inputs, libraries or the machine can cause an error, so that it is not a fault of this package."""
    for name in FORESEEN:
        module, _, name = name.rpartition(".")
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], name, ())):
            return True
    return False


def is_debug(argv: Sequence[str] = ()) -> bool:
    """Return whether a command line or the environment variable `TRL_HRM_DEBUG` asks for tracebacks."""
    return "--debug" in argv or os.environ.get("TRL_HRM_DEBUG", "0") != "0"


def error_line(error: Exception, command: str, debug: str = "--debug") -> str:
    """
    Return one line about an error, without control characters.

    Args:
        error (`Exception`):
            Error that ended the command.
        command (`str`):
            Name of the command, for an error that is a fault of this package.
        debug (`str`, *optional*, defaults to `"--debug"`):
            What to add to the command to see the traceback.
    """
    generation = sys.modules.get("datasets.exceptions")
    if generation and isinstance(error, generation.DatasetGenerationError) and error.__cause__:
        error = error.__cause__  # the message of the first only says that something failed
    text = str(error)
    if not text or isinstance(error, MemoryError | KeyError):
        text = f"{type(error).__name__} {text}".strip()
    text = one_line(text, MAX_LENGTH)
    if is_foreseen(error):
        return f"error: {text}"
    return (
        f"error: `{command}` failed with {type(error).__name__}: {text}. This is a bug in trl_hrm. Run it again with {debug} for the "
        "traceback, and report it together with the output of `trl-hrm env`."
    )
