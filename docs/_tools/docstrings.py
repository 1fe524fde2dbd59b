"""
Griffe extension that turns docstrings in TRL's style into Markdown.

`Args:` becomes a definition list, with a heading for each `> Parameters that control ...`. A reference such as
[`StepFormat`], [`StepTree.from_row`] or [`~search.steps.StepRule`] becomes a link: to the reference page that documents
the object, else to its source in the repository. A reference to nothing is an error.
"""

import re
from functools import partial
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import griffe


ROOT = Path(__file__).resolve().parents[2]
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
SECTION = re.compile(
    r"^(Args|Parameters|Attributes|Returns|Yields|Raises|Example):\n((?:\n|[ \t].*\n)*)", re.MULTILINE
)
LIBRARIES = {"accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers", "trl", "vllm"}


class TRLDocstrings(griffe.Extension):
    """
    Args:
        repo_url (`str`):
            Repository on GitHub, for links to the source.
    """

    def __init__(self, repo_url: str):
        self.repo_url = repo_url

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        objects = list(walk(pkg))
        by_name: dict[str, list[griffe.Object]] = {}
        for found in objects:
            by_name.setdefault(found.name, []).append(found)
        documented = documented_paths(pkg)

        def link(scope: griffe.Object, match: re.Match) -> str:
            short, name = match.groups()
            if name.partition(".")[0] in LIBRARIES:
                return f"`{name.rpartition('.')[2] if short else name}`"
            target = find(pkg, scope, name, by_name)
            shown = f"`{name.rpartition('.')[2] if short else name}`"
            if target.path in documented:
                return f"[{shown}][{target.path}]"
            line = f"#L{target.lineno}" if target.lineno else ""
            return f"[{shown}]({self.repo_url}/blob/main/{target.filepath.relative_to(ROOT).as_posix()}{line})"

        faults = []
        for found in objects:
            if found.docstring:
                parts = re.split(
                    r"(^ *```.*?^ *```)", to_markdown(found.docstring.value), flags=re.MULTILINE | re.DOTALL
                )
                try:
                    parts[::2] = [REFERENCE.sub(partial(link, found), part) for part in parts[::2]]
                except LookupError as error:
                    faults.append(str(error))
                found.docstring.value = "".join(parts)
        if faults:
            raise griffe.ExtensionError("references in docstrings that cannot be resolved:\n" + "\n".join(faults))


def walk(parent: griffe.Object) -> Any:
    """Yield an object and all that are defined in it."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from walk(member)


def documented_paths(pkg: griffe.Module) -> set[str]:
    """Return the paths of the objects that the reference pages show, and of their public members."""
    paths = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^::: trl_hrm\.(\S+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            shown = resolved(pkg[name])
            members = shown.all_members.values() if shown.is_class else []
            paths |= {shown.path} | {f"{shown.path}.{one.name}" for one in members if not one.name.startswith("_")}
    return paths


def resolved(found: griffe.Object | griffe.Alias) -> griffe.Object:
    return found.final_target if found.is_alias else found


def find(
    pkg: griffe.Module, scope: griffe.Object, name: str, by_name: dict[str, list[griffe.Object]]
) -> griffe.Object:
    """
    Return what a name means in a docstring. A path of modules begins in `trl_hrm`. Any other name is looked up in the
    class, its module and `trl_hrm`, then anywhere in the package, where only one object may have it.
    """
    first, *rest = name.removeprefix("trl_hrm.").split(".")
    if rest and first in pkg.modules:
        target = pkg.modules[first]
    else:
        places = [place for place in (scope, scope.module, pkg) if first in place.all_members]
        found = [resolved(places[0].all_members[first])] if places else by_name.get(first, [])
        if len(found) != 1:
            paths = ", ".join(one.path for one in found) or "nothing"
            raise LookupError(f"{scope.path}: [`{name}`] names {paths}")
        [target] = found
    for part in rest:
        if part not in target.all_members:
            raise LookupError(f"{scope.path}: {target.path} has no {part!r}, which [`{name}`] refers to")
        target = resolved(target.all_members[part])
    return target


def to_markdown(text: str) -> str:
    """Return a docstring with its sections as headings, definition lists and bullets."""
    return SECTION.sub(lambda match: section(match[1], dedent(match[2]).strip("\n")), text + "\n")


def section(name: str, body: str) -> str:
    title = "Parameters" if name == "Args" else name
    if name in ("Args", "Parameters", "Attributes"):
        body = re.sub(r"^> (.+)$", r"\n*\1*\n", body, flags=re.MULTILINE)
        body = re.sub(r"^(\S.*):\n((?:\n|[ \t].*(?:\n|$))+)", definition, body, flags=re.MULTILINE)
    elif name == "Raises":
        body = re.sub(r"^(?=\[?`)", "- ", body, flags=re.MULTILINE)
        body = re.sub(r"^(?!- )", "  ", body, flags=re.MULTILINE)
    return f"**{title}**\n\n{body}\n\n"


def definition(match: re.Match) -> str:
    term = re.sub(r"(^|, )(\*{0,2}\w+)(?= \(|,|$)", r"\1**`\2`**", match[1])
    description = indent(dedent(match[2]).strip("\n"), "    ").lstrip()
    return f"\n{term}\n:   {description}\n"
