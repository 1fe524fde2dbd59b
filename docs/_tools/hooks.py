"""Hooks of MkDocs: links that leave `docs/`, the help of the commands, and a check of every link of the finished site."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit


ROOT = Path(__file__).resolve().parents[2]
HELP = "<!-- help of every command -->"


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """
    Point links to files outside `docs/` at the repository, so that the same Markdown works on GitHub and on the site.
    """
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def repository_link(match: re.Match) -> str:
        target = Path(os.path.normpath(folder / match[1]))
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        if not target.exists():
            raise FileNotFoundError(f"docs/{page.file.src_uri} links to {match[1]}, which does not exist")
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config['repo_url'].rstrip('/')}/{kind}/main/{target.relative_to(ROOT).as_posix()}{match[2] or ''})"

    markdown = re.sub(r"\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)", repository_link, markdown)
    return markdown.replace(HELP, commands_help()) if HELP in markdown else markdown


def commands_help() -> str:
    """Return a section for each command: what it does, its config and function, and all of its options."""
    os.environ["COLUMNS"] = "100"
    import trl_hrm
    from trl_hrm.cli import COMMANDS
    from trl_hrm.command_parser import CommandParser

    sections = []
    for name, command in COMMANDS.items():
        parser = CommandParser(getattr(trl_hrm, command.config), show_all=True, prog=f"trl-hrm {name}")
        links = " and ".join(f"[`{one}`][trl_hrm.{one}]" for one in (command.function, command.config))
        summary = command.summary[0].upper() + command.summary[1:]
        sections.append(f"## {name}\n\n{summary}. In Python: {links}.\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(sections)


class Links(HTMLParser):
    """Collects the ids and the addresses of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.addresses: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value)
            elif name in ("href", "src") and value is not None:
                self.addresses.add(value)


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Check that every link and image of the site leads to a file of it, and every anchor to an id of that file."""
    site, site_url = Path(config["site_dir"]), config["site_url"]
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    faults = []
    for path, page in pages.items():
        if path.name == "404.html":  # served at any address, so that its links are absolute
            continue
        here = path.relative_to(site).as_posix()
        for address in page.addresses:
            own = address.startswith(site_url)  # as guides link to the reference, which GitHub does not show
            parts = urlsplit("/" + address.removeprefix(site_url) if own else address)
            if parts.scheme or parts.netloc:
                if parts.scheme not in ("https", "mailto", "data") or (parts.scheme == "https" and not parts.netloc):
                    faults.append(f"{here}: {address} is not an address that a browser opens")
                continue
            target = site / unquote(urlsplit(urljoin(f"/{here}", parts.path)).path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                faults.append(f"{here}: {address} leads to no file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                faults.append(f"{here}: {address} leads to no heading")
    if faults:
        raise ValueError("broken links:\n" + "\n".join(sorted(faults)))
