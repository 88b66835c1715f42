"""How often gates raise false alarms, and how often planted faults are caught and located: `python -m bench.gates`.

On the bundled model. Whole runs ask in another order each, so that other prompts share their forwards, with one
and with two threads in turn. A fault is planted in a copy of the weight file, measured by a process
of its own as any checkpoint is, and taken out again.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from bench import bundled
from neural_mri.client.local import LocalScans, LocalWorkers
from neural_mri.contract.findings import Rule
from neural_mri.contract.suites import Measure, Suite
from neural_mri.diagnostics import Record, diagnose, load_suite, measure
from neural_mri.diagnostics.comparison import compare
from neural_mri.diagnostics.records import Block, Quantity

__all__ = ("KINDS", "main")

KINDS = ("2 % noise in a head's W_O", "a head zeroed", "an MLP scaled by 1.05")
D_HEAD, N_HEADS, N_LAYERS = 64, 9, 30
"""Of the bundled model."""


class Fault(NamedTuple):
    """What is done to a copy, and where."""

    kind: str
    layer: int
    head: int


def main() -> None:
    """Measure, and print a line a finding."""
    parser = argparse.ArgumentParser(prog="python -m bench.gates", description=__doc__)
    parser.add_argument("--suite", default="quick", help="its name or file")
    parser.add_argument("--faults", type=int, default=8, help="of each kind")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--again", type=int, default=2, help="whole runs of the same checkpoint")
    given = parser.parse_args()
    with LocalWorkers() as workers:
        _measure(given, workers)


def _measure(given: argparse.Namespace, workers: LocalWorkers) -> None:
    suite, folder = load_suite(given.suite), bundled.folder()
    baseline = _measured(suite, folder, workers, with_noise=True)
    _tell("baseline with its noise", baseline.seconds)
    alarms = sum(
        _alarms(suite, _redrawn(baseline, seed), baseline) for seed in range(given.resamples)
    )
    print(f"{given.resamples} recorded runs, resampled: {alarms} false alarms")
    n_alarms = 0
    for number in range(given.again):
        run = _measured(suite, folder, workers, threads=1 + number % 2, seed=number)
        n_alarms += _alarms(suite, run, baseline)
        _tell(f"whole run {number + 1}, {n_alarms} false alarms so far", run.seconds)
    with tempfile.TemporaryDirectory() as workshop:
        copy = Path(workshop) / "copy"
        shutil.copytree(folder, copy)
        for kind in KINDS:
            found = [
                _caught(suite, copy, fault, baseline, workers)
                for fault in _faults(kind, given.faults)
            ]
            caught = sum(each is not None for each in found)
            print(
                f"{kind}: {caught} of {len(found)} caught, {sum(map(bool, found))} at their layer"
            )


def _tell(what: str, seconds: float) -> None:
    print(f"{what}: {seconds:.1f} s", flush=True)


def _measured(
    suite: Suite,
    folder: Path,
    workers: LocalWorkers,
    *,
    with_noise: bool = False,
    threads: int | None = None,
    seed: int | None = None,
) -> Record:
    order = None if seed is None else random.Random(seed)  # noqa: S311 -- orders, not secrets
    started = time.perf_counter()
    processes = None if threads is None else 1
    with LocalScans(str(folder), processes=processes, threads=threads, workers=workers) as scans:
        record = measure(suite, scans, with_noise=with_noise, order=order)
    return msgspec.structs.replace(record, seconds=time.perf_counter() - started)


def _alarms(suite: Suite, candidate: Record, baseline: Record) -> bool:
    found = compare(suite, candidate, baseline)
    scores = any(score.p_value < suite.alpha for score in found.scores)
    return scores or bool(found.weights) or any(len(each.changed) for each in found.tested)


def _redrawn(record: Record, seed: int) -> Record:
    """The record as another run might have had it: each prompt with the noise that some prompt had."""
    draw = np.random.default_rng(seed)
    blocks = dict(record.blocks)
    for quantity, again in record.noise.items():
        if quantity.measure is not Measure.ATTRIBUTION:
            block = record.blocks[quantity]
            clean = block.rows(again.prompts)
            if quantity.measure is Measure.NORMS:  # noise grows with what it is the noise of
                share = np.where(clean > 0, again.values / np.where(clean > 0, clean, 1) - 1, 0)
                unit = block._replace(values=np.ones_like(block.values))
                factors = _noisy(unit, share.astype(np.float32), draw).values
                blocks[quantity] = block._replace(values=block.values * factors)
            else:
                blocks[quantity] = _noisy(block, again.values - clean, draw)
    alone, accompanied = (
        record.noise[Quantity(Measure.ATTRIBUTION, name)] for name in ("alone", "accompanied")
    )
    estimate = Quantity(Measure.ATTRIBUTION, "estimate")
    relative = (accompanied.rows(alone.prompts) - alone.values) / _size(alone.values)
    block = record.blocks[estimate]
    scaled = _noisy(block._replace(values=block.values / _size(block.values)), relative, draw)
    blocks[estimate] = block._replace(values=scaled.values * _size(block.values))
    return msgspec.structs.replace(record, blocks=blocks)


def _noisy(block: Block, noise: npt.NDArray[np.float32], draw: np.random.Generator) -> Block:
    rows = draw.integers(0, len(noise), len(block.prompts))
    signs = draw.choice([-1.0, 1.0], (len(rows), 1)).astype(np.float32)
    return block._replace(values=block.values + signs * noise[rows])


def _size(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    size: npt.NDArray[np.float32] = np.sqrt((values * values).mean(1, keepdims=True))
    return size


def _faults(kind: str, count: int) -> Iterator[Fault]:
    draw = random.Random(kind)  # noqa: S311 -- places, not secrets
    for _ in range(count):
        yield Fault(kind, draw.randrange(N_LAYERS), draw.randrange(N_HEADS))


def _caught(
    suite: Suite, copy: Path, fault: Fault, baseline: Record, workers: LocalWorkers
) -> bool | None:
    """Whether what is computed names the fault's layer; None where no gate failed."""
    with _planted(copy, fault):
        diagnosis = diagnose(suite, _measured(suite, copy, workers), baseline)
    layers = [
        finding.evidence.layer for finding in diagnosis.findings if finding.rule is Rule.CHANGED_AT
    ]
    return None if diagnosis.passed else layers == [fault.layer]


@contextmanager
def _planted(copy: Path, fault: Fault) -> Iterator[None]:
    path = copy / "model.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    scaled = fault.kind == KINDS[2]
    name = "mlp.down_proj" if scaled else "self_attn.o_proj"
    entry = header[f"model.layers.{fault.layer}.{name}.weight"]
    path.chmod(0o644)
    weights = np.memmap(
        path, np.float32, "r+", 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
    )
    before = np.array(weights)
    head = slice(fault.head * D_HEAD, (fault.head + 1) * D_HEAD)
    if scaled:
        weights *= np.float32(1.05)
    elif fault.kind == KINDS[1]:
        weights[:, head] = 0
    else:
        draw = np.random.default_rng(fault.layer)
        weights[:, head] += (
            0.02 * before[:, head].std() * draw.standard_normal(before[:, head].shape)
        )
    weights.flush()
    try:
        yield
    finally:
        weights[:] = before
        weights.flush()


if __name__ == "__main__":
    main()
