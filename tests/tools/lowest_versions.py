"""
Print the lowest version of each dependency that `pyproject.toml` allows, as requirements with `==`.

`make test-lowest` installs them. A resolver may choose a higher version when the lowest ones do not go together; exact
requirements fail instead.
"""

import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement


PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]


def declared(extras: Iterable[str]) -> Iterator[Requirement]:
    """Yield the dependencies of the package and of its extras; `trl-hrm[docs]` stands for the extra's own."""
    yield from map(Requirement, PROJECT["dependencies"])
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            if requirement.name == PROJECT["name"]:
                yield from declared(requirement.extras)
            else:
                yield requirement


def lowest(requirement: Requirement) -> str:
    """Return the requirement with its lower bound as the only version, or unchanged if it has none."""
    bounds = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==")]
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={bounds[0]}" if bounds else str(requirement)


if __name__ == "__main__":
    print("\n".join(sorted({lowest(requirement) for requirement in declared(sys.argv[1:])})))
