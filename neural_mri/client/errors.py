"""What can go wrong between a caller and the service, and what the caller can do about it.

ClientError
├── Unreachable      nobody answered: not started, another address, or the connection broke
│   └── Late         somebody is there, and took longer than the caller would wait
├── ClientClosed     the client was closed before it was asked
├── Refused          the service said no, in a problem document
├── NotUnderstood    something answered, but not as this version of Neural MRI does
├── Damaged          the bytes are not those that the result's manifest names
├── JobEnded         the job ended without a result
│   ├── JobFailed
│   └── JobCancelled
└── MissingExtra     a picture or a data frame was asked for, and its library is not installed
"""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from neural_mri.contract.jobs import JobState, JobView
from neural_mri.contract.problems import LimitReached

__all__ = (
    "ClientClosed",
    "ClientError",
    "Damaged",
    "JobCancelled",
    "JobEnded",
    "JobFailed",
    "Late",
    "MissingExtra",
    "NotUnderstood",
    "Refused",
    "Unreachable",
    "ended_without_result",
    "needing",
)


class ClientError(Exception):
    """Any of the above."""


class ClientClosed(ClientError):
    """The client was closed before it was asked."""

    def __init__(self) -> None:
        super().__init__("the client has been closed: make another")


class Unreachable(ClientError):
    """Nobody answered at the service's address."""

    def __init__(
        self,
        base_url: str,
        reason: str,
        *,
        sent: bool = True,
        broken: bool = False,
        advice: str = "start the service with `make up` or `python -m deploy.embedded`; if it runs "
        "elsewhere, say where with NMRI_URL or --url",
    ) -> None:
        super().__init__(f"{base_url} does not answer ({reason}): {advice}")
        self.base_url = base_url
        self.reason = reason
        self.sent = sent
        """Whether the request may have arrived: False where nothing has even been sent."""
        self.broken = broken
        """Whether somebody was there, and the connection broke."""


class Late(Unreachable):
    """The service was asked, and had not answered when the time for an answer was over."""

    def __init__(self, base_url: str, seconds: float) -> None:
        super().__init__(
            base_url,
            f"it took longer than {seconds:g} s",
            broken=True,
            advice="what was asked may still be done; NMRI_TIMEOUT or --timeout says how long to wait",
        )


_PASSING = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)


class Refused(ClientError):
    """The service refused a request; `document` is its RFC 9457 problem document, whole."""

    def __init__(
        self,
        document: dict[str, Any],
        *,
        status: int | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        said = document.get("status")
        self.document = document
        self.status = status or (said if isinstance(said, int) else 0)
        """The answer's own; the document's where it is all there is."""
        self.retry_after_seconds = retry_after_seconds
        """How long the service asks to wait before another attempt, where it does."""
        self.type = str(document.get("type", "about:blank"))
        self.title = str(document.get("title", ""))
        self.detail = str(document.get("detail") or self.title)
        self.members = {
            name: value
            for name, value in document.items()
            if name not in {"type", "title", "status", "detail", "instance"}
        }
        super().__init__(self.detail)

    @property
    def passes(self) -> bool:
        """Whether a later attempt may be answered: the service is busy, full or away, and says no more."""
        return self.status in _PASSING and self.type != LimitReached.type_urn()

    @property
    def did_nothing(self) -> bool:
        """Whether it passes, and the request is sure to have had no effect."""
        return self.status == HTTPStatus.TOO_MANY_REQUESTS and self.passes


class NotUnderstood(ClientError):
    """The answer is not one that this version of the client can read."""


class Damaged(ClientError):
    """A table's bytes or its account of itself disagree with the manifest."""


class JobEnded(ClientError):
    """The job reached its end without a result."""

    def __init__(self, job: JobView, message: str) -> None:
        super().__init__(message)
        self.job = job


class JobFailed(JobEnded):
    """It failed, ran out of time, or was set aside after losing too many workers."""


class JobCancelled(JobEnded):
    """Somebody cancelled it."""


class MissingExtra(ClientError):
    """A library that only some users need is not installed."""

    def __init__(self, package: str, wanted_for: str, extra: str = "plot") -> None:
        super().__init__(
            f"{wanted_for} needs {package}, which is not installed: "
            f"pip install 'neural-mri[{extra}]'"
        )
        self.package = package


def ended_without_result(job: JobView) -> JobEnded:
    """The error that a job which ended in any state but `succeeded` amounts to."""
    if job.state is JobState.CANCELLED:
        return JobCancelled(job, f"job {job.id} was cancelled")
    reason = (job.problem or {}).get("detail") or "the service gives no reason"
    return JobFailed(job, f"job {job.id} {job.state.value}: {reason}")


@contextmanager
def needing(library: str, wanted_for: str, extra: str = "plot") -> Iterator[None]:
    """Around the import of a library that may not be installed: raises `MissingExtra` if it is not."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise MissingExtra(library, wanted_for, extra) from error
