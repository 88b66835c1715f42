"""Scans: each request becomes a job."""

from typing import Annotated

from litestar import Response, post
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg, QueryParameter

from api.answers import Prefer, job_answer
from api.dependencies import Services
from api.problems import refusals
from api.results import FinishedJob
from api.submissions import submit_scan
from neural_mri.contract.jobs import JobView, Lane
from neural_mri.contract.scans import ActivationScan, AttentionScan, Scan, StructuralScan

__all__ = ("scan_activation", "scan_attention", "scan_structural")

AsLane = Annotated[
    Lane,
    QueryParameter(description="How soon the job should run, and how much it counts against you."),
]
RESPONSES = {
    200: ResponseSpec(FinishedJob, description="The finished job", generate_examples=False),
    **refusals(409, 413, 415, 422, 429),
}


@post(
    "/api/scan/structural",
    status_code=202,
    response_description="The job, and where to look",
    operation_id="scanStructural",
    summary="T1: structure and exact parameter counts",
    description="From the model's configuration alone: nothing is loaded.",
    tags=["scans"],
    responses=RESPONSES,
)
async def scan_structural(
    data: Annotated[
        StructuralScan,
        BodyKwarg(
            media_type=RequestEncodingType.JSON,
            examples=[Example(summary="The default model", value={})],
        ),
    ],
    services: NamedDependency[Services],
    prefer: Prefer = None,
    lane: AsLane = Lane.INTERACTIVE,
) -> Response[JobView]:
    """Scan a model's structure."""
    return await _scan(services, data, prefer, lane)


@post(
    "/api/scan/activation",
    status_code=202,
    response_description="The job, and where to look",
    operation_id="scanActivation",
    summary="fMRI: what each component writes to the residual stream",
    description="For each token of a prompt; the strongest neurons and likeliest next tokens as well.",
    tags=["scans"],
    responses=RESPONSES,
)
async def scan_activation(
    data: Annotated[
        ActivationScan,
        BodyKwarg(
            media_type=RequestEncodingType.JSON,
            examples=[
                Example(
                    summary="Every component",
                    value={"prompt": "The Eiffel Tower is located in"},
                ),
                Example(
                    summary="One layer at the last token",
                    value={
                        "prompt": "The Eiffel Tower is located in",
                        "layers": ["blocks.3.attn", "blocks.3.mlp"],
                        "aggregation": "l2_norm",
                        "include_residual": False,
                        "token_positions": [-1],
                    },
                ),
            ],
        ),
    ],
    services: NamedDependency[Services],
    prefer: Prefer = None,
    lane: AsLane = Lane.INTERACTIVE,
) -> Response[JobView]:
    """Scan a model's activations."""
    return await _scan(services, data, prefer, lane)


@post(
    "/api/scan/attention",
    status_code=202,
    response_description="The job, and where to look",
    operation_id="scanAttention",
    summary="Attention patterns of some layers",
    description="One table a layer, a row a head; each query's row sums to 1.",
    tags=["scans"],
    responses=RESPONSES,
)
async def scan_attention(
    data: Annotated[
        AttentionScan,
        BodyKwarg(
            media_type=RequestEncodingType.JSON,
            examples=[
                Example(
                    summary="Two layers",
                    value={"prompt": "The Eiffel Tower is located in", "layers": [0, 3]},
                )
            ],
        ),
    ],
    services: NamedDependency[Services],
    prefer: Prefer = None,
    lane: AsLane = Lane.INTERACTIVE,
) -> Response[JobView]:
    """Scan a model's attention patterns."""
    return await _scan(services, data, prefer, lane)


async def _scan(
    services: Services, scan: Scan, prefer: str | None, lane: Lane
) -> Response[JobView]:
    return await job_answer(services, await submit_scan(services, scan, lane), prefer)
