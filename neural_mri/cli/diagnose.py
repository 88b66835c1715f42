"""`neural-mri diagnose` and `neural-mri report`: a checkpoint examined, gated, and told about."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from neural_mri.cli import options
from neural_mri.cli.exits import ExitCode
from neural_mri.cli.terminal import complain, complaints, note, standard_output
from neural_mri.client import ClientError
from neural_mri.client.diagnosing import ServiceScans, diagnosed
from neural_mri.client.local import LocalScans, LocalWorkers, WorkerMissing
from neural_mri.contract.findings import Diagnosis, Severity
from neural_mri.contract.problems import InvalidRequest, Problem
from neural_mri.contract.suites import Language, Suite
from neural_mri.diagnostics import FORMATS, Records, Scans, load_suite, render, suite_names
from neural_mri.diagnostics.phrasing import Phrases, number
from neural_mri.diagnostics.reports import read_diagnosis
from neural_mri.diagnostics.reports.wording import case_unit, checkpoint, verdict

__all__ = ("GateExit", "diagnose", "report")


class GateExit(IntEnum):
    """What a CI job can rely on."""

    PASSED = 0
    FAILED = 1
    NOT_RUN = 2


_EXITS = "Exit codes: 0 every gate passed; 1 a gate failed; 2 it could not run, or the two cannot be compared."

_SUFFIXES = {
    "html": ".html",
    "md": ".md",
    "json": ".json",
    "junit": ".junit.xml",
    "sarif": ".sarif",
}

InLanguage = Annotated[
    Language,
    typer.Option(
        "--language",
        parser=options.one_of(Language),
        metavar="|".join(Language),
        help="What reports are written in.",
    ),
]


def diagnose(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help=f"{', '.join(suite_names())}, or a .toml file.")
    ] = "quick",
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint: a name; with --local also a folder of safetensors.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with this one; without it nothing is gated."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Scan on this machine; needs no service.")
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Other tolerances of the suite, such as `tuned`."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help=f"Write the report there, as {', '.join(FORMATS)}."),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records",
            metavar="FOLDER",
            help="Where measurements are kept under their keys; a CI job caches it.",
            show_default="NMRI_BASELINES, or ~/.cache/neural-mri/baselines",
        ),
    ] = None,
    language: InLanguage = Language.EN,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Examine a checkpoint with a suite of prompts, and gate it against a baseline.

    neural-mri diagnose quick --local --model ./candidate --baseline ./main --out report
    """
    try:
        for name, given in (("--model", model), ("--baseline", baseline)):
            # A variable that was never set: without a baseline nothing would be gated.
            if given == "":
                raise typer.BadParameter(f"{name} is empty: expected a checkpoint")
        if local and model is None:
            raise typer.BadParameter("--local needs --model: a folder or a name")
        diagnosis = _run(
            load_suite(suite),
            model=model,
            baseline=baseline,
            local=local,
            profile=profile,
            records=Records(records),
            quiet=quiet,
            url=url,
        )
        if out is not None:
            _write(diagnosis, out, language, tuple(FORMATS))
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except (typer.BadParameter, ClientError, Problem, OSError) as error:
        with _unheard():
            complain(getattr(error, "message", None) or str(error))
        raise typer.Exit(GateExit.NOT_RUN) from error
    except Exception:  # noqa: BLE001 -- whatever it is, no gate has failed
        # Python's own status for an error that nobody foresaw is 1, which says that a gate failed.
        with _unheard():
            traceback.print_exc()
        raise typer.Exit(GateExit.NOT_RUN) from None
    with _unheard():
        _print(diagnosis, Phrases(language), standard_output())
        if out is not None and not quiet:
            note(f"wrote {out / 'diagnosis.html'} and {len(FORMATS) - 1} more")
    raise typer.Exit(GateExit.PASSED if diagnosis.passed else GateExit.FAILED)


diagnose.__doc__ = f"{diagnose.__doc__}\n{_EXITS}"


def report(
    diagnosis: Annotated[
        Path, typer.Argument(metavar="FILE", help="diagnosis.json, as `diagnose --out` wrote it.")
    ],
    *,
    form: Annotated[
        str,
        typer.Option("--format", metavar="|".join(FORMATS), help="What to write."),
    ] = "html",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to.", show_default="standard output"),
    ] = None,
    language: InLanguage = Language.EN,
) -> None:
    """Write a diagnosis again, in another form or another language. Nothing is scanned."""
    try:
        text = render(_read(diagnosis), form, language)
        if out is None:
            sys.stdout.buffer.write(text.encode())
            sys.stdout.flush()
        else:
            out.write_text(text, "utf-8")
    except BrokenPipeError:
        raise  # whoever read has enough: the interpreter's own way out says nothing
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}")
        raise typer.Exit(ExitCode.USAGE) from error
    except Problem as error:
        complain(str(error))
        raise typer.Exit(ExitCode.USAGE) from error


@contextmanager
def _unheard() -> Iterator[None]:
    """Whoever read may have gone, or a disk be full: that says nothing about the gates, so no exit code does.

    rich leaves the process with 1 where nobody reads.
    """
    try:
        yield
    except (OSError, SystemExit):
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                # The interpreter flushes once more as it ends, and has an exit code of its own for that.
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _read(file: Path) -> Diagnosis:
    body = file.read_bytes()
    try:
        return read_diagnosis(body)
    except InvalidRequest as error:
        raise InvalidRequest(f"{file}: {error.detail}") from error


def _run(
    suite: Suite,
    *,
    model: str | None,
    baseline: str | None,
    local: bool,
    profile: str | None,
    records: Records,
    quiet: bool,
    url: str | None,
) -> Diagnosis:
    with ExitStack() as opened:
        if local:
            workers = opened.enter_context(LocalWorkers())
            # Imports take as long as it does to know the checkpoints by their contents. Where both have been
            # measured nobody needs them.
            with suppress(WorkerMissing):
                workers.start()

            def scans(checkpoint: str) -> Scans:
                opening = LocalScans(checkpoint, records=records, workers=workers)
                return opened.enter_context(opening)

            candidate = scans(model or "")
            there = scans(baseline) if baseline else None
        else:
            client = opened.enter_context(options.open_client(url))
            candidate = ServiceScans(client, model)
            there = ServiceScans(client, baseline) if baseline else None
        advance = opened.enter_context(_progress(quiet=quiet))
        return diagnosed(
            suite,
            candidate,
            there,
            records,
            profile=profile,
            on_progress=advance,
            on_note=note,
        )


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a checkpoint, where somebody can see it."""
    console = complaints()
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=36),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    tasks: dict[str, int] = {}

    def advance(model: str, done: int, total: int) -> None:
        if not total:
            if not quiet:
                with _unheard():
                    note(f"{model}: measured before")
            return
        if model not in tasks or done == 1:
            tasks[model] = bars.add_task(model, total=total)
        bars.update(tasks[model], completed=done, total=total)  # type: ignore[arg-type]

    with bars:
        yield advance


def _write(diagnosis: Diagnosis, folder: Path, language: Language, forms: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for form in forms:
        text = render(diagnosis, form, language)
        (folder / f"diagnosis{_SUFFIXES[form]}").write_text(text, "utf-8")


_STYLES = {
    Severity.FAILURE: "bold red",
    Severity.WARNING: "yellow",
    Severity.NOTE: "dim",
    None: "green",
}
_FINDINGS_SHOWN = 12


def _print(diagnosis: Diagnosis, phrases: Phrases, console: Console) -> None:
    """What fits a screen."""
    style = "green" if diagnosis.passed else "bold red"
    console.print(
        Text(f"{checkpoint(diagnosis.candidate)} · ").append(
            verdict(diagnosis, phrases), style=style
        )
    )
    if diagnosis.baseline is not None:
        console.print(Text(f"{phrases('baseline')}: {checkpoint(diagnosis.baseline)}", style="dim"))
    if diagnosis.gates:
        console.print()
        console.print(_gates(diagnosis, phrases))
    console.print()
    table = Table.grid(padding=(0, 2))
    for case in diagnosis.cases:
        table.add_row(
            f"  {phrases.of(case.title)}",
            phrases.score(case.score, case_unit(case)),
            f"n={case.score.n}",
            Text(", ".join(each.label for each in case.carriers[:3]), style="dim"),
        )
    console.print(table)
    console.print()
    for finding in diagnosis.findings[:_FINDINGS_SHOWN]:
        said = phrases.say(finding, diagnosis)
        line = Text(f"{phrases.severity(finding.severity):>8}  ", style=_STYLES[finding.severity])
        console.print(
            line.append(said.title, style="bold not dim").append(f"  {said.text}", style="none")
        )
    if (left := len(diagnosis.findings) - _FINDINGS_SHOWN) > 0:
        console.print(Text(f"          … +{left}", style="dim"))


def _gates(diagnosis: Diagnosis, phrases: Phrases) -> Table:
    table = Table(box=None, padding=(0, 2))
    for name in ("measure", "outcome", "changed", "largest", "p_value", "where"):
        table.add_column(phrases(name), style="dim" if name == "p_value" else None)
    for gate in diagnosis.gates:
        table.add_row(
            phrases.measure(gate.measure.value),
            Text(phrases.severity(gate.severity), style=_STYLES[gate.severity]),
            f"{gate.changed} / {gate.tested}",
            phrases.quantity(gate.largest, gate.unit),
            number(gate.p_value),
            phrases.place(gate.where, diagnosis) if gate.where else "",
        )
    return table
