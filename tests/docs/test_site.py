"""The documentation: it builds without a warning, and leaves nothing public out."""

import subprocess
import sys
from pathlib import Path

import pytest

import neural_mri.client
from api.app import create_app
from api.openapi import document, operations
from neural_mri.backing.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it: a broken link or a page that nobody reaches is an error."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_request_is_described(site: Path) -> None:
    page = (site / "reference/http.html").read_text()
    described = document(create_app(Settings()).litestar)
    for operation in operations(described):
        assert f"{operation.method.upper()} {operation.path}</code>" in page


def test_everything_the_client_offers_is_described(site: Path) -> None:
    page = (site / "reference/python.html").read_text()
    for name in neural_mri.client.__all__:
        if callable(getattr(neural_mri.client, name)):
            assert f'id="neural_mri.client.{name}"' in page, name
    for named in ("Sessions.fork", "SharedSession.open", "Batches.submit", "Access.set_limits"):
        assert f'id="neural_mri.client.{named}"' in page, named


def test_every_command_is_described(site: Path) -> None:
    page = (site / "reference/cli.html").read_text()
    for command in ("scan activation", "perturb", "users limit", "watch", "sessions revisions"):
        assert f"<code>neural-mri {command}</code>" in page


def test_a_page_asks_nobody_else_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        for loaded in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http'):
            assert loaded not in text, page.name
