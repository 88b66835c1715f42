"""What users have under way and have computed, and how much they may."""

from typing import Annotated

import msgspec
from litestar import get, put
from litestar.di import NamedDependency
from litestar.params import JSONBody, PathParameter

from api.access import needs
from api.dependencies import Services
from api.problems import refusals
from neural_mri.backing import limits
from neural_mri.backing.audit import Deed
from neural_mri.contract.auth import AuditAction, Scope, Usage, UserLimits

__all__ = ("get_usage", "list_users", "set_limits")


@get(
    "/api/usage",
    operation_id="getUsage",
    summary="What you have under way and have computed today, beside what you may",
    description="A day is the last 24 hours. What was known already, or followed another's scan, is free.",
    tags=["access"],
    responses=refusals(),
)
async def get_usage(services: NamedDependency[Services]) -> Usage:
    """Tell one's usage."""
    return await services.sessions.read(limits.usage, services.caller.user, services.limits)


@get(
    "/api/users",
    operation_id="listUsers",
    summary="Everybody's usage",
    tags=["access"],
    opt=needs(Scope.ADMIN),
    responses=refusals(),
)
async def list_users(services: NamedDependency[Services]) -> list[Usage]:
    """List users."""
    names = await services.sessions.read(limits.users)
    return [await services.sessions.read(limits.usage, name, services.limits) for name in names]


@put(
    "/api/users/{user:str}/limits",
    operation_id="setLimits",
    summary="Give a user limits of their own, or take them back",
    tags=["access"],
    opt=needs(Scope.ADMIN),
    responses=refusals(413, 415),
)
async def set_limits(
    user: Annotated[str, PathParameter(min_length=1, max_length=100)],
    data: JSONBody[UserLimits],
    services: NamedDependency[Services],
) -> Usage:
    """Set limits."""
    await services.act(
        lambda _: Deed(AuditAction.LIMITS_SET, user, msgspec.to_builtins(data)),
        limits.set_limits,
        user,
        data,
    )
    return await services.sessions.read(limits.usage, user, services.limits)
