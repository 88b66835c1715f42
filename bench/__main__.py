"""Measure, print, and write the page.

Every figure is a ratio to one plain forward of the same run, so that pages of different machines can be
compared. `--quick` leaves out all but the first table.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers

from bench import (
    activations,
    anomalies,
    bundled,
    circuits,
    detection,
    devices,
    fidelity,
    growth,
    memory,
    page,
    stimulation,
    weights,
)
from bench.timing import Row
from worker.scanner import loading
from worker.scanner.loading import LoadedModel

_MEMORY_BAR = 0.25
"""Most that an fMRI scan of 512 tokens may rise above the model, as a share of it."""
_MIB = 1 << 20


def main() -> None:
    """Run every row."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="runs of each candidate (9)")
    parser.add_argument("--threads", type=int, help="PyTorch's threads (as many as cores)")
    parser.add_argument("--model", type=Path, help="a model folder (the bundled SmolLM2)")
    parser.add_argument("--quick", action="store_true", help="the table of ratios alone")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}: expected at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = arguments.model or bundled.folder()
    model = loading.load(folder, loading.published_numerics(folder))
    parts = [_heading(folder.name, rounds=arguments.rounds)]
    print(parts[0], flush=True)
    for part in _parts(model, folder, rounds=arguments.rounds, quick=arguments.quick):
        print(part, flush=True)
        parts.append(part)
    # What other commands measure, or this one did not this time, stays as it is.
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    written = "\n".join(parts)
    titles = page.headings(written)
    lead = written.partition("\n## ")[0]
    page.replace_lead(arguments.page, lead)
    for title in titles:
        found = page.section(written, title) or ""
        page.replace_section(arguments.page, title, found.partition("\n")[2].strip("\n"))


def _parts(model: LoadedModel, folder: Path, *, rounds: int, quick: bool) -> Iterator[str]:
    yield _ratios(_rows(model, folder, rounds=rounds))
    if quick:
        return
    yield "## How cost grows\n\nIn plain forwards of the same prompt, same rounds.\n"
    for grown in growth.growths(model, rounds=rounds):
        yield _growth(grown)
    yield _memory(memory.peak(folder), memory.swaps())
    yield from _quality(model, folder)
    yield _devices()


def _rows(model: LoadedModel, folder: Path, *, rounds: int) -> Iterator[Row]:
    sources = (
        activations.rows,
        partial(weights.rows, folder),
        anomalies.rows,
        circuits.rows,
        stimulation.rows,
    )
    for source in sources:
        for row in source(model, rounds=rounds):
            print(
                f"{row.what}, {row.n_tokens} tokens: {row.ratio:.2f}", file=sys.stderr, flush=True
            )
            yield row


def _quality(model: LoadedModel, folder: Path) -> Iterator[str]:
    yield "## Quality\n"
    yield fidelity.markdown(model, folder)
    yield detection.markdown(model, folder)


def _heading(model_name: str, *, rounds: int) -> str:
    clock = "Processor" if torch.get_num_threads() == 1 else "Wall"
    return f"""# Benchmarks

Written by `python -m bench`. {clock} time, median of {rounds} rounds (fewer where one takes seconds) in which
every candidate runs once, after warm-up; the ratio is to one plain Hugging Face forward (all logits, no cache)
of the same prompt in the same rounds. Model: {model_name}, float32. Machine: {_machine()}; Python
{platform.python_version()}, PyTorch {torch.__version__}, transformers {transformers.__version__}.
"""


def _ratios(rows: Iterable[Row]) -> str:
    return _table(
        ("what", "tokens", "milliseconds", "x plain forward", "bar"),
        [
            (
                row.what,
                str(row.n_tokens),
                f"{row.seconds * 1e3:.1f}",
                f"{row.ratio:.2f}",
                "" if row.goal is None else _verdict(row.ratio, row.goal),
            )
            for row in rows
        ],
    )


def _growth(grown: growth.Growth) -> str:
    header = (grown.size, "plain, milliseconds", *grown.candidates)
    lines = [
        (
            str(size),
            f"{seconds['plain'] * 1e3:.1f}",
            *(f"{seconds[name] / seconds['plain']:.2f}" for name in grown.candidates),
        )
        for size, seconds in grown.seconds.items()
    ]
    return f"### {grown.title}\n\n{_table(header, lines)}"


def _memory(peak: memory.Peak, swaps: memory.Swaps) -> str:
    share = peak.scan / peak.model
    lines = [
        ("the model", f"{peak.model / _MIB:.0f}", ""),
        ("a plain forward of 512 tokens, above it", f"{peak.plain / _MIB:.0f}", ""),
        (
            "an fMRI scan of 512 tokens, above it",
            f"{peak.scan / _MIB:.0f}",
            _verdict(share, _MEMORY_BAR) + f" ({share:.2f} of the model)",
        ),
        (
            f"what {memory.SWAPS - memory.SETTLED} further model swaps leave behind",
            f"{(swaps.last - swaps.settled) / _MIB:.1f}",
            _verdict((swaps.last - swaps.settled) / swaps.model, _MEMORY_BAR)
            + f" (of a model of {swaps.model / _MIB:.0f} MiB)",
        ),
    ]
    return "## Memory\n\n" + _table(("what", "MiB", "bar"), lines)


def _devices() -> str:
    title = "## Seconds on a GPU\n\n"
    if not torch.cuda.is_available():
        return title + "Not measured: PyTorch sees no CUDA device here.\n"
    lines = [
        (timed.shape, timed.dtype, timed.what, f"{timed.seconds:.4f}")
        for name, shape in devices.SHAPES.items()
        for timed in devices.every_mode(name, shape, device="cuda")
    ]
    name = f"{torch.cuda.get_device_name()}, random weights, one prompt of 32 tokens.\n\n"
    return title + name + _table(("shape", "type", "what", "seconds"), lines)


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    every = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in every)


def _verdict(found: float, bar: float) -> str:
    return f"≤ {bar:.2f}: {'met' if found <= bar else 'missed'}"


def _machine() -> str:
    """Processor and cores, and nothing that names this machine among others."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores, PyTorch threads: {torch.get_num_threads()}"


if __name__ == "__main__":
    main()
