"""What a diagnosis reads off the scanner's tables. Every quantity of a record is defined here.

Norms and entropies leave position 0 out: it holds the attention sink.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.suites import Measure
from neural_mri.diagnostics.records import Block, Quantity, Values

__all__ = (
    "Numbers",
    "activation_norms",
    "attention_entropies",
    "attributions",
    "flair_channels",
    "lens_curves",
    "tensor_statistics",
    "weight_statistics",
)

Tables = Mapping[str, pa.Table]

WEIGHT_STATISTICS = (
    "rms",
    "frobenius",
    "max_abs",
    "mean",
    "std",
    "rms_q",
    "rms_k",
    "rms_v",
    "rms_o",
)
TENSOR_STATISTICS = (
    "mean",
    "std",
    "minimum",
    "maximum",
    "rms",
    "frobenius",
    "kurtosis",
    "p1",
    "p50",
    "p99",
)
SCORES = (
    "margin",
    "answer_log_probability",
    "foil_log_probability",
    "answer_rank",
    "likeliest_log_probability",
)
"""`margin`: log p(answer) - log p(foil), nats. `answer_rank`: tokens likelier than the answer."""
CHANNELS = ("entropy", "margin", "gain", "support", "depth", "anomalous")
"""FLAIR at the position asked about; `margin` here in logits, between the two likeliest tokens."""
LENS_QUANTITIES = ("kl", "entropy", "answer_log_probability")


class Numbers:
    """Blocks as they are gathered, a prompt at a time."""

    def __init__(self) -> None:
        self._rows: dict[Quantity, dict[str, Values]] = {}
        self._components: dict[Quantity, tuple[str, ...]] = {}

    def add(
        self,
        measure: Measure,
        name: str,
        prompt: str,
        components: tuple[str, ...],
        values: Values,
    ) -> None:
        """One prompt's numbers. Raises `ValueError` where its components are not those of the others."""
        quantity = Quantity(measure, name)
        known = self._components.setdefault(quantity, components)
        if known != components:
            raise ValueError(f"{measure} {name} of {prompt} has other components than before")
        self._rows.setdefault(quantity, {})[prompt] = values.astype(np.float32)

    def blocks(self, prompts: Sequence[str]) -> dict[Quantity, Block]:
        """What was gathered, in the order of the prompts; `prompts` names all that may be there."""
        found = {}
        for quantity, rows in self._rows.items():
            mine = tuple(prompt for prompt in prompts if prompt in rows)
            values = np.stack([rows[prompt] for prompt in mine])
            found[quantity] = Block(mine, self._components[quantity], values)
        return found


def activation_norms(tables: Tables, prompt: str, n_tokens: int, into: Numbers) -> None:
    """RMS over positions 1 to n_tokens - 1 of the L2 norm of what each component writes."""
    table = tables["activations"]
    values = _matrix(table)[:, 1:n_tokens].astype(np.float64)
    order = in_order(table["component"].to_pylist())
    norms = np.sqrt((values * values).mean(1))[order.rows]
    into.add(Measure.NORMS, "l2_norm", prompt, order.names, norms.astype(np.float32))


def attention_entropies(tables: Tables, prompt: str, n_tokens: int, into: Numbers) -> None:
    """Mean over queries 1 to n_tokens - 1 of H / log(keys): 0 looks at one token, 1 at all alike."""
    names: list[str] = []
    found = []
    for name in sorted(tables, key=lambda name: int(name.removeprefix("attention."))):
        table = tables[name]
        patterns = _matrix(table)
        width = round(patterns.shape[1] ** 0.5)
        p = patterns.reshape(len(patterns), width, width)[:, 1:n_tokens, :n_tokens]
        p = p.astype(np.float64)
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
        found.append((entropy / np.log(np.arange(2, n_tokens + 1))).mean(1))
        names += table["component"].to_pylist()
    values = np.concatenate(found).astype(np.float32)
    into.add(Measure.ATTENTION, "entropy", prompt, tuple(names), values)


def lens_curves(tables: Tables, prompt: str, into: Numbers) -> None:
    """The lens at the embedding and after each block, at the position asked about."""
    table = tables["lens"]
    names = table["component"].to_pylist()
    quantities = np.array(table["quantity"].to_pylist())
    values = _matrix(table)[:, -1]
    for name in LENS_QUANTITIES:
        rows = np.flatnonzero(quantities == name)
        places = tuple(names[row] for row in rows)
        # The last place is the model's own prediction: its divergence from itself is 0 by definition.
        into.add(Measure.LENS, name, prompt, places, values[rows])


def flair_channels(tables: Tables, prompt: str, into: Numbers) -> None:
    """How the answer fares, and FLAIR's channels, at the position asked about."""
    uncertainty = tables["uncertainty"].to_pylist()[-1]
    support = {row["role"]: row for row in tables["support"].to_pylist()}
    own, answer, foil = (support.get(role, {}) for role in ("own", "answer", "foil"))
    log_p = float(answer.get("log_probability", np.nan))
    log_foil = float(foil.get("log_probability", np.nan))
    depth = tables["depth"].to_pylist()[-1]["depth"]
    scores = (log_p - log_foil, log_p, log_foil, _final_rank(tables), own.get("log_probability"))
    channels = (
        uncertainty["entropy"],
        uncertainty["margin"],
        own.get("gain", np.nan),
        own.get("support", np.nan),
        depth,
        float(own.get("anomalous", False)),
    )
    for name, value in zip(SCORES, scores, strict=True):
        into.add(Measure.SCORES, name, prompt, ("",), np.array([value], np.float32))
    for name, value in zip(CHANNELS, channels, strict=True):
        into.add(Measure.RISK, name, prompt, ("",), np.array([value], np.float32))


def _final_rank(tables: Tables) -> float:
    table = tables["lens"]
    rows = np.flatnonzero(np.array(table["quantity"].to_pylist()) == "answer_rank")
    return float(_matrix(table)[rows[-1], -1])


def attributions(tables: Tables, prompt: str, into: Numbers) -> None:
    """What replacing each component does to the metric: below 0 where it helps the answer."""
    table = tables["effects"]
    names = table["component"].to_pylist()
    inner = [row for row, name in enumerate(names) if name not in ("embed", "unembed")]
    order = tuple(names[row] for row in inner)
    for column, name in (("estimate", "estimate"), ("effect", "effect")):
        values = table[column].to_numpy()[inner]
        into.add(Measure.ATTRIBUTION, name, prompt, order, values)


def weight_statistics(tables: Tables, into: Numbers) -> None:
    """T2's statistics of every component's matrices, and of what heads do as a whole."""
    table = tables["weights"]
    order = in_order(table["component"].to_pylist())
    for name in WEIGHT_STATISTICS:
        values = table[name].to_numpy()[order.rows]
        into.add(Measure.WEIGHTS, name, "", order.names, values)
    circuits = tables["circuits"]
    kinds = np.array(circuits["circuit"].to_pylist())
    heads = circuits["component"].to_pylist()
    for kind in ("QK", "OV"):
        rows = np.flatnonzero(kinds == kind)
        values = circuits["spectral_norm"].to_numpy()[rows]
        names = tuple(heads[row] for row in rows)
        into.add(Measure.WEIGHTS, f"{kind.lower()}_spectral_norm", "", names, values)


def tensor_statistics(tables: Tables, into: Numbers) -> None:
    """T2's statistics of every tensor: biases and norm gains, which no component's matrices hold."""
    table = tables["tensors"]
    names = tuple(
        f"{component}:{name}" if component else name
        for component, name in zip(
            table["component"].to_pylist(), table["name"].to_pylist(), strict=True
        )
    )
    for statistic in TENSOR_STATISTICS:
        values = table[statistic].to_numpy()
        into.add(Measure.WEIGHTS, f"tensor_{statistic}", "", names, values)
    nonfinite = table["nonfinite"].to_numpy().astype(np.float32)
    into.add(Measure.WEIGHTS, "tensor_nonfinite", "", names, nonfinite)


def _matrix(table: pa.Table) -> Values:
    """The `value` column: a row a component."""
    column = table["value"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    matrix: Values = flat.reshape(len(table), -1)
    return matrix


class _Order:
    """Components in the order in which the model computes them."""

    def __init__(self, names: list[str]) -> None:
        components = [Component.parse(name) for name in names]
        self.rows = sorted(range(len(names)), key=lambda row: causal_place(components[row]))
        self.names = tuple(names[row] for row in self.rows)


_STEPS = {Kind.EMBED: 0, Kind.HEAD: 1, Kind.ATTN: 2, Kind.MLP: 3, Kind.UNEMBED: 4}


def causal_place(component: Component) -> tuple[int, int, int]:
    """Sorts components by when they are computed: embedding, then heads, attention and MLP of each layer."""
    if component.kind is Kind.EMBED:
        return (-1, 0, 0)
    if component.layer is None:
        return (1_000_000, 0, 0)
    return (component.layer, _STEPS.get(component.kind, 5), component.index or 0)


def in_order(names: list[str]) -> _Order:
    """Their causal order."""
    return _Order(names)
