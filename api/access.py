"""Who a request comes from, and whether its route is for them.

Every route under `/api` needs a key, as `Authorization: Bearer`, or a session's cookie, unless it says
that it is open. What a key must allow follows from the method, unless the route says otherwise: to look is
`scan:read`, to change is `scan:write`.
"""

import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from api.dependencies import Services
from neural_mri.backing import access
from neural_mri.backing.access import LOCAL
from neural_mri.contract.auth import Identity, Scope, Unauthenticated
from neural_mri.contract.problems import Unavailable

__all__ = (
    "ANYBODY",
    "ANY_KEY",
    "COOKIE",
    "FOR_PROBES",
    "Admitted",
    "Connection",
    "admit",
    "count_login",
    "needs",
    "presented",
    "readmission",
)

COOKIE = "nmri_session"

_SCOPE = "needed_scope"
_OPEN = "open"
_UNCOUNTED = "uncounted"
_KNOWN_LATELY = "known_lately"

KNOWN_SECONDS = 300.0
"""How long whoever watches the service is let in on what was known of their key, while nobody can look."""
MOST_KNOWN = 100
"""Of whom a process keeps that."""

ANYBODY: Mapping[str, Any] = MappingProxyType({_OPEN: True})
"""`opt` of a route that needs no key; it is told who asks where that is known."""
FOR_PROBES: Mapping[str, Any] = MappingProxyType({_OPEN: True, _UNCOUNTED: True})
"""`opt` of a route that needs no key and is never refused: the service is looked after by it."""
ANY_KEY: Mapping[str, Any] = MappingProxyType({_SCOPE: None})
"""`opt` of a route that any key may use."""

Connection = ASGIConnection[Any, Any, Any, Any]
Admitted = Callable[[], Awaitable[bool]]

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def needs(scope: Scope, *, known_lately: bool = False) -> dict[str, Any]:
    """`opt` of a route that needs this scope.

    One that watches the service (`known_lately`) is answered also while the database is away that knows the keys:
    to whose key was good a moment ago.
    """
    return {_SCOPE: scope, _KNOWN_LATELY: known_lately}


async def admit(services: Services, connection: Connection, handler: BaseRouteHandler) -> Identity:
    """The caller, if the route is for them. Raises `Unauthenticated`, `MissingScope`, `TooMany`."""
    if services.settings.auth == "off":
        return LOCAL
    method = connection.scope["method"]  # type: ignore[typeddict-item]  # of HTTP only
    is_open = (
        handler.opt.get(_OPEN, False)
        or method == "OPTIONS"
        or (not connection.scope["path"].startswith("/api/") and _SCOPE not in handler.opt)
    )
    is_counted = connection.scope["path"].startswith("/api/") and _UNCOUNTED not in handler.opt
    most = services.settings.user_requests_a_minute if is_counted else 0
    identify = _lately if handler.opt.get(_KNOWN_LATELY) else _identity
    try:
        caller = await identify(services, connection)
    except Unauthenticated:
        if not is_open:
            await count_login(services, connection)
            raise
        await services.rates.count(f"address:{_address(services, connection)}", most)
        return Identity(user="", scopes=())
    await services.rates.count(f"user:{caller.user}", most)
    usual = Scope.SCAN_READ if method in _SAFE else Scope.SCAN_WRITE
    needed: Scope | None = handler.opt.get(_SCOPE, usual)
    if not is_open and needed is not None:
        caller.require(needed)
    return caller


async def count_login(services: Services, connection: Connection) -> None:
    """Count somebody who may be trying keys, by where they are. Raises `TooMany`."""
    most = services.settings.login_requests_a_minute
    await services.rates.count(f"login:{_address(services, connection)}", most)


def _address(services: Services, connection: Connection) -> str:
    """Where a caller is. What proxies that are trusted say they were asked by, nobody else's word."""
    peer = connection.client.host if connection.client else ""
    return services.proxies.origin(peer, connection.headers.getall("x-forwarded-for", []))


def readmission(services: Services, connection: Connection) -> Admitted:
    """Asks, of an answer that lasts, whether its reader would still be let in."""

    async def is_admitted() -> bool:
        if services.settings.auth == "off":
            return True
        try:
            await _identity(services, connection)
        except Unauthenticated:
            return False
        except Unavailable:
            pass  # nobody is shut out because nobody could look
        return True

    return is_admitted


async def _lately(services: Services, connection: Connection) -> Identity:
    """The caller, as known lately where it cannot be looked up. Raises `Unauthenticated`, `Unavailable`."""
    given = connection.headers.get("authorization", "")
    key = hashlib.sha256(given.encode()).digest()  # the key itself is kept nowhere
    now = time.monotonic()
    try:
        caller = await _identity(services, connection)
    except Unauthenticated:
        services.known_lately.pop(key, None)
        raise
    except Unavailable:
        known, until = services.known_lately.get(key, (None, 0.0))
        if known is None or until < now:
            raise
        return known
    if given:
        # The newest last: those who have not come for the longest are the first to be forgotten.
        services.known_lately.pop(key, None)
        services.known_lately[key] = caller, now + KNOWN_SECONDS
        while len(services.known_lately) > MOST_KNOWN:
            del services.known_lately[next(iter(services.known_lately))]
    return caller


async def _identity(services: Services, connection: Connection) -> Identity:
    given = connection.headers.get("authorization")
    if given is not None:
        scheme, _, text = given.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated(
                f"Authorization names the scheme {scheme[:20]!r}: expected Bearer and an API key"
            )
        return await presented(services, text.strip())
    if (token := connection.cookies.get(COOKIE)) is not None:
        found = await services.sessions.look(access.login_identity, services.pepper, token)
        if found is None:
            raise Unauthenticated("the session has ended: log in again")
        return found
    raise Unauthenticated(
        "this needs an API key: send it as `Authorization: Bearer nmri_...`, or log in by "
        "POST /api/login"
    )


async def presented(services: Services, key: str) -> Identity:
    """Whose key this is. Raises `Unauthenticated`, which says nothing of the key."""
    found = await services.sessions.look(access.authenticate, services.pepper, key)
    if found is None:
        raise Unauthenticated("the API key is unknown, expired or revoked")
    return found
