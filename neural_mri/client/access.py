"""Who may do what, from Python: keys made and revoked, users' limits, and the record of who did what.

with Access() as access:
    access.set_limits("ada", UserLimits(max_jobs=50))
    for entry in access.audit(user="ada"): ...
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Self
from urllib.parse import quote
from uuid import UUID

import msgspec

from neural_mri.client.exchange import Exchange
from neural_mri.contract.auth import (
    AuditAction,
    AuditEntry,
    CreatedKey,
    KeyView,
    NewKey,
    Usage,
    UserLimits,
)

__all__ = ("Access",)


_PAGE = 100


class Access:
    """The keys and users of one service, and its record. Use it as a context manager, or `close` it.

    Raises as `Client` does.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        timeout_seconds: float | None = None,
        patience_seconds: float | None = None,
        api_key: str | None = None,
    ) -> None:
        self._exchange = Exchange(
            base_url,
            timeout_seconds=timeout_seconds,
            patience_seconds=patience_seconds,
            headers={},
            api_key=api_key,
        )

    def close(self) -> None:
        """Close the connections, as `Client.close` does."""
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

    def usage(self) -> Usage:
        """What you have under way and have computed today, beside what you may."""
        return self._exchange.ask(Usage, "GET", "/api/usage")

    def users(self) -> list[Usage]:
        """Everybody's usage, for an admin."""
        return self._exchange.ask(list[Usage], "GET", "/api/users")

    def set_limits(self, user: str, limits: UserLimits) -> Usage:
        """Give a user limits of their own, for an admin; the user's usage beside them.

        All of them are set: one that is None is everybody's from then on.
        """
        if not user or user in {".", ".."}:
            raise ValueError(f"{user!r} is no user's name")
        path, body = f"/api/users/{quote(user, safe='')}/limits", msgspec.json.encode(limits)
        return self._exchange.ask(Usage, "PUT", path, body=body)

    def audit(
        self,
        *,
        user: str | None = None,
        action: AuditAction | str | None = None,
        before: UUID | None = None,
        limit: int | None = None,
    ) -> Iterator[AuditEntry]:
        """Who did what, the latest first, for an admin; page by page as it is read.

        `before` an entry of that id, by one `user`, of one sort; `limit` of them at most.
        """
        asked = {} if user is None else {"user": user}
        if action is not None:
            asked["action"] = AuditAction(action).value
        left = limit
        while left is None or left > 0:
            size = _PAGE if left is None else min(left, _PAGE)
            query = {**asked, "limit": str(size)}
            if before is not None:
                query["before"] = str(before)
            page = self._exchange.ask(list[AuditEntry], "GET", "/api/audit", query=query)
            yield from page
            if len(page) < size:
                return
            before = page[-1].id
            left = None if left is None else left - size
