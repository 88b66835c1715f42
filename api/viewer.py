"""The viewer: a built folder of static files, the same origin as the API.

Only files found by walking the folder are served: a path is looked up, never opened, so that there is no
way out of it, and symbolic links are not followed. The folder is walked again when its index changes.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from api.files import Payload, header
from api.negotiation import accepts_coding
from api.problems import MethodNotAllowed
from neural_mri.contract.problems import NotFound

__all__ = ("Viewer",)

MEDIA_TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".arrow": "application/vnd.apache.arrow.file",
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".ico": "image/x-icon",
        ".js": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".map": "application/json",
        ".mjs": "text/javascript; charset=utf-8",
        ".mp4": "video/mp4",
        ".png": "image/png",
        ".svg": "image/svg+xml",
        ".ttf": "font/ttf",
        ".txt": "text/plain; charset=utf-8",
        ".wasm": "application/wasm",
        ".webm": "video/webm",
        ".webmanifest": "application/manifest+json",
        ".webp": "image/webp",
        ".woff2": "font/woff2",
    }
)
"""What a viewer is made of; any other file is served as bytes."""

INDEX = "/index.html"
HASHED = "/assets/"
"""Where the build puts files under names that change with their content."""

NOT_BUILT = b"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Neural MRI: no viewer here yet</title>
<h1>The viewer is not built</h1>
<p>The API answers; its pages are missing. Build them with <code>npm run build</code> in <code>web/</code>, or set
<code>NEURAL_MRI_VIEWER_DIR</code> to a built folder, and load this page again.</p>
<p><a href="/schema">What the API can do</a></p>
"""


class _File(NamedTuple):
    path: Path
    size: int
    modified_ns: int

    @property
    def etag(self) -> str:
        return f"{self.modified_ns:x}-{self.size:x}"


class Viewer:
    """Serves the folder. An ASGI application."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._walked_for: int | None = None
        self._files: Mapping[str, _File] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises `NotFound` for what the build has not made."""
        if scope["type"] != ScopeType.HTTP:
            return
        if scope["method"] != "GET":
            raise MethodNotAllowed(
                f"{scope['method']} is not possible at {scope['path']}", allow=["GET", "HEAD"]
            )
        self._refresh()
        await self._page(scope)(scope, receive, send)

    def _refresh(self) -> None:
        try:
            built = (self._folder / "index.html").stat().st_mtime_ns
        except OSError:
            built = None
        if built != self._walked_for:
            self._files = dict(_walk(self._folder)) if built is not None else {}
            self._walked_for = built

    def _page(self, scope: Scope) -> ASGIApp:
        path = scope["path"]
        if path in self._files:
            return self._payload(path, scope)
        # An address inside the viewer is its own router's to read; a file that is not there is not.
        wants_page = "text/html" in (header(scope, b"accept") or "")
        if path != "/" and (not wants_page or "." in path.rpartition("/")[2]):
            raise NotFound(f"there is nothing at {path}")
        return self._payload(INDEX, scope) if INDEX in self._files else _not_built

    def _payload(self, name: str, scope: Scope) -> Payload:
        file, headers = self._files[name], {"vary": "accept-encoding"}
        etag = file.etag
        packed = self._files.get(f"{name}.gz")
        if packed is not None and accepts_coding(header(scope, b"accept-encoding"), "gzip"):
            file, etag = packed, f"{packed.etag}-gzip"
            headers["content-encoding"] = "gzip"
        immutable = name.startswith(HASHED)
        return Payload(
            file.path,
            size=file.size,
            etag=etag,
            media_type=MEDIA_TYPES.get(Path(name).suffix.lower(), "application/octet-stream"),
            cache_control="public, max-age=31536000, immutable" if immutable else "no-cache",
            headers=headers,
        )


def _walk(root: Path) -> list[tuple[str, _File]]:
    """Every regular file under a folder, by its address; no hidden ones, and none behind a link."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.is_symlink() or not path.is_file():
                continue
            status = path.stat()
            address = "/" + path.relative_to(root).as_posix()
            found.append((address, _File(path, status.st_size, status.st_mtime_ns)))
    return found


async def _not_built(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": 404,
            "headers": [
                (b"content-type", b"text/html; charset=utf-8"),
                (b"content-length", str(len(NOT_BUILT)).encode()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": NOT_BUILT, "more_body": False})
