"""The page of figures: sections that commands of their own write, each leaving the others alone."""

import re
from pathlib import Path

__all__ = ("headings", "replace_lead", "replace_section", "section")


def section(page: str, title: str) -> str | None:
    """A section of the page, heading and all, up to the next of its rank; None where there is none."""
    found = _pattern(title).search(page)
    return None if found is None else found[0]


def headings(text: str) -> list[str]:
    """Titles of the sections of a page, or of a part of one."""
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def replace_lead(path: Path, lead: str) -> None:
    """Write anew what stands before the first section."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    first = re.search(r"^## ", page, re.MULTILINE)
    rest = page[first.start() :] if first else ""
    path.write_text(f"{lead.rstrip()}\n" + (f"\n{rest}" if rest else ""), encoding="utf-8")


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
