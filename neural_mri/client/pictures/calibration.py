"""Calibration: what is ordinary, layer by layer."""

import numpy as np
import pyarrow as pa

from neural_mri.client.activation_map import value_matrix
from neural_mri.client.colour import inferno
from neural_mri.client.drawing import (
    FAINT,
    IN_OUR_FONTS,
    INK,
    Picture,
    new_figure,
    plain,
    subtitle,
)

__all__ = ("ordinary_picture",)


@IN_OUR_FONTS
def ordinary_picture(ordinary: pa.Table, title: str) -> Picture:
    """D_KL(model ‖ lens) at each place on reference text: median and the middle 90 %, a panel a lens."""
    names = list(zip(ordinary["lens"].to_pylist(), ordinary["channel"].to_pylist(), strict=True))
    values = value_matrix(ordinary)
    lenses = [lens for lens, channel in dict.fromkeys(names) if channel == "kl"]
    figure = new_figure(title, width=max(3.6 * len(lenses) + 1.4, 7.0), height=4.2)
    axes = list(figure.subplots(1, len(lenses), squeeze=False, sharey=True).flat)
    for axis, lens in zip(axes, lenses, strict=True):
        of_lens = values[[row for row, name in enumerate(names) if name == (lens, "kl")]]
        low, middle, high = np.percentile(of_lens, (5, 50, 95), axis=1)
        places = np.arange(-1, len(of_lens) - 1)
        axis.fill_between(places, low, high, color=inferno(0.6).hex, alpha=0.35, linewidth=0)
        axis.plot(places, middle, color=inferno(0.8).hex, linewidth=1.4)
        axis.set_xlabel("after layer (-1: the embedding)", fontsize=8, color=FAINT)
        axis.set_facecolor("none")
        plain(axis)
        axis.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)
        subtitle(axis, f"{lens} lens, {of_lens.shape[1]} positions")
    axes[0].set_ylabel("D_KL(model ‖ lens), nats: median, 5 to 95 %", fontsize=8, color=FAINT)
    return figure
