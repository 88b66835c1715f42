"""A diagnosis as a document: for people, for pull requests, for CI systems, for programs."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import msgspec

from neural_mri.contract.findings import Diagnosis
from neural_mri.contract.problems import InvalidRequest
from neural_mri.contract.suites import Language
from neural_mri.diagnostics.phrasing import Phrases
from neural_mri.diagnostics.reports.html import html
from neural_mri.diagnostics.reports.junit import junit
from neural_mri.diagnostics.reports.markdown import markdown
from neural_mri.diagnostics.reports.sarif import sarif

__all__ = ("FORMATS", "read_diagnosis", "render")


def _json(diagnosis: Diagnosis, phrases: Phrases) -> str:
    """The diagnosis itself, each finding with its sentences beside its numbers."""
    document = msgspec.to_builtins(diagnosis)
    for finding, said in zip(document["findings"], diagnosis.findings, strict=True):
        finding["said"] = phrases.say(said, diagnosis)._asdict()
    document["language"] = phrases.language.value
    return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"


FORMATS: Mapping[str, Callable[[Diagnosis, Phrases], str]] = MappingProxyType(
    {"html": html, "md": markdown, "json": _json, "junit": junit, "sarif": sarif}
)
"""`junit` is XML that CI systems read as tests, `sarif` JSON that code hosts read as findings."""


def render(diagnosis: Diagnosis, form: str, language: Language = Language.EN) -> str:
    """The document. Raises `InvalidRequest` for a form that is none."""
    if form not in FORMATS:
        raise InvalidRequest(
            f"{form!r} is no form of a report: expected one of {', '.join(FORMATS)}", form=form
        )
    return FORMATS[form](diagnosis, Phrases(language))


def read_diagnosis(body: bytes) -> Diagnosis:
    """A diagnosis from its JSON. Raises `InvalidRequest`."""
    try:
        return msgspec.json.decode(body, type=Diagnosis)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"this is not a diagnosis in JSON: {error}") from error
