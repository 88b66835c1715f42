"""A diagnosis as SARIF 2.1.0, which code hosts show among a repository's findings.

A finding's place is a component of a checkpoint, so it is a logical location; as hosts want a file too, the
suite is named, which the repository can hold. No run names itself (`automationDetails`): hosts take such a name for the
category that later findings replace, before the one that whoever uploads has given.
"""

from typing import Any

import msgspec

from neural_mri import __version__
from neural_mri.contract.findings import Diagnosis, Finding, Severity
from neural_mri.diagnostics.phrasing import Phrases
from neural_mri.diagnostics.reports.wording import legible

__all__ = ("sarif",)

_LEVELS = {Severity.FAILURE: "error", Severity.WARNING: "warning", Severity.NOTE: "note"}


def sarif(diagnosis: Diagnosis, phrases: Phrases) -> str:
    """The document."""
    rules = list(dict.fromkeys(finding.rule for finding in diagnosis.findings))
    document = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "Neural MRI",
                        "version": __version__,
                        "informationUri": "https://pypi.org/project/neural-mri/",
                        "rules": [
                            {
                                "id": rule.value,
                                "name": rule.name.title().replace("_", ""),
                                "shortDescription": {"text": rule.value.replace("-", " ")},
                            }
                            for rule in rules
                        ],
                    }
                },
                "language": {"en": "en-US", "ko": "ko-KR"}[phrases.language.value],
                "results": [
                    _result(finding, diagnosis, phrases, [rule.value for rule in rules])
                    for finding in diagnosis.findings
                ],
            }
        ],
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"


def _result(
    finding: Finding, diagnosis: Diagnosis, phrases: Phrases, rules: list[str]
) -> dict[str, Any]:
    said = phrases.say(finding, diagnosis)
    evidence = finding.evidence
    where = evidence.component or finding.case or "model"
    message = f"{said.title}. {said.text} {phrases('next')}: {said.next}"
    return {
        "ruleId": finding.rule.value,
        "ruleIndex": rules.index(finding.rule.value),
        "level": _LEVELS[finding.severity],
        "message": {"text": legible(message)},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": f"{diagnosis.suite}.toml"},
                    "region": {"startLine": 1},
                },
                "logicalLocations": [
                    {
                        "name": where,
                        "fullyQualifiedName": f"{diagnosis.candidate.model}/{where}",
                        "kind": "module",
                    }
                ],
            }
        ],
        "partialFingerprints": {
            "neuralMri/v1": f"{diagnosis.suite}:{finding.rule.value}:{finding.case or ''}:{where}"
        },
        "properties": {
            "layer": evidence.layer,
            "head": evidence.head,
            "value": evidence.value if abs(evidence.value) < 1e20 else None,
            "unit": evidence.unit,
            "pValue": evidence.p_value,
            "noise": evidence.noise,
            "scanKeys": list(evidence.scan_keys),
        },
    }
