"""The chart's templates, filled in as far as they go: values, conditions and loops on lines of their own, three pipes.

Not Helm, and without a cluster. The chart keeps to this much of the language, and anything else in it is an error here.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ("CHART", "references", "render", "text", "values")

CHART = Path(__file__).parents[2] / "deploy/helm/neural-mri"
_ACTION = re.compile(r"{{(-?)\s*(.*?)\s*(-?)}}")
_CONTROL = re.compile(
    r"{{- (?:if (?P<condition>\S+|not \(kindIs \"invalid\" (?P<given>\S+)\))|range \$name, \$value := (?P<range>\S+)|(?P<end>end)) }}"
)
_INCLUDE = re.compile(r'include \(print \$\.Template\.BasePath "/([\w.]+)"\) \.')
_LOOKUP = re.compile(r'lookup "v1" "Secret" \.Release\.Namespace \.Values\.secretName')
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
    return [each for each in yaml.safe_load_all(text(name, given, release)) if each is not None]


def text(name: str, given: Mapping[str, Any], release: str = "mri") -> str:
    """One template, filled in."""
    scope = {"Values": given, "Release": {"Name": release, "Namespace": "default"}}
    lines = (CHART / "templates" / name).read_text().splitlines()
    return "\n".join(_filled(lines, scope))


def _filled(lines: list[str], scope: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    at = 0
    while at < len(lines):
        control = _CONTROL.fullmatch(lines[at])
        if control is None:
            found.append(_ACTION.sub(lambda match: _fill(match, scope), lines[at]))
            at += 1
            continue
        assert not control["end"], f"line {at + 1}: an end of nothing"
        end = _end(lines, at)
        body = lines[at + 1 : end]
        if control["given"]:
            found += _filled(body, scope) if _value(control["given"], scope) is not None else []
        elif control["condition"]:
            found += _filled(body, scope) if _value(control["condition"], scope) else []
        else:
            for name, value in sorted(_value(control["range"], scope).items()):
                found += _filled(body, {**scope, "$name": name, "$value": value})
        at = end + 1
    return found


def _end(lines: list[str], start: int) -> int:
    """The line on which what begins on that one ends."""
    depth = 0
    for at in range(start, len(lines)):
        if control := _CONTROL.fullmatch(lines[at]):
            depth += -1 if control["end"] else 1
            if depth == 0:
                return at
    raise AssertionError(f"{lines[start]}: does not end")


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
    if source in {"$name", "$value"}:
        return scope[source]
    if include := _INCLUDE.fullmatch(source):
        return text(include[1], scope["Values"], scope["Release"]["Name"])
    if _LOOKUP.fullmatch(source):
        return {}
    assert _REFERENCE.fullmatch(source), f"{source}: the chart reads values alone"
    found: Any = scope
    for step in source.removeprefix(".").split("."):
        assert step in found, f"{source} is not among the values"
        found = found[step]
    return found
