"""The API where everybody needs a key."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from neural_mri.backing import access
from neural_mri.backing.settings import Settings
from neural_mri.contract.auth import CreatedKey, Scope
from tests.api.world import World, serving

__all__ = ("READER", "USER", "Door", "keyed")

USER = (Scope.SCAN_READ, Scope.SCAN_WRITE)
READER = (Scope.SCAN_READ,)


class Door:
    """A service with keys, and clients who have some."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self.settings = settings

    def key(
        self, world: World, user: str = "ada", scopes: tuple[Scope, ...] = USER, **changes: Any
    ) -> CreatedKey:
        """A key, made beside the API."""
        pepper = access.load_pepper(self.settings)
        return world.sessions.write(access.create_key, pepper, user=user, scopes=scopes, **changes)

    def client(self, key: CreatedKey | str | None = None) -> httpx.Client:
        """A client with that key."""
        text = key.key if isinstance(key, CreatedKey) else key
        headers = {} if text is None else {"authorization": f"Bearer {text}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20)

    @contextmanager
    def user(
        self, world: World, user: str = "ada", scopes: tuple[Scope, ...] = USER
    ) -> Iterator[httpx.Client]:
        """A client of somebody who has just been given a key."""
        with self.client(self.key(world, user, scopes)) as client:
            yield client


@contextmanager
def keyed(settings: Settings, **changes: Any) -> Iterator[Door]:
    """Serve with keys."""
    settings = msgspec.structs.replace(settings, auth="keys", **changes)
    with serving(settings) as client:
        yield Door(str(client.base_url), settings)
