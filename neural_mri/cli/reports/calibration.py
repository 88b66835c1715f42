"""A calibration as text."""

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neural_mri.cli.listing import print_heading
from neural_mri.client.activation_map import value_matrix
from neural_mri.contract.results import Manifest, provenance_of

__all__ = ("print_calibration",)

_SHOWN = {
    "kl": "D_KL(model, lens), mean over layers, nats",
    "final_entropy": "entropy of the next token, nats",
    "gain": "gain of the likeliest token, nats",
}


def print_calibration(ordinary: pa.Table, manifest: Manifest, console: Console) -> None:
    """What is ordinary in FLAIR's channels, and how other scans name this calibration."""
    said = provenance_of(ordinary).parameters
    print_heading(
        f"Ordinary values ({said.get('n_tokens', '?')} tokens of {said.get('source', 'text')} text)",
        console,
    )
    names = list(zip(ordinary["lens"].to_pylist(), ordinary["channel"].to_pylist(), strict=True))
    values = value_matrix(ordinary)
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "right", "right"):
        table.add_column(justify=justify)
    table.add_row("  lens", "", "5 %", "median", "95 %", style="dim")
    for lens, channel in dict.fromkeys(names):
        if channel not in _SHOWN:
            continue
        rows = [row for row, name in enumerate(names) if name == (lens, channel)]
        marks = np.percentile(values[rows], (5, 50, 95), axis=1).mean(1)
        table.add_row(f"  {lens}", _SHOWN[channel], *(f"{mark:.3g}" for mark in marks))
    console.print(table)
    console.print()
    console.print(Text(f"use it with --calibration {manifest.scan_key}"), soft_wrap=True)
