"""The site: what `make docs` builds it from, and that its checks find what is broken."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import trl_hrm


ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "docs" / "_tools"
REPOSITORY = "https://github.com/trl-hrm/trl-hrm"
SITE = "https://trl-hrm.github.io/trl-hrm/"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")


def settings() -> dict:
    """Return `mkdocs.yml` without what only MkDocs can read."""
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


class TestReference:
    def test_every_public_name_is_on_one_page(self):
        """A name on no page has no documentation; on two, links lead to either."""
        pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "reference").glob("*.md"))]
        shown = re.findall(r"^::: trl_hrm\.(\S+)$", "\n".join(pages), flags=re.MULTILINE)
        assert len(set(shown)) == len(shown)
        assert set(trl_hrm.__all__) <= set(shown)

    def test_references_to_other_libraries_exist(self):
        """The site shows them as code, without a link, so that the build does not see a name that a library has dropped."""
        named = set()
        for path in sorted((ROOT / "trl_hrm").rglob("*.py")):
            named |= set(re.findall(r"\[`~([\w.]+)`\]", path.read_text(encoding="utf-8")))
        checked = 0
        for name in sorted(named):
            library, *rest = name.split(".")
            if library in ("accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers", "trl"):
                found = importlib.import_module(".".join([library, *rest[:-1]]))
                assert hasattr(found, rest[-1]), name
                checked += 1
        assert checked > 10


class TestNavigation:
    def test_repository(self):
        config = settings()
        [extension] = config["plugins"][2]["mkdocstrings"]["handlers"]["python"]["options"]["extensions"]
        assert config["repo_url"] == extension["docs/_tools/docstrings.py"]["repo_url"] == REPOSITORY

    def test_address(self):
        """Guides link to the reference by its address, since GitHub does not show it."""
        assert settings()["site_url"] == SITE
        assert f'Documentation = "{SITE}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for path in sorted((ROOT / "docs").glob("*.md")):
            assert not re.search(r"\]\(reference/", path.read_text(encoding="utf-8")), path.name

    def test_broken_links_are_errors(self):
        assert set(settings()["validation"].values()) == {"warn"}  # errors, since `make docs` builds with --strict
        assert "mkdocs build --strict" in (ROOT / "Makefile").read_text(encoding="utf-8")


class TestLinksOutOfDocs:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="reference/data.md"))

    def rewritten(self, markdown: str) -> str:
        return hooks.on_page_markdown(markdown, self.page, {"repo_url": REPOSITORY + "/"})

    def test_files_and_folders_are_links_to_the_repository(self):
        """The site holds only `docs/`."""
        assert self.rewritten("[b](../../benchmarks/README.md#search)") == (
            f"[b]({REPOSITORY}/blob/main/benchmarks/README.md#search)"
        )
        assert self.rewritten("[r](../../recipes/tiny)") == f"[r]({REPOSITORY}/tree/main/recipes/tiny)"

    def test_links_inside_docs_stay(self):
        assert self.rewritten("[a](../search.md#x) [b](data.md)") == "[a](../search.md#x) [b](data.md)"

    def test_what_does_not_exist_is_an_error(self):
        with pytest.raises(FileNotFoundError, match="reference/data.md links to ../../nothing.md"):
            self.rewritten("[b](../../nothing.md)")


class TestLinksOfTheSite:
    def check(self, folder: Path, body: str) -> None:
        (folder / "other").mkdir()
        (folder / "other" / "index.html").write_text('<h2 id="here">Here</h2>')
        (folder / "index.html").write_text(body)
        hooks.on_post_build({"site_dir": str(folder), "site_url": SITE})

    def test_right_ones(self, tmp_path):
        links = ["other/#here", "other/", "https://a.org/b#c", SITE, f"{SITE}other/#here"]
        self.check(tmp_path, "".join(f'<a href="{link}">a</a>' for link in links))

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ('<a href="othr/">a</a>', "othr/ leads to no file"),
            ('<a href="other/#there">a</a>', "other/#there leads to no heading"),
            ('<img src="picture.png">', "picture.png leads to no file"),
            ('<a href="https:/a.org">a</a>', "https:/a.org is not an address"),
            ('<a href="http:a">a</a>', "http:a is not an address"),
            (f'<a href="{SITE}othr/">a</a>', f"{SITE}othr/ leads to no file"),
            (f'<a href="{SITE}other/#there">a</a>', f"{SITE}other/#there leads to no heading"),
        ],
    )
    def test_broken_ones(self, tmp_path, body, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            self.check(tmp_path, body)


def test_help_of_every_command():
    """The page of the commands is made from the parsers."""
    from trl_hrm.cli import COMMANDS

    text = hooks.commands_help()
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == list(COMMANDS)
    assert "[`annotate`][trl_hrm.annotate]" in text and "--c_puct" in text


class TestDocstrings:
    @pytest.fixture
    def load_package(self, tmp_path, monkeypatch):
        """Load a package of one module with the extension, and return the module."""
        griffe = pytest.importorskip("griffe", reason='needs `pip install "trl-hrm[docs]"`')
        docstrings = load("docstrings")

        def load_package(source: str, page: str = ""):
            (tmp_path / "trl_hrm").mkdir()
            (tmp_path / "trl_hrm" / "__init__.py").write_text("from .part import *\n")
            (tmp_path / "trl_hrm" / "part.py").write_text(source)
            (tmp_path / "docs" / "reference").mkdir(parents=True)
            (tmp_path / "docs" / "reference" / "page.md").write_text(page)
            monkeypatch.setattr(docstrings, "ROOT", tmp_path)
            extensions = griffe.load_extensions(docstrings.TRLDocstrings(repo_url=REPOSITORY))
            return griffe.load("trl_hrm", search_paths=[tmp_path], extensions=extensions, try_relative_path=False)[
                "part"
            ]

        return load_package

    SOURCE = '''
class Tree:
    """A tree."""

    def cut(self):
        """Cut it."""


def grow(height, width=1, **options):
    """
    Grow a [`Tree`] of [`~transformers.Trainer`].

    Args:
        > Parameters that control the size

        height, width (`int`, *optional*, defaults to `("1", "2")`):
            The size. See [`Tree.cut`]:

            - in metres
        **options (`dict`):
            More.

    Returns:
        [`Tree`]: The tree.

    Raises:
        `ValueError`: If it
        dies.
        `OSError`: If not.

    Example:

    ```python
    >>> grow(1)  # [`Nothing`]
    ```
    """
'''

    def test_sections_and_references(self, load_package):
        found = load_package(self.SOURCE, "::: trl_hrm.part.Tree\n")["grow"].docstring.value
        assert re.sub(r"\n{2,}", "\n\n", found).rstrip() == (
            "Grow a [`Tree`][trl_hrm.part.Tree] of `Trainer`.\n\n"
            "**Parameters**\n\n"
            "*Parameters that control the size*\n\n"
            '**`height`**, **`width`** (`int`, *optional*, defaults to `("1", "2")`)\n'
            ":   The size. See [`Tree.cut`][trl_hrm.part.Tree.cut]:\n\n"
            "    - in metres\n\n"
            "**`**options`** (`dict`)\n"
            ":   More.\n\n"
            "**Returns**\n\n[`Tree`][trl_hrm.part.Tree]: The tree.\n\n"
            "**Raises**\n\n- `ValueError`: If it\n  dies.\n- `OSError`: If not.\n\n"
            "**Example**\n\n```python\n>>> grow(1)  # [`Nothing`]\n```"
        )

    def test_what_no_page_shows_is_linked_to_its_source(self, load_package):
        found = load_package(self.SOURCE)["grow"].docstring.value
        assert f"[`Tree`]({REPOSITORY}/blob/main/trl_hrm/part.py#L2)" in found

    @pytest.mark.parametrize("name", ["Nothing", "Tree.grow", "~part.Nothing", "part.Tree.grow"])
    def test_a_reference_to_nothing_is_an_error(self, load_package, name):
        from griffe import ExtensionError

        with pytest.raises(ExtensionError, match="trl_hrm.part.grow: "):
            load_package(self.SOURCE.replace("[`Tree`] of", f"[`{name}`] of"))
