"""What a run was started with: one file that every shard and every restart must agree with."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..io import write_json
from .prompts import OLD_DEFAULTS, Prompt, started_prompt


MANIFEST = "manifest.json"


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """
    Write the manifest of a new run, or compare it with the one that is there.

    `versions` and `started_with` may differ: an upgraded library does not make another search of it, a run may be
    given more problems, and an engine less memory.

    Raises:
        `ValueError`: If the run in `folder` was started otherwise. The message names what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.exists():
        fresh = path.with_name(f".{MANIFEST}.{os.getpid()}")
        write_json(fresh, manifest)
        try:
            os.link(fresh, path)  # of several shards that start at once, the first one wins
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    found = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(manifest))
    for values in (found, asked):
        if "prompt" in values:
            values["prompt"] = started_prompt(values)
    changed = [
        f"{name} was {_shown(found, name)} and is {_shown(asked, name)}"
        for name in sorted(_names(found) | _names(asked))
        if name.split(".")[0] not in ("versions", "started_with") and _lookup(found, name) != _lookup(asked, name)
    ]
    if changed:
        raise ValueError(
            f"{path}: this run was started with other settings: {'; '.join(changed)}. Start with the same settings to go "
            "on, or in another --output_dir."
        )


def resumed_prompt(prompt: Prompt, *folders: Path) -> Prompt:
    """
    Return the prompt with which a run can be resumed that was started before manifests had all of its options.

    Args:
        prompt ([`Prompt`]):
            The prompt of a new run.
        folders (`Path`):
            Folders of the run. Those without a manifest are new.
    """
    defaults = {name: value for name, value in OLD_DEFAULTS.items() if getattr(prompt, name) == getattr(Prompt, name)}
    for path in (folder / MANIFEST for folder in folders):
        if path.exists():
            started = json.loads(path.read_text(encoding="utf-8")).get("prompt", OLD_DEFAULTS)
            prompt = replace(prompt, **{name: value for name, value in defaults.items() if name not in started})
    return prompt


def _names(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix}
    return set().union(*(_names(inner, f"{prefix}.{key}" if prefix else key) for key, inner in value.items()))


def _lookup(value: Any, name: str) -> Any:
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def _shown(value: dict[str, Any], name: str) -> str:
    shown = json.dumps(_lookup(value, name), ensure_ascii=False)
    return shown if len(shown) <= 80 else shown[:77] + "..."
