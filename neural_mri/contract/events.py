"""What a job's event stream says: small JSON, a tagged union. Tensors never ride it.

A stream ends with exactly one `ended` event. `reset` says that earlier events are gone (their store was
emptied) and carries where the job stands now.
"""

from typing import Any, TypeAlias

import msgspec

from neural_mri.contract.jobs import JobState

__all__ = (
    "ActivationFrame",
    "Artifact",
    "EffectsFrame",
    "Ended",
    "Event",
    "FrameLayer",
    "LayerFrame",
    "Progress",
    "Queued",
    "Reset",
    "StateChanged",
    "decode_event",
    "encode_event",
)


class EventBase(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """What every event has: nothing beside its type."""


class StateChanged(EventBase, frozen=True, kw_only=True, tag="state"):
    """The job moved to a state."""

    state: JobState
    attempt: int


class Progress(EventBase, frozen=True, kw_only=True, tag="progress"):
    """`done` of `total` steps of a stage; at most 20 a second."""

    stage: str
    """`forward` counts layers, `download`, `convert` and `load` bytes, `store` tables."""
    done: int
    total: int


class Queued(EventBase, frozen=True, kw_only=True, tag="queue"):
    """Where the waiting job stands; at most once a second, and of no stream: it is not told again."""

    position: int
    """1 for the next to be taken."""
    estimated_start_seconds: float | None
    """From now; None where nobody can tell."""


class LayerFrame(EventBase, frozen=True, kw_only=True, tag="layer_frame"):
    """One layer has been computed: its values at the last reported token."""

    layer: int
    token_idx: int
    heads: tuple[float, ...]
    mlp: float | None
    attn: float | None
    resid_post: float | None
    unit: str


class FrameLayer(msgspec.Struct, frozen=True, kw_only=True):
    """One sublayer's values in a frame, as the seed specification's section 4.2 has it."""

    layer_id: str
    type: str
    """`embedding`, `attention` (one value a head) or `mlp` (one value)."""
    activations: tuple[float, ...]


class ActivationFrame(EventBase, frozen=True, kw_only=True, tag="activation_frame"):
    """All components at one token. Exactly the floats of the stored table."""

    token_idx: int
    token: str
    layers: tuple[FrameLayer, ...]
    unit: str


class EffectsFrame(EventBase, frozen=True, kw_only=True, tag="effects_frame"):
    """Effects of components on a circuit scan's metric: the estimates first, then what was measured."""

    exact: bool
    """Whether each was measured, or is a first-order estimate."""
    components: tuple[str, ...]
    """Addresses: the strongest where there are too many to tell."""
    effects: tuple[float, ...]
    """Of each component in turn. Measured ones are the floats of the stored table."""
    unit: str


class Artifact(EventBase, frozen=True, kw_only=True, tag="artifact"):
    """A table of the result can be fetched."""

    table: str
    url: str
    bytes: int


class Reset(EventBase, frozen=True, kw_only=True, tag="reset"):
    """Earlier events are gone; the job stands at `state`."""

    state: JobState
    attempt: int


class Ended(EventBase, frozen=True, kw_only=True, tag="ended"):
    """The job reached a terminal state: the last event of every stream."""

    state: JobState
    attempt: int
    cached: bool = False
    result: str | None = None
    """Where the result is, when it succeeded."""
    problem: dict[str, Any] | None = None


Event: TypeAlias = (
    StateChanged
    | Queued
    | Progress
    | LayerFrame
    | ActivationFrame
    | EffectsFrame
    | Artifact
    | Reset
    | Ended
)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode_event(event: msgspec.Struct) -> bytes:
    """One line of JSON."""
    return _encoder.encode(event)


def decode_event(body: bytes | str) -> Event:
    """An event as it was sent."""
    return _decoder.decode(body)


def event_name(event: msgspec.Struct) -> str:
    """The tag, which is also the SSE `event:` field."""
    config: Any = event.__struct_config__
    return str(config.tag)
