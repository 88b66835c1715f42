"""Patching and tracing: layer by position, a map a kind of place, side by side."""

import numpy as np

from neural_mri.client.colour import Scale
from neural_mri.client.drawing import (
    BACKGROUND,
    DIVERGING,
    FAINT,
    HEAT,
    IN_OUR_FONTS,
    INK,
    Picture,
    colour_bar,
    drawable,
    heat,
    label_rows,
    label_tokens,
    new_figure,
    subtitle,
)
from neural_mri.client.restoration import Restoration

__all__ = ("restoration_picture",)


@IN_OUR_FONTS
def restoration_picture(found: Restoration, title: str, *, signed: bool) -> Picture:
    """One scale for all maps: around 0 where values have a sign to show, else from 0 up.

    A cross marks each map's largest value.
    """
    groups = [one.values for one in found.maps]
    if signed:
        scale, colours = Scale.around_zero(*groups), DIVERGING
    else:
        top = max((float(np.nanmax(g)) for g in groups if np.isfinite(g).any()), default=1.0)
        scale, colours = Scale(0.0, max(top, 1e-6), logarithmic=False), HEAT
    n_columns, n_rows = len(found.tokens), max(len(one.components) for one in found.maps)
    each = float(np.clip(0.26 * n_columns + 0.6, 2.6, 6.0))
    figure = new_figure(
        f"{title}\n{_asked(found)}",
        width=max(each * len(found.maps) + 2.2, 8.0),
        height=float(np.clip(0.14 * n_rows, 2.4, 8.0)) + 2.6,
    )
    axes = list(figure.subplots(1, len(found.maps), squeeze=False).flat)
    for at, (axis, one) in enumerate(zip(axes, found.maps, strict=True)):
        heat(axis, one.values, scale, colours)
        axis.invert_yaxis()
        label_tokens(axis, found.tokens, range(n_columns), np.array(found.sinks), "x")
        if at == 0 or one.name == "heads":
            heads = one.name == "heads"
            label_rows(axis, [c.label if heads else str(c.layer) for c in one.components])
            axis.set_ylabel("layer", fontsize=8, color=FAINT)
        else:
            axis.set_yticks([])
        if (peak := one.peak) is not None:
            row = one.components.index(peak.component)
            for ink, width in ((BACKGROUND, 2.6), (INK, 1.1)):
                axis.plot(peak.position, row, "+", color=ink, markersize=8, markeredgewidth=width)
            subtitle(axis, f"{one.name}, most {peak.value:.3g} at {peak.place}")
        else:
            subtitle(axis, f"{one.name}: nothing to restore")
    colour_bar(figure, axes, scale, colours, f"{found.quantity}, {found.unit}")
    return figure


def _asked(found: Restoration) -> str:
    foil = "" if found.foil is None else f" rather than {drawable(found.foil)}"
    how = ", ".join(
        f"{name} {found.parameters[name]}"
        for name in ("direction", "sigma", "draws", "window")
        if name in found.parameters
    )
    return (
        f"next token {drawable(found.answer)}{foil}: clean {found.clean:.3g}, corrupted "
        f"{found.corrupted:.3g} {found.metric_unit}; p {found.probability_clean:.3f}, "
        f"{found.probability_corrupted:.3f}" + (f"   ({how})" if how else "")
    )
