"""DTI as text."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from neural_mri.cli.listing import print_heading, print_signed
from neural_mri.client import CircuitMap
from neural_mri.client.text import visible

__all__ = ("print_circuit",)


def print_circuit(
    circuit: CircuitMap, prompt_tokens: Sequence[str], console: Console, top: int
) -> None:
    """The question, the strongest components with their signs, and the strongest paths."""
    asked = circuit.question
    after = f"token {asked.position} {visible(prompt_tokens[asked.position])}"
    foil = "" if asked.foil is None else f" rather than {visible(asked.foil)}"
    console.print(Text(f"Next token after {after}: {visible(asked.answer)}{foil}"))
    line = f"{asked.metric} {asked.clean:+.4g} {circuit.unit}, p {asked.probability_clean:.4f}"
    if np.isfinite(asked.corrupted):
        line += f"; corrupted {asked.corrupted:+.4g}, p {asked.probability_corrupted:.4f}"
    console.print(Text(line, style="dim"))

    strongest = circuit.strongest(top)
    values = [circuit.value(effect) for effect in strongest]
    if circuit.is_direct:
        heading = "Strongest components: their own terms of the logits (above 0 helps; logits)"
    else:
        heading = (
            f"Strongest components: change of {asked.metric} when replaced ({circuit.ablation}; "
            f"below 0 it helps; {circuit.unit})"
        )
    print_heading(heading, console)
    notes = [
        "" if circuit.is_direct else "measured" if effect.exact else "estimate"
        for effect in strongest
    ]
    print_signed([effect.component.label for effect in strongest], values, notes, console)
    if circuit.edges:
        print_heading(
            "Strongest paths: first-order effect of the source by this path (logits)", console
        )
        edges = circuit.edges[:top]
        arrow = "→" if console.encoding.startswith("utf") else "->"
        print_signed(
            [f"{edge.source.label} {arrow} {edge.target.label}" for edge in edges],
            [edge.strength for edge in edges],
            [""] * len(edges),
            console,
        )
    measured = sum(effect.exact for effect in circuit.effects)
    console.print()
    console.print(
        Text(f"{circuit.method}; {measured} of {len(circuit.effects)} measured", style="dim")
    )
