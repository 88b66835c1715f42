"""The compose file as Compose reads it: merged, interpolated, services with their environments."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ("COMPOSE", "MissingVariable", "merged", "services", "started")

COMPOSE = Path(__file__).parents[2] / "deploy/compose/compose.yaml"


class MissingVariable(Exception):
    """The file needs a variable that the environment does not have."""


def services(environment: Mapping[str, str], path: Path = COMPOSE) -> dict[str, dict[str, Any]]:
    """The file's services under these variables. Raises `MissingVariable`."""
    loaded = yaml.safe_load(path.read_text())
    found: dict[str, dict[str, Any]] = _filled(loaded["services"], environment)
    return found


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Services of one file with those of another over them: mappings are merged, everything else replaced."""
    found = dict(below)
    for key, value in above.items():
        before = found.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            found[key] = merged(before, value)
        else:
            found[key] = value
    return found


def started(found: Mapping[str, dict[str, Any]], profile: str = "") -> dict[str, dict[str, Any]]:
    """Those of the services that `up` starts."""
    return {
        name: service
        for name, service in found.items()
        if "profiles" not in service or profile in service["profiles"]
    }


def _filled(value: Any, environment: Mapping[str, str]) -> Any:
    match value:
        case str():
            return interpolated(value, environment)
        case dict():
            return {key: _filled(each, environment) for key, each in value.items()}
        case list():
            return [_filled(each, environment) for each in value]
        case _:
            return value


def interpolated(text: str, environment: Mapping[str, str]) -> str:
    """Text with `$$`, `${NAME}`, `${NAME:-other}` and `${NAME:?message}` filled in, one in another too."""
    parts, at = [], 0
    while (start := text.find("$", at)) >= 0:
        parts.append(text[at:start])
        if text[start : start + 2] == "$$":
            parts.append("$")
            at = start + 2
            continue
        assert text[start : start + 2] == "${", f"{text}: expected ${{NAME}}"
        end = _closing(text, start + 2)
        parts.append(_variable(text[start + 2 : end], environment))
        at = end + 1
    return "".join([*parts, text[at:]])


def _closing(text: str, at: int) -> int:
    depth = 1
    for place in range(at, len(text)):
        if text.startswith("${", place):
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return place
    raise AssertionError(f"{text}: a variable that does not end")


def _variable(inner: str, environment: Mapping[str, str]) -> str:
    match = re.fullmatch(r"(\w+)(?:(:-|:\?)(.*))?", inner, re.DOTALL)
    assert match, f"{inner}: no variable"
    name, how, rest = match.groups()
    if value := environment.get(name, ""):
        return value
    if how == ":-":
        return interpolated(rest, environment)
    raise MissingVariable(f"{name}: {rest or 'not set'}")
