/**
 * Arrow tables as plain typed arrays. The only file that names the Arrow library, so that it can be
 * replaced. Values are the service's float32, bit for bit; NaN means "not measured".
 */
import { tableFromIPC } from "@uwdata/flechette";

import type { Provenance } from "./schema";

/** The major schema version each table is read at; a newer one is refused, never guessed. */
const KNOWN_MAJOR = 1;

type Columns = ReturnType<typeof tableFromIPC>;

export class UnreadableTable extends Error {
  override readonly name = "UnreadableTable";
}

interface Stamped {
  readonly provenance: Provenance;
}

export interface TopologyTable extends Stamped {
  readonly components: readonly string[];
  readonly parameters: Float64Array;
  /** Parameters read by the component and counted elsewhere. */
  readonly shared: Float64Array;
}

export interface ParameterTensor {
  readonly name: string;
  readonly component: string;
  readonly role: string;
  readonly shape: readonly number[];
  readonly parameters: number;
  readonly tiedTo: string;
}

export interface Token {
  readonly position: number;
  readonly id: number;
  readonly text: string;
  /** Whether it is an attention sink: its norms dwarf the others' and say nothing of the prompt. */
  readonly sink: boolean;
}

export interface ActivationTable extends Stamped {
  readonly components: readonly string[];
  /** Values a component: one a reported token position. */
  readonly width: number;
  /** Row-major `[component, position]`. */
  readonly values: Float32Array;
}

export interface Neuron {
  readonly component: string;
  readonly position: number;
  readonly rank: number;
  readonly neuron: number;
  readonly value: number;
}

export interface Prediction {
  readonly position: number;
  readonly rank: number;
  readonly text: string;
  readonly logit: number;
  readonly probability: number;
}

export interface AttentionTable extends Stamped {
  readonly components: readonly string[];
  /** Prompt length in tokens. */
  readonly size: number;
  /** `[head, query position, key position]`, row-major; each query's row sums to 1. */
  readonly patterns: Float32Array;
}

export function readTopology(bytes: ArrayBuffer): TopologyTable {
  const { table, provenance } = open(bytes, "topology");
  return {
    provenance,
    components: strings(table, "component"),
    parameters: numbers(table, "parameters"),
    shared: numbers(table, "shared_parameters"),
  };
}

export function readParameters(bytes: ArrayBuffer): readonly ParameterTensor[] {
  const { table } = open(bytes, "parameters");
  const names = strings(table, "name");
  const components = strings(table, "component");
  const roles = strings(table, "role");
  const counts = numbers(table, "parameters");
  const tied = strings(table, "tied_to");
  const shapes = column(table, "shape").toArray() as ArrayLike<Iterable<number>>;
  return names.map((name, row) => ({
    name,
    component: components[row] ?? "",
    role: roles[row] ?? "",
    shape: [...(shapes[row] ?? [])],
    parameters: counts[row] ?? 0,
    tiedTo: tied[row] ?? "",
  }));
}

export function readTokens(bytes: ArrayBuffer): readonly Token[] {
  const { table } = open(bytes, "tokens");
  const ids = numbers(table, "token_id");
  const positions = numbers(table, "position");
  const sinks = [...(column(table, "sink").toArray() as Iterable<boolean>)];
  return strings(table, "text").map((text, row) => ({
    position: positions[row] ?? row,
    id: ids[row] ?? -1,
    text,
    sink: sinks[row] ?? false,
  }));
}

export function readActivations(bytes: ArrayBuffer): ActivationTable {
  const { table, provenance } = open(bytes, "activations");
  const { values, width } = matrix(table, "value");
  return { provenance, components: strings(table, "component"), values, width };
}

export function readNeurons(bytes: ArrayBuffer): readonly Neuron[] {
  const { table } = open(bytes, "neurons");
  const positions = numbers(table, "position");
  const ranks = numbers(table, "rank");
  const neurons = numbers(table, "neuron");
  const values = numbers(table, "value");
  return strings(table, "component").map((component, row) => ({
    component,
    position: positions[row] ?? 0,
    rank: ranks[row] ?? 0,
    neuron: neurons[row] ?? 0,
    value: values[row] ?? NaN,
  }));
}

export function readPredictions(bytes: ArrayBuffer): readonly Prediction[] {
  const { table } = open(bytes, "predictions");
  const positions = numbers(table, "position");
  const ranks = numbers(table, "rank");
  const logits = numbers(table, "logit");
  const probabilities = numbers(table, "probability");
  return strings(table, "text").map((text, row) => ({
    position: positions[row] ?? 0,
    rank: ranks[row] ?? 0,
    text,
    logit: logits[row] ?? NaN,
    probability: probabilities[row] ?? NaN,
  }));
}

export function readAttention(bytes: ArrayBuffer): AttentionTable {
  const { table, provenance } = open(bytes, "attention");
  const { values, width } = matrix(table, "value");
  const size = Math.sqrt(width);
  if (!Number.isInteger(size)) {
    throw new UnreadableTable(`An attention pattern of ${width} values is not a square`);
  }
  return { provenance, components: strings(table, "component"), size, patterns: values };
}

function open(bytes: ArrayBuffer, expected: string): { table: Columns; provenance: Provenance } {
  const table = tableFromIPC(new Uint8Array(bytes));
  const stamp = table.schema.metadata?.get("neural_mri");
  if (stamp === undefined) {
    throw new UnreadableTable("This Arrow table has no neural_mri metadata: it is not a scan's");
  }
  const provenance = JSON.parse(stamp) as Provenance;
  const major = Number(provenance.version.split(".")[0]);
  if (provenance.table !== expected || major > KNOWN_MAJOR) {
    throw new UnreadableTable(
      `Expected table ${expected} of version ${KNOWN_MAJOR}, got ${provenance.table} of version ` +
        provenance.version,
    );
  }
  return { table, provenance };
}

function column(table: Columns, name: string) {
  // flechette's types promise a column for every name; an absent one is undefined all the same.
  const found = table.getChild(name) as ReturnType<Columns["getChild"]> | undefined;
  if (found === undefined) throw new UnreadableTable(`The table has no column ${name}`);
  return found;
}

function strings(table: Columns, name: string): readonly string[] {
  return [...(column(table, name).toArray() as Iterable<string>)];
}

function numbers(table: Columns, name: string): Float64Array {
  return Float64Array.from(column(table, name).toArray() as ArrayLike<number>);
}

/** A fixed-size-list column as one flat array. */
function matrix(table: Columns, name: string): { values: Float32Array; width: number } {
  const rows = column(table, name);
  if (rows.length === 0) return { values: new Float32Array(0), width: 0 };
  const width = (rows.at(0) as Float32Array).length;
  const values = new Float32Array(rows.length * width);
  for (let row = 0; row < rows.length; row++) {
    values.set(rows.at(row) as Float32Array, row * width);
  }
  return { values, width };
}
