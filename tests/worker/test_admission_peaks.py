"""What scans are estimated to need, beside what they take: the highest resident memory of a process of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

CHILD = """
import json, sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from neural_mri.contract.anomalies import CalibrationScan
from neural_mri.contract.circuits import CircuitMethod, CircuitScan
from neural_mri.contract.models import Numerics
from neural_mri.contract.perturbations import Noise, PatchingScan, PatchSite, PerturbationScan
from tests.models import prompt
from worker.admission import estimate, give_back
from worker.scanner.calibrating import calibrate
from worker.scanner.circuits import scan_circuits
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.patching import scan_patching
from worker.scanner.perturbation import scan_perturbation

torch.set_num_threads(1)
torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
)
model = LoadedModel(LlamaForCausalLM(shape).eval().requires_grad_(False), Numerics(), ())
asked = dict(prompt="x", answer=7, foil=9)
paired = dict(asked, corrupt_prompt="y")


def path(n_tokens, steps):
    scan = CircuitScan(**paired, method=CircuitMethod.INTEGRATED_GRADIENTS, steps=steps, edges=0)
    tokens = prompt(n_tokens), prompt(n_tokens, seed=5)
    return scan, lambda: scan_circuits(model, scan, *tokens, 7, 9, Silent(), None)


def heads(n_tokens, _size):
    scan = PatchingScan(**paired, sites=(PatchSite.HEAD,))
    tokens = prompt(n_tokens), prompt(n_tokens, seed=5)
    return scan, lambda: scan_patching(model, scan, *tokens, Silent(), answer_id=7, foil_id=9)


def noise(n_tokens, count):
    scan = PerturbationScan(**asked, perturbed_scan=False, perturbations=[
        Noise(component=f"blocks.{number % 4}.mlp", draws=32, seed=number) for number in range(count)
    ])
    return scan, lambda: scan_perturbation(model, scan, prompt(n_tokens), Silent(), sources={})


def text(n_tokens, n_ordinary):
    # A quarter of the text, without the texts' first tokens, has ordinary values.
    scan = CalibrationScan(n_tokens=4 * n_ordinary, n_ordinary=n_ordinary)
    return scan, lambda: calibrate(model, scan, Silent())


def highest():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


name, n_tokens, size, warming = json.loads(sys.argv[1])
make = globals()[name]
make(8, warming)[1]()  # what libraries keep once and for all
give_back()
Path("/proc/self/clear_refs").write_text("5")
before = highest()
scan, run = make(n_tokens, size)
run()
taken = highest() - before
needed = estimate(scan, model.architecture, n_tokens=n_tokens, itemsize=4)
print(json.dumps([needed, taken]))
"""


class Peak(NamedTuple):
    """Bytes."""

    estimated: int
    taken: int


def peak(name: str, n_tokens: int, size: int, warming: int) -> Peak:
    """Of a scan of CHILD's, after a small one of the same kind."""
    answer = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([name, n_tokens, size, warming])],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return Peak(*json.loads(answer.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("name", "n_tokens", "size", "warming"),
    [
        pytest.param("path", 64, 64, 1, id="integrated gradients of 64 steps"),
        pytest.param("heads", 64, 0, 0, id="patches of every head"),
        pytest.param("noise", 64, 32, 1, id="noise of 32 perturbations"),
        pytest.param("text", 0, 2048, 64, id="a calibration of 8192 tokens"),
    ],
)
def test_an_estimate_is_above_what_a_scan_takes_and_below_thrice_that(
    name: str, n_tokens: int, size: int, warming: int
) -> None:
    found = peak(name, n_tokens, size, warming)
    assert found.taken < found.estimated < 3 * found.taken
