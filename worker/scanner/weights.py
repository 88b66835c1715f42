"""T2: what the published weights of a model folder are like, read from its files.

The model is never loaded. Its configuration says which tensors there are and whose; the files are gone
through once, one layer a thread, tensor by tensor.
"""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock, local
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.weights import WeightScan
from worker.scanner import bridging, topology
from worker.scanner.conversion import origin
from worker.scanner.listening import Cancelled, Listener
from worker.scanner.prompts import ScanOutput
from worker.scanner.weight_circuits import (
    LayerCircuits,
    joined,
    not_measured,
    output_value,
    query_key,
)
from worker.scanner.weight_difference import compare
from worker.scanner.weight_files import WeightFiles
from worker.scanner.weight_slices import WeightMap, weight_map
from worker.scanner.weight_statistics import Questions, Workspace, measure
from worker.scanner.weight_tables import Findings, weight_tables

__all__ = ("scan_weights",)

_MOST_THREADS = 8
"""Each may hold 2^25 values of a tensor in memory."""
_POLL_SECONDS = 0.1


def scan_weights(
    folder: Path, request: WeightScan, listener: Listener, baseline: Path | None = None
) -> ScanOutput:
    """Scan a model folder, and compare it with a baseline's where the request names one.

    Tables `tensors`, `histograms`, `outliers`, `weights`, `circuits`, `neuron_weights`, `dimensions`, and
    `difference` with a baseline. Progress is counted in bytes of weights. Raises `UnsupportedModel` when
    either folder cannot be read, or the baseline's weights have other names or shapes, and `Cancelled`
    when the listener does.
    """
    if (request.baseline is None) != (baseline is None):
        raise ValueError(f"the request's baseline is {request.baseline!r}, its folder {baseline}")
    skeleton = bridging.skeleton(bridging.read_configuration(folder))
    anatomy = topology.examine(skeleton)
    rows = topology.parameter_rows(skeleton, anatomy)
    files = WeightFiles.open(folder, skeleton, rows)
    compared = None if baseline is None else WeightFiles.open(baseline, skeleton, rows)
    mapped = weight_map(skeleton, anatomy, rows)
    components = request.selected(anatomy.architecture)
    reading = _Reading(files, compared, mapped, request)
    reading.go_through(_tasks(mapped, components), listener)
    made_from = origin(folder)
    return ScanOutput(
        weight_tables(
            request,
            mapped,
            components,
            files,
            reading.findings,
            quantization=None if made_from is None else made_from.quantization,
        ),
        forward_seconds=0.0,
    )


class _Task(NamedTuple):
    """What one thread does before it takes the next."""

    parameters: tuple[str, ...]
    attention: Component | None
    """The attention layer whose circuits are wanted."""


def _tasks(mapped: WeightMap, components: Sequence[Component]) -> list[_Task]:
    """The largest first: then no thread is left alone with it at the end."""
    wanted = dict.fromkeys(
        name for component in components for name in mapped.parameters_of(component)
    )
    tasks: dict[Component, list[str]] = {}
    for name in wanted:
        tasks.setdefault(mapped.rows[name].owner.component, []).append(name)
    attention = {component.layer for component in components if component.kind is Kind.HEAD}
    found = [
        _Task(
            tuple(names),
            component if component.kind is Kind.ATTN and component.layer in attention else None,
        )
        for component, names in tasks.items()
    ]
    return sorted(found, key=lambda task: -sum(mapped.rows[name].size for name in task.parameters))


class _Reading:
    """What is found while the files are gone through, by several threads at once."""

    def __init__(
        self,
        files: WeightFiles,
        compared: WeightFiles | None,
        mapped: WeightMap,
        request: WeightScan,
    ) -> None:
        self.findings = Findings({}, {}, {})
        self._files = files
        self._compared = compared
        self._mapped = mapped
        self._request = request
        self._workspaces = local()
        self._read_bytes = 0
        self._counting = Lock()
        self._stopped = Event()

    def go_through(self, tasks: Sequence[_Task], listener: Listener) -> None:
        """Do the tasks. On the way out, no thread is left behind."""
        stored = self._files.parameters
        total = sum(stored[name].n_bytes for task in tasks for name in task.parameters)
        n_threads = min(torch.get_num_threads(), _MOST_THREADS)
        with ThreadPoolExecutor(n_threads, thread_name_prefix="weights") as pool:
            try:
                pending = {pool.submit(self._do, task) for task in tasks}
                while pending:
                    finished, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                    listener.progress("weights", self._read_bytes, total)
                    listener.pause()
            finally:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)

    def _checkpoint(self) -> None:
        if self._stopped.is_set():
            raise Cancelled

    def _do(self, task: _Task) -> None:
        workspace: Workspace | None = getattr(self._workspaces, "own", None)
        if workspace is None:
            self._workspaces.own = workspace = Workspace()
        for name in task.parameters:
            self._measure(name, workspace)
        if task.attention is not None and task.attention.layer is not None:
            self.findings.circuits[task.attention.layer] = self._circuits(task.attention, workspace)
        for name in task.parameters:
            self._files.parameters[name].forget()

    def _measure(self, name: str, workspace: Workspace) -> None:
        tensor = self._files.parameters[name]
        columns = self._mapped.column_sums_wanted(name)
        asked = Questions(
            self._request.histogram_bins,
            self._request.outlier_sigma,
            columns,
            self._mapped.head_axis(name),
        )
        self.findings.statistics[name] = measure(tensor, asked, workspace, self._checkpoint)
        if self._compared is not None:
            other = self._compared.parameters[name]
            self.findings.changes[name] = compare(
                tensor, other, workspace, self._checkpoint, columns=columns
            )
            other.forget()
        with self._counting:
            self._read_bytes += tensor.n_bytes

    def _circuits(self, attention: Component, workspace: Workspace) -> LayerCircuits:
        """Key-value head by key-value head, so that a layer is never held in float64 as a whole."""
        shape, roles = self._mapped.architecture, self._mapped.attention(attention)
        if any(self.findings.statistics[lines.parameter].nonfinite for lines in roles.values()):
            return not_measured(shape.n_heads, shape.d_head)

        def matrices(role: str, key_value: int) -> Tensor:
            self._checkpoint()
            lines = roles[role].part(key_value, shape.n_kv_heads)
            tensor = self._files.parameters[lines.parameter]
            exact = workspace.double(role, len(lines.numbers) * shape.d_model)
            values = tensor.lines(lines.axis, lines.numbers)
            np.copyto(exact.reshape(-1, shape.d_model), values)
            return torch.from_numpy(exact).view(-1, shape.d_head, shape.d_model)

        query_keys, output_values = [], []
        for group in range(shape.n_kv_heads):
            query_keys.append(query_key(matrices("W_Q", group), matrices("W_K", group)[0]))
            output_values.append(output_value(matrices("W_O", group), matrices("W_V", group)[0]))
        return LayerCircuits(joined(query_keys), joined(output_values))
