"""Sessions of the viewer, and API keys."""

from typing import Annotated, Any
from urllib.parse import urlsplit

from litestar import Request, Response, delete, get, post
from litestar.datastructures import Cookie
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter

from api.access import ANY_KEY, ANYBODY, COOKIE, count_login, presented
from api.dependencies import Services
from api.problems import refusals
from neural_mri.backing import access
from neural_mri.backing.access import key_created
from neural_mri.backing.audit import Deed
from neural_mri.contract.auth import (
    AuditAction,
    CreatedKey,
    Identity,
    KeyView,
    LoginRequest,
    MissingScope,
    NewKey,
    Scope,
    UnknownKey,
)

__all__ = ("create_key", "list_keys", "log_in", "log_out", "revoke_key", "who_am_i")


@get(
    "/api/login",
    operation_id="whoAmI",
    summary="Who you are, and what you may do",
    tags=["access"],
    opt=ANY_KEY,
    responses=refusals(),
)
async def who_am_i(services: NamedDependency[Services]) -> Identity:
    """Tell who asks."""
    return services.caller


@post(
    "/api/login",
    status_code=200,
    operation_id="logIn",
    summary="Exchange an API key for a session's cookie",
    description=(
        "For browsers: the cookie is HttpOnly and SameSite=Strict, stands for the key until it ends or "
        "is revoked, and no longer than `NEURAL_MRI_LOGIN_SECONDS`."
    ),
    tags=["access"],
    opt=ANYBODY,
    responses=refusals(413, 415),
)
async def log_in(
    data: JSONBody[LoginRequest],
    services: NamedDependency[Services],
    request: Request[Any, Any, Any],
) -> Response[Identity]:
    """Open a session."""
    await count_login(services, request)
    identity = await presented(services, data.key)
    seconds = services.settings.login_seconds
    token = await services.on_behalf_of(identity).act(
        lambda _: Deed(AuditAction.LOGGED_IN, str(identity.key), {}),
        access.open_login,
        services.pepper,
        str(identity.key),
        seconds,
    )
    return Response(identity, cookies=[_cookie(request, token, int(seconds))])


@post(
    "/api/logout",
    status_code=204,
    operation_id="logOut",
    summary="End the session that the cookie stands for",
    tags=["access"],
    opt=ANYBODY,
    responses=refusals(),
)
async def log_out(
    services: NamedDependency[Services], request: Request[Any, Any, Any]
) -> Response[None]:
    """End a session."""
    if (token := request.cookies.get(COOKIE)) is not None:
        await services.sessions.write(access.close_login, services.pepper, token)
    return Response(None, status_code=204, cookies=[_cookie(request, "", 0)])


def _cookie(request: Request[Any, Any, Any], value: str, seconds: int) -> Cookie:
    # Browsers name their page's address; behind a gateway that ends TLS nothing else tells.
    is_secure = urlsplit(request.headers.get("origin", "")).scheme == "https"
    return Cookie(
        key=COOKIE,
        value=value,
        max_age=seconds,
        path="/",
        secure=is_secure,
        httponly=True,
        samesite="strict",
    )


@post(
    "/api/keys",
    status_code=201,
    operation_id="createKey",
    summary="Make an API key",
    description=(
        "Its secret is in this answer and nowhere else. Who is no admin can make keys for themselves "
        "that allow no more and last no longer than the one they use."
    ),
    tags=["access"],
    opt=ANY_KEY,
    responses=refusals(413, 415, 429),
)
async def create_key(data: JSONBody[NewKey], services: NamedDependency[Services]) -> CreatedKey:
    """Make a key."""
    caller = services.caller
    user = data.user or caller.user
    is_admin = caller.may(Scope.ADMIN)
    if user != caller.user and not is_admin:
        raise MissingScope(
            f"only an admin can make a key for somebody else: you are {caller.user}",
            scope=Scope.ADMIN.value,
        )
    for scope in data.scopes:
        caller.require(scope)
    return await services.act(
        key_created,
        access.create_key,
        services.pepper,
        user=user,
        scopes=data.scopes,
        label=data.label,
        seconds=data.expires_in_seconds,
        not_after=None if is_admin else caller.expires_at,
    )


@get(
    "/api/keys",
    operation_id="listKeys",
    summary="Your API keys, newest first; everybody's for an admin",
    tags=["access"],
    opt=ANY_KEY,
    responses=refusals(),
)
async def list_keys(
    services: NamedDependency[Services],
    user: Annotated[
        str | None, QueryParameter(description="Only this user's, for an admin.", max_length=100)
    ] = None,
) -> list[KeyView]:
    """List keys."""
    if not services.caller.may(Scope.ADMIN):
        user = services.caller.user
    return await services.sessions.read(access.keys_of, user)


@delete(
    "/api/keys/{key_id:str}",
    status_code=200,
    operation_id="revokeKey",
    summary="End an API key for good, and every session opened with it",
    description="A key can end itself, and those of its owner that allow no more than it does.",
    tags=["access"],
    opt=ANY_KEY,
    responses=refusals(404),
)
async def revoke_key(key_id: FromPath[str], services: NamedDependency[Services]) -> KeyView:
    """Revoke a key."""
    key = await services.sessions.read(access.get_key, key_id)
    caller = services.caller
    if key is not None and (key.user == caller.user or caller.may(Scope.ADMIN)):
        if key.id != caller.key:
            for scope in key.scopes:
                caller.require(scope)
        key = await services.act(_revoked, access.revoke_key, key_id)
        if key is not None:
            return key
    # Whoever sends a whole key here must not read it again in an answer.
    raise UnknownKey("there is no API key of that id", key=key_id[:12])


def _revoked(key: KeyView | None) -> Deed | None:
    return None if key is None else Deed(AuditAction.KEY_REVOKED, key.id, {"user": key.user})
