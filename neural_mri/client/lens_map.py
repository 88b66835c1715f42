"""A FLAIR scan's tables as values: what the logit lens says at each place, and three channels a token."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from neural_mri.client.activation_map import value_matrix
from neural_mri.client.colour import Values
from neural_mri.contract.components import Component
from neural_mri.contract.results import provenance_of

__all__ = ("LensMap", "Reading", "Support")


class Support(NamedTuple):
    """How far a next token is supported by more than habit."""

    role: str
    """`own`, `answer` or `foil`."""
    text: str
    log_probability: float
    gain: float
    """nats"""
    support: float
    """In ordinary standard deviations; low is suspicious."""
    anomalous: bool


class Reading(NamedTuple):
    """The model's next token after one position: how sure it is, since which layer, and how supported."""

    position: int
    token: str
    """The token at the position."""
    predicted: str
    """The likeliest next token; empty where nothing was measured."""
    entropy: float
    """nats"""
    max_probability: float
    entropy_z: float
    uncertain: bool
    """More entropy than the false-alarm rate allows."""
    layer: int
    """First layer after which the lens stays with the model's token; -1 where not measured."""
    depth: float
    """The same as a share of the layers."""
    strange_places: int
    """Places at which the lens is farther from the model than the false-alarm rate allows."""
    own: Support | None

    @property
    def flags(self) -> tuple[str, ...]:
        """What is anomalous here, in words."""
        said = (
            (self.uncertain, "uncertain"),
            (self.own is not None and self.own.anomalous, "unsupported"),
            (self.strange_places > 0, f"lens x{self.strange_places}"),
        )
        return tuple(word for holds, word in said if holds)


class LensMap(NamedTuple):
    """`values[quantity][place position]`; what was not measured is NaN, in texts empty."""

    places: tuple[Component, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    """The prompt's tokens at `positions`."""
    values: Mapping[str, Values]
    likeliest: tuple[tuple[str, ...], ...]
    """`[place][position]`, the lens's likeliest next token."""
    readings: tuple[Reading, ...]
    asked: tuple[Support, ...]
    """The answer and the foil, at the target position; where they were measured."""
    lens: str
    false_alarm_rate: float | None
    """None where there was no calibration to judge by."""

    @classmethod
    def of(cls, tables: Mapping[str, pa.Table], prompt_tokens: tuple[str, ...]) -> "LensMap":
        """From a FLAIR result's tables `lens`, `lens_tokens`, `uncertainty`, `support`, `depth`."""
        provenance = provenance_of(tables["lens"])
        positions = provenance.positions or ()
        names = tables["lens"]["quantity"].to_pylist()
        matrix = value_matrix(tables["lens"])
        values = {
            name: matrix[[row for row, found in enumerate(names) if found == name]]
            for name in dict.fromkeys(names)
        }
        addresses = tuple(dict.fromkeys(tables["lens"]["component"].to_pylist()))
        texts = {
            (row["component"], row["position"]): row["text"]
            for row in tables["lens_tokens"].to_pylist()
        }
        support = tables["support"].to_pylist()
        return cls(
            places=tuple(map(Component.parse, addresses)),
            positions=positions,
            tokens=tuple(prompt_tokens[position] for position in positions),
            values=values,
            likeliest=tuple(
                tuple(texts.get((address, position), "") for position in positions)
                for address in addresses
            ),
            readings=_readings(tables, values["anomalous"], positions, prompt_tokens),
            asked=tuple(_support(row) for row in support if row["role"] != "own"),
            lens=provenance.parameters.get("lens", ""),
            false_alarm_rate=provenance.parameters.get("false_alarm_rate"),
        )


def _readings(
    tables: Mapping[str, pa.Table],
    strange: Values,
    positions: tuple[int, ...],
    prompt_tokens: tuple[str, ...],
) -> tuple[Reading, ...]:
    own = {
        row["position"]: _support(row)
        for row in tables["support"].to_pylist()
        if row["role"] == "own"
    }
    depth = {row["position"]: row for row in tables["depth"].to_pylist()}
    column = {position: at for at, position in enumerate(positions)}
    return tuple(
        Reading(
            position=row["position"],
            token=prompt_tokens[row["position"]],
            predicted=row["text"],
            entropy=row["entropy"],
            max_probability=row["max_probability"],
            entropy_z=row["entropy_z"],
            uncertain=row["anomalous"],
            layer=depth[row["position"]]["layer"],
            depth=depth[row["position"]]["depth"],
            strange_places=int(np.nansum(strange[:, column[row["position"]]])),
            own=own.get(row["position"]),
        )
        for row in tables["uncertainty"].to_pylist()
    )


def _support(row: dict[str, Any]) -> Support:
    return Support(*(row[name] for name in Support._fields))
