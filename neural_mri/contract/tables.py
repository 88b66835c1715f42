"""What each kind of table holds: the columns that every table of its name has, and what they mean.

Columns that pictures are painted from are float32 and not null; NaN says "not measured". Where a value
belongs to each token, or to each of a vector's coordinates, a last column `value` holds them all; how many
depends on the scan, so it is not listed here.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pyarrow as pa

__all__ = ("SCHEMAS", "SchemaVersion", "TableSchema")


class SchemaVersion(NamedTuple):
    """Readers understand every version of their own major."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


class TableSchema(NamedTuple):
    """One kind of table."""

    version: SchemaVersion
    fields: tuple[pa.Field, ...]
    """Columns before the value columns whose length depends on the prompt."""
    about: str


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _float_fields(*names: str) -> tuple[pa.Field, ...]:
    return tuple(_field(name, pa.float32()) for name in names)


_COMPONENT = (
    _field("component", pa.string()),
    _field("kind", pa.string()),
    _field("layer", pa.int16()),
    _field("head", pa.int16()),
)
"""Address, kind, layer and head; -1 where a component has none."""

SCHEMAS: Mapping[str, TableSchema] = MappingProxyType(
    {
        "topology": TableSchema(
            SchemaVersion(1, 0),
            (
                *_COMPONENT,
                _field("kv_head", pa.int16()),
                _field("parameters", pa.uint32()),
                _field("shared_parameters", pa.uint32()),
            ),
            "Components and their parameters. `parameters` are the component's own and sum to the "
            "model's; `shared_parameters` are read by it and counted elsewhere (a key-value head "
            "shared by a group, a tied embedding).",
        ),
        "parameters": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("name", pa.string()),
                _field("component", pa.string()),
                _field("role", pa.string()),
                _field("shape", pa.list_(pa.field("item", pa.int32(), nullable=False))),
                _field("parameters", pa.uint32()),
                _field("tied_to", pa.string()),
            ),
            "Every parameter tensor of the model, each storage counted once.",
        ),
        "tensors": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("name", pa.string()),
                _field("component", pa.string()),
                _field("role", pa.string()),
                _field("dtype", pa.string()),
                _field("shape", pa.list_(_field("item", pa.int32()))),
                _field("numel", pa.uint32()),
                _field("nonfinite", pa.uint32()),
                *_float_fields(
                    "mean",
                    "std",
                    "minimum",
                    "maximum",
                    "max_abs",
                    "rms",
                    "frobenius",
                    "kurtosis",
                    "outlier_share",
                    "p0_1",
                    "p1",
                    "p25",
                    "p50",
                    "p75",
                    "p99",
                    "p99_9",
                ),
            ),
            "Every tensor of the weight files, each storage once. `std` is the population's, `kurtosis` "
            "the excess over a Gaussian's, `p0_1` to `p99_9` percentiles, `outlier_share` the share of "
            "weights beyond the scan's number of standard deviations from the mean. A tensor with "
            "`nonfinite` values is not measured otherwise; one with role `buffer` is no weight.",
        ),
        "histograms": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("name", pa.string()),
                _field("component", pa.string()),
                _field("role", pa.string()),
                _field("minimum", pa.float32()),
                _field("maximum", pa.float32()),
            ),
            "How many weights of each tensor fall into bins of equal width from `minimum` to `maximum`: "
            "`counts`, a fixed-size list of uint32. A bin holds its lower edge, the last one both.",
        ),
        "outliers": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("name", pa.string()),
                _field("component", pa.string()),
                _field("role", pa.string()),
                _field("rank", pa.int16()),
                _field("row", pa.int32()),
                _field("column", pa.int32()),
                _field("value", pa.float32()),
                _field("z", pa.float32()),
            ),
            "The weights of each tensor that lie farthest from its mean, in standard deviations `z`. "
            "`row` and `column` as stored; of a vector, `row` is the coordinate and `column` -1.",
        ),
        "weights": TableSchema(
            SchemaVersion(1, 0),
            (
                *_COMPONENT,
                *_float_fields(
                    "rms",
                    "frobenius",
                    "max_abs",
                    "mean",
                    "std",
                    "outlier_share",
                    "rms_q",
                    "rms_k",
                    "rms_v",
                    "rms_o",
                ),
            ),
            "The matrices that each component reads: embed, each layer's attention, heads and MLP, "
            "unembed. A head has its slices of W_Q and W_O, and those of W_K and W_V of its key-value "
            "head; a tied unembedding reads the embedding. Biases and norm gains are left to `tensors`.",
        ),
        "circuits": TableSchema(
            SchemaVersion(1, 0),
            (
                *_COMPONENT,
                _field("circuit", pa.string()),
                *_float_fields("spectral_norm", "frobenius", "stable_rank", "copying"),
            ),
            "What each head does as a whole: `QK`, W_Q W_K^T, where it attends; `OV`, W_V W_O, what it "
            "moves (Elhage et al. 2021). `value` holds the largest singular values; `stable_rank` is "
            "|.|_F^2 / |.|_2^2; `copying`, of OV alone, sum(Re eigenvalue) / sum |eigenvalue|, from -1 "
            "to 1.",
        ),
        "neuron_weights": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("component", pa.string()),
                _field("layer", pa.int16()),
                _field("rank", pa.int16()),
                _field("neuron", pa.int32()),
                *_float_fields("product", "in_norm", "out_norm", "gate_norm"),
            ),
            "The neurons of each MLP with the largest product of the norms of what they read by "
            "(`in_norm`) and write by (`out_norm`). `gate_norm` is NaN where the MLP has no gate.",
        ),
        "dimensions": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("name", pa.string()),
                _field("component", pa.string()),
                _field("role", pa.string()),
                _field("layer", pa.int16()),
                _field("rank", pa.int16()),
                _field("dimension", pa.int32()),
                *_float_fields("norm", "ratio"),
            ),
            "The dimensions of the residual stream that each writing matrix writes to most strongly: "
            "the norm of the weights that lead there, and its ratio to the median dimension's.",
        ),
        "difference": TableSchema(
            SchemaVersion(1, 0),
            (*_COMPONENT, *_float_fields("frobenius", "relative", "max_abs", "cosine")),
            "How each component's weights differ from the baseline's: the norm of the difference, that "
            "over the norm of the baseline's weights, its largest entry, and the cosine between the two. "
            "All parameters of a component, biases and gains included; of a head, its matrices.",
        ),
        "tokens": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("position", pa.int32()),
                _field("token_id", pa.int32()),
                _field("text", pa.string()),
                _field("start", pa.int32()),
                _field("end", pa.int32()),
                _field("sink", pa.bool_()),
            ),
            "The prompt's tokens. `sink` marks an attention sink: position 0, or a residual norm "
            "above ten times the median over the other positions.",
        ),
        "activations": TableSchema(
            SchemaVersion(1, 0),
            _COMPONENT,
            "What each component writes to the residual stream: a row a component, a value a token.",
        ),
        "percentile": TableSchema(
            SchemaVersion(1, 0),
            _COMPONENT,
            "How unusually active each component is: the share of ordinary positions at which it was less "
            "active, 0 to 1, a row a component, a value a token. NaN at sinks, position 0 included.",
        ),
        "vectors": TableSchema(
            SchemaVersion(1, 0),
            (*_COMPONENT, _field("position", pa.int32())),
            "The vectors behind `activations`: a row a component and token, d_model values.",
        ),
        "neurons": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("component", pa.string()),
                _field("layer", pa.int16()),
                _field("position", pa.int32()),
                _field("rank", pa.int16()),
                _field("neuron", pa.int32()),
                _field("value", pa.float32()),
            ),
            "The strongest neurons of each MLP at each token, by absolute hidden activation.",
        ),
        "predictions": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("position", pa.int32()),
                _field("rank", pa.int16()),
                _field("token_id", pa.int32()),
                _field("text", pa.string()),
                _field("logit", pa.float32()),
                _field("log_probability", pa.float32()),
                _field("probability", pa.float32()),
            ),
            "The likeliest next tokens after each position. Log-probabilities in nats.",
        ),
        "comparison": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("position", pa.int32()),
                _field("answer_id", pa.int32()),
                _field("answer", pa.string()),
                _field("foil_id", pa.int32()),
                _field("metric_before", pa.float32()),
                _field("metric_after", pa.float32()),
                _field("metric_sd", pa.float32()),
                _field("logit_before", pa.float32()),
                _field("logit_after", pa.float32()),
                _field("probability_before", pa.float32()),
                _field("probability_after", pa.float32()),
            ),
            "The answer clean and perturbed, one row. The metric is the logit difference answer - foil, or "
            "without a foil (foil_id -1) the answer's log-probability. `metric_sd`: spread over draws.",
        ),
        "shift": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("position", pa.int32()),
                _field("kl", pa.float32()),
                _field("kl_sd", pa.float32()),
                _field("entropy_before", pa.float32()),
                _field("entropy_after", pa.float32()),
            ),
            "How far each position's next-token distribution moved: D_KL(clean ‖ perturbed).",
        ),
        "metric": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("position", pa.int32()),
                _field("answer_id", pa.int32()),
                _field("answer", pa.string()),
                _field("foil_id", pa.int32()),
                _field("foil", pa.string()),
                _field("clean", pa.float32()),
                _field("corrupted", pa.float32()),
                _field("probability_clean", pa.float32()),
                _field("probability_corrupted", pa.float32()),
                _field("direct_biases", pa.float32()),
            ),
            "What a circuit is asked about, one row: the metric and the answer's probability in the clean "
            "and the corrupted run (NaN where there is none). `direct_biases` is the part of the direct "
            "attribution that no component writes.",
        ),
        "effects": TableSchema(
            SchemaVersion(1, 0),
            (
                *_COMPONENT,
                _field("effect", pa.float32()),
                _field("exact", pa.bool_()),
                _field("estimate", pa.float32()),
                _field("direct", pa.float32()),
            ),
            "What replacing each component does to the metric: below 0 where the component helps. "
            "`effect` is measured where `exact`, else the `estimate`; `direct` is the component's own "
            "term of the logits, whose sum with `metric.direct_biases` they are.",
        ),
        "edges": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("source", pa.string()),
                _field("target", pa.string()),
                _field("source_index", pa.int32()),
                _field("target_index", pa.int32()),
                _field("strength", pa.float32()),
            ),
            "The strongest paths from what one component writes straight to what another reads, by "
            "absolute strength: the first-order effect of replacing the source for that target alone. "
            "The indices are rows of `effects`.",
        ),
        "lens": TableSchema(
            SchemaVersion(1, 0),
            (*_COMPONENT, _field("quantity", pa.string())),
            "What the logit lens predicts at `embed` and after each block, beside what the model predicts: "
            "a row a place and quantity, a value a position. `kl` D_KL(model ‖ lens), `js`, `entropy`, "
            "`answer_log_probability` in nats; `answer_rank` counts likelier tokens; `agrees` is 1 where "
            "the likeliest token is the model's; `kl_z` in ordinary standard deviations, `anomalous` 1 "
            "where |kl_z| exceeds the bound.",
        ),
        "lens_tokens": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("component", pa.string()),
                _field("layer", pa.int16()),
                _field("position", pa.int32()),
                _field("token_id", pa.int32()),
                _field("text", pa.string()),
                _field("log_probability", pa.float32()),
            ),
            "The lens's likeliest next token at each place and position. Log-probabilities in nats.",
        ),
        "nodes": TableSchema(
            SchemaVersion(1, 0),
            (*_COMPONENT, _field("quantity", pa.string())),
            "What FLAIR paints on each attention layer and MLP: `kl_change`, by how many nats the "
            "sublayer's write changes D_KL(model ‖ lens) (negative: towards the model's prediction; all "
            "together they lead from the embedding's divergence to 0); `z`, in ordinary standard "
            "deviations; `anomalous`, 1 where |z| exceeds the bound.",
        ),
        "uncertainty": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("position", pa.int32()),
                _field("token_id", pa.int32()),
                _field("text", pa.string()),
                *_float_fields("entropy", "max_probability", "margin", "entropy_z", "seed_score"),
                _field("anomalous", pa.bool_()),
            ),
            "How sure the model is of its own next token: entropy in nats, margin over the next token in "
            "logits. `anomalous`: more entropy than the bound. `seed_score` weighs KL and entropy over "
            "layers; it is not an error detector.",
        ),
        "support": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("position", pa.int32()),
                _field("role", pa.string()),
                _field("token_id", pa.int32()),
                _field("text", pa.string()),
                *_float_fields(
                    "log_probability", "lens_log_probability", "gain", "gain_z", "support"
                ),
                _field("anomalous", pa.bool_()),
            ),
            "How far a next token is supported by more than habit. `gain` = log p(token) - its mean log-"
            "probability in lenses half-way up, nats; `support` the mean of z(gain) and z(margin), in "
            "ordinary standard deviations: low is suspicious. Role `own`: the model's likeliest, at "
            "every position; `answer`, `foil`: the tokens asked about, at the target alone, where "
            "`support` takes the token's own margin over the likeliest other.",
        ),
        "depth": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("position", pa.int32()),
                _field("layer", pa.int16()),
                _field("depth", pa.float32()),
            ),
            "The first layer after which the lens's likeliest token is the model's and stays it; `depth` "
            "as a share of the layers. Neutral: right answers are often decided late. Layer -1 and NaN "
            "where not measured.",
        ),
        "calibration_lens": TableSchema(
            SchemaVersion(1, 0),
            (_field("lens", pa.string()), *_COMPONENT),
            "The maps of a lens, a row a place: `value` is the bias, d_model values.",
        ),
        "calibration_matrix": TableSchema(
            SchemaVersion(1, 0),
            (_field("lens", pa.string()), *_COMPONENT),
            "The maps of a lens, a row a place: `value` is the matrix added to the identity, row-major, "
            "d_model x d_model values.",
        ),
        "calibration_means": TableSchema(
            SchemaVersion(1, 0),
            (
                *_COMPONENT,
                _field("part", pa.string()),
                _field("mean", pa.list_(_field("item", pa.float32()))),
            ),
            "Mean vectors over positions 1 and later of reference text: `z` of each head before W_O, the "
            "MLP's `hidden` activation, and what `attn` and `mlp` write and `resid_pre`, `resid_post` hold.",
        ),
        "calibration_activity": TableSchema(
            SchemaVersion(1, 0),
            _COMPONENT,
            "Quantiles of the L2 norm of what each component writes on reference text, positions 1 and "
            "later: `value` at the levels 0, 0.01, ... 1.",
        ),
        "calibration_ordinary": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("lens", pa.string()),
                _field("channel", pa.string()),
                _field("row", pa.int16()),
                *_float_fields("mean", "sd"),
            ),
            "Values of FLAIR's channels on reference text: `value` holds them, smallest first; the k-th of "
            "n is the k / (n + 1) quantile. A row a layer where the channel has layers.",
        ),
        "attention": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("component", pa.string()),
                _field("layer", pa.int16()),
                _field("head", pa.int16()),
            ),
            "Attention patterns: a row a head, query-major `[query position, key position]`; each "
            "query's row sums to 1.",
        ),
        "contrast": TableSchema(
            SchemaVersion(1, 0),
            (
                _field("position", pa.int32()),
                _field("answer_id", pa.int32()),
                _field("answer", pa.string()),
                _field("foil_id", pa.int32()),
                _field("foil", pa.string()),
                *_float_fields(
                    "clean",
                    "corrupted",
                    "corrupted_sd",
                    "probability_clean",
                    "probability_corrupted",
                    "probability_corrupted_sd",
                ),
            ),
            "The two runs that values are patched between, one row: the metric and the answer's "
            "probability in each, of the next token after the position. The metric is the logit "
            "difference answer - foil, or without a foil (foil_id -1) the answer's log-probability. "
            "Mean and spread over draws where the corrupted run is drawn; a single one has no spread.",
        ),
        "recovery": TableSchema(
            SchemaVersion(1, 0),
            _COMPONENT,
            "What patching a component at one position restores of the metric: a row a component, a value "
            "a position. (patched - corrupted) / (clean - corrupted): 0 the corrupted run, 1 the clean "
            "one, and beyond; NaN where the two runs are too close.",
        ),
        "patched": TableSchema(
            SchemaVersion(1, 0),
            _COMPONENT,
            "The metric itself with a component patched at one position: a row a component, a value a "
            "position.",
        ),
        "trace": TableSchema(
            SchemaVersion(1, 0),
            (*_COMPONENT, _field("quantity", pa.string())),
            "Causal tracing: a row a place and quantity, a value a position where the clean value was put "
            "back into the corrupted run. `indirect_effect`: restored minus corrupted, mean over draws of "
            "the noise; `sd` its spread. `resid_post` is one layer's state; `attn` and `mlp` are the "
            "middle of a window of layers.",
        ),
    }
)
