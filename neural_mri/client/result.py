"""A finished scan's tables, fetched when asked for and checked against the manifest."""

import hashlib
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from neural_mri.client import long_form, notebook
from neural_mri.client.activation_map import (
    ActivationMap,
    Grid,
    heads_and_mlps,
    place_of,
    value_matrix,
)
from neural_mri.client.circuit_map import CircuitMap
from neural_mri.client.colour import Scale, blue_orange, grey, inferno
from neural_mri.client.comparison import Comparison
from neural_mri.client.errors import ClientError, Damaged, needing
from neural_mri.client.exchange import Exchange, decoded
from neural_mri.client.lens_map import LensMap
from neural_mri.client.restoration import Restoration
from neural_mri.client.watching import wait_for
from neural_mri.client.weight_map import WeightMap
from neural_mri.contract.components import Component
from neural_mri.contract.jobs import JobView
from neural_mri.contract.results import ARROW_FILE, Manifest, TableRef, from_ipc, provenance_of
from neural_mri.contract.scans import ScanKind

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from polars import DataFrame as PolarsFrame

__all__ = ("Prediction", "Result")

_MAIN_TABLE = {
    ScanKind.T1: "topology",
    ScanKind.T2: "weights",
    ScanKind.FMRI: "activations",
    ScanKind.DTI: "effects",
    ScanKind.FLAIR: "lens",
    ScanKind.PATCHING: "recovery",
    ScanKind.TRACING: "trace",
    ScanKind.CALIBRATION: "calibration_ordinary",
}


class Prediction(NamedTuple):
    """A likely next token."""

    text: str
    token_id: int
    probability: float
    logit: float


class Result:
    """What a scan measured. Tables are fetched once each, and kept."""

    def __init__(self, exchange: Exchange, job_id: UUID, manifest: Manifest) -> None:
        self.job_id = job_id
        self.manifest = manifest
        self._exchange = exchange
        self._bodies: dict[str, bytes] = {}
        self._tables: dict[str, pa.Table] = {}

    @property
    def kind(self) -> ScanKind:
        """Which scan this is the result of."""
        return self.manifest.kind

    @property
    def title(self) -> str:
        """Modality, model and the first digits of the weights' digest."""
        return f"{self.kind.value} · {self.manifest.model} · {self.manifest.revision[:8]}"

    @property
    def table_names(self) -> tuple[str, ...]:
        """What `table` can be asked for."""
        return tuple(ref.name for ref in self.manifest.tables)

    @property
    def main_table(self) -> str:
        """Name of the table a picture is painted from.

        Of several layers of attention, the first; of a perturbation without activations, `shift`.
        """
        if self.kind is ScanKind.PERTURBATION:
            return "change" if "change" in self.table_names else "shift"
        return _MAIN_TABLE.get(self.kind) or f"attention.{self.attention_layers[0]}"

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose attention patterns the result holds; others are scanned on demand."""
        return tuple(
            int(ref.name.removeprefix("attention."))
            for ref in self.manifest.tables
            if ref.table == "attention"
        )

    def table(self, name: str | None = None) -> pa.Table:
        """A table of the result, by default the main one.

        Raises `ValueError` when the result has no such table, and `Damaged` when what the service sent
        is not what the manifest names.
        """
        name = name or self.main_table
        if name not in self._tables:
            ref = self._ref(name)
            body = self.arrow(name)
            self._tables[name] = _checked_table(body, name, self.manifest, table=ref.table)
        return self._tables[name]

    def arrow(self, name: str | None = None) -> bytes:
        """The bytes of a table's Arrow file, exactly as they are stored. Raises as `table` does."""
        name = name or self.main_table
        if name not in self._bodies:
            ref = self._ref(name)
            path = f"/api/jobs/{self.job_id}/result/{name}"
            body = self._exchange.send("GET", path, headers={"Accept": ARROW_FILE}).content
            if (digest := hashlib.sha256(body).hexdigest()) != ref.chunk:
                raise Damaged(
                    f"table {name} of job {self.job_id} has SHA-256 {digest[:12]}… over {len(body)} "
                    f"bytes; its manifest names {ref.chunk[:12]}… over {ref.bytes}"
                )
            self._bodies[name] = body
        return self._bodies[name]

    def summary(self) -> dict[str, Any]:
        """The result as JSON, without the large tables: the service's own summary."""
        return self._exchange.ask(dict[str, Any], "GET", f"/api/jobs/{self.job_id}/result")

    def activations(self) -> ActivationMap:
        """An fMRI scan's values as an array. Raises `ValueError` for scans that have none."""
        return ActivationMap.of(self.table("activations"), self.table("tokens"))

    def weights(self) -> WeightMap:
        """A T2 scan's values by component. Raises `ValueError` for other scans."""
        return WeightMap.of(
            self.table("weights"),
            self.table("circuits"),
            self.table("outliers"),
            self._table_if_any("difference"),
        )

    def circuit(self) -> CircuitMap:
        """A DTI scan's effects, question and edges. Raises `ValueError` for other scans."""
        return CircuitMap.of(
            self.table("effects"), self.table("metric"), self._table_if_any("edges")
        )

    def lens(self) -> LensMap:
        """A FLAIR scan's lens and channels. Raises `ValueError` for other scans."""
        names = ("lens", "lens_tokens", "uncertainty", "support", "depth")
        return LensMap.of(self._tables_called(names), self.manifest.prompt_tokens)

    def comparison(self) -> Comparison:
        """A perturbation's answer before and after. Raises `ValueError` for other scans."""
        names = ["comparison", "shift", "predictions", "predictions_after"]
        if "change" in self.table_names:
            names += ["change", "tokens"]
        return Comparison.of(self._tables_called(names))

    def restoration(self) -> Restoration:
        """The maps of a patching or tracing scan. Raises `ValueError` for other scans."""
        maps = "trace" if self.kind is ScanKind.TRACING else "recovery"
        return Restoration.of(self.table(maps), self.table("contrast"), self.table("tokens"))

    def predictions(self, position: int | None = None) -> tuple[Prediction, ...]:
        """The likeliest next tokens after a position (the last reported one), likeliest first.

        A negative position counts from the last reported one. Raises `ValueError` for one that was not
        reported.
        """
        rows = sorted(self.table("predictions").to_pylist(), key=lambda row: int(row["rank"]))
        reported = sorted({row["position"] for row in rows})
        if not reported and position is None:
            return ()
        position = reported[place_of(-1 if position is None else position, reported)]
        return tuple(
            Prediction(row["text"], row["token_id"], row["probability"], row["logit"])
            for row in rows
            if row["position"] == position
        )

    def attention(self, layer: int, head: int | None = None) -> npt.NDArray[np.float32]:
        """Attention probabilities of a layer `[head query key]`, or of one head `[query key]`.

        An fMRI scan does not keep them: they are scanned on demand, and this waits for that scan.
        """
        name = f"attention.{layer}"
        kept = self.manifest.table(name) is not None
        pattern = self.table(name) if kept else self._attention_on_demand(layer)
        heads = value_matrix(pattern)
        n_tokens = round(heads.shape[1] ** 0.5)
        squares: npt.NDArray[np.float32] = heads.reshape(len(heads), n_tokens, n_tokens)
        if head is None:
            return squares
        if not 0 <= head < len(squares):
            raise ValueError(f"head {head} does not exist: expected 0 to {len(squares) - 1}")
        square: npt.NDArray[np.float32] = squares[head]
        return square

    def to_long(self) -> pa.Table:
        """One row a value: columns as `long_form` lists them."""
        main, tokens = self.table(), self.manifest.prompt_tokens
        match self.kind:
            case ScanKind.T1 | ScanKind.T2 | ScanKind.DTI:
                return main
            case ScanKind.FMRI | ScanKind.FLAIR | ScanKind.PATCHING | ScanKind.TRACING:
                return long_form.activations_long(main, tokens)
            case ScanKind.PERTURBATION if self.main_table == "change":
                return long_form.activations_long(main, tokens)
            case ScanKind.PERTURBATION:
                return long_form.with_tokens(main, tokens)
            case ScanKind.CALIBRATION:
                return long_form.ordinary_long(main)
            case ScanKind.ATTENTION:
                tables = (self.table(f"attention.{layer}") for layer in self.attention_layers)
                return pa.concat_tables(
                    [long_form.attention_long(pattern, tokens) for pattern in tables]
                )

    def to_pandas(self) -> "DataFrame":
        """`to_long`, as a data frame. Raises `MissingExtra` where pandas is not installed."""
        with needing("pandas", "a data frame"):
            import pandas as pd  # noqa: F401 -- pyarrow's own message would not name the extra
        return self.to_long().to_pandas()

    def to_polars(self) -> "PolarsFrame":
        """`to_long`, as a data frame of Polars; Arrow's memory is shared where it can be.

        Raises `MissingExtra` where Polars is not installed.
        """
        with needing("polars", "a Polars data frame", "polars"):
            import polars as pl
        return pl.DataFrame(self.to_long())

    def plot(
        self,
        *,
        position: int = -1,
        layer: int | None = None,
        scale: Literal["log", "linear"] = "log",
    ) -> "Figure":
        """The picture of the scan: `savefig` it, or let a notebook show it.

        fMRI: layer by component at token `position`, and layer by token. T1: parameters. T2: size of
        weights, and what heads copy. Attention: every head of `layer` (the first one scanned). DTI:
        effects, the strongest components and paths. FLAIR: the lens, and three channels under it.
        Perturbation: the answer before and after, and what changed at token `position`. Patching and
        tracing: a map a kind of place. Raises `MissingExtra` without matplotlib.
        """
        with needing("matplotlib", "a picture"):
            from neural_mri.client import figures, pictures
        match self.kind:
            case ScanKind.FMRI:
                return figures.activation_picture(
                    self.activations(),
                    self.title,
                    position=position,
                    logarithmic=scale == "log",
                )
            case ScanKind.T1:
                return figures.topology_picture(self._parameter_grid(), self.title)
            case ScanKind.ATTENTION:
                shown = self.attention_layers[0] if layer is None else layer
                pattern = self.attention(shown)
                return figures.attention_picture(
                    pattern,
                    range(len(pattern)),
                    self.manifest.prompt_tokens,
                    f"{self.title} · layer {shown}",
                )
            case ScanKind.T2:
                return pictures.weight_picture(self.weights(), self.title)
            case ScanKind.DTI:
                return pictures.circuit_picture(
                    self.circuit(), self.manifest.prompt_tokens, self.title
                )
            case ScanKind.FLAIR:
                return pictures.lens_picture(self.lens(), self.title)
            case ScanKind.PERTURBATION:
                return pictures.comparison_picture(
                    self.comparison(), self.manifest.prompt_tokens, self.title, position=position
                )
            case ScanKind.PATCHING | ScanKind.TRACING:
                signed = self.kind is ScanKind.PATCHING
                return pictures.restoration_picture(self.restoration(), self.title, signed=signed)
            case ScanKind.CALIBRATION:
                return pictures.ordinary_picture(self.table(), self.title)

    def __repr__(self) -> str:
        tables = ", ".join(self.table_names)
        return f"<Result of {self.kind.value} on {self.manifest.model}: {tables}>"

    def _repr_html_(self) -> str:
        try:
            match self.kind:
                case ScanKind.FMRI:
                    scan = self.activations()
                    picture = notebook.heat_map(scan.grid(), scan.scale(), scan.unit, inferno)
                    extra = notebook.prediction_list(
                        [(p.text, p.probability) for p in self.predictions()]
                    )
                case ScanKind.T1:
                    grid = self._parameter_grid()
                    scale = Scale.of(grid.values, logarithmic=True)
                    picture = notebook.heat_map(grid, scale, "parameters", grey)
                    extra = ""
                case ScanKind.DTI:
                    circuit = self.circuit()
                    grid = circuit.grid()
                    around = Scale.around_zero(grid.values)
                    picture = notebook.heat_map(grid, around, circuit.unit, blue_orange)
                    extra = ""
                case _:
                    picture, extra = notebook.note("plot() draws the picture"), ""
        except (ClientError, RuntimeError, ValueError) as error:
            # The last two once the client, or the file that the tables are in, is closed: a cell that is
            # shown again is no place for a traceback.
            picture, extra = notebook.note(f"the tables cannot be had: {error}"), ""
        return notebook.card(self.title, self.manifest, picture + extra)

    def _parameter_grid(self) -> Grid:
        table = self.table("topology")
        components = tuple(map(Component.parse, table["component"].to_pylist()))
        parameters = np.array(table["parameters"].to_pylist(), dtype=np.float32)
        return heads_and_mlps(components, parameters)

    def _table_if_any(self, name: str) -> pa.Table | None:
        return self.table(name) if name in self.table_names else None

    def _tables_called(self, names: Iterable[str]) -> dict[str, pa.Table]:
        return {name: self.table(name) for name in names}

    def _ref(self, name: str) -> TableRef:
        ref = self.manifest.table(name)
        if ref is None:
            raise ValueError(
                f"this {self.kind.value} result has no table {name!r}: expected one of "
                + ", ".join(self.table_names)
            )
        return ref

    def _attention_on_demand(self, layer: int) -> pa.Table:
        path = f"/api/jobs/{self.job_id}/attention/{layer}"
        response = self._exchange.send("GET", path, headers={"Accept": ARROW_FILE})
        name = f"attention.{layer}"
        if response.status_code != HTTPStatus.ACCEPTED:
            return _checked_table(response.content, name, self.manifest, table="attention")
        job = wait_for(self._exchange, decoded(JobView, response))
        manifest = self._exchange.ask(Manifest, "GET", f"/api/jobs/{job.id}/manifest")
        return Result(self._exchange, job.id, manifest).table(name)


def _checked_table(body: bytes, name: str, manifest: Manifest, *, table: str) -> pa.Table:
    """The table in an Arrow file, if it says of itself what the manifest says of it."""
    try:
        read = from_ipc(body)
        provenance = provenance_of(read)
    except (pa.ArrowInvalid, ValueError) as error:
        raise Damaged(f"table {name} cannot be read: {error}") from error
    if (provenance.table, provenance.revision) != (table, manifest.revision):
        raise Damaged(
            f"table {name} says it holds {provenance.table} of weights {provenance.revision[:12]}…; "
            f"the manifest names {table} of {manifest.revision[:12]}…"
        )
    return read
