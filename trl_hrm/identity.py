"""Identity of checkpoints and files by content, so that a resumed run notices if a path now holds something else."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .io import read_json


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
        "*token*_map.json",
        "added_tokens.json",
        "chat_template*",
    ),
    "step_format": ("step_format.json",),
}


def digest_of_files(files: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files, as 16 hex digits. The order of the files does not matter."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        with open(path, "rb") as file:
            digest.update(f"{path.name}\n".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def checkpoint_identity(path_or_repo: str, revision: str | None = None) -> dict[str, Any]:
    """
    Return what identifies the content of a checkpoint: the commit of a Hub repository, or the digests of the files in a folder.

    Args:
        path_or_repo (`str`):
            Path or Hub id of a model, or of a PEFT adapter.
        revision (`str`, *optional*):
            Revision of the repository. It is resolved to a commit.

    Returns:
        `dict[str, Any]`: For a Hub repository, `commit`. For a folder, a hash for each of `weights`, `config`, `tokenizer` and
        `step_format` that it has. For an adapter, also `base_model`, the identity of its base model.

    Raises:
        `OSError`: If the folder or repository does not exist.
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
        found = adapter or cached_file(path_or_repo, "config.json", revision=revision)
        identity = {"commit": extract_commit_hash(found, None)}
    if adapter is not None:
        config = read_json(adapter)
        identity["base_model"] = checkpoint_identity(config["base_model_name_or_path"], config.get("revision"))
    return identity
