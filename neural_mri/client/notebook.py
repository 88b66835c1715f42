"""How a result looks in a notebook: plain HTML and SVG, no script, no library, every text escaped."""

from collections.abc import Callable, Sequence
from html import escape
from math import isnan

from neural_mri.client.activation_map import Grid
from neural_mri.client.colour import Colour, Scale, inferno
from neural_mri.client.text import visible
from neural_mri.contract.results import Manifest

__all__ = ("card", "heat_map", "note", "prediction_list")

_CELL = 12
_MARGIN = 36
_SHOWN_TOKENS = 200

_CARD = (
    "background:#0a0c10;color:#d5dde6;font:12px/1.5 'JetBrains Mono',monospace;padding:12px 14px;"
    "border-radius:6px;display:inline-block;max-width:100%;overflow:auto"
)
_CHIP = "background:#1b2027;border-radius:3px;padding:0 4px;margin:0 2px 2px 0;display:inline-block"
_FAINT = "color:#8593a3"


def card(title: str, manifest: Manifest, body: str) -> str:
    """The whole thing: title, prompt, `body` (HTML), tables and timing."""
    shown = manifest.prompt_tokens[:_SHOWN_TOKENS]
    chips = "".join(f'<span style="{_CHIP}">{escape(visible(token))}</span>' for token in shown)
    if len(shown) < len(manifest.prompt_tokens):
        chips += f" … {len(manifest.prompt_tokens)} tokens"
    tables = ", ".join(escape(ref.name) for ref in manifest.tables)
    timing = f"forward {manifest.forward_seconds:.3f} s, scanner {manifest.compute_seconds:.3f} s"
    return (
        f'<div style="{_CARD}"><b>{escape(title)}</b><div style="margin:6px 0">{chips}</div>{body}'
        f'<div style="{_FAINT};margin-top:6px">tables: {tables}<br>{timing}</div></div>'
    )


def note(sentence: str) -> str:
    """A sentence in place of a picture."""
    return f'<div style="{_FAINT}">{escape(sentence)}</div>'


def prediction_list(predictions: Sequence[tuple[str, float]]) -> str:
    """Next tokens with their probabilities, as bars."""
    rows = "".join(
        f'<tr><td style="text-align:left">{escape(visible(text))}</td><td>{probability:.3f}</td>'
        f'<td style="text-align:left"><span style="display:inline-block;height:8px;'
        f'background:{inferno(0.8).hex};width:{200 * probability:.0f}px"></span></td></tr>'
        for text, probability in predictions
    )
    return (
        f'<table style="color:inherit;font:inherit;background:none;margin-top:6px">{rows}</table>'
    )


def heat_map(grid: Grid, scale: Scale, unit: str, colour: Callable[[float], Colour]) -> str:
    """Layer by component; hovering over a cell names it and its value."""
    places = scale.place(grid.values)
    cells = []
    for row, name in enumerate(grid.rows):
        for column, layer in enumerate(grid.layers):
            value = float(grid.values[row, column])
            if isnan(value):  # not measured
                continue
            cells.append(
                f'<rect x="{_MARGIN + column * _CELL}" y="{row * _CELL}" width="{_CELL - 1}" '
                f'height="{_CELL - 1}" fill="{colour(float(places[row, column])).hex}">'
                f"<title>L{layer} {name}: {value:.4g} {escape(unit)}</title></rect>"
            )
    names = "".join(
        f'<text x="{_MARGIN - 4}" y="{row * _CELL + 9}" text-anchor="end">{name}</text>'
        for row, name in enumerate(grid.rows)
        if row % 4 == 0 or name == "MLP"
    )
    bottom = len(grid.rows) * _CELL
    layers = "".join(
        f'<text x="{_MARGIN + column * _CELL}" y="{bottom + 11}">{layer}</text>'
        for column, layer in enumerate(grid.layers)
        if column % 5 == 0
    )
    width, height = _MARGIN + len(grid.layers) * _CELL, bottom + 16
    limits = f"{escape(unit)}, {scale.low:.3g} to {scale.high:.3g} (middle 96 %), by layer"
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'style="font:9px monospace;fill:#8593a3">{"".join(cells)}{names}{layers}</svg>'
        f'<div style="{_FAINT}">{limits}</div>'
    )
