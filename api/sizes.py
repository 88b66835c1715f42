"""How large a scan's result will be, and how much work it is, from shapes alone."""

from typing import NamedTuple

from neural_mri.contract.anomalies import Lens, Sublayers
from neural_mri.contract.circuits import Ablation, CircuitMethod, Granularity
from neural_mri.contract.components import Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.perturbations import Noise, PatchSite
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
    AnomalyScan,
    AttentionScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    Scan,
    StructuralScan,
    TracingScan,
    WeightScan,
    resolve_positions,
)

__all__ = ("Extent", "extent")

FLOAT_BYTES = 4
NEURON_ROW_BYTES = 32
PREDICTION_ROW_BYTES = 40
LENS_QUANTITIES = 9
"""Numbers of a lens's reading: divergence, entropies, ranks, and the token it names."""


class Extent(NamedTuple):
    """An estimate of one scan."""

    result_bytes: int
    forwards: float
    """Work, in plain forward passes of the scan's prompt."""
    mend: str
    """What to ask for instead where the result would be too large."""


def extent(scan: Scan, architecture: Architecture, n_tokens: int) -> Extent:
    """The estimate; `n_tokens` of the prompt, or of all texts of a calibration."""
    match scan:
        case ActivationScan():
            return _activations(scan, architecture, n_tokens)
        case AttentionScan():
            patterns = len(scan.layers) * architecture.n_heads * n_tokens**2 * FLOAT_BYTES
            return Extent(patterns, 1.2, "ask for fewer layers at once")
        case CircuitScan():
            # A component's row runs, on average, through half of the blocks.
            components = architecture.n_layers * (
                2 if scan.granularity is Granularity.BLOCKS else architecture.n_heads + 1
            )
            # An MLP's own value is far from a mean or from nothing: then every one is measured.
            resamples = scan.effective_ablation is Ablation.RESAMPLE
            mlps = 1 if resamples else architecture.n_layers
            measured = min(scan.exact + mlps, components) if scan.exact else 0
            forwards = {
                CircuitMethod.FAST: 2 + measured / 10,
                CircuitMethod.ABLATION: 2 + components / 10,
                CircuitMethod.ATTRIBUTION_PATCHING: 2.0,
                CircuitMethod.INTEGRATED_GRADIENTS: 1.0 + scan.steps,
                CircuitMethod.DIRECT: 1.2,
            }[scan.method]
            return Extent(100 * (components + scan.edges), forwards, "ask for fewer edges")
        case AnomalyScan():
            return _anomalies(scan, architecture, n_tokens)
        case PerturbationScan():
            draws = max((p.draws for p in scan.perturbations if isinstance(p, Noise)), default=1)
            nodes = architecture.n_layers * (architecture.n_heads + 5) if scan.perturbed_scan else 0
            a_position = 3 * nodes * FLOAT_BYTES + 2 * scan.top_predictions * PREDICTION_ROW_BYTES
            return Extent(
                a_position * n_tokens,
                1.0 + draws + len(scan.other_prompts),
                "leave out perturbed_scan, or ask for fewer top_predictions",
            )
        case PatchingScan():
            maps = sum(architecture.n_heads if site is PatchSite.HEAD else 1 for site in scan.sites)
            return _map(maps, 1, architecture, n_tokens, "ask for fewer sites")
        case TracingScan():
            return _map(len(scan.kinds), scan.draws, architecture, n_tokens, "ask for fewer kinds")
        case CalibrationScan():
            matrices = 2 * architecture.n_layers if Lens.RIDGE in scan.lenses else 4
            size = matrices * architecture.d_model**2 * FLOAT_BYTES
            return Extent(size, 8.0, "ask for lens 'bias' alone")
        case StructuralScan() | WeightScan():
            # As many rows as the model has tensors and components, whatever is asked.
            return Extent(0, 1.0, "")


def _activations(scan: ActivationScan, architecture: Architecture, n_tokens: int) -> Extent:
    components = scan.selected(architecture)
    width = 1 + scan.needs_calibration  # a value, and where it ranks
    if scan.aggregation is Aggregation.RAW:
        width += architecture.d_model
    mlps = sum(component.kind is Kind.MLP for component in components)
    a_position = (
        len(components) * width * FLOAT_BYTES
        + mlps * scan.top_neurons * NEURON_ROW_BYTES
        + scan.top_predictions * PREDICTION_ROW_BYTES
    )
    n_positions = len(resolve_positions(scan.token_positions, n_tokens))
    return Extent(
        a_position * n_positions,
        1.1,
        "report fewer components or token_positions, or another aggregation than raw",
    )


def _anomalies(scan: AnomalyScan, architecture: Architecture, n_tokens: int) -> Extent:
    n_positions = 1
    if scan.token_positions != "target":
        n_positions = len(resolve_positions(scan.token_positions, n_tokens))
    places = architecture.n_layers * (2 if scan.sublayers is Sublayers.ALL else 1)
    # Unembedding a place costs as much as the vocabulary's share of the model; about 3 forwards a grid.
    return Extent(
        places * n_positions * LENS_QUANTITIES * FLOAT_BYTES,
        1.2 + 3.0 * n_positions / n_tokens,
        "ask for fewer token_positions",
    )


def _map(maps: int, draws: int, architecture: Architecture, n_tokens: int, mend: str) -> Extent:
    """A layer x position map: a row of the batch a cell, half of the blocks each."""
    cells = maps * architecture.n_layers * n_tokens
    return Extent(2 * cells * FLOAT_BYTES, 2 + cells * draws / 10, mend)
