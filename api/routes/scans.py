"""Scans and stimulation: each request becomes a job.

One table says what can be asked; every row is a route of its own, with its request's type and worked
examples in the OpenAPI document.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from litestar import Response, post
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg, QueryParameter

from api.answers import IdempotencyKey, Prefer, job_answer
from api.dependencies import Services
from api.problems import refusals
from api.results import FinishedJob
from api.submissions import submit_scan
from api.waiting import wait_seconds
from neural_mri.contract import stimuli
from neural_mri.contract.jobs import JobView, Lane
from neural_mri.contract.scans import (
    ActivationScan,
    AnomalyScan,
    AttentionScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    Scan,
    ScanBase,
    StructuralScan,
    TracingScan,
    WeightScan,
)

__all__ = ("SCANS",)

AsLane = Annotated[
    Lane,
    QueryParameter(description="How soon the job should run, and how much it counts against you."),
]
RESPONSES = {
    200: ResponseSpec(FinishedJob, description="The finished job", generate_examples=False),
    **refusals(409, 413, 415, 422, 429),
}

EIFFEL = "The Eiffel Tower is located in the city of"
JOHN = "When Mary and John went to the store, John gave a drink to"
ANNA = "When Mary and John went to the store, Anna gave a drink to"


class _Route(NamedTuple):
    """One kind of request."""

    path: str
    operation_id: str
    request: type[ScanBase]
    summary: str
    description: str
    examples: Mapping[str, Mapping[str, Any]]
    """Bodies by what they ask for."""
    tag: str = "scans"


_ROUTES: Sequence[_Route] = (
    _Route(
        "/api/scan/structural",
        "scanStructural",
        StructuralScan,
        "T1: structure and exact parameter counts",
        "From the model's configuration alone: nothing is loaded.",
        {"The default model": {}},
    ),
    _Route(
        "/api/scan/weights",
        "scanWeights",
        WeightScan,
        "T2: statistics of the published weights",
        "From the weight files, tensor by tensor: no model is loaded, no norm is folded in. With a "
        "`baseline`, what differs from that model's weights as well.",
        {
            "Every component": {},
            "One layer, and what counts as an outlier": {
                "layers": ["blocks.3.attn", "blocks.3.mlp"],
                "outlier_sigma": 4.0,
            },
        },
    ),
    _Route(
        "/api/scan/activation",
        "scanActivation",
        ActivationScan,
        "fMRI: what each component writes to the residual stream",
        "For each token of a prompt; the strongest neurons and likeliest next tokens as well.",
        {
            "Every component": {"prompt": EIFFEL},
            "One layer at the last token": {
                "prompt": EIFFEL,
                "layers": ["blocks.3.attn", "blocks.3.mlp"],
                "aggregation": "l2_norm",
                "include_residual": False,
                "token_positions": [-1],
            },
        },
    ),
    _Route(
        "/api/scan/attention",
        "scanAttention",
        AttentionScan,
        "Attention patterns of some layers",
        "One table a layer, a row a head; each query's row sums to 1.",
        {"Two layers": {"prompt": EIFFEL, "layers": [0, 3]}},
    ),
    _Route(
        "/api/scan/circuits",
        "scanCircuits",
        CircuitScan,
        "DTI: the effect of every component on a chosen next token, and the paths between them",
        "Effect = metric with the component replaced, minus metric of the clean run: negative where it "
        "helps. With `fast`, estimates come first and the strongest are then measured exactly.",
        {
            "What carries the likeliest token": {"prompt": EIFFEL},
            "Indirect objects, against a corrupt prompt": {
                "prompt": JOHN,
                "corrupt_prompt": ANNA,
                "answer": " Mary",
                "foil": " John",
            },
            "Exactly, every component set to its mean": {
                "prompt": EIFFEL,
                "answer": " Paris",
                "method": "ablation",
                "ablation": "mean",
                "edges": 0,
            },
        },
    ),
    _Route(
        "/api/scan/anomaly",
        "scanAnomaly",
        AnomalyScan,
        "FLAIR: uncertainty, where the answer appears, and whether it is supported",
        "The logit lens at every layer, in absolute nats, judged against the model's own calibration.",
        {
            "Every position": {"prompt": EIFFEL},
            "Only the answer, against a foil": {
                "prompt": EIFFEL,
                "answer": " Paris",
                "foil": " Rome",
                "token_positions": "target",
            },
        },
    ),
    _Route(
        "/api/perturb",
        "perturb",
        PerturbationScan,
        "Several perturbations at once, before and after",
        "Clean and perturbed run as rows of one batch. By hooks alone: no weight is ever changed.",
        {
            "A head silenced and an MLP doubled": {
                "prompt": EIFFEL,
                "answer": " Paris",
                "perturbations": [
                    {"operation": "zero", "component": "blocks.21.attn.head_3"},
                    {"operation": "amplify", "component": "blocks.4.mlp", "factor": 2.0},
                ],
            }
        },
        "stimulation",
    ),
    _Route(
        "/api/perturb/zero",
        "perturbZero",
        stimuli.ZeroRequest,
        "Set a component's output to 0",
        "",
        {"A head": {"prompt": EIFFEL, "component": "blocks.21.attn.head_3"}},
        "stimulation",
    ),
    _Route(
        "/api/perturb/amplify",
        "perturbAmplify",
        stimuli.AmplifyRequest,
        "Multiply a component's output",
        "",
        {"An MLP, doubled": {"prompt": EIFFEL, "component": "blocks.4.mlp", "factor": 2.0}},
        "stimulation",
    ),
    _Route(
        "/api/perturb/invert",
        "perturbInvert",
        stimuli.InvertRequest,
        "Change the sign of a component's output",
        "",
        {"A head": {"prompt": EIFFEL, "component": "blocks.21.attn.head_3"}},
        "stimulation",
    ),
    _Route(
        "/api/perturb/noise",
        "perturbNoise",
        stimuli.NoiseRequest,
        "Add Gaussian noise to a component's output",
        "`sigma` times the component's own root mean square; several draws run as rows of one batch, "
        "and mean and spread over them are reported.",
        {
            "An MLP, eight draws": {
                "prompt": EIFFEL,
                "component": "blocks.4.mlp",
                "sigma": 1.0,
                "seed": 7,
            }
        },
        "stimulation",
    ),
    _Route(
        "/api/perturb/ablate",
        "perturbAblate",
        stimuli.AblateRequest,
        "Replace a component's output by its mean over reference text",
        "The model's calibration has the means.",
        {"A head": {"prompt": EIFFEL, "component": "blocks.21.attn.head_3"}},
        "stimulation",
    ),
    _Route(
        "/api/perturb/inject",
        "perturbInject",
        stimuli.InjectRequest,
        "Add given values to a component's output, or put them in its place",
        "",
        {
            "A neuron, held at 5": {
                "prompt": EIFFEL,
                "component": "blocks.4.mlp.neuron_12",
                "values": [5.0],
                "mode": "replace",
            }
        },
        "stimulation",
    ),
    _Route(
        "/api/perturb/patch",
        "perturbPatch",
        stimuli.PatchRequest,
        "Put in a component's output in the run of another prompt",
        "Of as many tokens, so that positions correspond.",
        {
            "A layer's residual": {
                "prompt": JOHN,
                "source_prompt": ANNA,
                "component": "blocks.12.resid_post",
                "answer": " Mary",
                "foil": " John",
            }
        },
        "stimulation",
    ),
    _Route(
        "/api/perturb/reset",
        "perturbReset",
        stimuli.ResetRequest,
        "Nothing is done: the clean run",
        "Requests stand by themselves, so there is nothing to undo: resetting is the empty list.",
        {"A prompt": {"prompt": EIFFEL}},
        "stimulation",
    ),
    _Route(
        "/api/perturb/patching",
        "perturbPatching",
        PatchingScan,
        "Activation patching, as layer x position maps of recovery",
        "Recovery is unclamped, and NaN where the two prompts' metrics already agree.",
        {
            "Where the name is moved": {
                "prompt": JOHN,
                "corrupt_prompt": ANNA,
                "answer": " Mary",
                "foil": " John",
            }
        },
        "stimulation",
    ),
    _Route(
        "/api/perturb/trace",
        "perturbTrace",
        TracingScan,
        "Causal tracing (Meng et al. 2022), as layer x position maps",
        "Noise on the subject's embeddings; then clean states are restored one at a time.",
        {"Where the tower's city is known": {"prompt": EIFFEL, "subject": "The Eiffel Tower"}},
        "stimulation",
    ),
    _Route(
        "/api/model/calibrate",
        "calibrateModel",
        CalibrationScan,
        "Measure what scans of a model are read against",
        "Reference means and quantiles, and the lenses. Every model has a calibration on text of its own; "
        "this one is used by scans that name its `scan_key`.",
        {"With a ridge lens": {"lenses": ["bias", "ridge"], "n_tokens": 8192}},
        "models",
    ),
)


def _handler(route: _Route) -> HTTPRouteHandler:
    async def handle(
        data: ScanBase,
        services: NamedDependency[Services],
        prefer: Prefer = None,
        lane: AsLane = Lane.INTERACTIVE,
        idempotency_key: IdempotencyKey = None,
    ) -> Response[JobView]:
        asked = time.monotonic()
        # Who waits for the answer sees nothing before it.
        is_watched = wait_seconds(prefer) is None
        job = await submit_scan(services, _scan(data), lane, idempotency_key, is_watched=is_watched)
        return await job_answer(services, job, prefer, asked=asked)

    handle.__doc__ = route.summary + "."
    handle.__name__ = route.operation_id
    body = BodyKwarg(
        media_type=RequestEncodingType.JSON,
        examples=[Example(summary=name, value=value) for name, value in route.examples.items()],
    )
    # Litestar reads the signature; this is the one part of it that differs from route to route.
    handle.__annotations__["data"] = Annotated[route.request, body]
    return post(
        route.path,
        status_code=202,
        response_description="The job, and where to look",
        operation_id=route.operation_id,
        summary=route.summary,
        description=route.description or None,
        tags=[route.tag],
        responses=RESPONSES,
    )(handle)


def _scan(request: ScanBase) -> Scan:
    """The scan that a request asks for."""
    if isinstance(request, stimuli.ResetRequest):
        return request.scan()
    if isinstance(request, Scan):
        return request
    raise TypeError(f"{type(request).__name__} asks for no scan")


SCANS: Sequence[HTTPRouteHandler] = tuple(map(_handler, _ROUTES))
"""A route for each kind of request."""
