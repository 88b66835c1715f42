"""How often gates raise false alarms, and how often planted faults are caught and located: `python -m bench.gates`.

On the bundled model. Whole runs ask in another order each, so that other prompts share their forwards, every fourth by
one process of two threads and not by two of one. A fault is planted in a copy of the weight file, measured by a process
of its own as any checkpoint is, and taken out again. The copy has biases, all zero, which changes no number: so a
bias can be edited as well. What takes hours can go on where it stopped: `--log FILE` keeps every run, and
`docs/measured` has those that the documentation counts.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from bench import bundled
from neural_mri.client.local import LocalScans, LocalWorkers
from neural_mri.contract.baselines import MEASURES_VERSION
from neural_mri.contract.findings import Rule
from neural_mri.contract.suites import Measure, Suite
from neural_mri.diagnostics import Record, diagnose, load_suite, measure
from neural_mri.diagnostics.comparison import compare
from neural_mri.diagnostics.records import Block, Quantity

__all__ = ("KINDS", "main")

KINDS = ("2 % noise in a head's W_O", "a head zeroed", "an MLP scaled by 1.05", "a bias edited")
D_HEAD, N_HEADS, N_KV_HEADS, N_LAYERS = 64, 9, 3, 30
"""Of the bundled model."""

BIASED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.down_proj",
)


class Fault(NamedTuple):
    """What is done to a copy, and where."""

    kind: str
    layer: int
    head: int
    """Of a bias before the heads, one of the heads that share keys and values."""
    biased: str
    """Whose bias is edited, where one is."""


def main() -> None:
    """Measure, and print a line a finding."""
    parser = argparse.ArgumentParser(prog="python -m bench.gates", description=__doc__)
    parser.add_argument("--suite", default="quick", help="its name or file")
    parser.add_argument("--faults", type=int, default=8, help="of each kind")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--again", type=int, default=2, help="whole runs of the same checkpoint")
    parser.add_argument(
        "--log", type=Path, help="JSON lines of runs: those in it are not run again"
    )
    given = parser.parse_args()
    with LocalWorkers() as workers:
        _measure(given, workers)


class Runs:
    """Runs and what came of them, in a file where one is named."""

    def __init__(self, path: Path | None, suite: Suite) -> None:
        """Raises ValueError where the file is of another suite, or of numbers that are computed otherwise."""
        self._path = path
        self._known: dict[tuple[str, int], str] = {}
        self._of = {"suite": suite.digest, "measures": MEASURES_VERSION}
        if path is None or not path.exists():
            return
        for line in path.read_text().splitlines():
            run = msgspec.json.decode(line)
            if (of := {name: run.get(name) for name in self._of}) != self._of:
                raise ValueError(f"{path} has runs of {of}, not of {self._of}: name a new file")
            self._known[run["what"], run["number"]] = run["outcome"]

    def outcome(self, what: str, number: int, run: Callable[[], str]) -> str:
        """What came of a run: as it was written down, or else of running it now."""
        if (what, number) in self._known:
            return self._known[what, number]
        started = time.perf_counter()
        outcome = run()
        seconds = round(time.perf_counter() - started, 1)
        line = {**self._of, "what": what, "number": number, "outcome": outcome}
        print(f"{what}, {number + 1}: {outcome}, {seconds} s", flush=True)
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode({**line, "seconds": seconds}) + b"\n")
        return outcome


def _measure(given: argparse.Namespace, workers: LocalWorkers) -> None:
    suite = load_suite(given.suite)
    runs = Runs(given.log, suite)
    folder = bundled.folder()
    if given.resamples or given.again:
        _repeat(given, suite, folder, runs, workers)
    if given.faults:
        with tempfile.TemporaryDirectory() as workshop:
            copy = _with_biases(folder, Path(workshop) / "copy")
            _plant(given, suite, copy, runs, workers)


def _repeat(
    given: argparse.Namespace, suite: Suite, folder: Path, runs: Runs, workers: LocalWorkers
) -> None:
    baseline = _measured(suite, folder, workers, with_noise=True)
    _tell("baseline with its noise", baseline.seconds)
    alarms = sum(
        _alarms(suite, _redrawn(baseline, seed), baseline) for seed in range(given.resamples)
    )
    print(f"{given.resamples} recorded runs, resampled: {alarms} false alarms")

    def run(number: int) -> str:
        threads = 2 if number % 4 == 3 else None
        again = _measured(suite, folder, workers, threads=threads, seed=number)
        return "false alarm" if _alarms(suite, again, baseline) else "quiet"

    found = [
        runs.outcome("whole run", number, partial(run, number)) for number in range(given.again)
    ]
    print(f"{len(found)} whole runs: {found.count('false alarm')} false alarms")


def _plant(
    given: argparse.Namespace, suite: Suite, copy: Path, runs: Runs, workers: LocalWorkers
) -> None:
    baseline = _measured(suite, copy, workers, with_noise=True)
    for kind in KINDS:
        found = [
            runs.outcome(kind, number, partial(_caught, suite, copy, fault, baseline, workers))
            for number, fault in enumerate(_faults(kind, given.faults))
        ]
        caught = len(found) - found.count("passed")
        print(f"{kind}: {caught} of {len(found)} caught, {found.count('located')} at their layer")


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
    # Of a prompt without a foil there is no margin, and no noise of it that another could have had.
    return block._replace(values=block.values + signs * np.nan_to_num(noise[rows]))


def _size(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    size: npt.NDArray[np.float32] = np.sqrt((values * values).mean(1, keepdims=True))
    return size


def _faults(kind: str, count: int) -> Iterator[Fault]:
    draw = random.Random(kind)  # noqa: S311 -- places, not secrets
    for _ in range(count):
        layer, head, biased = draw.randrange(N_LAYERS), draw.randrange(N_HEADS), ""
        if kind == KINDS[3]:
            head, biased = head % N_KV_HEADS, draw.choice(BIASED)
        yield Fault(kind, layer, head, biased)


def _caught(suite: Suite, copy: Path, fault: Fault, baseline: Record, workers: LocalWorkers) -> str:
    """Whether what is computed names the fault's layer, another one, or no gate failed."""
    with _planted(copy, fault):
        diagnosis = diagnose(suite, _measured(suite, copy, workers), baseline)
    layers = [
        finding.evidence.layer for finding in diagnosis.findings if finding.rule is Rule.CHANGED_AT
    ]
    if diagnosis.passed:
        return "passed"
    return "located" if layers == [fault.layer] else f"located at {layers}, not {fault.layer}"


def _with_biases(folder: Path, copy: Path) -> Path:
    """The same function with every bias of its family written out, all of them zero."""
    shutil.copytree(folder, copy)
    config = msgspec.json.decode((copy / "config.json").read_bytes())
    config["attention_bias"] = config["mlp_bias"] = True
    (copy / "config.json").write_bytes(msgspec.json.encode(config))
    weights = load_file(copy / "model.safetensors")
    biases = {
        name.removesuffix("weight") + "bias": np.zeros(len(tensor), np.float32)
        for name, tensor in weights.items()
        if name.endswith("_proj.weight")
    }
    save_file({**weights, **biases}, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@contextmanager
def _planted(copy: Path, fault: Fault) -> Iterator[None]:
    path = copy / "model.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))

    def tensor(name: str) -> npt.NDArray[np.float32]:
        entry = header[f"model.layers.{fault.layer}.{name}"]
        at = 8 + length + entry["data_offsets"][0]
        return np.memmap(path, np.float32, "r+", at, tuple(entry["shape"]))

    path.chmod(0o644)
    head = slice(fault.head * D_HEAD, (fault.head + 1) * D_HEAD)
    draw = np.random.default_rng(fault.layer)
    if fault.biased:
        bias, weight = tensor(f"{fault.biased}.bias"), tensor(f"{fault.biased}.weight")
        place = bias if fault.biased in BIASED[3:] else bias[head]
        # Of what the map itself gives for an input whose RMS is 1.
        usual = float(weight.std()) * weight.shape[1] ** 0.5
        after = 0.02 * usual * draw.standard_normal(place.shape)
    elif fault.kind == KINDS[2]:
        place = tensor("mlp.down_proj.weight")
        after = place * np.float32(1.05)
    else:
        place = tensor("self_attn.o_proj.weight")[:, head]
        noise = 0.02 * place.std() * draw.standard_normal(place.shape)
        after = np.zeros_like(place) if fault.kind == KINDS[1] else place + noise
    before = np.array(place)
    place[...] = after
    try:
        yield
    finally:
        place[...] = before


if __name__ == "__main__":
    main()
