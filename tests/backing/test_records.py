import time
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest

from neural_mri.backing.records import new_id
from neural_mri.contract.jobs import JobKind
from tests.backing.making import submission, tokens


def test_ids_are_uuids_of_version_seven_that_say_when_they_were_made() -> None:
    made = new_id()
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert made.int >> 80 == pytest.approx(time.time() * 1000, abs=1000)


def test_ids_of_one_process_stand_in_the_order_they_were_made() -> None:
    made = [new_id() for _ in range(5000)]
    assert made == sorted(made)


def test_threads_never_make_the_same_id() -> None:
    with ThreadPoolExecutor(4) as threads:
        made: list[UUID] = list(threads.map(lambda _: new_id(), range(4000)))
    assert len(set(made)) == 4000


def test_a_job_without_a_prompt_costs_one() -> None:
    assert submission(tokens=None).estimated_cost == 1.0
    assert submission(tokens=tokens(7)).estimated_cost == 7.0


def test_jobs_share_a_pass_when_its_kind_weights_and_length_are_equal() -> None:
    first, second = uuid4(), uuid4()
    other_prompt = b'{"scan_mode":"fMRI","prompt":"Goodbye"}'
    shared = submission(owner="bob", request=other_prompt).batch_key(second)
    assert submission().batch_key(first) == shared
    for other in (
        submission(tokens=tokens(9)),
        submission(revision="f" * 64),
        submission(request=b'{"scan_mode":"fMRI","prompt":"Hello","top_neurons":3}'),
        submission(request=b'{"scan_mode":"fMRI","prompt":"Hello","canonical":true}'),
        submission(request=b'{"scan_mode":"attention","prompt":"Hello","layers":[0]}'),
    ):
        assert other.batch_key(first) != submission().batch_key(first)


def test_a_job_that_reads_no_prompt_shares_with_none() -> None:
    load = submission(kind=JobKind.LOAD, tokens=None)
    assert load.batch_key(uuid4()) != load.batch_key(uuid4())
