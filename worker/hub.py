"""Models of the Hugging Face hub, by the names they have there: `hf:ORG/REPO[@REVISION]`.

A branch or a tag is resolved to the commit it stands for, and that commit is what is fetched and recorded.
Only safetensors and JSON of the repository's top folder are: no pickle, no code, no other format's copy of
the weights. Where the hub is, who asks and where fetched files stay is the library's to know: `HF_ENDPOINT`,
`HF_TOKEN`, `HF_HOME`.

For the model store alone: whoever has imported `worker.scanner` is offline, and this says so.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import structlog

from neural_mri.backing.settings import without_credentials
from neural_mri.contract.problems import InvalidRequest, Unavailable, UnsupportedModel

__all__ = ("Repository", "begin", "fetch", "resolved")

# Read when the library is imported. It would tell what software asks, and ask the hub what to call it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they tear a log to pieces

PREFIX = "hf:"

PAUSES_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0)
"""How long a download that broke off is left before it goes on where it was: the library itself tries no longer than a
minute while nothing comes, and not at all where the connection is reset."""

NEEDED = ("config.json", "tokenizer.json")
"""Without which a model cannot be read, or its prompts not be encoded."""

_WRITTEN = re.compile(
    r"hf:(?P<id>(?:[\w.-]+/)?[\w.-]+)(?:@(?P<revision>[^\s@#,]+)(?:#(?P<commit>[0-9a-f]{40}))?)?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")

log = structlog.get_logger(__name__)


class Repository(NamedTuple):
    """A model's repository at a revision."""

    id: str
    """`ORG/REPO`."""
    revision: str
    """A branch, a tag or a commit, as it was asked for."""
    commit: str | None
    """What the revision stands for; None until the hub has been asked."""

    @classmethod
    def parsed(cls, text: str) -> Self:
        """A repository as it is written, or as `label` has it. Raises `InvalidRequest`."""
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise InvalidRequest(
                f"{text!r} is no repository of the hub: expected hf:ORG/REPO[@REVISION]"
            )
        revision = match["revision"] or "main"
        is_commit = _COMMIT.fullmatch(revision)
        return cls(match["id"], revision, revision if is_commit else match["commit"])

    @property
    def asked(self) -> str:
        """What was asked for: the same at any time."""
        return f"{PREFIX}{self.id}@{self.revision}"

    @property
    def label(self) -> str:
        """How the registry names it: what was asked for, and the commit that it was then."""
        return self.asked if self.commit in {None, self.revision} else f"{self.asked}#{self.commit}"


def begin() -> None:
    """Have the library read its variables now, before the scanner that sets them is imported."""
    from huggingface_hub import constants as _  # noqa: F401 -- it reads them when it is imported


def resolved(repository: Repository) -> Repository:
    """The repository with its commit; one that has it asks nobody.

    Raises `InvalidRequest` where the hub has no such thing for us, `Unavailable` where it does not answer.
    """
    if repository.commit is not None:
        return repository
    import huggingface_hub

    with _said(repository):
        found = huggingface_hub.resolve_revision(repository.id, revision=repository.revision)
    return repository._replace(commit=found.resolved)


def fetch(repository: Repository) -> Path:
    """The folder in the library's cache that holds what is read of a repository.

    Raises as `resolved` does, and `UnsupportedModel` for one that holds no model we read: before any of its
    weights is fetched.
    """
    import huggingface_hub

    with _said(repository):
        # Offline the cache may have it; what it lacks is said below.
        offline = huggingface_hub.is_offline_mode()
        weights = "*.safetensors" if offline else _weights(repository)
    for pause in () if offline else PAUSES_SECONDS:
        try:
            return _downloaded(repository, weights)
        except Unavailable as refusal:
            log.warning("download_broke_off", reason=refusal.detail, seconds=pause)
        time.sleep(pause)
    return _downloaded(repository, weights)


def _downloaded(repository: Repository, weights: str) -> Path:
    """What the cache lacks is fetched; what it holds of a file that broke off is not fetched again."""
    import huggingface_hub

    with _said(repository):
        folder = huggingface_hub.snapshot_download(
            repository.id,
            revision=repository.commit,
            allow_patterns=[weights, "*.json"],
            ignore_patterns="*/*",
        )
    return Path(folder)


def _weights(repository: Repository) -> str:
    """The pattern of the weights' files. Raises `UnsupportedModel`."""
    import huggingface_hub

    sizes = {
        entry.path: entry.size
        for entry in huggingface_hub.list_repo_tree(repository.id, revision=repository.commit)
        if isinstance(entry, huggingface_hub.RepoFile)
    }
    found = [name for name in sizes if name.endswith(".safetensors")]
    if not found:
        others = sorted(n for n in sizes if n.endswith((".bin", ".pt", ".pth", ".gguf", ".h5")))
        holds = f"holds {', '.join(others)}" if others else "holds no weights"
        raise UnsupportedModel(
            f"{repository.label} {holds}: only safetensors are fetched, because other formats can hold code"
        )
    if lacking := [name for name in NEEDED if name not in sizes]:
        raise UnsupportedModel(f"{repository.label} holds no {' and no '.join(lacking)}")
    # Some repositories hold the same weights twice, under their makers' names as well.
    usual = [name for name in found if name.startswith("model")]
    log.info(
        "model_is_fetched",
        source=repository.label,
        bytes=sum(sizes[name] for name in usual or found),
    )
    return "model*.safetensors" if usual else "*.safetensors"


@contextmanager
def _said(repository: Repository) -> Iterator[None]:
    """What goes wrong with the hub, in a sentence."""
    import huggingface_hub
    from httpx2 import HTTPError
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    endpoint = without_credentials(ENDPOINT)
    asked = repository.asked.removeprefix(PREFIX)
    try:
        yield
    except errors.GatedRepoError as error:
        raise InvalidRequest(
            f"{repository.id} is gated: agree to its terms at {endpoint}/{repository.id}, and set HF_TOKEN "
            "to a token that may read it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InvalidRequest(
            f"{endpoint} has no model {repository.id}, or none that is shown without a token that may "
            "read it (HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InvalidRequest(
            f"{repository.id} has no revision {repository.revision!r}: expected a branch, a tag or a commit"
        ) from error
    except (errors.HFValidationError, errors.DisabledRepoError, errors.BadRequestError) as error:
        raise InvalidRequest(f"{asked} is refused by {endpoint}: {_first_line(error)}") from error
    except (
        errors.RevisionResolutionError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        HTTPError,
    ) as error:
        if huggingface_hub.is_offline_mode():
            raise Unavailable(
                f"{asked} is not in the cache, and HF_HUB_OFFLINE keeps us from asking {endpoint}"
            ) from error
        raise Unavailable(
            f"{endpoint} does not answer for {asked}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = map(str.strip, str(error).splitlines())
    return without_credentials(next((line for line in lines if line), repr(error)))
