"""A FLAIR scan's numbers as Arrow tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neural_mri.contract.anomalies import AnomalyScan
from neural_mri.contract.components import EMBED, Component, Kind
from neural_mri.contract.results import build, component_columns, positions_column
from worker.scanner.calibration import Calibration
from worker.scanner.channels import Channels, Measured, support
from worker.scanner.lens_maps import support_layers
from worker.scanner.loading import LoadedModel
from worker.scanner.ordinary import Ordinary
from worker.scanner.prompts import finished
from worker.scanner.residuals import outer_places

__all__ = ("Findings", "all_tables")


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """What a scan found, at the positions where it was measured: all reported ones but 0."""

    model: LoadedModel
    request: AnomalyScan
    calibration: Calibration | None
    positions: tuple[int, ...]
    inner_positions: tuple[int, ...]
    target: int
    asked: tuple[int, ...]
    """The answer, and the foil if there is one."""
    measured: Measured
    channels: Channels
    known: Mapping[str, Ordinary]
    """Empty where there is nothing to judge by."""

    def everywhere(self, values: Tensor) -> Float[Tensor, "*rows pos"]:
        """Values at measured positions, set among NaN for the reported position that is not."""
        found = values.float().cpu()
        if self.positions[0] > 0:
            return found
        return torch.cat([found.new_full((*found.shape[:-1], 1), torch.nan), found], -1)

    @property
    def outer_places(self) -> tuple[Component, ...]:
        """Where between blocks the lens was held to the residual."""
        return outer_places(self.model.architecture.n_layers)[-len(self.measured.outer.kl) :]

    def channel(self, name: str) -> Float[Tensor, "row pos"]:
        """A channel; one row of NaN where it was not measured."""
        final = self.channels["final_entropy"]
        return self.channels.get(name, torch.full_like(final, torch.nan))

    def z(self, channel: str) -> Float[Tensor, "row pos"]:
        """How unusual a channel is; NaN where there is nothing to judge by."""
        values = self.channels[channel]
        if channel not in self.known:
            return torch.full_like(values, torch.nan)
        return self.known[channel].z(values)

    def beyond(self, z: Tensor, extreme: str) -> Float[Tensor, "*rows pos"]:
        """1 where |z| exceeds the bound on the extreme over all rows, else 0; NaN without one."""
        if extreme not in self.known:
            return torch.full_like(z, torch.nan)
        bound = self.known[extreme].above(self.request.false_alarm_rate)
        return torch.where(z.isnan(), torch.nan, (z.abs() > bound).float())

    def bound(self, channel: str) -> float | None:
        """Beyond it a value is anomalous: above, of support below; None where nothing can be judged."""
        if channel not in self.known:
            return None
        ordinary, rate = self.known[channel], self.request.false_alarm_rate
        return (ordinary.below(rate) if channel == "support" else ordinary.above(rate)).item()

    def judged_by(self) -> dict[str, Any]:
        """What a table says about its judgements."""
        calibration = self.calibration
        if calibration is None or not self.known:
            return {"lens": self.request.lens.value, "calibration": "none"}
        return {
            "lens": self.request.lens.value,
            "false_alarm_rate": self.request.false_alarm_rate,
            "calibration": calibration.source,
            "calibration_seed": calibration.seed,
            "calibration_tokens": calibration.n_tokens,
            "ordinary_positions": self.known["gain"].ordered.shape[1],
        }


def all_tables(found: Findings) -> dict[str, pa.Table]:
    """Every table that the lens gives; `nodes` where it was read inside blocks."""
    made = {
        "lens": _lens(found),
        "lens_tokens": _lens_tokens(found),
        "uncertainty": _uncertainty(found),
        "support": _support(found),
        "depth": _depth(found),
    }
    if found.inner_positions:
        made["nodes"] = _nodes(found)
    return made


def _f32(values: Tensor) -> pa.Array:
    return pa.array(values.reshape(-1).float().cpu().numpy())


def _quantities(
    schema: str,
    places: tuple[Component, ...],
    quantities: Mapping[str, Float[Tensor, "place pos"]],
    width: int,
) -> pa.Table:
    """A row a place and quantity: all quantities of a place together."""
    by_row = [place for place in places for _ in quantities]
    columns = component_columns(by_row)
    columns["quantity"] = pa.array(list(quantities) * len(places), pa.string())
    values = torch.stack(list(quantities.values()), dim=1)
    return build(schema, columns, positions_column(_f32(values), width))


def _lens(found: Findings) -> pa.Table:
    outer, nothing = found.measured.outer, found.everywhere
    last = torch.full_like(found.channels["final_entropy"], torch.nan)
    kl_z = found.z("kl") if "kl" in found.channels else last[:0]
    flagged = found.beyond(kl_z, "extreme_lens")
    quantities = {
        "kl": outer.kl,
        "js": outer.js,
        "entropy": outer.entropy,
        "answer_log_probability": outer.asked[..., 0],
        "answer_rank": outer.rank,
        "agrees": outer.top == found.measured.final.top,
        "kl_z": torch.cat([kl_z, last]),
        "anomalous": torch.cat([flagged, last]),
    }
    table = _quantities(
        "lens",
        found.outer_places,
        {name: nothing(values) for name, values in quantities.items()},
        len(found.positions),
    )
    return finished(
        table,
        "lens",
        unit="nats",
        method="softmax(softcap(W_U norm_f(A x + b))) of the residual x at each place; anomalous: |kl_z| "
        "above what its largest over all places exceeds at the false-alarm rate on reference text",
        positions=found.positions,
        answer_id=found.asked[0],
        bound=found.bound("extreme_lens"),
        **found.judged_by(),
    )


def _lens_tokens(found: Findings) -> pa.Table:
    outer = found.measured.outer
    places = found.outer_places
    at = [position for position in found.positions if position > 0]
    ids = outer.top.cpu().reshape(-1).tolist()
    columns = {
        "component": pa.array([str(place) for place in places for _ in at], pa.string()),
        "layer": pa.array(
            [-1 if place.layer is None else place.layer for place in places for _ in at], pa.int16()
        ),
        "position": pa.array(at * len(places), pa.int32()),
        "token_id": pa.array(ids, pa.int32()),
        "text": pa.array([found.model.text(token) for token in ids], pa.string()),
        "log_probability": _f32(outer.top_log_probability),
    }
    return finished(
        build("lens_tokens", columns),
        "lens_tokens",
        unit="nats",
        method="the likeliest token of the logit lens",
        lens=found.request.lens.value,
    )


def _nodes(found: Findings) -> pa.Table:
    n_layers = found.model.architecture.n_layers
    kinds = (("attn", Kind.ATTN), ("mlp", Kind.MLP))
    change = torch.stack([found.channels[name] for name, _ in kinds], 1).flatten(0, 1)
    z = torch.stack([found.z(name) for name, _ in kinds], 1).flatten(0, 1)
    embedded = found.channels["kl"][:1, found.measured.inner_at]
    nowhere = torch.full_like(embedded, torch.nan)
    quantities = {
        "kl_change": torch.cat([embedded, change]),
        "z": torch.cat([nowhere, z]),
        "anomalous": torch.cat([nowhere, found.beyond(z, "extreme_node")]),
    }
    places = [Component(kind, layer) for layer in range(n_layers) for _, kind in kinds]
    table = _quantities("nodes", (EMBED, *places), quantities, len(found.inner_positions))
    return finished(
        table,
        "nodes",
        unit="nats",
        method="D_KL(model ‖ lens) after the sublayer's write minus before it (embed: the divergence "
        "itself); anomalous: |z| above what its largest over all sublayers exceeds at the false-alarm "
        "rate on reference text. Where both sublayers read one residual, attention is taken to write first",
        positions=found.inner_positions,
        bound=found.bound("extreme_node"),
        **found.judged_by(),
    )


def _uncertainty(found: Findings) -> pa.Table:
    final = found.measured.final
    flags = torch.zeros_like(found.channels["final_entropy"][0], dtype=torch.bool)
    if found.known:
        bound = found.known["final_entropy"].above(found.request.false_alarm_rate)
        flags = found.channels["final_entropy"][0] > bound
    columns = {
        **_own_columns(found),
        "entropy": _f32(found.everywhere(final.entropy)),
        "max_probability": _f32(found.everywhere(final.log_probability.exp())),
        "margin": _f32(found.everywhere(final.margin)),
        "entropy_z": _f32(found.everywhere(found.z("final_entropy")[0])),
        "seed_score": _f32(found.everywhere(found.channel("seed_score")[0])),
        "anomalous": _flags(found, flags),
    }
    request = found.request
    return finished(
        build("uncertainty", columns),
        "uncertainty",
        unit="nats",
        method="of the model's own next-token distribution; anomalous: entropy above the bound that the "
        "false-alarm rate allows. seed_score: mean over layers of "
        f"{request.kl_weight:g} KL + {request.entropy_weight:g} H of the lens; not an error detector",
        positions=found.positions,
        bound=found.bound("final_entropy"),
        **found.judged_by(),
    )


def _support(found: Findings) -> pa.Table:
    final, lens = found.measured.final, found.measured.support
    at = [position for position in found.positions if position > 0]
    rows = [(position, "own", index) for index, position in enumerate(at)]
    ids = final.top.cpu().tolist()
    log_p, log_q = [final.log_probability], [lens.own.mean(0)]
    margin = [final.margin]
    if found.target in at:
        index = at.index(found.target)
        for column, (role, token) in enumerate(zip(("answer", "foil"), found.asked, strict=False)):
            rows.append((found.target, role, index))
            own = token == ids[index]
            ids.append(token)
            log_p.append(final.asked[index : index + 1, column])
            log_q.append(lens.asked[:, index : index + 1, column].mean(0))
            behind = log_p[-1] - final.log_probability[index : index + 1]
            margin.append(final.margin[index : index + 1] if own else behind)
    log_probability, expected = torch.cat(log_p).cpu(), torch.cat(log_q).cpu()
    gain = log_probability - expected
    nothing = torch.full_like(gain, torch.nan)
    flags = torch.zeros_like(gain, dtype=torch.bool)
    gain_z = supported = nothing
    if found.known:
        gain_z = found.known["gain"].z(gain.unsqueeze(0))[0]
        supported = support(gain.unsqueeze(0), torch.cat(margin).cpu().unsqueeze(0), found.known)[0]
        flags = supported < found.known["support"].below(found.request.false_alarm_rate)
    columns = {
        "position": pa.array([position for position, _, _ in rows], pa.int32()),
        "role": pa.array([role for _, role, _ in rows], pa.string()),
        "token_id": pa.array(ids, pa.int32()),
        "text": pa.array([found.model.text(token) for token in ids], pa.string()),
        "log_probability": _f32(log_probability),
        "lens_log_probability": _f32(expected),
        "gain": _f32(gain),
        "gain_z": _f32(gain_z),
        "support": _f32(supported),
        "anomalous": pa.array(flags.tolist(), pa.bool_()),
    }
    layers = support_layers(found.model.architecture.n_layers)
    lenses = "ridge" if found.calibration is not None else "raw"
    return finished(
        build("support", columns),
        "support",
        unit="nats",
        method=f"gain: log p(token) - mean over {lenses} lenses after layers "
        f"{', '.join(map(str, layers))} of log q(token); support: (z(gain) + z(margin)) / 2; anomalous: "
        "support below the bound that the false-alarm rate allows",
        bound=found.bound("support"),
        **found.judged_by(),
    )


def _depth(found: Findings) -> pa.Table:
    n_layers = found.model.architecture.n_layers
    agrees = found.measured.outer.top[1:] == found.measured.final.top
    # Of the last place alone nothing can be said: it is the prediction itself.
    settled = _settled(agrees).float() if len(agrees) else found.channel("depth")[0]
    layers = found.everywhere(settled)
    columns = {
        "position": pa.array(found.positions, pa.int32()),
        "layer": pa.array(layers.nan_to_num(nan=-1).int().tolist(), pa.int16()),
        "depth": _f32((layers + 1) / n_layers),
    }
    return finished(
        build("depth", columns),
        "depth",
        unit="share of layers",
        method="first layer after which the lens's likeliest token stays the model's",
        positions=found.positions,
        lens=found.request.lens.value,
    )


def _settled(agrees: Bool[Tensor, "layer pos"]) -> Int[Tensor, " pos"]:
    """The first layer from which all agree. The last one always does."""
    stays = agrees.int().flip(0).cumprod(0).sum(0)
    settled: Tensor = len(agrees) - stays
    return settled


def _own_columns(found: Findings) -> dict[str, pa.Array]:
    ids = found.measured.final.top.cpu().tolist()
    if found.positions[0] == 0:
        ids = [-1, *ids]
    return {
        "position": pa.array(found.positions, pa.int32()),
        "token_id": pa.array(ids, pa.int32()),
        "text": pa.array(["" if i < 0 else found.model.text(i) for i in ids], pa.string()),
    }


def _flags(found: Findings, flags: Bool[Tensor, " pos"]) -> pa.Array:
    """Nothing is called anomalous where nothing was measured."""
    values = flags.tolist()
    return pa.array([False, *values] if found.positions[0] == 0 else values, pa.bool_())
