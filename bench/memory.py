"""Memory, each figure from a process of its own: python -m bench.memory peak FOLDER, or swaps.

`peak` says how far a scan of 512 tokens rises above the loaded model; `swaps` whether a hundred models, loaded,
scanned and released one after another, leave anything behind.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.timing import plain_forward, prompt
from neural_mri.contract.scans import ActivationScan
from worker.scanner.activations import scan_activations
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel, load, published_numerics

__all__ = ("SETTLED", "SWAPS", "Peak", "Swaps", "peak", "rise", "swaps")

_TOKENS = 512
SWAPS = 100
SETTLED = 10
"""Swaps after which every allocator has what it will ever ask for."""
_RESET_PEAK = "5"


class Peak(NamedTuple):
    """Bytes."""

    model: int
    plain: int
    """A plain forward's rise above the resident memory before it."""
    scan: int
    """An fMRI scan's."""


class Swaps(NamedTuple):
    """Resident bytes after some swaps, a model of how many bytes each."""

    model: int
    settled: int
    last: int


def peak(folder: Path) -> Peak:
    """Measured in a fresh process."""
    return Peak(**_in_fresh_process("peak", str(folder)))


def swaps() -> Swaps:
    """Measured in a fresh process."""
    return Swaps(**_in_fresh_process("swaps"))


def _in_fresh_process(*asked: str) -> dict[str, int]:
    command = [sys.executable, "-m", "bench.memory", *asked]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, int] = json.loads(answer.splitlines()[-1])
    return found


def rise(run: Callable[[], object]) -> int:
    """Bytes by which resident memory rises while it runs, at the most.

    The kernel keeps the peak itself and is told to begin anew (proc(5), clear_refs): a thread that looks
    now and then can miss what was held for a moment, on a busy machine all of it. Ask it of a process that
    does nothing else: what other threads free meanwhile, or the kernel takes back from what nobody has touched
    for long, is missing from the rise.
    """
    run()  # what libraries keep once and for all is not the scan's
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _highest()
    run()
    return _highest() - before


def _highest() -> int:
    """Bytes, the highest resident memory since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.removesuffix("kB")) << 10
    raise OSError("/proc/self/status has no VmHWM: expected a Linux kernel that keeps peaks")


def _measure_peak(folder: Path) -> Peak:
    model = load(folder, published_numerics(folder))
    tokens = prompt(model, min(_TOKENS, model.architecture.n_ctx))

    def scan(tokens_scanned: int) -> object:
        some = prompt(model, tokens_scanned)
        return scan_activations(model, ActivationScan(prompt="x"), some, Silent())

    return Peak(
        model.memory_bytes,
        rise(plain_forward(model, tokens)),
        rise(lambda: scan(len(tokens))),
    )


def _measure_swaps() -> Swaps:
    """On two layers of SmolLM2's width, made here: loading is what is measured, not reading a disk."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    process = psutil.Process()
    settled = size = 0
    with tempfile.TemporaryDirectory(prefix="nmri-") as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        for number in range(SWAPS):
            model = load(Path(folder), published_numerics(Path(folder)))
            size = model.memory_bytes
            _scan_and_release(model)
            if number == SETTLED - 1:
                settled = process.memory_info().rss
    return Swaps(size, settled, process.memory_info().rss)


def _scan_and_release(model: LoadedModel) -> None:
    scan_activations(model, ActivationScan(prompt="x"), prompt(model, 16), Silent())
    model.release()


def main() -> None:
    """Measure what is asked for, and print it for whoever asked."""
    what, *folder = sys.argv[1:]
    torch.set_num_threads(1)
    measured = _measure_peak(Path(*folder)) if what == "peak" else _measure_swaps()
    print(json.dumps(measured._asdict()))


if __name__ == "__main__":
    main()
