"""`neural-mri cluster`: workers, what they hold, and what waits, as it changes."""

import time
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Group
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from neural_mri.cli import options
from neural_mri.cli.terminal import print_json, standard_output
from neural_mri.contract.cluster import Cluster, ModelHeld, QueueLoad, WorkerSeen

__all__ = ("cluster",)


def cluster(
    once: Annotated[bool, typer.Option("--once", help="Show it once, and leave.")] = False,
    interval: Annotated[
        float,
        typer.Option(
            "--interval",
            parser=options.number(0.1, 3600),
            metavar="SECONDS",
            help="How often to look.",
        ),
    ] = 1.0,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Watch workers, the models they hold, and the queues, until Ctrl-C; once where nobody watches."""
    console = standard_output()
    with options.open_client(url) as client:
        if as_json:
            print_json(client.cluster())
        elif once or not console.is_terminal:
            console.print(_picture(client.cluster()))
        else:
            first = _picture(client.cluster())
            # Whatever it is doing when it is told to leave: that is how it ends.
            with (
                suppress(KeyboardInterrupt),
                Live(first, console=console, auto_refresh=False) as live,
            ):
                while True:
                    time.sleep(interval)
                    live.update(_picture(client.cluster()), refresh=True)


def _picture(seen: Cluster) -> Group:
    versions = seen.versions
    redis = f"redis {versions.redis}" if versions.redis else "redis away"
    head = f"neural-mri {versions.service}, python {versions.python}, {versions.database}, {redis}"
    return Group(
        Text(head, style="dim"), Text(), _workers(seen.workers), Text(), _queues(seen.queues)
    )


def _workers(workers: tuple[WorkerSeen, ...] | None) -> Table | Text:
    if workers is None:
        return Text("Redis is away: what workers do is not known.", style="yellow")
    if not workers:
        return Text("No worker has been heard of.", style="yellow")
    table = _table(
        "worker", "device", "version", "free", "model", "state", "memory", "loaded in", "held for"
    )
    for worker in workers:
        head = (worker.worker, worker.device, worker.version or "?", _room(worker))
        for model in worker.models or (None,):
            table.add_row(*head, *_held(model))
            head = ("", "", "", "")
    return table


def _room(worker: WorkerSeen) -> str:
    """What it could load now, of what its models may take in all."""
    if worker.free_bytes is None or worker.budget_bytes is None:
        return ""
    return f"{decimal(worker.free_bytes)} of {decimal(worker.budget_bytes)}"


def _held(model: ModelHeld | None) -> tuple[str, str, str, str, str]:
    if model is None:
        return ("nothing", "", "", "", "")
    return (
        model.name,
        model.state.value + (", pinned" if model.pinned else ""),
        "" if model.memory_bytes is None else decimal(model.memory_bytes),
        "" if model.load_seconds is None else f"{model.load_seconds:.1f} s",
        "" if model.held_seconds is None else f"{model.held_seconds:.0f} s",
    )


def _queues(queues: tuple[QueueLoad, ...]) -> Table | Text:
    if not queues:
        return Text("Nothing waits, nothing runs.", style="dim")
    table = _table("model", "lane", "queue", "waiting", "oldest", "running")
    for load in queues:
        oldest = f"{load.oldest_seconds:.1f} s" if load.waiting else ""
        waiting, running = str(load.waiting), str(load.running)
        table.add_row(load.model, load.lane.value, load.queue, waiting, oldest, running)
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        numbers = heading in {
            "free",
            "memory",
            "loaded in",
            "held for",
            "waiting",
            "oldest",
            "running",
        }
        table.add_column(heading, justify="right" if numbers else "left")
    return table
