"""The chart's templates, filled in as far as they go: values, conditions on a line of their own, three pipes.

Not Helm. The chart keeps to this much of the language, and anything else in it is an error here.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ("CHART", "references", "render", "values")

CHART = Path(__file__).parents[2] / "deploy/helm/neural-mri"
_ACTION = re.compile(r"{{(-?)\s*(.*?)\s*(-?)}}")
_REFERENCE = re.compile(r"\.(?:Values|Release|Chart)(?:\.\w+)*")


def values() -> dict[str, Any]:
    """What the chart comes with."""
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return found


def references(text: str) -> set[str]:
    """Dotted names of the values a template reads."""
    actions = (match[2] for match in _ACTION.finditer(text))
    return {name for action in actions for name in _REFERENCE.findall(action)}


def render(name: str, given: Mapping[str, Any], release: str = "mri") -> list[dict[str, Any]]:
    """The objects of one template."""
    scope = {"Values": given, "Release": {"Name": release, "Namespace": "default"}}
    lines: list[str] = []
    shown = [True]
    for line in (CHART / "templates" / name).read_text().splitlines():
        control = re.fullmatch(r"{{- (if (?P<condition>\S+)|end) }}", line)
        if control is None:
            if shown[-1]:
                lines.append(_ACTION.sub(lambda match: _fill(match, scope), line))
        elif condition := control["condition"]:
            shown.append(shown[-1] and bool(_value(condition, scope)))
        else:
            shown.pop()
    assert shown == [True], f"{name}: a condition that does not end"
    return [each for each in yaml.safe_load_all("\n".join(lines)) if each is not None]


def _fill(match: re.Match[str], scope: Mapping[str, Any]) -> str:
    source, *pipes = (part.strip() for part in match[2].split("|"))
    value = _value(source, scope)
    for pipe in pipes:
        match pipe:
            case "quote":
                value = json.dumps(str(value))
            case "toJson":
                value = json.dumps(value)
            case "sha256sum":
                value = hashlib.sha256(str(value).encode()).hexdigest()
            case _:
                raise AssertionError(f"{pipe}: the chart uses quote, toJson and sha256sum alone")
    return str(value)


def _value(source: str, scope: Mapping[str, Any]) -> Any:
    assert _REFERENCE.fullmatch(source), f"{source}: the chart reads values alone"
    found: Any = scope
    for step in source.removeprefix(".").split("."):
        assert step in found, f"{source} is not among the values"
        found = found[step]
    return found
