"""Prompts as models read them."""

from typing import Annotated

from litestar import post
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg

from api.access import needs
from api.dependencies import Services
from api.preparation import tokens_of_prompt
from api.problems import refusals
from neural_mri.contract.auth import Scope
from neural_mri.contract.scans import PromptScan
from neural_mri.contract.tokens import Tokens

__all__ = ("TokenizeRequest", "tokenize")


class TokenizeRequest(PromptScan, frozen=True, kw_only=True):
    """A prompt, and the model that should read it."""


@post(
    "/api/tokenize",
    status_code=200,
    operation_id="tokenize",
    summary="A prompt's tokens",
    description=(
        "Exactly what a scan of the prompt reads. A token that is part of a character has an empty "
        "text; the first token of that character carries it."
    ),
    tags=["models"],
    opt=needs(Scope.SCAN_READ),
    responses=refusals(413, 415, 422),
)
async def tokenize(
    data: Annotated[
        TokenizeRequest,
        BodyKwarg(
            media_type=RequestEncodingType.JSON,
            examples=[Example(value={"prompt": "The Eiffel Tower is located in"})],
        ),
    ],
    services: NamedDependency[Services],
) -> Tokens:
    """Tokenize a prompt."""
    return await tokens_of_prompt(services, await services.model(data.model), data.prompt)
