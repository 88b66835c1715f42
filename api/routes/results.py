"""Results: in short as JSON, in full as Arrow."""

import asyncio
from typing import Annotated, Any, cast
from uuid import UUID

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, PathParameter
from litestar.types import ASGIApp

from api.answers import Prefer, plain_answer
from api.dependencies import Services
from api.negotiation import Accept, preferred
from api.problems import refusals
from api.results import (
    TABLE,
    IfNoneMatch,
    IfRange,
    Range,
    manifest_of,
    summary_of,
    table_answer,
)
from api.submissions import submit_attention
from api.waiting import settled, wait_seconds
from neural_mri.contract.jobs import TERMINAL, JobState, JobView
from neural_mri.contract.problems import ResultNotReady
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM, Manifest
from neural_mri.contract.summaries import Summary

__all__ = ("get_attention", "get_manifest", "get_result", "get_table")

JSON = "application/json"

ATTENTION_WAIT_SECONDS = 10
"""How long a reader of attention patterns is kept waiting who has said nothing of it."""


@get(
    "/api/jobs/{job_id:uuid}/result",
    operation_id="getResult",
    summary="A result: a summary in JSON, or its main table in Arrow",
    tags=["results"],
    responses={
        **TABLE,
        # A union is a type to Litestar's own document, though not to its signature.
        200: ResponseSpec(
            cast("type[Any]", Summary), description="The summary", generate_examples=False
        ),
        **refusals(404, 406, 409, 410),
    },
)
async def get_result(
    job_id: FromPath[UUID],
    services: NamedDependency[Services],
    accept: Accept = None,
    if_none_match: IfNoneMatch = None,  # noqa: ARG001 (read where the bytes are sent)
    if_range: IfRange = None,  # noqa: ARG001
    byte_range: Range = None,  # noqa: ARG001
) -> ASGIApp:
    """Read a result."""
    media_type = preferred(accept, (JSON, ARROW_FILE, ARROW_STREAM))
    job = await services.job(job_id)
    if media_type == JSON:
        summary = await summary_of(services, job)
        body = await asyncio.to_thread(msgspec.json.encode, summary)
        return plain_answer(body, headers={"vary": "accept"})
    return await table_answer(services, job, None, media_type)


@get(
    "/api/jobs/{job_id:uuid}/manifest",
    operation_id="getManifest",
    summary="What a result consists of, and how it was computed",
    tags=["results"],
    responses=refusals(404, 409, 410),
)
async def get_manifest(job_id: FromPath[UUID], services: NamedDependency[Services]) -> Manifest:
    """Read a result's manifest."""
    return await manifest_of(services, await services.job(job_id))


@get(
    "/api/jobs/{job_id:uuid}/result/{table:str}",
    operation_id="getTable",
    summary="A table of a result, in Arrow",
    description=(
        "The file never changes: its ETag is its SHA-256. A part of it can be asked for by Range. "
        "The manifest names the tables."
    ),
    tags=["results"],
    responses={**TABLE, **refusals(404, 406, 409, 410)},
)
async def get_table(
    job_id: FromPath[UUID],
    table: FromPath[str],
    services: NamedDependency[Services],
    accept: Accept = None,
    if_none_match: IfNoneMatch = None,  # noqa: ARG001 (read where the bytes are sent)
    if_range: IfRange = None,  # noqa: ARG001
    byte_range: Range = None,  # noqa: ARG001
) -> ASGIApp:
    """Read a table."""
    media_type = preferred(accept, (ARROW_FILE, ARROW_STREAM))
    return await table_answer(services, await services.job(job_id), table, media_type)


@get(
    "/api/jobs/{job_id:uuid}/attention/{layer:int}",
    operation_id="getAttention",
    summary="One layer's attention patterns for the prompt of a scan",
    description=(
        "Measured when first asked for. 202 with the job that measures them when that takes longer "
        f"than {ATTENTION_WAIT_SECONDS} s, or than Prefer: wait says."
    ),
    tags=["results"],
    responses={
        **TABLE,
        202: ResponseSpec(JobView, description="Being measured", generate_examples=False),
        **refusals(404, 406, 409, 410, 422, 429),
    },
)
async def get_attention(
    job_id: FromPath[UUID],
    layer: Annotated[int, PathParameter(ge=0, description="Counted from 0.")],
    services: NamedDependency[Services],
    accept: Accept = None,
    prefer: Prefer = None,
    if_none_match: IfNoneMatch = None,  # noqa: ARG001 (read where the bytes are sent)
    if_range: IfRange = None,  # noqa: ARG001
    byte_range: Range = None,  # noqa: ARG001
) -> ASGIApp:
    """Read attention patterns."""
    media_type = preferred(accept, (ARROW_FILE, ARROW_STREAM))
    job = await submit_attention(services, await services.job(job_id), layer)
    seconds = wait_seconds(prefer)
    job = await settled(services, job, ATTENTION_WAIT_SECONDS if seconds is None else seconds)
    if job.state is JobState.SUCCEEDED:
        return await table_answer(services, job, f"attention.{layer}", media_type)
    view = await services.view(job)
    if job.state not in TERMINAL:
        location = {"location": view.links["self"]}
        return plain_answer(msgspec.json.encode(view), status=202, headers=location)
    problem = job.problem or {}
    raise ResultNotReady(
        f"the attention scan {job.id} is {job.state}: {problem.get('detail', 'it has no result')}",
        job=str(job.id),
        state=job.state.value,
    )
