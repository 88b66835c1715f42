"""Every Redis key, queue name and storage path, in one place."""

import re
from typing import NamedTuple
from uuid import UUID

__all__ = (
    "ATTEMPTS",
    "CALIBRATIONS",
    "CONTROL_QUEUE",
    "CPU_QUEUE",
    "DELETED",
    "ENDED",
    "WORKERS",
    "Attempt",
    "attempt_of",
    "beside",
    "calibration_path",
    "cancel_flag",
    "chunk_path",
    "event_stream",
    "has_pieces",
    "heartbeat",
    "is_packed",
    "kept_result_path",
    "manifest_path",
    "once_kept_result_path",
    "packed_path",
    "pieces_path",
    "placement_queue",
    "rate",
    "result_of",
    "scan_queue",
    "table_path",
    "tokenizer_path",
    "watched",
)

CPU_QUEUE = "cpu"
"""Work that needs no loaded model; every worker listens."""
CONTROL_QUEUE = "load"
"""Requests to load a model, or to let it go; every worker listens."""

ENDED = "ended"
"""Redis channel on which the ids of jobs are said that have just ended, as 16 bytes."""

DELETED = "deleted"
"""Redis hash of how much has been deleted since Redis was emptied, by what it was and why: `job:age`."""

WORKERS = "workers"
"""Redis set of the names that may have a heartbeat."""

ATTEMPTS = ("packed", "pieces", "manifests")
"""Folders of what single attempts have measured."""

CALIBRATIONS = tuple(f"calibrations/{number:02x}" for number in range(256))
"""Folders of calibrations, by how their scan keys begin."""

_TABLE = re.compile(r"(pieces/[0-9a-f-]{36}\.[0-9]+)\.[0-9a-f]{64}\.arrow")


def scan_queue(revision: str) -> str:
    """The Celery queue of work for one set of weights; workers that hold them listen."""
    return f"scan.{revision[:16]}"


def placement_queue(worker: str) -> str:
    """One worker's own queue: a ticket there asks it to think about what it holds."""
    return f"place.{worker}"


def event_stream(job_id: UUID) -> str:
    """Redis stream of a job's events; its entry ids are the SSE ids."""
    return f"events:{job_id}"


def watched(job_id: UUID) -> str:
    """Redis key set while somebody may look at a job's frames as they come."""
    return f"watched:{job_id}"


def cancel_flag(job_id: UUID) -> str:
    """Redis key set while a running job is asked to stop."""
    return f"cancel:{job_id}"


def rate(who: str) -> str:
    """Redis key that counts a caller's requests of a minute, and is gone after it."""
    return f"rate:{who}"


def heartbeat(worker: str) -> str:
    """Redis key under which a worker says what it holds; it expires unless said again."""
    return f"worker:{worker}"


def chunk_path(sha256: str) -> str:
    """A table's bytes, under their own hash."""
    return f"chunks/{sha256[:2]}/{sha256}.arrow"


def packed_path(job_id: UUID, attempt: int) -> str:
    """An attempt's whole result in one file: two attempts never share one."""
    return f"packed/{job_id}.{attempt}.result"


def is_packed(path: str) -> bool:
    """Whether a result's path is that of one file with its tables in it."""
    return path.endswith(".result")


def pieces_path(job_id: UUID, attempt: int) -> str:
    """The manifest of an attempt whose tables stand beside it: nobody else's, and gone when it goes."""
    return f"pieces/{job_id}.{attempt}.json"


def has_pieces(path: str) -> bool:
    """Whether a result's path is that of a manifest with its tables beside it."""
    return path.startswith(("pieces/", "saved/"))


def manifest_path(job_id: UUID, attempt: int) -> str:
    """The manifest of an attempt whose tables stand under their own hashes, as they once did."""
    return f"manifests/{job_id}.{attempt}.json"


def table_path(manifest: str, sha256: str) -> str:
    """A table's bytes, by where the manifest that names it stands, and by their hash."""
    if has_pieces(manifest):
        return f"{manifest.removesuffix('.json')}.{sha256}.arrow"
    return chunk_path(sha256)


def beside(manifest: str) -> tuple[str, str]:
    """The folder in which an attempt's tables stand beside their manifest, and how the names of all of them begin."""
    folder, _, name = manifest.rpartition("/")
    return folder, name.removesuffix("json")


class Attempt(NamedTuple):
    """One claim of a job."""

    job_id: UUID
    """The id under which its worker knows the job."""
    number: int

    @property
    def results(self) -> tuple[str, ...]:
        """What a job's row may name as its result: one of them, as large as the result has turned out."""
        return packed_path(*self), pieces_path(*self), manifest_path(*self)


def result_of(path: str) -> str:
    """What a job's row names, of whose result a file is part."""
    table = _TABLE.fullmatch(path)
    return f"{table[1]}.json" if table else path


def attempt_of(path: str) -> Attempt | None:
    """Whose result a file is, or is part of; None for a file of another kind."""
    result = result_of(path)
    try:
        job_id, number, _ = result.rpartition("/")[2].split(".")
        attempt = Attempt(UUID(job_id), int(number))
    except ValueError:
        return None
    return attempt if result in attempt.results else None


def kept_result_path(digest: str) -> str:
    """A manifest that a session keeps, under its own hash, its tables beside it: it outlives the job that wrote it."""
    return f"saved/{digest[:2]}/{digest}.json"


def once_kept_result_path(digest: str) -> str:
    """The same where its tables stand under their own hashes, among everybody's, as they once did."""
    return f"kept/{digest[:2]}/{digest}.json"


def calibration_path(scan_key: str) -> str:
    """The manifest of a model's own calibration, under its scan key: whoever needs it finds it there."""
    return f"calibrations/{scan_key[:2]}/{scan_key}.json"


def tokenizer_path(digest: str) -> str:
    """A tokenizer's `tokenizer.json`, so that the API need not see the model store."""
    return f"tokenizers/{digest}.json"
