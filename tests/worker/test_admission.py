"""Whether scans fit, and what happens when memory runs out: for real, in a process that may have little."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neural_mri.contract.anomalies import CalibrationScan
from neural_mri.contract.circuits import CircuitScan
from neural_mri.contract.perturbations import Noise, PatchingScan, PerturbationScan, TracingScan
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
    AnomalyScan,
    AttentionScan,
    Scan,
    StructuralScan,
    WeightScan,
)
from tests.api.specimens import TINY
from worker import admission
from worker.admission import MOST_HALVINGS, estimate, halving, shown
from worker.scanner.halving import halved, portion, ran_out

ROOT = Path(__file__).parents[2]
SCANS: tuple[Scan, ...] = (
    ActivationScan(prompt="x"),
    ActivationScan(prompt="x", aggregation=Aggregation.RAW),
    AttentionScan(prompt="x", layers=(0, 1)),
    AnomalyScan(prompt="x"),
    CircuitScan(prompt="x", corrupt_prompt="y"),
    PerturbationScan(prompt="x", perturbations=(Noise(component="blocks.0.mlp", draws=3),)),
    PatchingScan(prompt="x", corrupt_prompt="y"),
    TracingScan(prompt="x", subject="x"),
)


@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: type(scan).__name__)
def test_a_longer_prompt_needs_more_and_half_precision_less(scan: Scan) -> None:
    def needed(n_tokens: int, itemsize: int = 4) -> int:
        return estimate(scan, TINY, n_tokens=n_tokens, itemsize=itemsize)

    assert 0 < needed(8) < needed(16) < needed(64)
    assert needed(64, itemsize=2) < needed(64)


def test_what_reads_files_needs_no_memory_worth_a_word() -> None:
    for scan in (StructuralScan(), WeightScan()):
        assert estimate(scan, TINY, n_tokens=0, itemsize=4) == 0
    assert estimate(CalibrationScan(), TINY, n_tokens=0, itemsize=4) > 0


def test_a_calibration_needs_room_for_the_text_it_samples_and_the_values_it_keeps() -> None:
    def needed(n_tokens: int, *, n_ordinary: int = 128, texts: tuple[str, ...] = ()) -> int:
        scan = CalibrationScan(n_tokens=n_tokens, n_ordinary=n_ordinary, texts=texts)
        return estimate(scan, TINY, n_tokens=0, itemsize=4)

    a_token = 4 * 2 * TINY.n_layers * TINY.n_kv_heads * TINY.d_head
    assert needed(1_000_000) > needed(16_384) + 983_616 * a_token
    a_position = 4 * (2 * TINY.n_layers + 1) * TINY.d_model
    assert needed(16_384, n_ordinary=4096) > needed(16_384) + 3968 * a_position
    assert needed(1_000_000, texts=("given",)) == needed(16_384, texts=("given",))


def test_bytes_are_said_in_words() -> None:
    assert [shown(n) for n in (900, 1536, 3 << 20, 5 << 29)] == [
        "900 bytes",
        "1.5 KiB",
        "3.0 MiB",
        "2.5 GiB",
    ]


def test_a_portion_is_halved_as_often_as_it_is_said() -> None:
    assert portion(64) == 64
    with halved(3) as unasked:
        pass
    with halved(2) as asked:
        assert [portion(64), portion(1)] == [16, 1]
    assert (asked.has_batches, unasked.has_batches) == (True, False)
    assert portion(64) == 64


def cramped(largest: int, *, asks: bool = True) -> Callable[[], int]:
    """Work that has room for batches of so many bytes."""

    def work() -> int:
        batch = portion(64) if asks else 64
        if batch > largest:
            raise MemoryError
        return batch

    return work


@pytest.fixture
def nothing_to_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has seen many tests has much to look through."""
    monkeypatch.setattr(admission, "give_back", lambda: None)


@pytest.mark.usefixtures("nothing_to_collect")
def test_work_is_done_in_batches_that_fit() -> None:
    assert halving(cramped(64)) == 64
    assert halving(cramped(10)) == 8


@pytest.mark.usefixtures("nothing_to_collect")
def test_work_without_batches_or_with_none_that_fits_fails() -> None:
    with pytest.raises(MemoryError):
        halving(cramped(10, asks=False))
    with pytest.raises(MemoryError):
        halving(cramped(0))
    assert 64 >> MOST_HALVINGS == 1


def test_other_errors_are_not_tried_again() -> None:
    tried = []

    def broken() -> None:
        tried.append(portion(64))
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        halving(broken)
    assert tried == [64]


def test_running_out_is_told_from_other_errors() -> None:
    assert ran_out(MemoryError())
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert ran_out(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8"))
    assert ran_out(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert ran_out(
        RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)")
    )
    assert not ran_out(OSError(errno.ENOENT, "No such file or directory"))
    assert not ran_out(RuntimeError("a bug"))


CHILD = """
import json, resource

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from neural_mri.contract.anomalies import Lens
from neural_mri.contract.models import Numerics
from neural_mri.contract.scans import AnomalyScan
from tests.models import prompt
from worker import admission, metrics
from worker.scanner import logit_lens
from worker.scanner.anomalies import scan_anomalies
from worker.scanner.halving import ran_out
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel

torch.set_num_threads(1)
torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=40_000, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=2, max_position_embeddings=128,
)
model = LoadedModel(LlamaForCausalLM(shape).eval().requires_grad_(False), Numerics(), ())
scan, tokens = AnomalyScan(prompt="x", lens=Lens.RAW), prompt(128)

def read():
    tables = scan_anomalies(model, scan, tokens, Silent(), calibration=None).tables.values()
    values = [table["value"].to_pylist() for table in tables if "value" in table.column_names]
    return np.concatenate([np.asarray(each, dtype=float).ravel() for each in values])

expected = read()
# As on a device with room: all positions at once, some 80 MB.
logit_lens._PRODUCT_BYTES["cpu"] = 1 << 28


def within(room_bytes, halvings):
    admission.MOST_HALVINGS = halvings
    mapped = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (mapped + room_bytes, resource.RLIM_INFINITY))
    try:
        return float(np.nanmax(np.abs(admission.halving(read) - expected)))
    except Exception as error:
        assert ran_out(error), repr(error)
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def halved():
    return metrics.OUT_OF_MEMORY.labels("halved")._value.get()

worst = within(60 << 20, 6)
enough = {"worst": worst, "halvings": halved()}
too_little = {"worst": within(1 << 20, 1), "halvings": halved() - enough["halvings"]}
print(json.dumps([enough, too_little, len(read()) == len(expected)]))
"""


def test_a_scan_that_has_too_little_memory_runs_in_smaller_batches_or_fails_alone() -> None:
    """In a process that may address 60 MB more than it does, and then next to nothing more."""
    answer = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, check=True, capture_output=True, text=True
    )
    enough, too_little, lives = json.loads(answer.stdout.splitlines()[-1])
    assert enough["halvings"] in range(1, MOST_HALVINGS + 1)
    assert enough["worst"] < 1e-4
    assert too_little == {"worst": None, "halvings": 1}
    assert lives
