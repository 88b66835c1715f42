"""API keys from Python: made, listed, revoked."""

from types import TracebackType
from typing import Self

import msgspec

from neural_mri.client.exchange import Exchange
from neural_mri.contract.auth import CreatedKey, KeyView, NewKey

__all__ = ("Access",)


class Access:
    """The API keys of one service. Use it as a context manager, or `close` it.

    Raises as `Client` does.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        timeout_seconds: float = 30.0,
        api_key: str | None = None,
    ) -> None:
        self._exchange = Exchange(
            base_url,
            timeout_seconds=timeout_seconds,
            patience_seconds=timeout_seconds,
            headers={},
            api_key=api_key,
        )

    def close(self) -> None:
        """Close the connections."""
        self._exchange.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def create(self, wanted: NewKey) -> CreatedKey:
        """Make a key: its secret is in the answer, and nowhere else."""
        body = msgspec.json.encode(wanted)
        return self._exchange.ask(CreatedKey, "POST", "/api/keys", body=body)

    def keys(self, user: str | None = None) -> list[KeyView]:
        """Your keys, newest first; everybody's, or one user's, for an admin."""
        query = {} if user is None else {"user": user}
        return self._exchange.ask(list[KeyView], "GET", "/api/keys", query=query)

    def revoke(self, key_id: str) -> KeyView:
        """End a key for good."""
        return self._exchange.ask(KeyView, "DELETE", f"/api/keys/{key_id}")
