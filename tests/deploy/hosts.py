"""Stand-ins for the comments of a code host: what GitHub and GitLab answer, over HTTP, as they document it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

__all__ = ("Host", "host")

ME = {"id": 7, "type": "Bot"}
SOMEBODY = {"id": 8, "type": "User"}


class Host:
    """One request's comments, and what was asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.comments: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.tells_who_asks = True
        """False as of the token that GitHub gives a job, which may not ask."""

    def write(self, body: str, author: dict[str, Any] = SOMEBODY) -> None:
        self.comments.append(
            {"id": len(self.comments) + 1, "body": body, "user": author, "author": author}
        )

    def answer(self, method: str, path: str, query: dict[str, list[str]], sent: Any) -> Any:
        if path.endswith("/user"):
            return ME
        if method == "GET":
            size, page = int(query["per_page"][0]), int(query["page"][0])
            return self.comments[size * (page - 1) : size * page]
        if method == "POST":
            self.write(sent["body"], ME)
            return self.comments[-1]
        comment = self.comments[int(path.rpartition("/")[2]) - 1]
        comment["body"] = sent["body"]
        return comment


@contextmanager
def host() -> Iterator[Host]:
    """A code host on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("content-length") or 0)
            sent = json.loads(self.rfile.read(length)) if length else None
            if self.command != "GET":
                known.asked.append((self.command, parts.path))
            known.tokens.add(self.headers.get("authorization") or self.headers["private-token"])
            body = json.dumps(known.answer(self.command, parts.path, parse_qs(parts.query), sent))
            barred = parts.path.endswith("/user") and not known.tells_who_asks
            self.send_response(403 if barred else 200)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = do_PATCH = do_PUT = handle_any  # noqa: N815 -- as http.server calls them

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known = Host(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield known
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
