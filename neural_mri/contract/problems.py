"""Refusals, as RFC 9457 problem details.

A refusal is the caller's to mend: it names the value and what was expected. The class name gives the
`type`, the first line of the docstring the `title`, the message the `detail`, keywords the members.

    Problem
    ├── InvalidRequest          400  the request could not be read
    ├── NotFound                404  no such thing, or not yours
    │   ├── UnknownJob
    │   └── UnknownTable
    ├── Conflict                409  the thing is not in a state that allows this
    │   ├── ResultNotReady
    │   ├── ModelBusy
    │   └── ModelNotLoaded
    ├── Gone                    410  it was here; its bytes are not
    ├── Unprocessable           422  understood, and impossible
    │   ├── UnknownModel
    │   ├── UnsupportedModel
    │   ├── UnknownComponent
    │   ├── InvalidAddress
    │   ├── InvalidPositions
    │   └── PromptTooLong
    ├── TooMany                 429  over a bound that passes with time
    │   └── LimitReached                 over one that does not
    └── Unavailable             503  the environment's fault; try again
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = (
    "Conflict",
    "Gone",
    "InvalidAddress",
    "InvalidPositions",
    "InvalidRequest",
    "LimitReached",
    "ModelBusy",
    "ModelNotLoaded",
    "NotFound",
    "Problem",
    "ProblemDocument",
    "PromptTooLong",
    "ResultNotReady",
    "TooMany",
    "Unavailable",
    "UnknownComponent",
    "UnknownJob",
    "UnknownModel",
    "UnknownTable",
    "Unprocessable",
    "UnsupportedModel",
)

MEDIA_TYPE = "application/problem+json"

type_prefix = "urn:neural-mri:problem:"

ProblemDocument = dict[str, Any]


class Problem(Exception):
    """The request was refused."""

    status: ClassVar[int] = 400

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members: Mapping[str, Any] = members

    @classmethod
    def type_urn(cls) -> str:
        """`UnknownComponent` -> `urn:neural-mri:problem:unknown-component`."""
        return type_prefix + re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @classmethod
    def title(cls) -> str:
        """The first line of the docstring, without its full stop."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip(".")

    def document(self) -> ProblemDocument:
        """The body of the answer, as RFC 9457 section 3 has it."""
        return {
            "type": self.type_urn(),
            "title": self.title(),
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }


class InvalidRequest(Problem):
    """The request could not be read."""


class NotFound(Problem):
    """There is no such thing here."""

    status = 404


class UnknownJob(NotFound):
    """There is no such job."""


class UnknownTable(NotFound):
    """The result has no such table."""


class Conflict(Problem):
    """The thing is not in a state that allows this."""

    status = 409


class ResultNotReady(Conflict):
    """The job has not succeeded, so it has no result."""


class ModelBusy(Conflict):
    """The model cannot be taken away now."""


class ModelNotLoaded(Conflict):
    """No worker is asked to hold this model."""


class Gone(Problem):
    """The bytes of this result are missing or damaged."""

    status = 410


class Unprocessable(Problem):
    """The request was understood, and cannot be done."""

    status = 422


class UnknownModel(Unprocessable):
    """No such model is registered."""


class UnsupportedModel(Unprocessable):
    """This model cannot be scanned faithfully."""


class UnknownComponent(Unprocessable):
    """The model has no such component."""


class InvalidAddress(Unprocessable):
    """This is not the address of a component."""


class InvalidPositions(Unprocessable):
    """The prompt has no such token positions."""


class PromptTooLong(Unprocessable):
    """The prompt is longer than the model's context."""


class TooMany(Problem):
    """Too many requests."""

    status = 429


class LimitReached(TooMany):
    """There are as many as there can be."""


class Unavailable(Problem):
    """Something this service stands on is not answering."""

    status = 503
