"""What was expected of a value that could not be read, and what was found: msgspec says one of the two.

The place it names is followed through what was sent and through the type that this was read as. What people
write for a model to read is never said again: a refusal may come into a log.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from neural_mri.backing.logs import USER_DATA

__all__ = ("explained", "place_in")

LONGEST = 60
"""Characters of a value that a refusal repeats."""

_PLACE = re.compile(r" - at `\$\.?(.*)`$", re.DOTALL)
_STEP = re.compile(r"\[(\d+)\]|\.?([^.\[\]]+)")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_NO_SUCH = ("Invalid enum value ", "Invalid value ")
_NOTHING: Any = object()


class _Place(NamedTuple):
    """A place in a request."""

    kinds: tuple[inspect.Type, ...]
    """What may stand there; none where that is not known."""
    value: Any
    """What does."""
    tags: tuple[str, ...] = ()
    """Of structs, where it is what tells them apart."""
    is_told: bool = True
    """Whether the value may be said again."""


def place_in(complaint: str) -> tuple[str, str]:
    """A complaint of msgspec's without the place, and the place: a path such as `perturbations[0].factor`."""
    found = _PLACE.search(complaint)
    return (complaint, "") if found is None else (complaint[: found.start()], found[1])


def explained(complaint: str, annotation: Any, sent: Any = _NOTHING, path: str = "") -> str:
    """The complaint, with what was found and what can stand there.

    Args:
        complaint: msgspec's, without the place.
        annotation: The type that the whole was read as.
        sent: What was read, as JSON's own values; left out where that is not known.
        path: The place in it; empty for the whole.
    """
    place = _followed(annotation, sent, path)
    if (unknown := _UNKNOWN.match(complaint)) is not None:
        fields = _fields(place)
        said = f"Object contains unknown field `{_short(unknown[1])}`"
        return f"{said}: expected one of {', '.join(fields)}" if fields else said
    for opening in _NO_SUCH:
        if complaint.startswith(opening):
            choices = [repr(tag) for tag in place.tags] or [*_choices(place.kinds)]
            said = (opening + (_shown(place) or "")).rstrip()
            if place.value is _NOTHING:
                said = complaint
            return f"{said}: expected one of {', '.join(choices)}" if choices else said
    if complaint.startswith("Expected "):
        return complaint + _got(complaint, place)
    return complaint


def _followed(annotation: Any, sent: Any, path: str) -> _Place:
    place = _Place(_kinds(annotation), sent)
    for index, name in _STEP.findall(path):
        place = _item(place, int(index)) if index else _field(place, name)
    return place


@cache
def _kinds(annotation: Any) -> tuple[inspect.Type, ...]:
    try:
        return tuple(_alternatives(inspect.type_info(annotation)))
    except TypeError:  # none of msgspec's
        return ()


def _alternatives(kind: inspect.Type) -> Iterator[inspect.Type]:
    match kind:
        case inspect.UnionType():
            for each in kind.types:
                yield from _alternatives(each)
        case inspect.Metadata():
            yield from _alternatives(kind.type)
        case _:
            yield kind


def _item(place: _Place, index: int) -> _Place:
    kinds: list[inspect.Type] = []
    for kind in place.kinds:
        match kind:
            case inspect.ListType() | inspect.VarTupleType():
                kinds += _alternatives(kind.item_type)
            case inspect.TupleType() if index < len(kind.item_types):
                kinds += _alternatives(kind.item_types[index])
    is_there = isinstance(place.value, list) and index < len(place.value)
    value = place.value[index] if is_there else _NOTHING
    return _Place(tuple(kinds), value, is_told=place.is_told)


def _field(place: _Place, name: str) -> _Place:
    sent = place.value
    value = sent.get(name, _NOTHING) if isinstance(sent, dict) else _NOTHING
    is_told = place.is_told and name not in USER_DATA
    structs = [kind for kind in place.kinds if isinstance(kind, inspect.StructType)]
    tags = tuple(str(kind.tag) for kind in structs if kind.tag_field == name)
    kinds = [
        each
        for kind in _sent_as(place)
        for field in kind.fields
        if field.encode_name == name
        for each in _alternatives(field.type)
    ]
    return _Place(tuple(kinds), value, tags, is_told)


def _sent_as(place: _Place) -> list[inspect.StructType]:
    """The structs that an object may be: of several, the one that it says it is."""
    structs = [kind for kind in place.kinds if isinstance(kind, inspect.StructType)]
    if len(structs) < 2 or not isinstance(place.value, dict):
        return structs
    return [
        kind for kind in structs if kind.tag_field and place.value.get(kind.tag_field) == kind.tag
    ]


def _fields(place: _Place) -> list[str]:
    structs = _sent_as(place)
    if len(structs) != 1:
        return []
    (kind,) = structs
    tag = () if kind.tag_field is None else (kind.tag_field,)
    return [f"`{name}`" for name in (*tag, *(field.encode_name for field in kind.fields))]


def _choices(kinds: tuple[inspect.Type, ...]) -> Iterator[str]:
    """What may stand there, in words of ours; after them what else may, by JSON's name of its kind."""
    for kind in kinds:
        match kind:
            case inspect.EnumType():
                yield from (repr(member.value) for member in kind.cls)
            case inspect.LiteralType():
                yield from map(repr, kind.values)
    if any(isinstance(kind, inspect.ListType | inspect.VarTupleType) for kind in kinds):
        yield "an array"


def _got(complaint: str, place: _Place) -> str:
    """What was found, as far as the complaint leaves it open."""
    value = place.value
    if value is _NOTHING:
        return ""
    if " of length " in complaint:
        return f", got {len(value)}" if isinstance(value, str | list | dict) else ""
    shown = _shown(place)
    if shown is None:
        return ""
    return f" {shown}" if ", got `" in complaint else f", got {shown}"


def _shown(place: _Place) -> str | None:
    """A value, if it is none of people's texts and has no others in it."""
    match place.value:
        case _ if not place.is_told:
            return None
        case str(text):
            return repr(_short(text))
        case bool() | int() | float() as value:
            return _short(msgspec.json.encode(value).decode())
        case _:
            return None


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
