"""The record of who did what."""

from typing import Annotated
from uuid import UUID

from litestar import get
from litestar.di import NamedDependency
from litestar.params import QueryParameter

from api.access import needs
from api.dependencies import Services
from api.problems import refusals
from neural_mri.backing import audit
from neural_mri.contract.auth import AuditAction, AuditEntry, Scope

__all__ = ("list_audit",)


@get(
    "/api/audit",
    operation_id="listAudit",
    summary="Who made and revoked keys, loaded and unloaded models, set limits, stopped jobs",
    description="Newest first; `before` the last entry of one page begins the next.",
    tags=["access"],
    opt=needs(Scope.ADMIN),
    responses=refusals(),
)
async def list_audit(
    services: NamedDependency[Services],
    before: Annotated[UUID | None, QueryParameter(description="An entry's id.")] = None,
    user: Annotated[str | None, QueryParameter(description="Whose.", max_length=100)] = None,
    action: Annotated[AuditAction | None, QueryParameter(description="What sort.")] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=500, description="How many at most.")] = 100,
) -> list[AuditEntry]:
    """List entries."""
    return await services.sessions.read(
        audit.entries, limit=limit, before=before, user=user, action=action
    )
