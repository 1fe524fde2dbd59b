"""Check that page files are installed, text is escaped, and pages load nothing from the network."""

import re
import tomllib
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path

import pytest

from trl_hrm.pages.page import Table, render, write_page
from trl_hrm.pages.pictures import Picture


ROOT = Path(__file__).resolve().parents[2]


def test_every_file_is_installed():
    """A template missing from the wheel would fail only for users who install it."""
    package = resources.files("trl_hrm.pages")
    folder = ROOT / "trl_hrm"
    files = [file for file in (folder / "pages").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["trl_hrm"]
    assert len(files) > 3
    for file in files:
        assert package.joinpath(*file.relative_to(folder / "pages").parts).read_text(encoding="utf-8")
        name = file.relative_to(folder).as_posix()
        assert any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns), name


def test_a_table_in_markdown():
    """A pipe or a line break would end the cell."""
    table = Table(["", "a|b"], [["one\ntwo", "3"], ["x", "|"]])
    assert table.markdown() == "|  | a\\|b |\n| --- | --- |\n| one two | 3 |\n| x | \\| |"


def test_missing_value_raises():
    """A page with an empty section would look finished."""
    with pytest.raises(Exception, match="names"):
        render("results.html.jinja", title="x")


def test_write_page(tmp_path):
    picture = Picture("one", "One", "One.", {"light": b"light", "dark": b"dark"})
    (file,) = write_page("<html>", [picture], tmp_path / "new" / "report.html")
    assert file == tmp_path / "new" / "report_files" / "one.png" and file.read_bytes() == b"light"
    assert (tmp_path / "new" / "report.html").read_text() == "<html>"


def test_the_style_loads_nothing():
    styles = [file for file in resources.files("trl_hrm.pages").iterdir() if file.name.endswith(".css")]
    assert len(styles) == 5
    for file in styles:
        assert not re.search(r"url\(|@import", file.read_text(encoding="utf-8")), file.name
