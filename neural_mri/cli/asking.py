"""What every command that scans has in common: when it is to run, and what becomes of its result."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from neural_mri.cli import options, outcomes
from neural_mri.cli.options import Outputs
from neural_mri.contract.jobs import Lane
from neural_mri.contract.scans import Scan

__all__ = ("Asking", "asks")

SHOWN = 5
"""Rows of each list, unless `--top` says otherwise."""


class Asking(NamedTuple):
    """The options of every command that scans, checked."""

    outputs: Outputs
    lane: Lane
    wait: bool
    url: str | None

    @property
    def top(self) -> int:
        """Rows of each list to show."""
        return self.outputs.top

    def scan(self, request: Scan, *, head: int | None = None) -> None:
        """Ask the service, and print and write what it says."""
        with options.open_client(self.url) as client:
            outcomes.scan(client, request, self.outputs, lane=self.lane, wait=self.wait, head=head)


def asks(*, shown: int = SHOWN) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the common options, after its own. They reach it as its parameter `asking`."""

    def common(
        *,
        lane: options.InLane = Lane.INTERACTIVE,
        top: options.Top = shown,
        as_json: options.Json = False,
        arrow: options.ArrowFile = None,
        csv: options.CsvFile = None,
        plot: options.PlotFile = None,
        no_wait: options.NoWait = False,
        quiet: options.Quiet = False,
        url: options.Url = None,
    ) -> Asking:
        outputs = Outputs(as_json, quiet, top, arrow, csv, plot).check(wait=not no_wait)
        return Asking(outputs, lane, not no_wait, url)

    shared = inspect.signature(common).parameters

    def given_to(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [each for each in signature.parameters.values() if each.name != "asking"]

        @wraps(command)
        def run(**given: Any) -> None:
            asking = common(**{name: given.pop(name) for name in shared})
            command(**given, asking=asking)

        parameters = [*own, *shared.values()]
        # Both are what typer reads.
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return given_to
