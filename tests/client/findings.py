"""Small results of the scans that say why, with known numbers, made by the contract's own builders."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from neural_mri.contract.components import EMBED, Component, Kind
from neural_mri.contract.results import (
    SCHEMAS,
    Provenance,
    build,
    component_columns,
    positions_column,
    stamp,
)
from neural_mri.contract.scans import (
    AnomalyScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    TracingScan,
    WeightScan,
    reporting_order,
)
from tests.client.specimens import (
    ARCHITECTURE,
    MODEL,
    REVISION,
    SCAN_KEY,
    TOKENS,
    activations,
    predictions,
    tokens,
)

N_TOKENS = len(TOKENS)
TARGET = N_TOKENS - 1

Values = npt.NDArray[np.float32]


def tables_of(scan: Any) -> dict[str, pa.Table]:
    """The tables of a scan of the tiny model."""
    match scan:
        case WeightScan():
            return weights(scan)
        case CircuitScan():
            return circuits(scan)
        case AnomalyScan():
            return anomalies()
        case PerturbationScan():
            return perturbed(scan)
        case PatchingScan():
            return patched(scan)
        case TracingScan():
            return traced(scan)
        case CalibrationScan():
            return {"calibration_ordinary": ordinary()}
        case _:
            raise TypeError(scan)


def table(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    unit: str,
    values: Values | None = None,
    **parameters: Any,
) -> pa.Table:
    """A table of rows; `values` are its value column, `[row position]`."""
    fields = SCHEMAS[name].fields
    columns = {f.name: pa.array([row[f.name] for row in rows], f.type) for f in fields}
    column = None
    if values is not None:
        flat = pa.array(values.astype(np.float32).reshape(-1))
        column = positions_column(flat, values.shape[1])
    provenance = Provenance(
        table=name,
        version=str(SCHEMAS[name].version),
        unit=unit,
        method="log-probability: with the component replaced, minus clean; made up",
        positions=None if values is None else tuple(range(values.shape[1])),
        parameters=parameters,
        model=MODEL.name,
        revision=REVISION,
        scan_key=SCAN_KEY,
        scanner_version="1",
    )
    return stamp(build(name, columns, column), provenance)


def named(components: Sequence[Component]) -> list[dict[str, Any]]:
    """The columns that name components, a mapping a row."""
    columns = {name: array.to_pylist() for name, array in component_columns(components).items()}
    return [
        {name: column[row] for name, column in columns.items()} for row in range(len(components))
    ]


def size_of(component: Component) -> float:
    """RMS of a component's weights: larger in later layers, largest in MLPs."""
    place = 10 if component.kind is Kind.MLP else component.index or 0
    return float(np.float32(0.1 * (1 + (component.layer or 0)) + 0.01 * place))


def weights(scan: WeightScan) -> dict[str, pa.Table]:
    """Head 1 of layer 2 has outliers; head h copies with score (h - 1) / 2."""
    parts = ("frobenius", "max_abs", "mean", "std", "rms_q", "rms_k", "rms_v", "rms_o")
    order = scan.selected(ARCHITECTURE)
    heads = [component for component in order if component.kind is Kind.HEAD]
    made = {
        "weights": table(
            "weights",
            [
                {
                    **row,
                    **dict.fromkeys(parts, 1.0),
                    "rms": size_of(component),
                    "outlier_share": 0.25 if component == Component.head(2, 1) else 0.0,
                }
                for component, row in zip(order, named(order), strict=True)
            ],
            "weight",
            outlier_sigma=scan.outlier_sigma,
            baseline=scan.baseline,
        ),
        "circuits": table(
            "circuits",
            [
                {
                    **row,
                    "circuit": circuit,
                    "spectral_norm": 1.0,
                    "frobenius": 1.0,
                    "stable_rank": 1.0,
                    "copying": nan if circuit == "QK" else (row["head"] - 1) / 2,
                }
                for row in named(heads)
                for circuit in ("QK", "OV")
            ],
            "singular value",
            np.ones((2 * len(heads), 2), np.float32),
        ),
        "outliers": table(
            "outliers",
            [
                {
                    "name": "w",
                    "component": "blocks.2.mlp",
                    "role": "W_out",
                    "rank": rank,
                    "row": 7,
                    "column": rank,
                    "value": -3.5,
                    "z": z,
                }
                for rank, z in enumerate((9.0, -88.0))
            ],
            "standard deviations",
        ),
    }
    if scan.baseline is not None:
        made["difference"] = table(
            "difference",
            [
                {
                    **row,
                    "frobenius": 1.0,
                    "relative": size_of(component),
                    "max_abs": 1.0,
                    "cosine": 1.0,
                }
                for component, row in zip(order, named(order), strict=True)
            ],
            "L2 norm",
        )
    return made


def effect_of(component: Component) -> float:
    """What replacing a component does: MLPs help, heads hinder, the later the more."""
    layer = component.layer or 0
    if component.kind is Kind.MLP:
        return float(np.float32(-1.0 - layer))
    return float(np.float32(0.1 * (1 + layer) + 0.01 * (component.index or 0)))


def circuits(scan: CircuitScan) -> dict[str, pa.Table]:
    """MLPs are measured, heads estimated; the embedding has the largest effect of all."""
    nodes = tuple(ARCHITECTURE.nodes())
    is_direct = scan.method.value == "direct"
    rows = []
    for component, row in zip(nodes, named(nodes), strict=True):
        effect = 99.0 if component == EMBED else effect_of(component)
        known = component.kind is not Kind.UNEMBED and not is_direct
        rows.append(
            {
                **row,
                "effect": effect if known else nan,
                "exact": component.kind is Kind.MLP and known,
                "estimate": effect if known else nan,
                "direct": -effect,
            }
        )
    how: dict[str, Any] = {} if is_direct else {"ablation": scan.effective_ablation.value}
    unit = "nats" if scan.foil is None else "logits"
    made = {
        "effects": table("effects", rows, unit, **how),
        "metric": table(
            "metric",
            [
                {
                    **question(scan.foil),
                    "direct_biases": 0.0,
                }
            ],
            unit,
        ),
    }
    if scan.edges and not is_direct:
        made["edges"] = table(
            "edges",
            [
                {
                    "source": "blocks.1.attn.head_2",
                    "target": "blocks.3.mlp",
                    "source_index": 7,
                    "target_index": 16,
                    "strength": -0.75,
                }
            ],
            "logits",
        )
    return made


def question(foil: object) -> dict[str, Any]:
    return {
        "position": TARGET,
        "answer_id": 51,
        "answer": " Paris",
        "foil_id": -1 if foil is None else 52,
        "foil": "" if foil is None else " Rome",
        "clean": -0.5,
        "corrupted": -4.0,
        "probability_clean": 0.7,
        "probability_corrupted": 0.02,
    }


def divergence() -> Values:
    """`[place position]`: falls from 8 nats at the embedding to 0; position 0 is not measured."""
    places = ARCHITECTURE.n_layers + 1
    falling = np.linspace(8, 0, places, dtype=np.float32)[:, None]
    kl: Values = (falling + np.arange(N_TOKENS) / 10 * (falling > 0)).astype(np.float32)
    kl[:, 0] = nan
    return kl


def anomalies() -> dict[str, pa.Table]:
    """The last token is uncertain, its lens strange at layer 1, its answer unsupported."""
    places = [
        EMBED,
        *(Component(Kind.RESID_POST, layer) for layer in range(ARCHITECTURE.n_layers)),
    ]
    kl = divergence()
    strange = np.zeros_like(kl)
    strange[2, TARGET] = 1
    strange[:, 0] = strange[-1] = nan
    quantities = {"kl": kl, "anomalous": strange}
    at = range(1, N_TOKENS)
    lens_rows = [{**row, "quantity": quantity} for row in named(places) for quantity in quantities]
    stacked = np.stack(list(quantities.values()), 1).reshape(-1, N_TOKENS)
    judged: dict[str, Any] = {"lens": "bias", "false_alarm_rate": 0.01}

    def supported(position: int, role: str, text: str, support: float) -> dict[str, Any]:
        return {
            "position": position,
            "role": role,
            "token_id": 51,
            "text": text,
            "log_probability": -0.4,
            "lens_log_probability": -9.0,
            "gain": 8.6,
            "gain_z": support,
            "support": support,
            "anomalous": support < -2,
        }

    return {
        "lens": table("lens", lens_rows, "nats", stacked, **judged),
        "lens_tokens": table(
            "lens_tokens",
            [
                {
                    "component": str(place),
                    "layer": -1 if place.layer is None else place.layer,
                    "position": position,
                    "token_id": 51,
                    "text": f" g{row}{position}",
                    "log_probability": -1.0,
                }
                for row, place in enumerate(places)
                for position in at
            ],
            "nats",
        ),
        "uncertainty": table(
            "uncertainty",
            [
                {
                    "position": position,
                    "token_id": 51 if position else -1,
                    "text": " Paris" if position else "",
                    "entropy": 1.5 + position if position else nan,
                    "max_probability": 0.5 if position else nan,
                    "margin": 1.0,
                    "entropy_z": 0.1,
                    "seed_score": 1.0,
                    "anomalous": position == TARGET,
                }
                for position in range(N_TOKENS)
            ],
            "nats",
            **judged,
        ),
        "support": table(
            "support",
            [
                *(supported(p, "own", " Paris", -3.0 if p == TARGET else 0.5) for p in at),
                supported(TARGET, "answer", " Paris", -3.0),
                supported(TARGET, "foil", " Rome", 1.25),
            ],
            "nats",
            **judged,
        ),
        "depth": table(
            "depth",
            [
                {
                    "position": position,
                    "layer": 2 if position else -1,
                    "depth": 0.75 if position else nan,
                }
                for position in range(N_TOKENS)
            ],
            "share of layers",
        ),
    }


def perturbed(scan: PerturbationScan) -> dict[str, pa.Table]:
    """The answer loses: metric -0.5 to -4, probability 0.7 to 0.02; what changed are the activations."""
    everywhere = tuple(range(N_TOKENS))
    asked = question(scan.foil)
    made = {
        "comparison": table(
            "comparison",
            [
                {
                    **asked,
                    "metric_before": asked["clean"],
                    "metric_after": asked["corrupted"],
                    "metric_sd": 0.25,
                    "logit_before": 9.0,
                    "logit_after": 5.0,
                    "probability_before": asked["probability_clean"],
                    "probability_after": asked["probability_corrupted"],
                }
            ],
            "nats" if scan.foil is None else "logits",
            draws=8,
        ),
        "shift": table(
            "shift",
            [
                {
                    "position": position,
                    "kl": 0.5 * position,
                    "kl_sd": nan,
                    "entropy_before": 1.0,
                    "entropy_after": 2.0,
                }
                for position in everywhere
            ],
            "nats",
        ),
        "predictions": predictions(everywhere),
        "predictions_after": after(),
    }
    if scan.perturbed_scan:
        made["change"] = activations(reporting_order(ARCHITECTURE), everywhere)
        made["tokens"] = tokens()
    return made


def after() -> pa.Table:
    """Paris has lost to a token that the clean run did not name."""
    guesses = ((99, " the", 0.6), (51, " Paris", 0.02))
    return table(
        "predictions",
        [
            {
                "position": position,
                "rank": rank,
                "token_id": token,
                "text": text,
                "logit": 1.0,
                "log_probability": float(np.log(probability)),
                "probability": probability,
            }
            for position in range(N_TOKENS)
            for rank, (token, text, probability) in enumerate(guesses, 1)
        ],
        "probability",
    )


def restored(n_rows: int) -> Values:
    """`[row position]`: rises with both, from -0.2 to 1."""
    values: Values = np.linspace(-0.2, 1, n_rows * N_TOKENS, dtype=np.float32)
    return values.reshape(n_rows, N_TOKENS)


def contrast(foil: object) -> pa.Table:
    row = {**question(foil), "corrupted_sd": nan, "probability_corrupted_sd": nan}
    return table("contrast", [row], "nats" if foil is None else "logits", draws=1)


def patched(scan: PatchingScan) -> dict[str, pa.Table]:
    rows: list[Component] = []
    for site in scan.sites:
        for layer in range(ARCHITECTURE.n_layers):
            if site.value == "head":
                rows += (Component.head(layer, head) for head in range(ARCHITECTURE.n_heads))
            else:
                rows.append(Component(Kind(site.value), layer))
    return {
        "recovery": table(
            "recovery",
            named(rows),
            "share of the gap",
            restored(len(rows)),
            direction=scan.direction.value,
        ),
        "contrast": contrast(scan.foil),
        "tokens": tokens(),
    }


def traced(scan: TracingScan) -> dict[str, pa.Table]:
    kinds = {"state": Kind.RESID_POST, "mlp": Kind.MLP, "attn": Kind.ATTN}
    rows = [
        Component(kinds[kind.value], layer)
        for kind in scan.kinds
        for layer in range(ARCHITECTURE.n_layers)
    ]
    both = [
        {**row, "quantity": quantity}
        for quantity in ("indirect_effect", "sd")
        for row in named(rows)
    ]
    values = restored(len(rows))
    return {
        "trace": table(
            "trace",
            both,
            "probability",
            np.concatenate([values, np.full_like(values, 7)]),
            sigma=scan.sigma,
            draws=scan.draws,
            window=scan.window,
        ),
        "contrast": contrast(scan.foil),
        "tokens": tokens(),
    }


def ordinary() -> pa.Table:
    """At place p, 9 ordinary divergences 1 + p, ... 9 + p."""
    rows: list[dict[str, Any]] = [
        {"lens": "bias", "channel": channel, "row": row, "mean": 5.0, "sd": 1.0}
        for channel, n_rows in (("kl", ARCHITECTURE.n_layers), ("final_entropy", 1))
        for row in range(n_rows)
    ]
    values = np.stack([np.arange(1, 10) + row["row"] for row in rows]).astype(np.float32)
    return table("calibration_ordinary", rows, "nats", values, source="model", n_tokens=2048)
