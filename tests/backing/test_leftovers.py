from uuid import uuid4

from neural_mri.backing import jobs, keys
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import Job
from neural_mri.backing.leftovers import left_over
from neural_mri.contract.jobs import JobState
from tests.backing.making import ELSEWHERE, QUEUE, submission

KEY = "a" * 64


def claimed(sessions: Sessions) -> Job:
    [job] = sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60.0)
    return job


def test_whose_result_a_file_is() -> None:
    job_id = uuid4()
    for path in keys.Attempt(job_id, 12).results:
        assert keys.attempt_of(path) == (job_id, 12)
        assert keys.result_of(path) == path
    manifest = keys.pieces_path(job_id, 12)
    table = keys.table_path(manifest, "ab" * 32)
    assert keys.attempt_of(table) == (job_id, 12)
    assert keys.result_of(table) == manifest
    for path in (
        f"packed/{job_id}.1.json",
        f"packed/{job_id}.01.result",
        f"packed/{str(job_id).upper()}.1.result",
        f"kept/{job_id}.1.result",
        f"packed/{job_id}.result",
        f"pieces/{job_id}.1.{'ab' * 31}.arrow",
        f"packed/{job_id}.1.{'ab' * 32}.arrow",
        "packed/x.1.result",
        keys.kept_result_path("ab" * 32),
        keys.chunk_path("ab" * 32),
        keys.calibration_path("ab" * 32),
    ):
        assert keys.attempt_of(path) is None


def test_whoever_names_a_result_keeps_it(sessions: Sessions) -> None:
    first = sessions.write(jobs.submit, submission(scan_key=KEY))
    for owner in ("bob", "cyd"):
        sessions.write(jobs.submit, submission(owner=owner, scan_key=KEY))
    known = claimed(sessions)
    # What its worker goes on with is bob's from now on.
    assert sessions.write(jobs.request_cancel, first.id).moved
    result = keys.packed_path(known.id, known.attempt)
    assert sessions.read(left_over, [result]) == []
    for to, path in ((JobState.RUNNING, None), (JobState.SUCCEEDED, result)):
        assert sessions.write(jobs.advance, known.id, to, attempt=known.attempt, manifest=path)
    assert sessions.write(jobs.submit, submission(owner="dan", scan_key=KEY)).manifest == result
    other = keys.manifest_path(known.id, known.attempt)
    assert sessions.read(left_over, [result, other]) == [other]


def test_what_this_database_knows_nothing_of_is_left_alone(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    known = claimed(sessions)
    sessions.write(jobs.advance, known.id, JobState.QUEUED, attempt=known.attempt)
    lost, to_come = (keys.packed_path(known.id, number) for number in (1, 2))
    strange = [
        keys.packed_path(uuid4(), 1),
        to_come,
        keys.kept_result_path("ab" * 32),
        keys.chunk_path("ab" * 32),
    ]
    assert sessions.read(left_over, strange) == []
    assert sessions.read(left_over, [*strange, lost]) == [lost]
    assert sessions.read(left_over, []) == []
