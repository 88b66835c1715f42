"""Whose measurements these are, and which of them may be compared.

A record is everything that one suite measured of one checkpoint. Its key is known before anything is
measured: equal keys mean equal numbers, so a record that is there already is never measured again.
"""

import hashlib
import re

import msgspec

from neural_mri.contract.models import ModelName, Numerics
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scan_keys import SCANNER_VERSION

__all__ = (
    "MEASURES_VERSION",
    "NotComparable",
    "Subject",
    "check_comparable",
    "named_after",
    "record_key",
)

MEASURES_VERSION = "3"
"""Raised with every change to how a diagnosis asks the scanner and reads its tables."""


class NotComparable(Unprocessable):
    """These two measurements differ by more than the weights."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint, and how it is computed."""

    model: ModelName
    revision: str
    """SHA-256 over the weight files."""
    tokenizer_digest: str
    numerics: Numerics
    family: str
    n_layers: int
    n_heads: int
    n_parameters: int
    scanner_version: str = SCANNER_VERSION


def named_after(folder: str) -> str:
    """A checkpoint's name, where it is known by its folder alone."""
    return re.sub(r"[^\w.\-]+", "-", folder, flags=re.ASCII).lstrip("-._") or "model"


def record_key(subject: Subject, suite_digest: str, *, with_noise: bool) -> str:
    """The address of a record, 64 hexadecimal digits. The checkpoint's name is no part of it."""
    document = {
        "suite": suite_digest,
        "measures_version": MEASURES_VERSION,
        "with_noise": with_noise,
        **{name: value for name, value in msgspec.to_builtins(subject).items() if name != "model"},
    }
    return hashlib.sha256(msgspec.json.encode(document, order="sorted")).hexdigest()


def check_comparable(candidate: Subject, baseline: Subject) -> None:
    """Raises `NotComparable`, naming the first thing beside the weights in which the two differ."""
    theirs = (
        ("tokenizer", candidate.tokenizer_digest[:16], baseline.tokenizer_digest[:16]),
        ("dtype", candidate.numerics.dtype, baseline.numerics.dtype),
        ("device", candidate.numerics.device, baseline.numerics.device),
        ("attention kernel", candidate.numerics.attention, baseline.numerics.attention),
        ("scanner version", candidate.scanner_version, baseline.scanner_version),
        ("family", candidate.family, baseline.family),
        ("number of layers", candidate.n_layers, baseline.n_layers),
        ("number of heads", candidate.n_heads, baseline.n_heads),
        # Of one family the width alone may be another.
        ("number of parameters", candidate.n_parameters, baseline.n_parameters),
    )
    for what, here, there in theirs:
        if here != there:
            raise NotComparable(
                f"{candidate.model} and {baseline.model} cannot be compared: the {what} is {here!r} of "
                f"the one and {there!r} of the other",
                differs=what,
            )
