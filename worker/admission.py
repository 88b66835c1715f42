"""Whether a scan fits into memory, before it runs and when it turns out not to.

The estimate counts what a scan holds at once, from shapes alone, beside the model: what one block makes in
passing, what is recorded of every layer, logits, attention patterns, the rows of a sweep, the points of a path,
what perturbations put in, and a text that is sampled. It is meant to be above what a scan takes and below thrice
that. A scan that could not fit with every other model gone is refused with both numbers. What runs out of memory
all the same runs again in smaller batches (`scanner.halving`), and fails alone when there is nothing left to make
smaller.
"""

import ctypes
import gc
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import structlog
import torch

from neural_mri.contract.anomalies import Lens
from neural_mri.contract.circuits import CircuitMethod
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.perturbations import (
    Inject,
    InjectMode,
    MeanAblation,
    Noise,
    PatchSite,
    Perturbation,
)
from neural_mri.contract.problems import Problem
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
from worker import metrics
from worker.scanner.attribution import steps_at_once
from worker.scanner.halving import halved, has_lost_device, ran_out
from worker.scanner.interventions import width
from worker.scanner.sampling import TEXT_TOKENS

__all__ = (
    "MOST_HALVINGS",
    "OutOfMemory",
    "estimate",
    "give_back",
    "halving",
    "has_lost_device",
    "shown",
)

MOST_HALVINGS = 6
FLOAT_BYTES = 4
SWEEP_BYTES = 1 << 30
"""Rows that a sweep, or a grid of patches, holds at once at the most (`sweep`, `patched_runs`)."""
CALIBRATION_TOKENS = 512
"""Of a reference text, read at once (`calibrating`)."""
QUANTILE_TOKENS = 8192
"""Of a reference text, whose norms are kept at the most (`calibrating`)."""
ENTRY_NUMBERS = 16
"""Of an edit at one position, beside vectors: its row, its place, its factor, its source (`interventions`)."""
MARGIN = 1.5

T = TypeVar("T")

log = structlog.get_logger(__name__)


class OutOfMemory(Problem):
    """The job needs more memory than the worker's device has."""

    status = 507


def estimate(scan: Scan, shape: Architecture, *, n_tokens: int, itemsize: int) -> int:
    """Bytes that a scan of so many tokens needs beside the model. Scans that share a forward need their sum."""
    return int(MARGIN * _needed(scan, _Sizes(shape, n_tokens, itemsize)))


class _Sizes:
    """Bytes of what a model makes of one prompt."""

    def __init__(self, shape: Architecture, n_tokens: int, itemsize: int) -> None:
        self.shape = shape
        self.n_tokens = n_tokens
        self._item = itemsize
        self._attention = (shape.n_heads + 2 * shape.n_kv_heads) * shape.d_head

    def of(self, n_tokens: int) -> "_Sizes":
        """The same of another prompt."""
        return _Sizes(self.shape, n_tokens, self._item)

    @property
    def forward(self) -> int:
        """What one block makes in passing: residuals, projections, the MLP's hidden activations."""
        widest = max(3 * self.shape.d_mlp, 2 * self._attention)
        return self.n_tokens * (6 * self.shape.d_model + widest) * self._item

    @property
    def recorded(self) -> int:
        """What `runs.record` keeps of every layer, and the forward itself."""
        a_layer = 5 * self.shape.d_model + self._attention
        return self.shape.n_layers * self.n_tokens * a_layer * self._item + self.forward

    @property
    def graph(self) -> int:
        """What is kept for a backward pass, beside what is recorded."""
        a_layer = 6 * self.shape.d_model + 4 * self.shape.d_mlp + 2 * self._attention
        return self.shape.n_layers * self.n_tokens * a_layer * self._item

    @property
    def residuals(self) -> int:
        """The stream before and inside every block."""
        return 2 * (self.shape.n_layers + 1) * self.n_tokens * self.shape.d_model * self._item

    @property
    def keys_and_values(self) -> int:
        """What attention keeps of every token, in every layer, while a text is written."""
        a_layer = 2 * self.shape.n_kv_heads * self.shape.d_head
        return self.shape.n_layers * self.n_tokens * a_layer * self._item

    @property
    def pattern(self) -> int:
        """Attention scores of one layer."""
        return self.shape.n_heads * self.n_tokens**2 * self._item

    def logits(self, positions: int) -> int:
        """In the model's type, and some of them as float32."""
        return positions * self.shape.d_vocab * self._item

    def rows(self, count: int) -> int:
        """Rows of a sweep, as long as the prompt."""
        return min(SWEEP_BYTES, count * self.n_tokens * self.shape.d_model * self._item)

    @property
    def nodes(self) -> int:
        """Values of every component at every token."""
        a_layer = self.shape.n_heads + 5
        return self.shape.n_layers * a_layer * self.n_tokens * FLOAT_BYTES


def _needed(scan: Scan, sizes: _Sizes) -> int:
    shape, n_tokens = sizes.shape, sizes.n_tokens
    match scan:
        case ActivationScan():
            return _activations(scan, sizes)
        case AttentionScan():
            patterns = len(scan.layers) * shape.n_heads * n_tokens**2 * 2 * FLOAT_BYTES
            return sizes.forward + 4 * sizes.pattern + patterns
        case AnomalyScan():
            return sizes.forward + 2 * sizes.residuals + sizes.logits(3 * _asked(scan, n_tokens))
        case PerturbationScan():
            rows = scan.n_rows * (sizes.forward + 3 * sizes.logits(n_tokens))
            return rows + 4 * sizes.nodes + _operands(scan, sizes)
        case CircuitScan():
            return _circuits(scan, sizes)
        case PatchingScan():
            maps = sum(shape.n_heads if site is PatchSite.HEAD else 1 for site in scan.sites)
            return _grid(maps, 1, sizes)
        case TracingScan():
            return _grid(len(scan.kinds), scan.draws, sizes)
        case CalibrationScan():
            return _calibration(scan, sizes)
        case StructuralScan() | WeightScan():
            return 0  # of the weight files, tensor by tensor


def _asked(scan: AnomalyScan, n_tokens: int) -> int:
    """Positions at which lenses are held to the stream."""
    if scan.token_positions == "target":
        return 1
    return len(resolve_positions(scan.token_positions, n_tokens))


def _activations(scan: ActivationScan, sizes: _Sizes) -> int:
    positions = len(resolve_positions(scan.token_positions, sizes.n_tokens))
    vectors = 0
    if scan.aggregation is Aggregation.RAW:
        components = len(scan.selected(sizes.shape))
        vectors = components * positions * sizes.shape.d_model * 2 * FLOAT_BYTES
    return sizes.forward + sizes.logits(positions) + 2 * sizes.nodes + vectors


def _circuits(scan: CircuitScan, sizes: _Sizes) -> int:
    shape = sizes.shape
    has_graph = scan.method is not CircuitMethod.DIRECT and (
        scan.method is not CircuitMethod.ABLATION or scan.edges > 0
    )
    runs = (1 + len(scan.other_prompts)) * sizes.recorded
    components = shape.n_layers * (shape.n_heads + 1)
    gradients = 2 * has_graph * sizes.graph
    if scan.method is CircuitMethod.INTEGRATED_GRADIENTS:
        points = min(scan.steps, steps_at_once(sizes.n_tokens))
        path = sizes.of(points * sizes.n_tokens)
        gradients = max(gradients, path.recorded + path.graph)
    return runs + gradients + sizes.rows(components) + sizes.logits(8)


def _calibration(scan: CalibrationScan, sizes: _Sizes) -> int:
    """A batch of the text as it is read; what is kept of the text; and where it is sampled, all of it at once."""
    shape, batch = sizes.shape, sizes.of(CALIBRATION_TOKENS)
    lenses = 6 * shape.n_layers * shape.d_model**2 * FLOAT_BYTES
    if Lens.RIDGE in scan.lenses:
        lenses *= 2
    reading = batch.recorded + batch.logits(CALIBRATION_TOKENS) + lenses
    # The values themselves, sorted, and where they stood.
    norms = 5 * sizes.of(min(scan.n_tokens, QUANTILE_TOKENS)).nodes
    # As they were read, side by side, and as the lenses have them.
    ordinary = 4 * sizes.of(min(scan.n_ordinary, scan.n_tokens // 4)).residuals
    sampling = 0
    if not scan.texts:
        texts = sizes.of(max(1, scan.n_tokens // min(TEXT_TOKENS, shape.n_ctx)))
        # The model's, then two of float64: a distribution and its sums.
        logits = texts.logits(texts.n_tokens) + 2 * 8 * texts.n_tokens * shape.d_vocab
        sampling = sizes.of(scan.n_tokens).keys_and_values + texts.forward + logits
    return max(sampling, reading) + norms + ordinary


def _operands(scan: PerturbationScan, sizes: _Sizes) -> int:
    """What is put into components, for each draw and position, from before the forward until it has ended.

    Where one of those at a place draws noise, or adds a vector, the round that it is in has as much for all.
    """
    at_place: defaultdict[tuple[int | None, Kind], list[Perturbation]] = defaultdict(list)
    for perturbation in scan.perturbations:
        component = Component.parse(perturbation.component)
        at_place[component.layer, _edited(component.kind, perturbation)].append(perturbation)
    numbers = 0
    for (_, kind), here in at_place.items():
        positions = [len(resolve_positions(one.token_positions, sizes.n_tokens)) for one in here]
        noises = [isinstance(one, Noise) for one in here]
        stacks = any(noises) + any(isinstance(one, Inject | MeanAblation) for one in here)
        vectors = sum(
            count * (stacks + noise) for count, noise in zip(positions, noises, strict=True)
        )
        numbers += vectors * width(kind, sizes.shape) + sum(positions) * ENTRY_NUMBERS
    return scan.n_draws * numbers * FLOAT_BYTES


def _edited(kind: Kind, perturbation: Perturbation) -> Kind:
    """Where it is done: what is added to a head's output is added to its layer's."""
    is_added = isinstance(perturbation, Inject) and perturbation.mode is InjectMode.ADD
    return Kind.ATTN if kind is Kind.HEAD and is_added else kind


def _grid(maps: int, draws: int, sizes: _Sizes) -> int:
    """Two recorded runs, or one and its draws, and a row a cell that holds half of the positions."""
    cells = maps * draws * sizes.shape.n_layers * sizes.n_tokens
    return (1 + draws) * sizes.recorded + sizes.rows(cells // 2 + 1) + sizes.logits(8)


def halving(work: Callable[[], T]) -> T:
    """What the work gives; where memory runs out, what it gives in smaller and smaller batches.

    Raises what the last attempt did: at once where the work has no batches.
    """
    times = 0
    while True:
        with halved(times) as batches:
            try:
                return work()
            except Exception as error:
                if not ran_out(error) or not batches.has_batches or times == MOST_HALVINGS:
                    raise
                log.warning("batches_halved", times=times + 1, error=str(error).partition("\n")[0])
        # Outside the handler: the error's frames hold what there was no room for.
        metrics.OUT_OF_MEMORY.labels("halved").inc()
        give_back()
        times += 1


def give_back() -> None:
    """Return what nobody holds any more to the device and the operating system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def shown(n_bytes: int) -> str:
    """Bytes for people: `1.3 GiB`."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 1 << power:
            return f"{n_bytes / (1 << power):.1f} {unit}"
    return f"{n_bytes} bytes"
