"""Models: what is registered, what is held, and asking workers to hold more or less."""

import asyncio
from typing import Annotated

from litestar import Response, delete, get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody, QueryParameter

from api.access import needs
from api.answers import IdempotencyKey, Prefer, job_answer
from api.dependencies import Services
from api.problems import refusals
from api.residents import holdings
from api.results import FinishedJob
from api.submissions import submit_model_job
from neural_mri.backing import models
from neural_mri.contract.auth import Scope
from neural_mri.contract.jobs import JobKind, JobView
from neural_mri.contract.models import ModelInfo, ModelRequest
from neural_mri.contract.problems import Conflict, ModelBusy

__all__ = ("list_models", "load_model", "model_info", "unload_model")

NamedModel = Annotated[
    str | None,
    QueryParameter(
        name="model", description="A registered model's name; the default model's where left out."
    ),
]
JOB_RESPONSES = {
    200: ResponseSpec(FinishedJob, description="The finished job", generate_examples=False),
    **refusals(409, 415, 422, 429),
}


@get(
    "/api/models",
    operation_id="listModels",
    summary="Every registered model, and where it stands",
    tags=["models"],
    responses=refusals(),
)
async def list_models(services: NamedDependency[Services]) -> list[ModelInfo]:
    """List models."""
    registered, held = await asyncio.gather(
        services.sessions.read(models.all), holdings(services.redis)
    )
    return [held.info(model, services.settings) for model in registered]


@get(
    "/api/model/info",
    operation_id="modelInfo",
    summary="A registered model's shape, and where it stands",
    tags=["models"],
    responses=refusals(422),
)
async def model_info(services: NamedDependency[Services], name: NamedModel = None) -> ModelInfo:
    """Describe a model."""
    registered, held = await asyncio.gather(services.model(name), holdings(services.redis))
    return held.info(registered, services.settings)


@post(
    "/api/model/load",
    status_code=202,
    response_description="The job, and where to look",
    operation_id="loadModel",
    summary="Ask a worker to hold a model",
    tags=["models"],
    opt=needs(Scope.MODEL_LOAD),
    responses=JOB_RESPONSES,
)
async def load_model(
    data: JSONBody[ModelRequest],
    services: NamedDependency[Services],
    prefer: Prefer = None,
    idempotency_key: IdempotencyKey = None,
) -> Response[JobView]:
    """Load a model."""
    model = await services.model(data.model)
    job = await submit_model_job(services, JobKind.LOAD, model, idempotency_key)
    return await job_answer(services, job, prefer)


@delete(
    "/api/model/unload",
    status_code=202,
    response_description="The job, and where to look",
    operation_id="unloadModel",
    summary="Give a model's memory back",
    description="The model is named in the query or in the body.",
    tags=["models"],
    opt=needs(Scope.MODEL_LOAD),
    responses=JOB_RESPONSES,
)
async def unload_model(
    services: NamedDependency[Services],
    name: NamedModel = None,
    data: JSONBody[ModelRequest | None] = None,
    prefer: Prefer = None,
    idempotency_key: IdempotencyKey = None,
) -> Response[JobView]:
    """Unload a model."""
    model = await services.model(data.model if data is not None else name)
    if model.name in services.settings.pinned:
        raise ModelBusy(
            f"{model.name} is pinned (NEURAL_MRI_PINNED_MODELS) and stays loaded", model=model.name
        )
    held = await holdings(services.redis)
    if held.is_known and not held.workers(model.revision):
        # A worker that starts later must not load it again.
        await services.sessions.write(models.set_wanted, model.name, wanted=False)
        raise Conflict(f"no worker holds {model.name}: nothing is to be unloaded", model=model.name)
    job = await submit_model_job(services, JobKind.UNLOAD, model, idempotency_key)
    return await job_answer(services, job, prefer)
