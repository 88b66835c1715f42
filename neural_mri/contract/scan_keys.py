"""The content address of a scan: equal keys mean equal numbers.

SHA-256 over canonical JSON (RFC 8785: keys sorted, no white space) of everything that changes a number:
the kind, every parameter with its default, the *token ids* instead of the text they came from, the
digests of weights and tokenizer, the numerics and the scanner's version. Never the user, the lane or how
the picture is shown.
"""

import hashlib
from typing import Any

import msgspec

from neural_mri.contract.models import Numerics
from neural_mri.contract.scans import PromptScan, Scan, kind_of

__all__ = ("SCANNER_VERSION", "scan_key")

SCANNER_VERSION = "1"
"""Raised with every change that moves a number, in whatever digit."""


def scan_key(
    scan: Scan,
    *,
    token_ids: tuple[int, ...] | None,
    revision: str,
    tokenizer_digest: str,
    numerics: Numerics,
    scanner_version: str = SCANNER_VERSION,
) -> str:
    """The scan's key, 64 hexadecimal digits."""
    parameters: dict[str, Any] = msgspec.to_builtins(scan)
    del parameters["scan_mode"], parameters["model"]
    if isinstance(scan, PromptScan):
        del parameters["prompt"]
    document = {
        "kind": kind_of(scan).value,
        "parameters": parameters,
        "token_ids": token_ids,
        "revision": revision,
        "tokenizer_digest": tokenizer_digest,
        "numerics": msgspec.to_builtins(numerics),
        "scanner_version": scanner_version,
    }
    return hashlib.sha256(msgspec.json.encode(document, order="sorted")).hexdigest()
