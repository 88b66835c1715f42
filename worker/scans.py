"""One scan, from the job's row to tables that say whose they are.

Sees to it that the numbers are those that the job's scan key promises. Knows neither queue nor store.
"""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import pyarrow as pa
import torch

from neural_mri.backing.jobs import Job
from neural_mri.backing.models import RegisteredModel
from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import Conflict, Unavailable
from neural_mri.contract.results import Manifest, provenance_of, stamp
from neural_mri.contract.scan_keys import SCANNER_VERSION, scan_key
from neural_mri.contract.scans import (
    ActivationScan,
    AttentionScan,
    Scan,
    StructuralScan,
    decode_scan,
    kind_of,
)
from neural_mri.contract.tokens import Tokens
from worker.residency import Resident
from worker.scanner.activations import scan_activations
from worker.scanner.attention import scan_attention
from worker.scanner.listening import Listener
from worker.scanner.prompts import ScanOutput
from worker.scanner.topology import scan_topology

__all__ = ("ModelChanged", "Scanned", "perform")


class ModelChanged(Conflict):
    """The model is no longer the one that the job was made for."""


class Scanned(NamedTuple):
    """A result that is not stored yet."""

    manifest: Manifest
    """Everything but the tables' addresses."""
    tables: Mapping[str, pa.Table]


def perform(
    job: Job,
    registered: RegisteredModel | None,
    resident: Resident | None,
    *,
    models_dir: Path,
    listener: Listener,
) -> Scanned:
    """Run a job's scan. `resident` is the model with the job's weights, where it is held.

    Raises `ModelChanged` when the numbers would not be those of the job's key, `Cancelled` when the
    listener stops it, and what the scanner refuses.
    """
    started = time.perf_counter()
    scan = decode_scan(job.request)
    if registered is None or registered.revision != job.revision:
        raise ModelChanged(
            f"{job.model} no longer has the weights {job.revision[:16]}: send the request again",
            model=job.model,
        )
    numerics = registered.numerics if resident is None else resident.model.numerics
    key = _promised_key(job, scan, registered, numerics)
    with torch.inference_mode():  # this thread's alone, so it is entered here
        output = _output(job, scan, models_dir / registered.folder, resident, listener)
    manifest = Manifest(
        scan_key=key,
        kind=kind_of(scan),
        model=job.model,
        revision=job.revision,
        numerics=numerics,
        scanner_version=SCANNER_VERSION,
        request=msgspec.json.decode(job.request),
        prompt_tokens=job.tokens.texts if job.tokens else (),
        tables=(),
        created_at=datetime.now(UTC),
        forward_seconds=output.forward_seconds,
        compute_seconds=time.perf_counter() - started,
        memory_bytes=_memory_bytes(numerics.device),
    )
    return Scanned(
        manifest, {name: _signed(table, manifest) for name, table in output.tables.items()}
    )


def _promised_key(job: Job, scan: Scan, registered: RegisteredModel, numerics: Numerics) -> str:
    key = scan_key(
        scan,
        token_ids=job.tokens.ids if job.tokens else None,
        revision=registered.revision,
        tokenizer_digest=registered.tokenizer_digest,
        numerics=numerics,
    )
    if job.scan_key not in (None, key):
        raise ModelChanged(
            f"{job.model} is computed otherwise since the request was made (data type, device, "
            "attention, tokenizer or the scanner's version): send the request again",
            model=job.model,
        )
    return key


def _output(
    job: Job, scan: Scan, folder: Path, resident: Resident | None, listener: Listener
) -> ScanOutput:
    if isinstance(scan, StructuralScan):
        return ScanOutput(scan_topology(folder), forward_seconds=0.0)
    if resident is None:
        raise Unavailable(f"{job.model} is not in this worker's memory: load it, then scan again")
    model, tokens = resident.model, _tokens(job)
    match scan:
        case ActivationScan():
            return scan_activations(model, scan, tokens, listener)
        case AttentionScan():
            return scan_attention(model, scan, tokens, listener)


def _tokens(job: Job) -> Tokens:
    if job.tokens is None:
        raise ValueError(f"job {job.id} is a scan of a prompt, but its row has no tokens")
    return job.tokens


def _signed(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The table, saying whose weights and which scan it is of."""
    provenance = msgspec.structs.replace(
        provenance_of(table),
        model=manifest.model,
        revision=manifest.revision,
        scan_key=manifest.scan_key,
        scanner_version=manifest.scanner_version,
    )
    return stamp(table, provenance)


def _memory_bytes(device: str) -> int:
    """Memory that this process holds on the model's device."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    resident: int = psutil.Process().memory_info().rss
    return resident
