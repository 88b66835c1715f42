"""The content address of a scan: equal keys mean equal numbers.

SHA-256 over canonical JSON (RFC 8785: keys sorted, no white space) of everything that changes a number:
the kind, every parameter with its default, the *token ids* instead of the texts they came from (beside
those that are not in normal form), the digests of weights and tokenizer, the numerics and the scanner's
version. Never the user, the lane or how the picture is shown.
"""

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any

import msgspec

from neural_mri.contract.models import Numerics
from neural_mri.contract.scans import (
    CalibrationScan,
    CircuitScan,
    PromptScan,
    Scan,
    TracingScan,
    kind_of,
)
from neural_mri.contract.tokens import Operands

__all__ = ("ANSWERS", "SCANNER_VERSION", "calibration_key", "scan_key")

NO_OPERANDS = Operands()
ANSWERS = ("answer", "foil")
"""Fields of a `TargetedScan` that name one token each."""

SCANNER_VERSION = "3"
"""Raised with every change that moves a number, in whatever digit."""


def scan_key(
    scan: Scan,
    *,
    token_ids: tuple[int, ...] | None,
    revision: str,
    tokenizer_digest: str,
    numerics: Numerics,
    operands: Operands = NO_OPERANDS,
    baseline_revision: str | None = None,
    scanner_version: str = SCANNER_VERSION,
) -> str:
    """The scan's key, 64 hexadecimal digits.

    `operands` has the tokens of what the scan reads beside its prompt; `baseline_revision` is the digest
    of the weights that it compares with.
    """
    parameters: dict[str, Any] = _as_tokens(msgspec.to_builtins(scan), operands)
    del parameters["scan_mode"], parameters["model"]
    if isinstance(scan, CircuitScan) and not scan.canonical:
        # Came later than the scan: what did not ask for it has the key that it always had.
        del parameters["canonical"]
    if (
        isinstance(scan, PromptScan)
        and not isinstance(scan, TracingScan)
        and _is_told_by_its_tokens(scan.prompt)
    ):
        # Where a subject stands is read off the text itself.
        del parameters["prompt"]
    if "baseline" in parameters:
        parameters["baseline"] = baseline_revision
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


def calibration_key(*, revision: str, tokenizer_digest: str, numerics: Numerics) -> str:
    """The key of a model's own calibration: the one that scans are read against by default."""
    return scan_key(
        CalibrationScan(),
        token_ids=None,
        revision=revision,
        tokenizer_digest=tokenizer_digest,
        numerics=numerics,
    )


_TEXTS = frozenset({"corrupt_prompt", "source_prompt", "texts"})
"""Fields that hold other prompts."""


def _as_tokens(value: Any, operands: Operands) -> Any:
    """The same parameters with token ids in place of texts."""
    if isinstance(value, Mapping):
        return {
            name: _ids(inner, operands)
            if name in _TEXTS
            else operands.token_ids.get(name, inner)
            if name in ANSWERS
            else _as_tokens(inner, operands)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_as_tokens(inner, operands) for inner in value]
    return value


def _ids(text: Any, operands: Operands) -> Any:
    if isinstance(text, list | tuple):
        return [_ids(one, operands) for one in text]
    if text not in operands.prompts:
        return text
    ids = list(operands.prompts[text].ids)
    return ids if _is_told_by_its_tokens(text) else {"ids": ids, "text": text}


def _is_told_by_its_tokens(text: str) -> bool:
    """Whether no other text has the same tokens, places of characters included.

    Many tokenizers compose what is not in Unicode's normal form C: it has the tokens of another text, of which each
    stands elsewhere.
    """
    return unicodedata.is_normalized("NFC", text)
