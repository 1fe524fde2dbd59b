"""
Identity of checkpoints by content, and the comparison of a resumed run with the settings that it was started with.

A path or a branch says nothing about the content: a run that is resumed with other weights at the same path would mix two policies.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .io import read_json, shown


# Measurements that identify a model on a server, with the mean difference between hardware and batches that is accepted. Not every
# server returns them
TOLERANCES = {"prompt_logprobs": 0.1, "probe_scores": 0.02}
# Files of a checkpoint that determine its outputs, by what they determine. A checkpoint of the Trainer also has the state of the
# optimizer, which is left out.
CHECKPOINT_FILES = {
    "weights": ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "consolidated*.pth", "*.gguf"),
    "config": ("config.json", "generation_config.json", "adapter_config.json", "*.index.json", "*.py"),
    "tokenizer": (
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "*.tiktoken",
        "*.model",
        "*token*_map.json",
        "added_tokens.json",
        "chat_template*",
    ),
    "step_format": ("step_format.json",),
}


def digest_of_files(files: Iterable[Path]) -> str:
    """
    Return a hash of the contents of files, as 16 hex digits. The order of the files does not matter. The names of several files
    count, the name of a single file does not.
    """
    paths = sorted(files, key=lambda path: path.name)
    digest = hashlib.sha256()
    for path in paths:
        name = path.name if len(paths) > 1 else ""
        with open(path, "rb") as file:
            digest.update(f"{name}\n".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def checkpoint_identity(path_or_repo: str, revision: str | None = None) -> dict[str, Any]:
    """
    Return what identifies the content of a checkpoint: the commit of a Hub repository, or the digests of the files in a folder.

    Args:
        path_or_repo (`str`):
            Path or Hub id of a model, of a tokenizer, or of a PEFT adapter.
        revision (`str`, *optional*):
            Revision of the repository. It is resolved to a commit.

    Returns:
        `dict[str, Any]`: For a Hub repository, `commit`. For a folder, a hash for each of `weights`, `config`, `tokenizer` and
        `step_format` that it has. For an adapter, also `base_model`, the identity of its base model.

    Raises:
        `OSError`: If the folder or repository does not exist.
        `ValueError`: If an adapter names no base model.
    """
    from transformers.utils import cached_file, find_adapter_config_file
    from transformers.utils.hub import extract_commit_hash

    adapter = find_adapter_config_file(path_or_repo, revision=revision)
    folder = Path(path_or_repo)
    if folder.is_dir():
        files = {
            kind: {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
            for kind, patterns in CHECKPOINT_FILES.items()
        }
        identity: dict[str, Any] = {kind: digest_of_files(found) for kind, found in files.items() if found}
    else:
        found = adapter or cached_file(
            path_or_repo, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        found = found or cached_file(path_or_repo, "tokenizer_config.json", revision=revision)
        identity = {"commit": extract_commit_hash(found, None)}
    if adapter is not None:
        config = read_json(adapter)
        base = config.get("base_model_name_or_path")
        if not isinstance(base, str) or (folder.is_dir() and Path(base).is_dir() and folder.samefile(base)):
            raise ValueError(
                f"{adapter}: `base_model_name_or_path` is {shown(base)}. It must be the path or Hub id of the base model."
            )
        identity["base_model"] = checkpoint_identity(base, config.get("revision"))
    return identity


def digest_of_checkpoint_weights(path_or_repo: str, revision: str | None = None) -> str | None:
    """
    Return a hash of the weight files of a checkpoint, which is the same for a Hub repository and a copy of its files in a folder.
    `None` if the weights of a repository have not been downloaded yet.

    Raises:
        `OSError`: If the folder or repository does not exist, or a folder has no weight files.
    """
    from transformers.utils import cached_file

    folder = Path(path_or_repo)
    is_local = folder.is_dir()
    if not is_local:
        folder = Path(cached_file(path_or_repo, "config.json", revision=revision)).parent
    # A repository may have its weights in several formats, of which the Hub's cache has only the one that transformers loads
    for pattern in ("model*.safetensors", *CHECKPOINT_FILES["weights"]):
        if files := [path for path in folder.glob(pattern) if path.is_file()]:
            return digest_of_files(files)
    if is_local:
        raise FileNotFoundError(
            f"{path_or_repo}: found no weight files, such as model.safetensors. Download it again."
        )
    return None


def changed_settings(found: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """
    List the differences between the saved settings of a folder and new settings. Lists of numbers in `TOLERANCES` may differ by
    rounding, or be missing.

    Args:
        found (`dict[str, Any]`):
            JSON object with the saved settings.
        asked (`dict[str, Any]`):
            JSON object with the new settings.

    Returns:
        `list[str]`: Name and both values of each setting that differs, for an error message.

    Example:

    ```python
    >>> changed_settings({"n": 4, "search": {"max_depth": 8}}, {"n": 4, "search": {"max_depth": 9}})
    ['search.max_depth was 8 and is 9']
    ```
    """
    return [format_change(name, *values) for name, values in setting_changes(found, asked).items()]


def setting_changes(found: dict[str, Any], asked: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the value before and the value now of each setting that differs, by its dotted name. See [`changed_settings`]."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name in sorted(found.keys() | asked.keys()):
        before, now = found.get(name), asked.get(name)
        if name in TOLERANCES and (None in (before, now) or _is_close(before, now, TOLERANCES[name])):
            continue
        inner = [{} if value is None else value for value in (before, now)]
        if before != now and all(isinstance(value, dict) for value in inner):
            changes |= {f"{name}.{setting}": values for setting, values in setting_changes(*inner).items()}
        elif before != now:
            changes[name] = before, now
    return changes


def _is_close(before: Any, now: Any, tolerance: float) -> bool:
    """Return whether two lists of numbers have the same length, and a mean difference of at most `tolerance`."""
    for numbers in (before, now):
        if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
            return False
    if not before or len(before) != len(now):
        return False
    return sum(abs(one - other) for one, other in zip(before, now, strict=True)) <= tolerance * len(now) + 1e-9


def format_change(name: str, before: Any, now: Any) -> str:
    """Return the name and both values of a setting, for a message."""
    was, is_now = (json.dumps(value, ensure_ascii=False) for value in (before, now))
    was, is_now = (text if len(text) <= 80 else text[:77] + "..." for text in (was, is_now))
    return f"{name} was {was} and is {is_now}"


# Settings that do not change the results, records that grow, and names whose content is compared under another name
_FREE = {
    "accepted_changes",
    "files of the reward model",
    "identity",
    "prompt.name",
    "reward_model.batch_size",
    "reward_model.max_length",
    "source",
    "started_with",
    "versions",
}
# Settings that name a checkpoint, by the part of the identity that has its content
_NAMES = {
    "policy": ("engine.model", "engine.revision", "engine.tokenizer"),
    "judge": ("engine.model", "engine.revision", "engine.tokenizer"),
    "reward_model": ("reward_model.model", "reward_model.revision", "reward_model.step_format"),
}


class Comparison(NamedTuple):
    """
    Result of [`compare_runs`].

    Args:
        changes (`dict[str, tuple[Any, Any]]`):
            Value before and value now of each setting that differs, by its dotted name, such as `policy.weights`.
        notes (`list[str]`):
            Messages about what is not refused: a name that changed although its content is the same, and content that was not
            recorded.
        unrecorded (`list[str]`):
            Parts of the identity that the saved settings do not have.
    """

    changes: dict[str, tuple[Any, Any]]
    notes: list[str]
    unrecorded: list[str]


def compare_runs(found: dict[str, Any], asked: dict[str, Any]) -> Comparison:
    """
    Compare the saved settings of a run with new settings, by content instead of by name.

    The key `identity` of the settings has the content of each checkpoint, such as `{"policy": {"weights": ..., "tokenizer": ...}}`. If
    both have it, the paths and revisions of the checkpoint are not compared.

    Args:
        found (`dict[str, Any]`):
            JSON object with the saved settings.
        asked (`dict[str, Any]`):
            JSON object with the new settings.
    """
    before, now = found.get("identity", {}), asked.get("identity", {})
    known = before.keys() & now.keys()
    names = {name for part in known for name in _NAMES.get(part, ())}
    if asked.get("engine", {}).get("engine") == "openai":
        names.discard("engine.model")  # the name of the model on the servers, whose weights are not known
    changes = setting_changes(found, asked)
    moved = {name: changes[name] for name in sorted(changes.keys() & (names | {"prompt.name", "source"}))}
    changes = {
        name: values
        for name, values in changes.items()
        if name not in names | _FREE and name.partition(".")[0] not in _FREE
    }
    for part in sorted(known):
        changes |= setting_changes({part: before[part]}, {part: now[part]})
    for server in ("policy_server", "judge_server"):
        root, probe = (
            f"{server}.root",
            f"{server}.prompt_logprobs",
        )  # folder on the server, and a measurement of its model
        if root in changes and probe not in changes and all("prompt_logprobs" in one[server] for one in (before, now)):
            moved[root] = changes.pop(root)
    unrecorded = sorted(now.keys() - before.keys())
    changed_parts = {name.partition(".")[0] for name in changes}
    notes = [
        f"{format_change(name, *values)}. The content is the same."
        for name, values in moved.items()
        if not (changed_parts & {part for part in known if name in _NAMES.get(part, ())})
        and not (name == "prompt.name" and "prompt" in changed_parts)
        and not (name == "source" and "candidates" in changed_parts)
    ]
    if unrecorded:
        notes.append(
            f"This run was started by an older version, which did not record the content of {' and '.join(unrecorded)}. Only "
            "the name could be compared."
        )
    return Comparison(changes, notes, unrecorded)


COMMITS = ("policy.commit", "policy.tokenizer.commit", "judge.commit", "judge.tokenizer.commit", "reward_model.commit")


def describe_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    """Return the names and values of settings that changed, for an error message, and how to use an earlier commit."""
    words = "; ".join(format_change(name, *values) for name, values in changes.items())
    commits = [
        f" To use the earlier commit, pass --{name.partition('.')[0]}_revision {before}."
        for name, (before, _) in changes.items()
        if name in COMMITS and before is not None
    ]
    return f"{words}.{''.join(commits)}"
