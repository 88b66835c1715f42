"""A hub of models on this machine: what the Hugging Face library asks of the real one, answered over HTTP."""

import hashlib
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ("Hub", "hub")

TOKEN = "hf_of_somebody_who_may"


class Hub:
    """Repositories by name, each with its branches and tags, and what was asked for."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        self.endpoint = endpoint
        self.home = folder / "home"
        """For `HF_HOME`."""
        self.asked: list[str] = []
        """Paths, in order."""
        self.gated: set[str] = set()
        self.breaks = 0
        """How many more of the files' contents break off halfway, as a connection does that is reset."""
        self._revisions: dict[str, dict[str, str]] = {}
        """Commits too, of all times."""
        self._files: dict[str, dict[str, bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What leads the library here."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0"}

    def publish(self, name: str, folder: Path, revision: str = "main") -> str:
        """Let a branch or tag of a repository be a folder's files as they are now; the commit."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        told = hashlib.sha1(usedforsecurity=False)
        for path, content in files.items():
            told.update(path.encode() + b"\0" + content)
        commit = told.hexdigest()
        self._files[commit] = files
        self._revisions.setdefault(name, {}).update({revision: commit, commit: commit})
        return commit

    def commit_of(self, name: str, revision: str) -> str | None:
        """None where there is no such revision. Raises `KeyError` where there is no such repository."""
        return self._revisions[name].get(revision)

    def files_of(self, commit: str) -> dict[str, bytes]:
        """Contents by path."""
        return self._files[commit]

    def taken(self) -> set[str]:
        """Names of the files whose contents were asked for."""
        return {path.rpartition("/")[2] for path in self.asked if "/resolve/" in path}


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(path)
        name, kind, rest = self._understood(path)
        try:
            revision, _, file = rest.partition("/")
            commit = self.hub.commit_of(name, revision or "main")
        except KeyError:
            # What the hub says of repositories that it does not show.
            self._refuse(401, "RepoNotFound", "Repository not found")
            return
        is_known = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if name in self.hub.gated and kind == "resolve" and not is_known:
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        elif commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif kind == "revision":
            siblings = [{"rfilename": each} for each in self.hub.files_of(commit)]
            self._tell({"id": name, "sha": commit, "siblings": siblings})
        elif kind == "tree":
            self._tell(list(self._tree(commit, recursive="recursive=True" in self.path)))
        elif file in self.hub.files_of(commit):
            self._send(self.hub.files_of(commit)[file], commit)
        else:
            self._refuse(404, "EntryNotFound", "Entry not found")

    do_HEAD = do_GET  # noqa: N815 (the base's way of naming)

    def _understood(self, path: str) -> tuple[str, str, str]:
        """Repository, what of it, and the rest."""
        for kind in ("revision", "tree", "resolve"):
            name, found, rest = path.removeprefix("api/models/").partition(f"/{kind}/")
            if found:
                return name, kind, rest
        return path.removeprefix("api/models/"), "revision", ""

    def _tree(self, commit: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
        for path, content in self.hub.files_of(commit).items():
            if recursive or "/" not in path:
                oid = hashlib.sha1(content, usedforsecurity=False).hexdigest()
                yield {"type": "file", "path": path, "size": len(content), "oid": oid}

    def _send(self, content: bytes, commit: str) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self._end(content, "application/octet-stream")

    def _tell(self, document: Any) -> None:
        self.send_response(200)
        self._end(json.dumps(document).encode(), "application/json")

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self._end(json.dumps({"error": message}).encode(), "application/json")

    def _end(self, content: bytes, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "application/octet-stream" and self.hub.breaks:
            self.hub.breaks -= 1
            self.wfile.write(content[: len(content) // 2])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # with a reset
            self.close_connection = True
            return
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
        """Nothing: `asked` has it."""


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """An empty hub, while the block runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        served = Hub(f"http://127.0.0.1:{server.server_address[1]}", folder)
        server.RequestHandlerClass = type("Answers", (_Answers,), {"hub": served})
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
