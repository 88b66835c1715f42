"""The bars of a command say where its job waits."""

from datetime import UTC, datetime
from uuid import uuid4

from neural_mri.cli.progress import JobProgress
from neural_mri.contract.events import Queued, StateChanged
from neural_mri.contract.jobs import JobKind, JobState, JobView, QueuePlace


def waiting(**changes: object) -> JobView:
    return JobView(
        id=uuid4(),
        kind=JobKind.SCAN,
        state=JobState.QUEUED,
        model="tiny",
        revision="0" * 64,
        created_at=datetime.now(UTC),
        **changes,  # type: ignore[arg-type]
    )


def test_a_waiting_job_is_shown_with_its_place_until_it_starts() -> None:
    with JobProgress(quiet=True) as progress:

        def said() -> str:
            return progress._bars.tasks[0].description

        progress.begin(waiting())
        assert said() == "queued"
        progress.begin(waiting(queue=QueuePlace(position=7, estimated_start_seconds=200.0)))
        assert said() == "place 7 in the queue, starts in about 3 min"
        progress(Queued(position=1, estimated_start_seconds=4.2))
        assert said() == "next in the queue, starts in about 4 s"
        progress(StateChanged(state=JobState.RUNNING, attempt=1))
        assert said() == "running"
