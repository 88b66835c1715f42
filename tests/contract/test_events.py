"""Events."""

from typing import get_args

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.events import (
    ActivationFrame,
    Artifact,
    EffectsFrame,
    Ended,
    Event,
    FrameLayer,
    LayerFrame,
    Progress,
    Queued,
    Reset,
    StateChanged,
    decode_event,
    encode_event,
    event_name,
)
from neural_mri.contract.jobs import JobState

STATES = st.sampled_from(JobState)
COUNTS = st.integers(0, 2**40)
VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=12)
LAYERS = st.builds(
    FrameLayer,
    layer_id=TEXTS,
    type=st.sampled_from(["embedding", "attention", "mlp"]),
    activations=st.lists(VALUES, max_size=4).map(tuple),
)
EVENTS = {
    StateChanged: st.builds(StateChanged, state=STATES, attempt=COUNTS),
    Queued: st.builds(
        Queued, position=COUNTS, estimated_start_seconds=st.none() | st.floats(0, 1e6, width=32)
    ),
    Progress: st.builds(Progress, stage=TEXTS, done=COUNTS, total=COUNTS),
    LayerFrame: st.builds(
        LayerFrame,
        layer=COUNTS,
        token_idx=COUNTS,
        heads=st.lists(VALUES, max_size=4).map(tuple),
        mlp=st.none() | VALUES,
        attn=st.none() | VALUES,
        resid_post=st.none() | VALUES,
        unit=TEXTS,
    ),
    ActivationFrame: st.builds(
        ActivationFrame,
        token_idx=COUNTS,
        token=TEXTS,
        layers=st.lists(LAYERS, max_size=3).map(tuple),
        unit=TEXTS,
    ),
    EffectsFrame: st.builds(
        EffectsFrame,
        exact=st.booleans(),
        components=st.lists(TEXTS, max_size=4).map(tuple),
        effects=st.lists(VALUES, max_size=4).map(tuple),
        unit=TEXTS,
    ),
    Artifact: st.builds(Artifact, table=TEXTS, url=TEXTS, bytes=COUNTS),
    Reset: st.builds(Reset, state=STATES, attempt=COUNTS),
    Ended: st.builds(
        Ended,
        state=STATES,
        attempt=COUNTS,
        cached=st.booleans(),
        result=st.none() | TEXTS,
        problem=st.none() | st.dictionaries(TEXTS, TEXTS, max_size=2),
    ),
}


def test_every_kind_of_event_is_tried_here() -> None:
    assert set(get_args(Event)) == set(EVENTS)


@given(st.one_of(list(EVENTS.values())))
def test_an_event_reads_back_as_it_was_sent_on_one_line(event: Event) -> None:
    body = encode_event(event)
    assert decode_event(body) == event
    assert b"\n" not in body
    assert b"\r" not in body


@given(st.one_of(list(EVENTS.values())))
def test_an_event_is_named_by_its_type(event: Event) -> None:
    assert msgspec.json.decode(encode_event(event))["type"] == event_name(event)


@given(st.one_of(list(EVENTS.values())))
def test_a_reader_passes_over_fields_that_a_later_version_adds(event: Event) -> None:
    later = {**msgspec.json.decode(encode_event(event)), "job": "an added field"}
    assert decode_event(msgspec.json.encode(later)) == event
