import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest

from neural_mri.backing import keys
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.events import Publisher, Told, parse_entries
from neural_mri.backing.settings import Settings
from neural_mri.contract.events import (
    ActivationFrame,
    EffectsFrame,
    Ended,
    Event,
    LayerFrame,
    Progress,
    StateChanged,
    decode_event,
)
from neural_mri.contract.jobs import JobState
from worker import reporter
from worker.reporter import LARGEST_BACKLOG, LOOK_SECONDS, MOST_AT_ONCE, Outbox, Reporter
from worker.unseen import Frames

JOB = uuid4()
ENDED = JobState.SUCCEEDED
T = TypeVar("T")


def frame(token_idx: int) -> ActivationFrame:
    return ActivationFrame(token_idx=token_idx, token="t", layers=(), unit="L2 norm")


def frames(token_idxs: Iterable[int]) -> Callable[[], list[ActivationFrame]]:
    return lambda: [frame(token_idx) for token_idx in token_idxs]


def effects(value: float) -> EffectsFrame:
    return EffectsFrame(exact=True, components=("embed",), effects=(value,), unit="logits")


def told(redis: SyncRedis, job_id: UUID) -> list[Event]:
    """What stands in a job's stream."""
    rows: Any = redis.xrange(keys.event_stream(job_id))
    return [decode_event(entry.data) for entry in parse_entries(rows)]


def layer_frame(layer: int, value: float) -> LayerFrame:
    return LayerFrame(
        layer=layer, token_idx=0, heads=(value,), mlp=0.0, attn=0.0, resid_post=0.0, unit="L2 norm"
    )


def progress(done: int, total: int = 1000) -> Progress:
    return Progress(stage="forward", done=done, total=total)


class Collected:
    """A sink that keeps what it is given, and can be made to stand still."""

    def __init__(
        self,
        watched: Callable[[], bool] = lambda: True,
        *,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.events: list[Event] = []
        self.trips: list[int] = []
        self.asked = 0
        self._watched = watched
        self._meanwhile = meanwhile
        """What happens while it is being asked who watches."""
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def publish_all(self, told: Sequence[Told], asking: Sequence[UUID] = ()) -> frozenset[UUID]:
        if not told:
            self.asked += 1
            answer = frozenset(asking if self._watched() else ())
            self._meanwhile()
            return answer
        self.entered.set()
        self.open.wait()
        self.trips.append(len(told))
        self.events += [event for _, event in told]
        return frozenset()

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]


def stuck() -> Collected:
    """A sink that is busy with one event and takes no other until it is opened."""
    sink = Collected()
    sink.open.clear()
    return sink


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def nothing_stops_it() -> None:
    return None


def test_every_token_frame_arrives_once_and_in_order(redis: SyncRedis, settings: Settings) -> None:
    redis.set(keys.watched(JOB), b"1")
    with Outbox(Publisher(redis, settings)) as outbox:
        listener = Reporter(outbox, JOB, nothing_stops_it)
        for begin in range(0, 300, 3):
            listener.frames(frames(range(begin, begin + 3)))
        assert outbox.flush(5)
        assert told(redis, JOB) == frames(range(300))()


def test_frames_of_a_job_that_nobody_watches_are_neither_made_nor_sent(
    redis: SyncRedis, settings: Settings
) -> None:
    def made() -> Any:
        raise AssertionError("nobody was to see them")

    begun = StateChanged(state=JobState.RUNNING, attempt=1)
    ended = Ended(state=ENDED, attempt=1)
    with Outbox(Publisher(redis, settings)) as outbox:
        listener = Reporter(outbox, JOB, nothing_stops_it)
        outbox.post(JOB, begun)
        listener.progress("forward", 1, 30)
        listener.layer(0, made)
        listener.frames(made)
        listener.effects(effects(0.5))
        assert outbox.flush(5)
        listener.progress("forward", 30, 30)
        listener.layer(1, made)
        outbox.post(JOB, ended)
        assert outbox.flush(5)
        assert told(redis, JOB) == [begun, ended]


def test_who_comes_to_watch_is_told_of_all_that_came_before_in_order(
    redis: SyncRedis, settings: Settings
) -> None:
    begun, ended = (
        StateChanged(state=JobState.RUNNING, attempt=1),
        Ended(state=ENDED, attempt=1),
    )
    with Outbox(Publisher(redis, settings)) as outbox:
        listener = Reporter(outbox, JOB, nothing_stops_it)
        outbox.post(JOB, begun)
        outbox.post(JOB, progress(1))
        listener.layer(0, lambda: layer_frame(0, 1.0))
        assert outbox.flush(5)
        assert told(redis, JOB) == [begun]
        outbox.post(JOB, progress(2))
        listener.layer(1, lambda: layer_frame(1, 2.0))
        listener.layer(0, lambda: layer_frame(0, 3.0))
        listener.frames(frames(range(2)))
        redis.set(keys.watched(JOB), b"1")
        assert outbox.flush(5)
        listener.frames(frames(range(2, 4)))
        outbox.post(JOB, ended)
        assert outbox.flush(5)
        layers = [layer_frame(0, 3.0), layer_frame(1, 2.0)]
        assert told(redis, JOB) == [begun, progress(2), *layers, *frames(range(4))(), ended]


def test_who_comes_to_watch_just_before_the_end_is_told_of_all_before_it(
    redis: SyncRedis, settings: Settings
) -> None:
    ended = Ended(state=ENDED, attempt=1)
    with Outbox(Publisher(redis, settings)) as outbox:
        listener = Reporter(outbox, JOB, nothing_stops_it)
        listener.frames(frames(range(3)))
        assert outbox.flush(5)
        assert told(redis, JOB) == []
        redis.set(keys.watched(JOB), b"1")
        outbox.post(JOB, ended)
        assert outbox.flush(5)
        assert told(redis, JOB) == [*frames(range(3))(), ended]


def test_frames_that_cannot_be_made_take_no_other_event_along() -> None:
    def lost() -> Any:
        raise RuntimeError("the device is lost")

    begun, ended = StateChanged(state=JobState.RUNNING, attempt=1), Ended(state=ENDED, attempt=1)
    sink = Collected(watched=lambda: True)
    with Outbox(sink) as outbox:
        outbox.post(JOB, begun)
        outbox.post_frames(JOB, Frames(lost, 0))
        outbox.post_frames(JOB, Frames(frames(range(2))))
        assert outbox.flush(5)
        outbox.post(JOB, ended)
        assert outbox.flush(5)
    assert sink.events == [begun, *frames(range(2))(), ended]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_can_tell_nothing_any_more_ends() -> None:
    class Broken(Collected):
        def publish_all(self, told: Sequence[Told], asking: Sequence[UUID] = ()) -> frozenset[UUID]:
            raise TypeError("a bug")

    given_up = threading.Event()
    with Outbox(Broken(), give_up=given_up.set) as outbox:
        outbox.post(JOB, Ended(state=ENDED, attempt=1))
        assert given_up.wait(5)


def test_whoever_watches_one_job_of_a_pass_is_told_of_that_alone(
    redis: SyncRedis, settings: Settings
) -> None:
    watched, other = uuid4(), uuid4()
    redis.set(keys.watched(watched), b"1")
    with Outbox(Publisher(redis, settings)) as outbox:
        for job_id in (watched, other):
            outbox.post(job_id, layer_frame(0, 1.0))
            outbox.post_frames(job_id, Frames(frames(range(2))))
        assert outbox.flush(5)
        assert told(redis, watched) == [layer_frame(0, 1.0), *frames(range(2))()]
        assert told(redis, other) == []


def test_while_nobody_watches_it_is_asked_a_few_times_a_second() -> None:
    sink = Collected(watched=lambda: False)
    with Outbox(sink) as outbox:
        until_at = time.monotonic() + 20 * LOOK_SECONDS
        while time.monotonic() < until_at:
            outbox.post(JOB, layer_frame(0, 1.0))
            time.sleep(0.001)
    # A thread that comes late asks less often, never more.
    assert 2 <= sink.asked <= 24
    assert not sink.events


def test_who_watches_is_told_of_frames_that_come_with_the_end_while_another_job_is_asked_of() -> (
    None
):
    begun, ended = StateChanged(state=JobState.RUNNING, attempt=1), Ended(state=ENDED, attempt=1)
    other, comes = uuid4(), False

    def scan() -> None:
        nonlocal comes
        if comes:
            comes = False
            outbox.post(JOB, layer_frame(0, 1.0))
            outbox.post_frames(JOB, Frames(frames(range(2))))
            outbox.post(JOB, ended)

    sink = Collected(watched=lambda: is_watched, meanwhile=scan)
    is_watched = False
    with Outbox(sink) as outbox:
        outbox.post(JOB, begun)
        assert outbox.flush(5)
        is_watched = comes = True
        outbox.post(other, begun)
        assert outbox.flush(5)
    assert sink.events == [begun, begun, layer_frame(0, 1.0), *frames(range(2))(), ended]


def test_of_a_job_that_was_lost_no_frame_is_kept_and_nobody_asks_who_watches() -> None:
    begun, is_watched = StateChanged(state=JobState.RUNNING, attempt=1), False
    sink = Collected(watched=lambda: is_watched)
    with Outbox(sink) as outbox:
        outbox.post(JOB, layer_frame(0, 1.0))
        outbox.post_frames(JOB, Frames(frames(range(2))))
        assert outbox.flush(5)
        outbox.post(JOB, begun)
        outbox.lose(JOB)
        assert outbox.flush(5)
        is_watched, n_asked = True, sink.asked
        time.sleep(4 * LOOK_SECONDS)
        assert outbox.flush(5)
        assert sink.asked == n_asked
    assert sink.events == [begun]


def test_an_end_that_is_still_to_be_told_is_not_lost_with_its_job() -> None:
    ended = Ended(state=ENDED, attempt=1)
    sink = Collected()
    with Outbox(sink) as outbox:
        outbox.post(JOB, layer_frame(0, 1.0))
        outbox.post(JOB, ended)
        outbox.lose(JOB)
        assert outbox.flush(5)
    assert sink.events == [layer_frame(0, 1.0), ended]


def test_jobs_beyond_what_can_run_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "MOST_JOBS", 3)
    jobs, seen = [uuid4() for _ in range(5)], False
    sink = Collected(watched=lambda: seen)
    with Outbox(sink) as outbox:
        for number, job_id in enumerate(jobs):
            outbox.post(job_id, layer_frame(number, 1.0))
            outbox.flush(5)
        seen = True
        outbox.flush(5)
    assert sink.of(LayerFrame) == [layer_frame(number, 1.0) for number in (2, 3, 4)]


def test_no_end_is_forgotten_however_many_jobs_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "MOST_JOBS", 3)
    begun, ended = StateChanged(state=JobState.RUNNING, attempt=1), Ended(state=ENDED, attempt=1)
    sink = Collected(watched=lambda: False)
    sink.open.clear()
    with Outbox(sink) as outbox:
        outbox.post(JOB, ended)
        assert sink.entered.wait(5)
        for _ in range(5):
            outbox.post(uuid4(), ended)
        for job_id in [uuid4() for _ in range(5)]:
            outbox.post(job_id, begun)
            outbox.post(job_id, layer_frame(0, 1.0))
            outbox.post(job_id, ended)
        sink.open.set()
        assert outbox.flush(5)
    assert len(sink.of(Ended)) == 11
    assert len(sink.of(StateChanged)) == 5


def test_progress_comes_twenty_times_a_second_and_the_last_one_always() -> None:
    sink = Collected()
    with Outbox(sink) as outbox:
        began = time.monotonic()
        for done in range(1, 1001):
            outbox.post(JOB, progress(done))
            time.sleep(0.0005)
        seconds = time.monotonic() - began
        outbox.flush(5)
    said = sink.of(Progress)
    assert len(said) <= 20 * seconds + 2
    assert len(said) >= 5
    assert said[-1] == progress(1000)


def test_held_progress_comes_by_itself_when_the_scan_pauses() -> None:
    sink = Collected()
    with Outbox(sink) as outbox:
        outbox.post(JOB, progress(1))
        outbox.post(JOB, progress(2))
        assert until(lambda: sink.of(Progress)[-1:] == [progress(2)])


def test_the_last_progress_of_a_stage_is_not_lost_to_the_next_stage() -> None:
    sink = Collected()
    stored = Progress(stage="store", done=1, total=4)
    with Outbox(sink) as outbox:
        for event in (progress(1), progress(2), progress(3), stored):
            outbox.post(JOB, event)
        outbox.flush(5)
    assert sink.events[-2:] == [progress(3), stored]


def test_progress_never_comes_after_the_state_that_followed_it() -> None:
    sink = Collected()
    storing = StateChanged(state=JobState.STORING, attempt=1)
    with Outbox(sink) as outbox:
        for event in (progress(1), progress(2), storing):
            outbox.post(JOB, event)
        outbox.flush(5)
    assert sink.events[-2:] == [progress(2), storing]


def test_of_jobs_that_have_ended_nothing_is_kept() -> None:
    sink = Collected()
    with Outbox(sink) as outbox:
        for _ in range(3):
            job_id = uuid4()
            outbox.post(job_id, progress(1))
            outbox.post(job_id, Ended(state=ENDED, attempt=1))
            assert outbox.flush(timeout_seconds=5.0)
        assert not outbox._due
        assert not outbox._unseen
        assert not outbox._watched
    assert [type(event) for event in sink.events] == [Progress, Ended] * 3


def test_of_one_layer_only_the_newest_frame_waits() -> None:
    sink = stuck()
    with Outbox(sink) as outbox:
        outbox.post(JOB, frame(0))
        assert sink.entered.wait(5)
        for value in range(50):
            outbox.post(JOB, layer_frame(0, value))
            outbox.post(JOB, layer_frame(1, value))
        sink.open.set()
        outbox.flush(5)
    assert sink.of(LayerFrame) == [layer_frame(0, 49), layer_frame(1, 49)]


def test_a_scan_never_waits_for_a_stream_that_stands_still() -> None:
    sink = stuck()
    ended = Ended(state=JobState.SUCCEEDED, attempt=1)
    with Outbox(sink) as outbox:
        began = time.monotonic()
        for token_idx in range(LARGEST_BACKLOG + 500):
            outbox.post(JOB, frame(token_idx))
        outbox.post(JOB, ended)
        assert time.monotonic() - began < 10, "the stream stands still for good"
        assert not outbox.flush(0.05)
        sink.open.set()
        assert outbox.flush(5)
    assert len(sink.of(ActivationFrame)) <= LARGEST_BACKLOG + MOST_AT_ONCE
    assert sink.events[-1] == ended


def test_what_gathers_while_one_round_trip_is_made_goes_by_the_next() -> None:
    sink = stuck()
    with Outbox(sink) as outbox:
        outbox.post(JOB, frame(0))
        assert sink.entered.wait(5)
        for token_idx in range(1, 101):
            outbox.post(JOB, frame(token_idx))
        sink.open.set()
        assert outbox.flush(5)
    assert sink.trips == [1, 100]
    assert [told.token_idx for told in sink.of(ActivationFrame)] == list(range(101))


def test_what_is_told_within_a_moment_goes_by_one_round_trip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reporter, "GATHER_SECONDS", 0.2)
    sink = Collected()
    with Outbox(sink) as outbox:
        for token_idx in range(20):
            outbox.post(JOB, frame(token_idx))
        assert sink.trips == []
        assert until(lambda: sink.trips == [20])


def test_who_goes_on_telling_makes_round_trips_that_lie_apart() -> None:
    sink = Collected()
    with Outbox(sink) as outbox:
        began = time.monotonic()
        for token_idx in range(200):
            outbox.post(JOB, frame(token_idx))
            time.sleep(0.001)
        seconds = time.monotonic() - began
        outbox.flush(5)
    assert len(sink.trips) <= seconds / reporter.APART_SECONDS + 2
    assert sink.trips[0] < 200, "the first do not wait for the last"
    assert [told.token_idx for told in sink.of(ActivationFrame)] == list(range(200))


def test_a_pass_of_many_jobs_wakes_the_thread_a_few_times_a_round_trip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sink, woken = Collected(), list[str]()
    with Outbox(sink) as outbox:
        real = outbox._changed.notify_all

        def count() -> None:
            if threading.current_thread().name != "outbox":
                woken.append("by a job")
            real()

        monkeypatch.setattr(outbox._changed, "notify_all", count)
        mates = [uuid4() for _ in range(12)]
        for layer in range(30):
            for mate in mates:
                outbox.post(mate, progress(layer, 30))
                outbox.post(mate, layer_frame(layer, 1.0))
            time.sleep(0.01)
        n_woken, n_trips = len(woken), len(sink.trips)
        outbox.flush(5)
    assert n_woken <= 4 * n_trips + 4, "of 720 times that something was told"
    assert len(sink.of(LayerFrame)) == 12 * 30


def test_a_layer_told_again_after_its_frame_has_gone_is_told_again() -> None:
    sink = Collected()
    with Outbox(sink) as outbox:
        for value in range(3):
            outbox.post(JOB, layer_frame(0, value))
            outbox.flush(5)
    assert sink.of(LayerFrame) == [layer_frame(0, value) for value in range(3)]


def test_an_end_waits_for_nothing_and_takes_along_what_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reporter, "GATHER_SECONDS", 60.0)
    sink = Collected()
    ended = Ended(state=JobState.SUCCEEDED, attempt=1)
    with Outbox(sink) as outbox:
        outbox.post(JOB, frame(0))
        outbox.post(JOB, progress(1))
        outbox.post(JOB, ended)
        assert until(lambda: sink.events == [frame(0), progress(1), ended])
    assert sink.trips == [3]


def test_a_full_round_trip_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "GATHER_SECONDS", 60.0)
    sink = Collected()
    with Outbox(sink) as outbox:
        for token_idx in range(MOST_AT_ONCE + 1):
            outbox.post(JOB, frame(token_idx))
        assert until(lambda: len(sink.events) >= MOST_AT_ONCE)


def test_leaving_publishes_what_was_posted() -> None:
    sink = Collected()
    with Outbox(sink) as outbox:
        outbox.post(JOB, progress(1))
        outbox.post(JOB, progress(2))
        outbox.post(JOB, frame(0))
    assert progress(2) in sink.events
    assert frame(0) in sink.events
    assert "outbox" not in {thread.name for thread in threading.enumerate()}


def test_jobs_do_not_use_up_each_others_progress() -> None:
    sink = Collected()
    other = uuid4()
    with Outbox(sink) as outbox:
        outbox.post(JOB, progress(1))
        outbox.post(other, progress(2))
        assert until(lambda: len(sink.events) == 2, seconds=1 / reporter.PROGRESS_PER_SECOND)
