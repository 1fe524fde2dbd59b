"""Parse a report page for the tests."""

from dataclasses import dataclass, field
from html.parser import HTMLParser


VOID = {"meta", "link", "img", "source", "br"}


@dataclass
class Section:
    """Title, text and tables of a section of the page. A table is a list of rows, starting with the header."""

    title: str = ""
    text: str = ""
    tables: list[list[list[str]]] = field(default_factory=list)

    def table(self, number: int = 0) -> dict[str, list[str]]:
        """Return the cells of each row, by the row's first cell."""
        return {row[0]: row[1:] for row in self.tables[number][1:]}


class Page(HTMLParser):
    """
    The elements of a page by tag. Tags that are not closed in order are an error.

    `sections` holds the sections by their `id`, and text before the first section under `""`.
    """

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections = {"": Section()}
        self.texts: dict[str, list[str]] = {}
        self.unscoped = 0
        self._open: list[str] = []
        self._now = self.sections[""]
        self.feed(text)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section" and "id" in attributes:
            assert attributes["id"] not in self.sections
            self._now = self.sections.setdefault(attributes["id"], Section())
        elif tag == "table":
            self._now.tables.append([])
        elif tag == "tr":
            self._now.tables[-1].append([])
        elif tag in ("td", "th"):
            self._now.tables[-1][-1].append("")
            self.unscoped += tag == "th" and attributes.get("scope") not in ("row", "col")

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> where {self._open[-3:]} are open"
        self._open.pop()

    def handle_data(self, data):
        data = data.replace("\xa0", " ")
        for tag in set(self._open):
            self.texts.setdefault(tag, []).append(data)
        if "style" in self._open:
            return
        self._now.text += data
        if self._open and self._open[-1] == "h2":
            self._now.title += data
        if {"td", "th"} & set(self._open):
            self._now.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of every element with a tag."""
        return [attributes for name, attributes in self.elements if name == tag]
