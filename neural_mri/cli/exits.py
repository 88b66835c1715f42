"""Exit codes, and which error means which."""

from enum import IntEnum

from neural_mri.client import ClientError, JobCancelled, MissingExtra, Unreachable
from neural_mri.contract.batches import BatchCounts, BatchState

__all__ = ("EXIT_CODES", "ExitCode", "exit_code_of", "exit_code_of_batch")


class ExitCode(IntEnum):
    """What a shell or a CI job can rely on."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    CANCELLED = 4
    INTERRUPTED = 130


EXIT_CODES = """\
Exit codes: 0 done; 1 the scan failed or the service refused it; 2 bad usage; 3 the service does not \
answer; 4 the job was cancelled; 130 interrupted (what the command itself asked for and waits for, and the \
job of `job --watch`, is cancelled on the service too; anything else goes on)."""


def exit_code_of(error: ClientError) -> ExitCode:
    """The exit code that tells this error from others."""
    match error:
        case Unreachable():
            return ExitCode.UNREACHABLE
        case JobCancelled():
            return ExitCode.CANCELLED
        case MissingExtra():
            return ExitCode.USAGE
        case _:
            return ExitCode.FAILED


def exit_code_of_batch(state: BatchState, counts: BatchCounts, *, deleted: int = 0) -> ExitCode:
    """Whether every scan of a batch that is over has succeeded: a failure, or a loss, before a cancellation."""
    if state is not BatchState.CANCELLED and (
        counts.failed or deleted or state is BatchState.STOPPED
    ):
        return ExitCode.FAILED
    if state is BatchState.CANCELLED or counts.cancelled:
        return ExitCode.CANCELLED
    return ExitCode.DONE
