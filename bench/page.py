"""The page of figures: sections that commands of their own write, each leaving the others alone."""

import re
from pathlib import Path

__all__ = ("replace_section", "section", "sections")


def section(page: str, title: str) -> str | None:
    """A section of the page, heading and all, up to the next of its rank; None where there is none."""
    found = _pattern(title).search(page)
    return None if found is None else found[0]


def sections(path: Path, *titles: str) -> list[str]:
    """Those of the sections that a page has."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = (section(text, title) for title in titles)
    return [f"{each.rstrip()}\n" for each in found if each is not None]


def replace_section(path: Path, title: str, body: str) -> None:
    """Write a section anew where it stands, or at the page's end."""
    page = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    written = f"## {title}\n\n{body.rstrip()}\n"
    old = section(page, title)
    if old is None:
        page = f"{page.rstrip()}\n\n{written}"
    else:
        page = page.replace(old, written + ("\n" if old.endswith("\n\n") else ""))
    path.write_text(page, encoding="utf-8")


def _pattern(title: str) -> re.Pattern[str]:
    return re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
