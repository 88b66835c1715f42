/**
 * The sagittal plane's content: depth downwards against whatever the sequence has beside it (tokens,
 * tensors, the components of a layer). Pure: numbers and names, no pixels.
 */
import type { Token } from "../api/frames";
import { source, type Field } from "./field";
import type { Anomalies } from "./modes/anomalies";
import type { Series } from "./series";
import { columnAddresses, nodeAt, type Topology } from "./topology";
import type { Volume } from "./volume";

export interface Section {
  readonly width: number;
  readonly height: number;
  /** Row-major, first row on top; NaN where not measured. */
  readonly values: Float64Array;
  readonly across: "tokens" | "tensors" | "components";
  /** One a column. */
  readonly names: readonly string[];
  /** Layer of the top row; -1 where the embedding stands above the first. */
  readonly top: number;
  /** What the numbers are counted in. */
  readonly unit: string;
  /** Whether its numbers are the axial picture's, so that colours mean the same in both. */
  readonly shared: boolean;
  /** Cells the scan marks; null where it marks none. */
  readonly marks: Float64Array | null;
  /** What a cell says in words. */
  readonly word: ((row: number, column: number) => string | null) | null;
}

export type Column = "attn" | "mlp" | "resid_post" | number;

export function sectionOf(
  topology: Topology,
  series: Series,
  field: Field | null,
  column: Column,
): Section | null {
  if (series.sequence === "T1") return tensors(topology, countedCells(series), "parameters");
  if (series.sequence === "T2" && field !== null && field.id !== "copying") {
    return tensors(topology, weighedCells(series, field.id), field.unit);
  }
  // Measured without `appearance`, the lens has the last place alone: nothing over depth.
  const { anomalies } = series;
  if (anomalies !== null && anomalies.places.length > 1) return lens(anomalies, series.tokens);
  if (field === null) return null;
  return series.tokens.length > 0
    ? profiles(topology, field, series.tokens, column)
    : components(topology, field);
}

interface Cell {
  readonly component: string;
  readonly role: string;
  readonly value: number;
  /** Whether cells of one name and layer add up, or the largest stands for them. */
  readonly adds: boolean;
}

function countedCells(series: Series): Cell[] {
  return series.parameters.map((tensor) => ({
    component: tensor.component,
    // Attention and MLP each have a norm: one name, two columns.
    role: tensor.role || tensor.name,
    value: tensor.parameters,
    adds: true,
  }));
}

function weighedCells(series: Series, quantity: string): Cell[] {
  return (series.weights?.tensors ?? []).map((tensor) => ({
    component: tensor.component,
    role: tensor.role || tensor.name,
    value:
      quantity === "outliers"
        ? tensor.outlierShare
        : quantity === "largest"
          ? tensor.maxAbs
          : tensor.rms,
    adds: false,
  }));
}

function tensors({ nLayers }: Topology, given: readonly Cell[], unit: string): Section {
  const cells = given.flatMap((cell) => {
    const place = /^blocks\.(\d+)\.(attn|mlp)/.exec(cell.component);
    return place === null
      ? []
      : [{ ...cell, layer: Number(place[1]), column: `${place[2]} ${cell.role}` }];
  });
  const columns = [...new Set(cells.map((cell) => cell.column))];
  const values = new Float64Array(nLayers * columns.length).fill(NaN);
  for (const { layer, column, value, adds } of cells) {
    const at = layer * columns.length + columns.indexOf(column);
    const before = values[at] ?? NaN;
    if (Number.isNaN(before)) values[at] = value;
    else values[at] = adds ? before + value : Math.max(before, value);
  }
  return {
    width: columns.length,
    height: nLayers,
    values,
    across: "tensors",
    names: columns.map((column) => column.slice(column.indexOf(" ") + 1).replace("W_", "")),
    top: 0,
    unit,
    shared: false,
    marks: null,
    word: null,
  };
}

/** Values of one column of components over layers and tokens. */
function profiles(
  topology: Topology,
  field: Field,
  tokens: readonly Token[],
  column: Column,
): Section {
  const width = tokens.length;
  const values = new Float64Array(topology.nLayers * width).fill(NaN);
  columnAddresses(topology, column).forEach((address, layer) => {
    const profile = field.volume.profile(source(field.volume, address) ?? "");
    if (profile !== null) values.set(profile, layer * width);
  });
  return {
    width,
    height: topology.nLayers,
    values,
    across: "tokens",
    names: tokens.map(({ text }) => text),
    top: 0,
    unit: field.unit,
    shared: typeof column === "number" || column === "mlp",
    marks: null,
    word: null,
  };
}

/** The axial plane as a dense image: a row a layer, its heads and MLP across. */
function components(topology: Topology, field: Field): Section {
  const width = topology.nHeads + 1;
  const values = new Float64Array(topology.nLayers * width);
  const names: string[] = [];
  for (let column = 0; column < width; column++) {
    names.push(columnName(topology, column));
    for (let layer = 0; layer < topology.nLayers; layer++) {
      const address = topology.addresses[nodeAt(topology, layer, column)] ?? "";
      values[layer * width + column] = field.volume.at(source(field.volume, address) ?? "", 0);
    }
  }
  return {
    width,
    height: topology.nLayers,
    values,
    across: "components",
    names,
    top: 0,
    unit: field.unit,
    shared: true,
    marks: null,
    word: null,
  };
}

/** What stands in a column of each layer: `H3`, `Attn`, `MLP`. */
function columnName(topology: Topology, column: number): string {
  const node = nodeAt(topology, 0, column);
  if (topology.kinds[node] === "attn") return "Attn";
  const head = topology.heads[node] ?? -1;
  return head < 0 ? "MLP" : `H${head}`;
}

/**
 * The coronal plane's content: one layer's components against tokens. Where a layer's attention was taken
 * as a whole it is one row; a still image has one column.
 */
export function coronalOf(
  topology: Topology,
  field: Field,
  tokens: readonly Token[],
  layer: number,
): Coronal {
  const width = Math.max(1, field.volume.width);
  const rows: { name: string; node: number; source: string }[] = [];
  for (let column = 0; column <= topology.nHeads; column++) {
    const node = nodeAt(topology, layer, column);
    const from = source(field.volume, topology.addresses[node] ?? "");
    if (from === null || rows.some((row) => row.source === from)) continue;
    const shared = from !== topology.addresses[node];
    rows.push({ name: shared ? "Attn" : columnName(topology, column), node, source: from });
  }
  const values = new Float64Array(rows.length * width).fill(NaN);
  rows.forEach((row, at) => {
    values.set(field.volume.profile(row.source) ?? [], at * width);
  });
  return {
    width,
    height: rows.length,
    values,
    names: rows.map(({ name }) => name),
    nodes: rows.map(({ node }) => node),
    sources: rows.map((row) => row.source),
    tokens: tokens.length > 0,
  };
}

export interface Coronal {
  readonly width: number;
  readonly height: number;
  /** Row-major, one row a component in picture order; NaN where not measured. */
  readonly values: Float64Array;
  readonly names: readonly string[];
  /** The node each row stands for, and the component whose numbers it shows. */
  readonly nodes: readonly number[];
  readonly sources: readonly string[];
  /** Whether its columns are tokens. */
  readonly tokens: boolean;
}

/** The logit lens: what is predicted at the embedding and after each block, at each token. */
function lens(found: Anomalies, tokens: readonly Token[]): Section {
  const flat = (volume: Volume) =>
    Float64Array.from(
      found.places.flatMap((place) => [
        ...(volume.profile(place) ?? new Float64Array(tokens.length).fill(NaN)),
      ]),
    );
  return {
    width: tokens.length,
    height: found.places.length,
    values: flat(found.lens),
    across: "tokens",
    names: tokens.map(({ text }) => text),
    top: found.places[0] === "embed" ? -1 : 0,
    unit: "nats",
    shared: false,
    marks: found.calibrated ? flat(found.lensAnomalous) : null,
    word: (row, column) =>
      found.word(found.places[row] ?? "", tokens[column]?.position ?? -1)?.text ?? null,
  };
}
