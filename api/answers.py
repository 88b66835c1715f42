"""How a job is answered: 202 with where to look, or the finished thing for who prefers to wait."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

import msgspec
from litestar import Response
from litestar.params import HeaderParameter
from litestar.types import ASGIApp, Receive, Scope, Send

from api.dependencies import Services
from api.results import finished
from api.waiting import LONGEST_WAIT_SECONDS, settled, wait_seconds
from neural_mri.backing.records import Job
from neural_mri.contract.jobs import TERMINAL, JobView
from neural_mri.contract.problems import MEDIA_TYPE

__all__ = ("IdempotencyKey", "Prefer", "job_answer", "plain_answer")

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

Prefer = Annotated[
    str | None,
    HeaderParameter(
        name="Prefer",
        description=(
            "`wait=N` (RFC 7240): answer when the job has ended, within N seconds, at most "
            f"{LONGEST_WAIT_SECONDS}."
        ),
        required=False,
    ),
]

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        description=(
            "Your own word for this request, new for each: sent again within a day, because its answer "
            "was lost, it gives the same job; with another request it is refused."
        ),
        pattern=r"^[\x20-\x7e]{1,200}$",
        required=False,
    ),
]


async def job_answer(
    services: Services, job: Job, prefer: str | None, *, asked: float = -math.inf
) -> Response[JobView]:
    """The answer to a request that made a job and came at `asked`, on the monotonic clock, or who knows when.

    A job that ended by a fault of its request is answered as the refusal it is.
    """
    seconds = wait_seconds(prefer)
    headers = {"location": job.view().links["self"]}
    if seconds is None:
        return Response(await services.view(job), status_code=202, headers=headers)
    headers["preference-applied"] = f"wait={seconds}"
    job = await settled(services, job, seconds, known_at=asked)
    if job.state not in TERMINAL:
        return Response(await services.view(job), status_code=202, headers=headers)
    status = (job.problem or {}).get("status", 500)
    if job.problem is not None and 400 <= status < 500:
        document = msgspec.json.encode({**job.problem, "job": str(job.id)})
        return _rendered(document, status, MEDIA_TYPE, headers)
    return _rendered(await finished(services, job), 200, "application/json", headers)


def plain_answer(
    body: bytes, *, status: int = 200, headers: Mapping[str, str] = NO_HEADERS
) -> ASGIApp:
    """JSON that is encoded already."""
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **headers,
    }

    async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
            }
        )
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return answer


def _rendered(
    body: bytes, status: int, media_type: str, headers: dict[str, str]
) -> Response[JobView]:
    answer: Response[JobView] = Response(
        body,  # type: ignore[arg-type]  # encoded in a thread: a summary may be megabytes
        status_code=status,
        media_type=media_type,
        headers=headers,
    )
    return answer
