"""Weights as whole float64 matrices, to hold a T2 scan against."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.weights import WeightScan
from tests import models
from worker.scanner import bridging, topology
from worker.scanner.listening import Silent
from worker.scanner.weight_slices import WeightMap, weight_map
from worker.scanner.weights import scan_weights

Tables = dict[str, pa.Table]
Rows = list[dict[str, Any]]
Matrix = npt.NDArray[np.float64]


def scan(folder: Path, **asked: Any) -> Tables:
    return scan_weights(folder, WeightScan(**asked), Silent()).tables


def rows(table: pa.Table, **wanted: Any) -> Rows:
    found: Rows = table.to_pylist()
    return [row for row in found if all(row[name] == value for name, value in wanted.items())]


def map_of(family: str) -> WeightMap:
    skeleton = bridging.skeleton(models.configuration(family))
    anatomy = topology.examine(skeleton)
    return weight_map(skeleton, anatomy, topology.parameter_rows(skeleton, anatomy))


class Oracle:
    """A family's weights as whole float64 matrices, from the model itself."""

    def __init__(self, family: str) -> None:
        self.map = map_of(family)
        self.parameters = {
            name: parameter.detach().double().numpy()
            for name, parameter in models.build(family).named_parameters()
        }

    def head(self, layer: int, head: int) -> dict[str, Matrix]:
        """W_Q, W_K, W_V, W_O of one head, each `[d_head, d_model]`."""
        return {
            role: np.moveaxis(self.parameters[lines.parameter], lines.axis, 0)[lines.numbers]
            for role, lines in self.map.attention(Component.head(layer, head)).items()
        }

    def reads(self, component: Component) -> Matrix:
        """All entries of the matrices that a component reads."""
        if component.kind is Kind.HEAD:
            parts = list(self.head(component.layer or 0, component.index or 0).values())
        else:
            parts = [self.parameters[name] for name in self.map.parameters_of(component)]
        return np.concatenate([part.ravel() for part in parts if part.ndim == 2])


def rewritten(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Matrix:
    """One stored tensor changed; its values after that."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path)
    after: Matrix = tensors[name].double().numpy()
    return after


def exactly(value: Any) -> Any:
    """As exact as promised; the tables' own float32 is finer."""
    return pytest.approx(value, rel=1e-6, abs=1e-12)
