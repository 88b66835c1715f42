"""Which model a worker loads next: the policy's rules one by one, and what they come to under load."""

import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.placement import Arrival, Setting, arrivals, drained_lru, lru, placed, simulate
from neural_mri.backing.placement import (
    Cost,
    Demand,
    Held,
    Move,
    Policy,
    WorkerRoom,
    evictions,
    faded,
    next_move,
    score,
)

POLICY = Policy(residence_seconds=10.0, patience_seconds=60.0, demand_seconds=20.0)
COST = Cost(memory_bytes=100, load_seconds=2.0)
COSTS = dict.fromkeys("abcde", COST)


def demand(revision: str, waiting: int = 0, *, oldest: float = 5.0, recent: float = 0.0) -> Demand:
    return Demand(revision, f"model {revision}", waiting, oldest if waiting else 0.0, recent)


def held(revision: str, *, seconds: float = 100.0, **changes: object) -> Held:
    return Held(revision, 100, seconds, 2.0)._replace(**changes)  # type: ignore[arg-type]  # by name


def room(*models: Held, slots: int = 2, worker: str = "me", resting: bool = False) -> WorkerRoom:
    taken = sum(model.memory_bytes for model in models)
    return WorkerRoom(worker, slots * 100, slots * 100 - taken, models, resting)


def move(*demands: Demand, me: WorkerRoom, others: tuple[WorkerRoom, ...] = ()) -> Move | None:
    return next_move("me", [me, *others], demands, COSTS, POLICY)


def loaded(found: Move | None) -> str | None:
    return None if found is None else found.revision


def test_what_nobody_waits_for_is_not_loaded() -> None:
    assert move(demand("a", recent=9.0), me=room()) is None


def test_a_free_place_is_given_at_once() -> None:
    found = move(demand("c", 1, oldest=0.0), demand("a", recent=50.0), me=room(held("a")))
    assert found == Move("c", "model c", (), is_copy=False)


def test_what_is_worth_least_a_byte_goes_first() -> None:
    requests = {"a": 1.0, "b": 1.0, "c": 1.0}
    large, slow = held("b", memory_bytes=300), held("c", load_seconds=5.0)
    mine = room(held("a"), large, slow, slots=5)
    chosen = evictions(mine, 100, requests, POLICY)
    assert chosen == [large]
    assert score(1.0, large) < score(1.0, held("a")) < score(1.0, slow)


def test_nothing_goes_needlessly() -> None:
    """A small one that was chosen first stays where a large one has to go anyway."""
    mine = room(held("a"), held("b", memory_bytes=400), slots=5)
    requests = {"a": 1.0, "b": 9.0}
    assert [each.revision for each in evictions(mine, 400, requests, POLICY) or ()] == ["b"]


def test_equal_demand_swaps_nothing() -> None:
    mine = room(held("a"), held("b"))
    assert move(demand("c", 1), demand("a", recent=1.0), demand("b", recent=1.0), me=mine) is None


def test_clearly_more_demand_takes_the_place_of_the_least() -> None:
    mine = room(held("a"), held("b"))
    found = move(demand("c", 3), demand("a", recent=2.0), demand("b", recent=1.0), me=mine)
    assert found == Move("c", "model c", ("b",), is_copy=False)


def test_jobs_that_wait_keep_their_model_where_it_is() -> None:
    mine = room(held("a"), held("b"))
    assert move(demand("c", 3), demand("a", 9), demand("b", 2), me=mine) is None


def test_a_pinned_model_stays_whatever_waits() -> None:
    mine = room(held("a", pinned=True), held("b", pinned=True))
    assert move(demand("c", 1000, oldest=1e6), me=mine) is None


def test_what_has_just_come_stays_for_a_while_and_as_long_as_it_took_to_load() -> None:
    for young in (held("a", seconds=9.0), held("a", seconds=25.0, load_seconds=30.0)):
        assert move(demand("c", 1000, oldest=1e6), me=room(young, slots=1)) is None


def test_what_has_served_nobody_yet_stays() -> None:
    fresh = held("a", settled=False)
    assert move(demand("c", 9, oldest=1e6), demand("a", 1), me=room(fresh, slots=1)) is None


def test_who_has_waited_longest_goes_first_whatever_the_demand_for_others() -> None:
    mine = room(held("a"), held("b"))
    crowd = (demand("a", 500), demand("b", 400), demand("d", 300))
    found = move(*crowd, demand("c", 1, oldest=61.0), demand("e", 1, oldest=62.0), me=mine)
    assert (loaded(found), found and found.evicted) == ("e", ("b",))


def test_room_that_the_overdue_wait_for_is_given_to_nobody_else() -> None:
    costs = COSTS | {"e": Cost(memory_bytes=200, load_seconds=2.0)}
    mine = room(held("a", seconds=1.0))
    waiting = [demand("e", 1, oldest=61.0), demand("c", 50)]
    assert next_move("me", [mine], waiting, costs, POLICY) is None
    later = room(held("a", seconds=11.0))
    assert loaded(next_move("me", [later], waiting, costs, POLICY)) == "e"


def test_what_can_never_fit_keeps_nobody_waiting() -> None:
    costs = COSTS | {"e": Cost(memory_bytes=201, load_seconds=2.0)}
    waiting = [demand("e", 1, oldest=61.0), demand("c", 1)]
    assert loaded(next_move("me", [room()], waiting, costs, POLICY)) == "c"


def test_memory_that_others_have_is_no_room_and_is_kept_for_nobody() -> None:
    """Unless something runs there, which may have it itself."""
    mine = room(held("a", pinned=True), held("b"), slots=5)._replace(free_bytes=50)
    assert (mine.most_bytes, mine.could_have_bytes) == (400, 400)
    resting = mine._replace(resting=True)
    assert (resting.most_bytes, resting.could_have_bytes) == (400, 150)
    assert room(held("a"), resting=True).could_have_bytes == 200
    costs = COSTS | {"e": Cost(memory_bytes=160, load_seconds=2.0)}
    waiting = [demand("e", 1, oldest=61.0), demand("c", 1)]
    assert next_move("me", [mine], waiting, costs, POLICY) is None
    assert loaded(next_move("me", [resting], waiting, costs, POLICY)) == "c"


def test_the_worker_that_loses_least_loads_and_then_the_one_with_most_room() -> None:
    wanted = demand("c", 1, oldest=0.5)
    crowded = room(held("a"), held("b"), worker="crowded")
    assert loaded(move(wanted, me=room(), others=(crowded,))) == "c"
    assert move(wanted, me=room(held("a"), held("b")), others=(room(worker="free"),)) is None
    assert move(wanted, me=room(slots=3), others=(room(worker="free", slots=4),)) is None
    assert loaded(move(wanted, me=room(slots=4), others=(room(worker="free"),))) == "c"


def test_when_the_better_placed_does_nothing_the_next_one_does() -> None:
    free = room(worker="free", slots=4)
    assert move(demand("c", 1, oldest=0.9), me=room(), others=(free,)) is None
    assert loaded(move(demand("c", 1, oldest=1.1), me=room(), others=(free,))) == "c"


def test_a_second_copy_comes_only_where_jobs_wait_although_the_model_is_held() -> None:
    holder = room(held("a"), worker="holder")
    assert move(demand("a", 5, oldest=3.0, recent=100.0), me=room(), others=(holder,)) is None
    found = move(demand("a", 5, oldest=4.5), me=room(), others=(holder,))
    assert found == Move("a", "model a", (), is_copy=True)


def test_a_second_copy_displaces_only_what_is_in_clearly_less_demand() -> None:
    holder = room(held("a"), worker="holder", slots=1)
    mine, waiting = room(held("b"), slots=1), demand("a", 40, oldest=9.0)
    assert loaded(move(waiting, demand("b", 5), me=mine, others=(holder,))) == "a"
    assert move(waiting, demand("b", 15), me=mine, others=(holder,)) is None
    assert move(demand("a", 40, oldest=500.0), demand("b", 15), me=mine, others=(holder,)) is None


def test_a_request_counts_for_less_and_less() -> None:
    assert faded(0.0, 20.0) == 1.0
    assert faded(20.0, 20.0) == pytest.approx(0.3679, abs=1e-4)
    assert faded(-1.0, 20.0) == 1.0, "clocks of two hosts may differ"


@pytest.mark.parametrize(
    "setting",
    [
        Setting(jobs_a_second=1.0, seconds=3600.0),
        Setting(jobs_a_second=1.0, seconds=3600.0, workers=2, slots=1),
    ],
    ids=["one worker, two slots", "two workers, a slot each"],
)
def test_five_models_on_two_slots_load_three_times_less_often_than_by_lru(setting: Setting) -> None:
    jobs = arrivals(setting)
    ours = simulate(setting, jobs, placed)
    for rival in (lru, drained_lru):
        assert simulate(setting, jobs, rival).loads >= 3 * ours.loads
    # Patience, and a turn for each of the three that have no slot.
    assert ours.waits[-1] <= 60.0 + 3 * (10.0 + 2.0)


def test_while_there_is_time_to_load_nobody_waits_for_patience() -> None:
    """One job a minute: what is asked for is loaded, as soon as what was loaded last has had its time."""
    setting = Setting(jobs_a_second=1 / 60, seconds=20_000.0)
    found = simulate(setting, arrivals(setting), placed)
    assert found.quantile(0.95) <= 10.0 + 2 * 2.0


def test_a_single_job_is_served_while_two_others_models_are_flooded() -> None:
    setting = Setting(jobs_a_second=0.0, seconds=600.0)
    flood = [Arrival(0.05 * number, number % 2) for number in range(20_000)]
    lonely = Arrival(30.0, 4)
    jobs = sorted([*flood, lonely])
    served = simulate(setting, jobs, placed, until=lonely)
    assert served.waits[-1] <= 60.0 + 10.0 + 2.0 + 1.0


@given(seed=st.integers(0, 2**32), rate=st.floats(0.05, 2.0), exponent=st.floats(0.0, 2.0))
@settings(max_examples=10, deadline=None)
def test_no_wait_is_longer_than_patience_and_a_turn_for_everybody(
    seed: int, rate: float, exponent: float
) -> None:
    chance = random.Random(seed)
    costs = tuple(Cost(1, chance.uniform(0.5, 8.0)) for _ in range(5))
    setting = Setting(jobs_a_second=rate, costs=costs, seconds=1500.0, exponent=exponent)
    turns = sum(max(10.0, cost.load_seconds) + cost.load_seconds for cost in costs)
    found = simulate(setting, list(islice(arrivals(setting, seed=seed), 2000)), placed)
    assert found.waits[-1] <= 60.0 + turns
