"""Files that only GitHub and maintainers read. Nothing else would notice that they name missing files."""

import re
from pathlib import Path

import pytest
import yaml

from trl_hrm.cli import COMMANDS


ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
FORMS = ["bug_report.yml", "feature_request.yml"]
PAGES = ["CONTRIBUTING.md", "docs/releasing.md", ".github/PULL_REQUEST_TEMPLATE.md"]


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_files():
    """GitHub silently ignores a file with a different name."""
    found = {str(path.relative_to(GITHUB)) for path in GITHUB.rglob("*") if path.is_file()}
    forms = {f"ISSUE_TEMPLATE/{name}" for name in [*FORMS, "config.yml"]}
    assert found == {"PULL_REQUEST_TEMPLATE.md", "workflows/ci.yml", "workflows/site.yml"} | forms


class TestWorkflow:
    workflow = read_yaml(GITHUB / "workflows" / "ci.yml")

    def test_runs_what_runs_elsewhere(self):
        """A second list of commands would diverge from `.ci/run`. Without the executable bit, the script fails only on GitHub."""
        commands = {
            name: [step["run"] for step in job["steps"] if "run" in step]
            for name, job in self.workflow["jobs"].items()
        }
        assert commands == {"run": [".ci/run"], "lowest": ["make test-lowest"]}
        assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
        assert self.workflow[True].keys() == {"push", "pull_request"}  # YAML reads the key `on` as true
        assert self.workflow["permissions"] == {"contents": "read"}

    def test_versions_are_those_of_the_classifiers(self):
        """CI must run on exactly the declared versions."""
        job = self.workflow["jobs"]["run"]
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        declared = re.findall(r"Python :: (3\.\d+)", project)
        assert job["strategy"]["matrix"] == {"python-version": declared}
        assert f'requires-python = ">={declared[0]}"' in project
        [setup] = [step["with"] for step in self.workflow["jobs"]["lowest"]["steps"] if "with" in step]
        assert setup["python-version"] == declared[0]

    def test_cache_depends_on_files_that_are_there(self):
        """With a missing file, the cache would never be renewed."""
        for job in self.workflow["jobs"].values():
            [setup] = [
                step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python")
            ]
            files = setup["cache-dependency-path"].split()
            assert setup["cache"] == "pip" and files and all((ROOT / file).is_file() for file in files)


def test_site():
    """The site is what `make docs` checks, and only `main` may replace it."""
    workflow = read_yaml(GITHUB / "workflows" / "site.yml")
    assert workflow[True] == {"push": {"branches": ["main"]}}
    assert workflow["permissions"] == {"contents": "read"}
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make docs"]
    [upload] = [
        step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/upload-pages-artifact")
    ]
    assert upload == {"path": "site"}
    assert any(step.get("uses", "").startswith("actions/deploy-pages@") for step in job["steps"])
    assert job["permissions"] == {"contents": "read", "pages": "write", "id-token": "write"}


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms(name):
    """GitHub hides an invalid form and reports the error only on a page that maintainers seldom visit."""
    form = read_yaml(GITHUB / "ISSUE_TEMPLATE" / name)
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = form["body"]
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] == "textarea" and re.fullmatch(r"\w+", field["id"])
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert field["attributes"].keys() == {"label", "description"}
        assert field.get("validations", {"required": True}) == {"required": True}


def test_chooser():
    config = read_yaml(GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    assert config.keys() == {"blank_issues_enabled", "contact_links"}
    for link in config["contact_links"]:
        assert link.keys() == {"name", "url", "about"} and link["url"].startswith("https://")


@pytest.mark.parametrize("page", [*PAGES, *(f".github/ISSUE_TEMPLATE/{name}" for name in FORMS)])
def test_commands_and_files_of_the_pages(page):
    """Make targets, commands, links and paths move, and outside contributors rely on these pages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in re.findall(r"(?:`|^|\n)make ([\w-]+)", text):
        assert target in targets, target
    for command in re.findall(r"trl-hrm ([\w-]+)", text):
        assert command in COMMANDS, command
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    folders = "trl_hrm|tests|recipes|docs|benchmarks|accelerate_configs|\\.ci|\\.github"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "target", ["install", "lint", "format", "test", "test-hub", "test-lowest", "test-slow", "docs"]
)
def test_every_tier_is_described(target):
    """Contributors do not run a tier that CONTRIBUTING does not mention."""
    assert f"make {target}" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_release_has_one_version():
    """Otherwise users would cite a different version than the installed one."""
    from trl_hrm import __version__

    assert read_yaml(ROOT / "CITATION.cff")["version"] == __version__
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert heading.group(1) == __version__
