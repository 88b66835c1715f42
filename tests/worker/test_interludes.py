"""A long scan on a worker's only thread, and short ones that come meanwhile."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from neural_mri.backing import jobs, keys, stored
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import Publisher
from neural_mri.backing.jobs import Job
from neural_mri.contract.circuits import CircuitMethod
from neural_mri.contract.jobs import JobKind, JobState, Lane
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.scans import (
    ActivationScan,
    AnomalyScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    Scan,
    TracingScan,
    WeightScan,
)
from neural_mri.contract.tokens import Operands, Span, Tokens
from tests.tiny import save_tiny_model
from tests.worker.bench import Bench, Interrupting
from worker import interludes, keeper, modelstore
from worker.interludes import Interludes

S = JobState
WORDS = " ".join(f"w{index}" for index in range(10))
SHORT = ActivationScan(prompt="short", model="tiny")
TRACE = TracingScan(prompt=WORDS, model="tiny", subject="w2 w3", draws=3)


def read(*ids: int) -> Tokens:
    return Tokens(
        ids=ids,
        texts=tuple(f"w{token}" for token in ids),
        spans=tuple(Span(3 * place, 3 * place + 2) for place in range(len(ids))),
    )


CORRUPT = read(*range(20, 30))
LONG: dict[str, tuple[Scan, Operands]] = {
    "trace": (TRACE, Operands()),
    "patching": (
        PatchingScan(prompt=WORDS, model="tiny", corrupt_prompt="other"),
        Operands(prompts={"other": CORRUPT}),
    ),
    "sweep": (
        CircuitScan(
            prompt=WORDS,
            model="tiny",
            corrupt_prompt="other",
            method=CircuitMethod.ABLATION,
            edges=20,
        ),
        Operands(prompts={"other": CORRUPT}),
    ),
    "path": (
        CircuitScan(
            prompt=WORDS,
            model="tiny",
            corrupt_prompt="other",
            method=CircuitMethod.INTEGRATED_GRADIENTS,
            edges=20,
        ),
        Operands(prompts={"other": CORRUPT}),
    ),
    "grid": (AnomalyScan(prompt=WORDS, model="tiny", token_positions="all"), Operands()),
    "calibration": (
        CalibrationScan(model="tiny", texts=("text",)),
        Operands(prompts={"text": read(*(3 + 7 * place % 50 for place in range(1200)))}),
    ),
    "weights": (WeightScan(model="tiny"), Operands()),
    "forward": (ActivationScan(prompt=WORDS, model="tiny"), Operands()),
}


@pytest.fixture(autouse=True)
def looks_at_every_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interludes, "LOOK_SECONDS", 0.0)


def long_scan(bench: Bench, name: str = "trace", **changes: Any) -> Job:
    """A scan of about a hundred forwards of its prompt."""
    scan, operands = LONG[name]
    fields = {"n_tokens": 10, "operands": operands, "forwards": 100.0, "owner": "bob"}
    return bench.submit(scan, **{**fields, **changes})


def load_of(model: str, revision: str) -> jobs.Submission:
    """Somebody's wish to have a model loaded."""
    return jobs.Submission(
        owner="ada",
        kind=JobKind.LOAD,
        model=model,
        revision=revision,
        queue=keys.CONTROL_QUEUE,
        request=msgspec.json.encode({"model": model}),
    )


@contextmanager
def at_each_pause(monkeypatch: pytest.MonkeyPatch, event: Callable[[int], None]) -> Iterator[None]:
    """Something happens before each look that a scan takes at the queue."""
    look, count = Interludes.pause, 0

    def pause(self: Interludes) -> None:
        nonlocal count
        event(count)
        count += 1
        look(self)

    with monkeypatch.context() as patched:
        patched.setattr(Interludes, "pause", pause)
        yield
    assert count, "the scan never paused"


def chunks(bench: Bench, job: Job) -> dict[str, str]:
    """The hash of each table of a job's result."""
    done = bench.now(job)
    assert done.state is S.SUCCEEDED, done.problem
    manifest = stored.load_manifest(bench.store, done.manifest or "")
    return {ref.name: ref.chunk for ref in manifest.tables}


def run_anew(bench: Bench, job: Job) -> None:
    """Answer no later job with this one's result."""
    bench.sessions.write(jobs.withdraw_result, job.scan_key, bench.now(job).manifest or "")


@pytest.mark.parametrize("name", LONG)
def test_short_scans_run_between_the_chunks_and_change_no_bit(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bench = holding_tiny
    attempts = bench.attempts()
    alone = long_scan(bench, name)
    attempts.take(alone.queue)
    undisturbed = chunks(bench, alone)
    run_anew(bench, alone)
    lone = bench.submit(SHORT)
    attempts.take(bench.queue)
    expected = chunks(bench, lone)
    run_anew(bench, lone)

    short: list[Job] = []

    def somebody_asks(pause: int) -> None:
        if len(short) < 6 and (not short or bench.now(short[-1]).state is S.SUCCEEDED):
            for job in short[-1:]:
                run_anew(bench, job)
            short.append(bench.submit(SHORT))

    # What lends little soon lends again.
    long = long_scan(bench, name, lane=Lane.BACKGROUND)
    with at_each_pause(monkeypatch, somebody_asks):
        assert attempts.take(long.queue) == 1
    assert chunks(bench, long) == undisturbed
    ended = [job for job in map(bench.now, short) if job.state is S.SUCCEEDED]
    assert ended, "none was let in"
    for job in ended:
        assert chunks(bench, job) == expected
        assert job.finished_at is not None
        assert job.finished_at <= (bench.now(long).finished_at or job.finished_at)
        assert job.attempt == 1


@pytest.mark.parametrize("name", ["trace", "forward"])
def test_what_is_lent_is_neither_held_against_a_scan_nor_counted(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bench = holding_tiny
    long = long_scan(bench, name, deadline_seconds=1.0)
    lent = 1.5

    def a_slow_one_comes(pause: int) -> None:
        if pause == 0:
            bench.submit(SHORT)

    def slow(run: Any) -> Any:
        def ran(self: Interludes, *args: Any) -> float:
            monkeypatch.setattr(self, "_run", with_reaper(self._run))
            seconds: float = run(self, *args)
            return seconds

        return ran

    taken: list[Job] = []

    def with_reaper(run: Any) -> Any:
        def ran(*args: Any) -> None:
            time.sleep(lent)
            taken.extend(bench.sessions.write(jobs.reap, max_attempts=3))
            run(*args)

        return ran

    monkeypatch.setattr(Interludes, "_lend", slow(Interludes._lend))
    with at_each_pause(monkeypatch, a_slow_one_comes):
        bench.attempts().take(bench.queue)
    done = bench.now(long)
    assert (done.state, done.deadline_seconds, taken) == (S.SUCCEEDED, 1.0, [])
    assert done.started_at is not None
    assert done.finished_at is not None
    assert (done.started_at - done.created_at).total_seconds() > lent
    own = (done.finished_at - done.started_at).total_seconds()
    manifest = stored.load_manifest(bench.store, done.manifest or "")
    assert 0 < manifest.forward_seconds <= manifest.compute_seconds < own


def test_a_database_that_is_away_while_time_is_lent_leaves_the_lender_its_deadline(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not added before is not taken away afterwards."""
    bench, write, refused = holding_tiny, Sessions.write, list[str]()
    long = long_scan(bench, deadline_seconds=20.0)
    short: list[Job] = []

    def somebody_asks(pause: int) -> None:
        if pause == 0:
            short.append(bench.submit(SHORT))

    def away_once(self: Sessions, work: Any, *args: Any, **kwargs: Any) -> Any:
        if work is jobs.reckon and not refused:
            refused.append("away")
            raise Unavailable("away")
        return write(self, work, *args, **kwargs)

    monkeypatch.setattr(Sessions, "write", away_once)
    with at_each_pause(monkeypatch, somebody_asks):
        bench.attempts().take(bench.queue)
    done = bench.now(long)
    assert (done.state, done.deadline_seconds) == (S.SUCCEEDED, 20.0)
    assert (bench.now(short[0]).state, refused) == (S.SUCCEEDED, ["away"])


def test_what_is_lent_while_a_lens_is_read_is_nobodys_though_mates_have_their_results(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, lent, short = holding_tiny, 2.0, list[Job]()
    flair = AnomalyScan(prompt=WORDS, model="tiny", token_positions="target")
    mates = [
        bench.submit(scan, tokens=read(*range(3 + number, 9 + number)), lane=Lane.BATCH)
        for number, scan in enumerate([SHORT] * 8 + [flair])
    ]
    lend = Interludes._lend

    def slowly(self: Interludes, *args: Any) -> float:
        monkeypatch.setattr(self, "_run", lambda *_: time.sleep(lent))
        return lend(self, *args)

    def somebody_asks(_: int) -> None:
        if not short and bench.now(mates[0]).state is S.SUCCEEDED:
            short.append(bench.submit(SHORT, n_tokens=5))

    monkeypatch.setattr(Interludes, "_lend", slowly)
    began = time.monotonic()
    with at_each_pause(monkeypatch, somebody_asks):
        assert bench.attempts().take(bench.queue) == len(mates)
    own = time.monotonic() - began - lent
    assert bench.now(short[0]).state is not S.QUEUED, "it was let in while the lens was read"
    done = [bench.now(job).manifest or "" for job in mates]
    manifests = [stored.load_manifest(bench.store, path) for path in done]
    seconds = [manifest.compute_seconds for manifest in manifests]
    assert all(seconds)
    assert sum(seconds) < own
    [forward] = {manifest.forward_seconds for manifest in manifests}
    assert 0 < forward * len(mates) < own, "nothing was lent in the forward that they share"


def test_leases_of_both_are_renewed(holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = holding_tiny
    bench.settings = msgspec.structs.replace(bench.settings, lease_seconds=0.6)
    monkeypatch.setattr(bench.keeper, "_lease_seconds", 0.6)
    long, short = long_scan(bench), list[Job]()
    taken = list[Job]()

    def a_slow_disk() -> None:
        assert bench.now(short[0]).state is S.RUNNING
        time.sleep(1.2)
        taken.extend(bench.sessions.write(jobs.reap, max_attempts=3))

    def somebody_asks(pause: int) -> None:
        if pause == 0:
            short.append(bench.submit(SHORT))

    with at_each_pause(monkeypatch, somebody_asks):
        bench.attempts(Interrupting(bench.store, a_slow_disk)).take(bench.queue)
    assert taken == []
    assert [bench.now(job).state for job in (long, *short)] == [S.SUCCEEDED] * 2


@pytest.mark.parametrize("whose", ["long", "short"])
def test_one_that_is_cancelled_meanwhile_stops_and_the_other_goes_on(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    bench = holding_tiny
    # The long one cannot hear it before the short one has ended: nobody is to be killed for that.
    given_up: list[None] = []
    monkeypatch.setattr(bench.keeper, "_give_up", lambda: given_up.append(None))
    if whose == "long":
        monkeypatch.setattr(keeper, "STOP_SECONDS", 1.0)
    long, short = long_scan(bench), list[Job]()

    def cancel() -> None:
        assert bench.now(short[0]).state is S.RUNNING
        cancelled = long if whose == "long" else short[0]
        bench.sessions.write(jobs.request_cancel, cancelled.id)
        Publisher(bench.redis, bench.settings).flag_cancel(cancelled.id)
        time.sleep(0.3 if whose == "short" else 2.0)

    def somebody_asks(pause: int) -> None:
        if pause == 0:
            short.append(bench.submit(SHORT))

    with at_each_pause(monkeypatch, somebody_asks):
        bench.attempts(Interrupting(bench.store, cancel)).take(bench.queue)
    states = {"long": bench.now(long).state, "short": bench.now(short[0]).state}
    assert states == {"long": S.SUCCEEDED, "short": S.SUCCEEDED} | {whose: S.CANCELLED}
    assert given_up == []


def test_only_what_is_short_and_waited_for_is_let_in(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = holding_tiny
    long = long_scan(bench)
    refused: list[Job] = []

    def they_ask(pause: int) -> None:
        if pause == 0:
            refused.extend(
                (
                    bench.submit(SHORT, n_tokens=5, lane=Lane.BATCH),
                    bench.submit(SHORT, n_tokens=6, lane=Lane.BACKGROUND),
                    bench.submit(SHORT, n_tokens=7, forwards=100.0),
                    bench.order(JobKind.UNLOAD),
                )
            )

    with at_each_pause(monkeypatch, they_ask):
        bench.attempts().take(bench.queue)
    assert bench.now(long).state is S.SUCCEEDED
    assert [bench.now(job).state for job in refused] == [S.QUEUED] * 4


@pytest.mark.parametrize(("lane", "lends"), [(Lane.BATCH, True), (Lane.INTERACTIVE, False)])
def test_a_forward_that_many_share_is_interrupted_where_nobody_waits_for_it(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch, lane: Lane, *, lends: bool
) -> None:
    """Who waits like those who share it shares the next one with others: that costs all less."""
    bench = holding_tiny
    mates = [
        bench.submit(SHORT, tokens=read(*range(3 + number, 9 + number)), lane=lane, owner="bob")
        for number in range(8)
    ]
    short: list[Job] = []

    def somebody_asks(pause: int) -> None:
        if pause == 0:
            short.append(bench.submit(SHORT, n_tokens=5))

    with at_each_pause(monkeypatch, somebody_asks):
        assert bench.attempts().take(bench.queue) == len(mates)
    assert {bench.now(job).state for job in mates} == {S.SUCCEEDED}
    assert bench.now(short[0]).state is (S.SUCCEEDED if lends else S.QUEUED)
    for job in mates:
        manifest = stored.load_manifest(bench.store, bench.now(job).manifest or "")
        assert 0 < manifest.forward_seconds <= manifest.compute_seconds


def test_a_short_one_that_fails_takes_no_other_along(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = holding_tiny
    long, short = long_scan(bench), list[Job]()

    def somebody_asks(pause: int) -> None:
        if pause == 0:
            short.append(
                bench.submit(ActivationScan(prompt="x", model="tiny", layers=("blocks.40",)))
            )

    with at_each_pause(monkeypatch, somebody_asks):
        bench.attempts().take(bench.queue)
    assert [bench.now(job).state for job in (long, *short)] == [S.SUCCEEDED, S.FAILED]


def test_no_flood_of_short_scans_keeps_a_long_one_from_its_end(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = holding_tiny
    # Long beside what it lends, whatever the machine is busy with.
    trace = msgspec.structs.replace(TRACE, draws=32)
    long = bench.submit(trace, n_tokens=10, forwards=1000.0, owner="bob")
    lent, lend = list[float](), Interludes._lend

    def lending(self: Interludes, *args: Any) -> float:
        lent.append(lend(self, *args))
        return lent[-1]

    def everybody_asks(pause: int) -> None:
        for owner in range(3):
            bench.submit(
                SHORT, n_tokens=4 + pause % 6, owner=f"user {owner}", scan_key=None, forwards=1.0
            )

    monkeypatch.setattr(Interludes, "_lend", lending)
    began = time.monotonic()
    with at_each_pause(monkeypatch, everybody_asks):
        bench.attempts().take(bench.queue)
    own = time.monotonic() - began - sum(lent)
    assert bench.now(long).state is S.SUCCEEDED
    assert len(lent) > 1
    # Of equal weight, it has had as much as it has lent, but for the last time.
    assert sum(lent[:-1]) <= own


@pytest.mark.parametrize("on_demand", [False, True], ids=["asked for", "on demand"])
def test_a_model_that_is_being_loaded_keeps_nobody_from_the_one_that_is_held(
    holding_tiny: Bench,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    *,
    on_demand: bool,
) -> None:
    bench = holding_tiny
    other = save_tiny_model(tmp_path_factory.mktemp("other") / "other", seed=1)
    registered = modelstore.add(bench.settings, "other", f"folder:{other}")
    if on_demand:
        waiting = bench.submit(
            ActivationScan(prompt=WORDS, model="other"),
            model="other",
            n_tokens=10,
            revision=registered.revision,
            queue=keys.scan_queue(registered.revision),
        )
    else:
        waiting = bench.sessions.write(jobs.submit, load_of("other", registered.revision))
    short: list[Job] = []

    def somebody_asks(pause: int) -> None:
        if pause == 0:
            short.append(bench.submit(SHORT))

    attempts = bench.attempts()
    with at_each_pause(monkeypatch, somebody_asks):
        attempts.take(bench.placing.queue if on_demand else keys.CONTROL_QUEUE)
    scanned, served = bench.now(short[0]), bench.now(waiting)
    assert scanned.state is S.SUCCEEDED
    assert bench.residency.get(registered.revision) is not None
    if on_demand:
        assert served.state is S.QUEUED, "its turn comes now"
        return
    assert served.state is S.SUCCEEDED, served.problem
    assert scanned.finished_at is not None
    assert scanned.finished_at < (served.finished_at or scanned.finished_at)


def test_what_a_load_lends_is_neither_held_against_it_nor_counted(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bench, lent, killed = holding_tiny, 1.0, list[int]()
    other = save_tiny_model(tmp_path_factory.mktemp("other") / "other", seed=1)
    registered = modelstore.add(bench.settings, "other", f"folder:{other}")
    monkeypatch.setattr("worker.placing.os.kill", lambda _pid, signum: killed.append(signum))
    bench.sessions.write(jobs.submit, load_of("other", registered.revision))

    def somebody_asks(pause: int) -> None:
        if pause == 0:
            bench.submit(SHORT)

    def slowly(self: Interludes, *_: Any) -> float:
        allowed = time.monotonic() - began + lent / 2
        hurried = msgspec.structs.replace(bench.settings, job_deadline_seconds=allowed)
        monkeypatch.setattr(bench.placing, "_settings", hurried)
        time.sleep(lent)
        bench.placing._renew()
        monkeypatch.setattr(bench.placing, "_settings", bench.settings)
        return lent

    monkeypatch.setattr(Interludes, "_lend", slowly)
    began = time.monotonic()
    with at_each_pause(monkeypatch, somebody_asks):
        bench.attempts().take(keys.CONTROL_QUEUE)
    own = time.monotonic() - began - lent
    resident = bench.residency.get(registered.revision)
    assert resident is not None
    assert not killed
    assert 0 < resident.load_seconds < own
