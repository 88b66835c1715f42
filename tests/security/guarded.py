"""The API as it stands on a network: a process of its own that asks everybody for a key."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from neural_mri.backing import access
from neural_mri.backing.settings import PREFIX, Settings
from neural_mri.contract.auth import CreatedKey, Scope
from tests.api.world import World
from tests.servers import free_port

__all__ = ("USER", "Guarded", "guarded")

ROOT = Path(__file__).parents[2]
USER = (Scope.SCAN_READ, Scope.SCAN_WRITE, Scope.MODEL_LOAD)


class Guarded:
    """The process, the world it stands on, and keys to it."""

    def __init__(self, settings: Settings, log: Path, program: Sequence[str]) -> None:
        self.world = World(settings=settings)
        self.settings = settings
        self.url = f"http://{settings.host}:{settings.port}"
        self._pepper = access.load_pepper(settings)
        self._log = log
        with log.open("wb") as written:
            self.process = subprocess.Popen(
                [sys.executable, *program],
                cwd=ROOT,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith(PREFIX)},
                    **settings.environment(),
                },
                stdout=written,
                stderr=written,
            )

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self.settings.host, self.settings.port

    def key(self, user: str, scopes: tuple[Scope, ...] = USER) -> CreatedKey:
        """A key for somebody."""
        return self.world.sessions.write(access.create_key, self._pepper, user=user, scopes=scopes)

    def client(self, key: CreatedKey | None = None) -> httpx.Client:
        """A client with that key."""
        headers = {} if key is None else {"authorization": f"Bearer {key.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, trust_env=False)

    def document(self) -> dict[str, Any]:
        """What it says it can do."""
        with self.client() as nobody:
            found: dict[str, Any] = nobody.get("/schema/openapi.json").raise_for_status().json()
        return found

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def said(self) -> str:
        """The same as text."""
        return self._log.read_text()

    def faults(self) -> list[dict[str, Any]]:
        """Lines that tell of a fault of its own."""
        return [line for line in self.lines() if line.get("level") in ("error", "critical")]

    def wait_until_ready(self) -> None:
        """Until it answers."""
        until = time.monotonic() + 120
        with self.client() as nobody:
            while True:
                assert self.process.poll() is None, self.said()
                try:
                    nobody.get("/api/health")
                except httpx.TransportError:
                    assert time.monotonic() < until, self.said()
                    time.sleep(0.02)
                else:
                    return

    def end(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        self.world.close()


@contextmanager
def guarded(
    settings: Settings, folder: Path, *, program: Sequence[str] = ("-m", "api"), **changes: Any
) -> Iterator[Guarded]:
    """Such a process while the block runs; `settings` name its database and its Redis."""
    settings = msgspec.structs.replace(
        settings,
        **{"auth": "keys", "port": free_port(), "log_format": "json", "heartbeat_seconds": 0.3}
        | changes,
    )
    service = Guarded(settings, folder / "api.log", program)
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.end()
