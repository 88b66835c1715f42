"""The page of figures keeps what a command did not measure."""

from pathlib import Path

from bench import page

PAGE = "# Benchmarks\n\nold lead\n\n## Memory\n\nold memory\n\n## Cluster\n\nkept\n"


def test_what_was_not_measured_stays(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    page.replace_lead(path, "# Benchmarks\n\nnew lead\n")
    page.replace_section(path, "Memory", "new memory")
    page.replace_section(path, "Viewer", "first seen")
    text = path.read_text()
    assert text == (
        "# Benchmarks\n\nnew lead\n\n## Memory\n\nnew memory\n\n## Cluster\n\nkept\n"
        "\n## Viewer\n\nfirst seen\n"
    )
    assert page.headings(text) == ["Memory", "Cluster", "Viewer"]


def test_a_page_begins_with_its_lead(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    page.replace_lead(path, "# Benchmarks\n\nlead")
    assert path.read_text() == "# Benchmarks\n\nlead\n"
