"""The API as a process that can be killed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec

from neural_mri.backing.settings import Settings
from tests.servers import free_port

__all__ = ("ROOT", "client_of", "on_own_port", "process")

ROOT = Path(__file__).parents[2]


def on_own_port(settings: Settings) -> Settings:
    """The same on a port that nobody listens on."""
    return msgspec.structs.replace(settings, port=free_port())


@contextmanager
def process(settings: Settings, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The API as a process of its own, killed in the end."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NEURAL_MRI_")}
    started = subprocess.Popen(
        [sys.executable, "-m", "api"],
        cwd=ROOT,
        env={**inherited, **settings.environment(), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        assert started.stderr is not None
        started.stderr.close()


@contextmanager
def client_of(settings: Settings) -> Iterator[httpx.Client]:
    """A client of a process that has just been started, once it answers."""
    until = time.monotonic() + 20
    with httpx.Client(base_url=f"http://127.0.0.1:{settings.port}", timeout=10) as client:
        while True:
            try:
                assert client.get("/api/health").status_code == 200
            except httpx.ConnectError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
            else:
                break
        yield client
