"""Seconds of every mode on shapes that are scanned in practice, random weights: GPT-2 small, and 3 billion."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from bench.stimulation import perturbing
from bench.timing import plain_forward, prompt
from neural_mri.contract.anomalies import AnomalyScan, Lens
from neural_mri.contract.circuits import Ablation, CircuitScan
from neural_mri.contract.scans import ActivationScan
from neural_mri.contract.weights import WeightScan
from worker.scanner.activations import scan_activations
from worker.scanner.anomalies import scan_anomalies
from worker.scanner.circuits import scan_circuits
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel, load, published_numerics
from worker.scanner.topology import scan_topology
from worker.scanner.weights import scan_weights

__all__ = ("SHAPES", "Shape", "Timed", "every_mode")

_TOKENS = 32
_ROUNDS = 5

# Its signature is written for readers, not for type checkers.
_AutoModel: Any = AutoModelForCausalLM


class Shape(NamedTuple):
    """A configuration, and the type that its weights are run in."""

    config: PretrainedConfig
    dtype: str


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "GPT-2 small, 12 x 12, d 768": Shape(GPT2Config(), "float32"),
        "3 B, 28 x 24, d 3072": Shape(
            LlamaConfig(
                vocab_size=128_256,
                hidden_size=3072,
                intermediate_size=8192,
                num_hidden_layers=28,
                num_attention_heads=24,
                num_key_value_heads=8,
                tie_word_embeddings=True,
            ),
            "bfloat16",
        ),
    }
)


class Timed(NamedTuple):
    """One mode on one shape."""

    shape: str
    dtype: str
    what: str
    seconds: float


def every_mode(name: str, shape: Shape, *, device: str) -> Iterator[Timed]:
    """Median wall seconds of each mode, of one prompt, warmed up once."""
    with tempfile.TemporaryDirectory(prefix="nmri-") as temporary:
        folder = Path(temporary)
        _write(shape, folder)
        model = load(folder, published_numerics(folder, dtype=shape.dtype, device=device))
        try:
            for what, run in _modes(model, folder).items():
                yield Timed(name, shape.dtype, what, _seconds(run, device))
        finally:
            model.release()


def _write(shape: Shape, folder: Path) -> None:
    torch.manual_seed(0)
    model = _AutoModel.from_config(shape.config, dtype=getattr(torch, shape.dtype))
    model.save_pretrained(folder)


def _modes(model: LoadedModel, folder: Path) -> dict[str, Callable[[], object]]:
    tokens = prompt(model, min(_TOKENS, model.architecture.n_ctx))
    fmri = ActivationScan(prompt="x")
    dti = CircuitScan(prompt="x", ablation=Ablation.ZERO)
    flair = AnomalyScan(prompt="x", lens=Lens.RAW)
    return {
        "plain forward": plain_forward(model, tokens),
        "T1": lambda: scan_topology(folder),
        "T2": lambda: scan_weights(folder, WeightScan(), Silent()),
        "fMRI": lambda: scan_activations(model, fmri, tokens, Silent()),
        "DTI, fast": lambda: scan_circuits(model, dti, tokens, None, None, None, Silent(), None),
        "FLAIR, all positions": lambda: scan_anomalies(
            model, flair, tokens, Silent(), calibration=None
        ),
        "perturb and compare": perturbing(
            model, tokens, model.architecture.n_layers // 2, perturbed_scan=True
        ),
    }


def _seconds(run: Callable[[], object], device: str) -> float:
    taken = []
    for _ in range(1 + _ROUNDS):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])
