"""Each kind of scan that can share a forward: how it is asked of a service, and run without one."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from neural_mri.contract.anomalies import AnomalyScan, Lens
from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan
from neural_mri.contract.perturbations import PerturbationScan, ZeroAblation
from neural_mri.contract.scans import ActivationScan, AttentionScan, encode_scan
from neural_mri.contract.tokens import Tokens
from worker.scanner.activations import scan_activations_together
from worker.scanner.anomalies import scan_anomalies_together
from worker.scanner.attention import scan_attention_together
from worker.scanner.circuits import AskedCircuit, scan_circuits_together
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.perturbation import Perturbing, scan_perturbation_together
from worker.scanner.prompts import ScanOutput
from worker.scanner.shared_forward import AskedOf, settled

__all__ = ("KINDS", "Kind", "SharedScan", "scanned")

SharedScan = ActivationScan | AnomalyScan | AttentionScan | PerturbationScan | CircuitScan


class Kind(NamedTuple):
    """A scan, as a service is asked for it."""

    path: str
    request: SharedScan

    @property
    def body(self) -> dict[str, Any]:
        """What is sent with each prompt."""
        fields: dict[str, Any] = msgspec.json.decode(encode_scan(self.request))
        return {name: value for name, value in fields.items() if name not in _NOT_SENT}


_NOT_SENT = frozenset({"scan_mode", "model", "prompt"})
_ABLATED = (ZeroAblation(component="blocks.1.attn.head_1"),)
_ESTIMATES = CircuitScan(
    prompt="-", method=CircuitMethod.ATTRIBUTION_PATCHING, ablation=Ablation.ZERO, edges=0
)

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "fMRI": Kind("/api/scan/activation", ActivationScan(prompt="-")),
        "FLAIR at the answer": Kind(
            "/api/scan/anomaly", AnomalyScan(prompt="-", token_positions="target")
        ),
        "FLAIR at the answer, support alone": Kind(
            "/api/scan/anomaly",
            AnomalyScan(prompt="-", token_positions="target", appearance=False),
        ),
        "FLAIR at every position": Kind("/api/scan/anomaly", AnomalyScan(prompt="-")),
        "attention": Kind("/api/scan/attention", AttentionScan(prompt="-", layers=(0, 1))),
        "perturbation": Kind("/api/perturb", PerturbationScan(prompt="-", perturbations=_ABLATED)),
        "DTI, estimates alone": Kind("/api/scan/circuits", _ESTIMATES),
    }
)


def scanned(model: LoadedModel, request: SharedScan, prompts: Sequence[Tokens]) -> list[ScanOutput]:
    """The same scan of several prompts in one forward, without a calibration; FLAIR with the raw lens."""
    listeners = [Silent()] * len(prompts)
    asked = [AskedOf(tokens, Silent()) for tokens in prompts]
    match request:
        case ActivationScan():
            return scan_activations_together(model, request, prompts, listeners)
        case AnomalyScan():
            raw = msgspec.structs.replace(request, lens=Lens.RAW)
            found = scan_anomalies_together(model, raw, asked, calibration=None)
            return [settled(outcome) for outcome in found]
        case AttentionScan():
            return scan_attention_together(model, [request] * len(prompts), prompts, listeners)
        case PerturbationScan():
            perturbing = [Perturbing(request, one, sources={}) for one in asked]
            return scan_perturbation_together(model, perturbing)
        case CircuitScan():
            circuits = [AskedCircuit(request, one) for one in asked]
            return [settled(outcome) for outcome in scan_circuits_together(model, circuits)]
