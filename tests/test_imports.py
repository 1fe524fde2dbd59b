"""What an import runs, and that imports go only from upper to lower layers."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import trl_hrm
from trl_hrm import _compat


ROOT = Path(__file__).resolve().parents[1]

# From bottom to top. Groups of a layer never import each other.
LAYERS = [
    {"_compat"},
    {"intervals", "io", "precision", "processes", "published_formats", "renamed"},
    {"config", "encoding", "forest", "messages", "schema", "terminal"},
    {"trl_hrm", "step_tree", "step_format", "hub", "identity", "pages", "errors"},
    {"tree_attention", "losses", "kl", "heads", "step_metrics", "step_credit", "grading", "tracking"},
    {"loading", "implicit"},
    {"search"},
    {"scoring"},
    {"data"},
    {"evaluation", "rewards", "accuracy_reward"},
    {"token_steps"},
    {"training"},
    {"reasoning", "trainer"},
    {"prm", "metrics", "tiny_model"},
    {"command_parser"},
    {"scripts"},
    {"demo", "pipeline"},
    {"cli"},
    {"__main__"},
    {"recipes", "benchmarks", "tests"},
]
LAYER_OF = {group: number for number, groups in enumerate(LAYERS) for group in groups}


@cache
def sources() -> list[Path]:
    return [
        path
        for folder in ("trl_hrm", "recipes", "benchmarks", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "trl_hrm" / "__init__.py"  # names load on first use
    ]


def group_of(parts: tuple[str, ...]) -> str:
    """`("trl_hrm", "data", "build")` is in `data`, `("recipes", "hrm_reward")` in `recipes`."""
    return (parts[1] if len(parts) > 1 else "trl_hrm") if parts[0] == "trl_hrm" else parts[0]


@cache  # three tests read all files
def imports_of(path: Path) -> list[tuple[str, str]]:
    """Return (module, name) for every import in a file, including imports inside functions. Relative ones are resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            found += [(module, alias.name) for alias in node.names]
    return found


def own_groups(path: Path) -> set[str]:
    """Return the groups of this repository that a file imports."""
    groups = set()
    for module, name in imports_of(path):
        parts = tuple(module.split("."))
        if parts[0] not in ("trl_hrm", "recipes", "benchmarks", "tests"):
            continue
        if parts == ("trl_hrm",):  # `from trl_hrm import X`: the module of X, or a module X
            groups.add(trl_hrm._NAMES.get(name, name).split(".")[0] if name and name != "__version__" else "trl_hrm")
        else:
            groups.add(group_of(parts))
    return groups


def test_imports_go_to_lower_layers():
    """A cycle would show only in an import order that no test uses."""
    offenders = []
    for path in sources():
        place = path.relative_to(ROOT)
        group = group_of(place.with_suffix("").parts)
        imported = own_groups(path) - {group}
        offenders += [f"{place}: add {name} to LAYERS" for name in sorted({group, *imported} - LAYER_OF.keys())]
        offenders += [
            f"{place} ({group}) imports {name}"
            for name in sorted(imported & LAYER_OF.keys())
            if LAYER_OF[name] >= LAYER_OF.get(group, 0)
        ]
    assert not offenders, "\n".join(offenders)


def test_private_names_of_trl_and_transformers_are_imported_in_one_place():
    """An upgrade of either library may move them, so only `_compat.py` may need a change."""
    offenders = [
        f"{path.relative_to(ROOT)}: from {module} import {name}"
        for path in sources()
        for module, name in imports_of(path)
        if module.split(".")[0] in ("trl", "transformers")
        and (any(part.startswith("_") for part in (*module.split("."), name)) or module.startswith("trl.trainer"))
    ]
    assert not offenders, "\n".join(offenders)


def test_tests_import_no_other_test_file():
    """What two of them need belongs to a module of its own: imported, a test file runs its imports, and is broken by the other."""
    offenders = [
        f"{path.relative_to(ROOT)}: from {module} import {name}"
        for path in sources()
        for module, name in imports_of(path)
        if any(part.startswith("test_") for part in module.split("."))
        or (module.startswith("tests") and name.startswith("test_"))
    ]
    assert not offenders, "\n".join(offenders)


def test_private_names_are_there():
    """They load on first use, which may be in the middle of a training."""
    for name in _compat._NAMES:
        assert getattr(_compat, name) is not None


def test_importing_the_package_runs_nothing():
    """The command line must start fast, and a missing optional package must not break it."""
    code = (
        "import sys, trl_hrm, trl_hrm.step_tree, trl_hrm.step_format, trl_hrm.data.hierarchy\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'peft', 'accelerate'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "from trl_hrm import StepFormat, StepTree, hrm_view\n"
        "assert not {'torch', 'transformers', 'trl'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_reasoning_model_is_apart_from_the_reward_models():
    """It shares training, pushes, pages and dataset publishing with them. Whoever uses one loads nothing of the other."""
    code = (
        "import importlib, pkgutil, sys, trl_hrm, trl_hrm.data.hierarchy\n"
        "assert 'trl_hrm.reasoning' not in sys.modules\n"
        "for name in [name for name in sys.modules if name.startswith('trl_hrm.')]:\n"
        "    del sys.modules[name]\n"
        "import trl_hrm.reasoning\n"
        "for module in pkgutil.walk_packages(trl_hrm.reasoning.__path__, 'trl_hrm.reasoning.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sorted(name for name in sys.modules if name.startswith('trl_hrm.')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    shared = {"io", "config", "schema", "terminal", "processes", "hub", "identity", "pages", "errors", "intervals"}
    shared |= {"_compat", "precision", "training", "reasoning"}
    published = ("trl_hrm.data", "trl_hrm.data.output", "trl_hrm.data.publish")
    loaded = [name for name in result.stdout.split() if name.split(".")[1] not in shared]
    assert not [name for name in loaded if name not in published and not name.startswith("trl_hrm.data.publish_")]


def test_every_public_name_resolves():
    assert set(trl_hrm.__all__) <= set(dir(trl_hrm))
    for name in trl_hrm.__all__:
        assert getattr(trl_hrm, name) is not None
        if name in trl_hrm._NAMES:
            assert getattr(trl_hrm, name).__module__ == f"trl_hrm.{trl_hrm._NAMES[name]}"
    with pytest.raises(AttributeError):
        trl_hrm.Nothing  # noqa: B018


def test_names_for_type_checkers_are_the_same():
    """The block under TYPE_CHECKING never runs, so nothing else would notice a missing name."""
    tree = ast.parse((ROOT / "trl_hrm" / "__init__.py").read_text(encoding="utf-8"))
    named = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name: module for name, module in named.items() if name in trl_hrm._NAMES} == trl_hrm._NAMES
