"""Perturbation: the likeliest next tokens before and after, and what changed inside."""

from collections.abc import Sequence

import numpy as np

from neural_mri.client.colour import inferno
from neural_mri.client.comparison import Comparison
from neural_mri.client.drawing import (
    FAINT,
    HEAT,
    IN_OUR_FONTS,
    INK,
    Picture,
    colour_bar,
    drawable,
    heat,
    label_layers,
    label_rows,
    label_tokens,
    new_figure,
    plain,
    subtitle,
)
from neural_mri.contract.components import Kind

__all__ = ("comparison_picture",)

_MOST_GUESSES = 10
_BEFORE, _AFTER = "#7f9bb3", inferno(0.72).hex


@IN_OUR_FONTS
def comparison_picture(
    found: Comparison, prompt_tokens: Sequence[str], title: str, *, position: int
) -> Picture:
    """Bars of both runs, the divergence at each token, and where values changed."""
    change = found.change
    n_rows = 0 if change is None else len(change.grid(position).rows)
    tall = 0.0 if change is None else float(np.clip(0.24 * n_rows, 1.6, 7.0))
    heading = (
        f"{title}\nnext token {drawable(found.answer)}: {found.metric_name} "
        f"{found.metric.before:.3g} → {found.metric.after:.3g} {found.unit}, "
        f"p {found.probability.before:.3f} → {found.probability.after:.3f}, "
        f"D_KL {found.kl:.3g} nats"
    )
    figure = new_figure(heading, width=11.0, height=tall + 5.0)
    ratios = (3.2,) if change is None else (3.2, max(tall, 2.0))
    panels = figure.add_gridspec(len(ratios), 2, height_ratios=ratios, width_ratios=(1.2, 1))

    bars = figure.add_subplot(panels[0, 0])
    guesses = found.guesses[:_MOST_GUESSES]
    rows = np.arange(len(guesses))
    before = np.nan_to_num([guess.probability.before for guess in guesses])
    after = np.nan_to_num([guess.probability.after for guess in guesses])
    bars.barh(rows - 0.2, before, height=0.38, color=_BEFORE, label="clean")
    bars.barh(rows + 0.2, after, height=0.38, color=_AFTER, label="perturbed")
    bars.set_yticks(rows, [drawable(guess.text) for guess in guesses])
    bars.invert_yaxis()
    bars.set_facecolor("none")
    plain(bars)
    bars.set_xlabel("probability", fontsize=8, color=FAINT)
    bars.legend(frameon=False, fontsize=7, labelcolor=INK, loc="lower right")
    subtitle(bars, f"likeliest after token {found.position}, as far as either run names them")

    moved = figure.add_subplot(panels[0, 1])
    moved.bar(range(len(found.kl_by_position)), found.kl_by_position, color=_AFTER, width=0.72)
    moved.set_facecolor("none")
    plain(moved)
    none = np.zeros(len(prompt_tokens), dtype=bool)
    label_tokens(moved, prompt_tokens, range(len(prompt_tokens)), none, "x")
    moved.set_ylabel("D_KL(clean ‖ perturbed), nats", fontsize=8, color=FAINT)
    subtitle(moved, "how far each next-token distribution moved")

    if change is not None:
        column = change.column(position)
        grid = change.grid(position)
        scale = change.scale()
        left = figure.add_subplot(panels[1, 0])
        heat(left, grid.values, scale, HEAT)
        label_layers(left, grid.layers)
        label_rows(left, grid.rows)
        token = f"{change.positions[column]} {drawable(change.tokens[column])}"
        subtitle(left, f"change of what each component writes at token {token}")
        right = figure.add_subplot(panels[1, 1])
        by_token = change.by_token(Kind.MLP)
        heat(right, by_token.values, scale, HEAT)
        label_tokens(right, change.tokens, change.positions, change.sinks, "x")
        label_rows(right, by_token.rows)
        subtitle(right, "of the MLPs, layer × token; sinks (*) not in the limits")
        note = "L2 norm of the change, log scale"
        colour_bar(figure, [left, right], scale, HEAT, note, aspect=25)
    return figure
