/** The service's tables as plain typed arrays: its float32, bit for bit; NaN means "not measured". */
import { UnreadableTable, readTable, type Column, type Table } from "./arrow";
import type { Provenance } from "./schema";

/** The major schema version each table is read at; a newer one is refused, never guessed. */
const KNOWN_MAJOR = 1;

export { UnreadableTable };

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
  /** In the model's vocabulary, where many may have one text; -1 where a share hides it. */
  readonly id: number;
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
  const table = openTable(bytes, "topology");
  return {
    provenance: table.provenance,
    components: table.texts("component"),
    parameters: table.numbers("parameters"),
    shared: table.numbers("shared_parameters"),
  };
}

export function readParameters(bytes: ArrayBuffer): readonly ParameterTensor[] {
  const table = openTable(bytes, "parameters");
  const shapes = table.lists("shape");
  return table.rows((row) => ({
    name: row.text("name"),
    component: row.text("component"),
    role: row.text("role"),
    shape: [...(shapes[row.index] ?? [])],
    parameters: row.number("parameters"),
    tiedTo: row.text("tied_to"),
  }));
}

export function readTokens(bytes: ArrayBuffer): readonly Token[] {
  return openTable(bytes, "tokens").rows((row) => ({
    position: row.number("position"),
    id: row.number("token_id"),
    text: row.text("text"),
    sink: row.flag("sink"),
  }));
}

export function readActivations(bytes: ArrayBuffer): ActivationTable {
  const table = openTable(bytes, "activations");
  const { values, width } = table.matrix("value");
  return { provenance: table.provenance, components: table.texts("component"), values, width };
}

export function readNeurons(bytes: ArrayBuffer): readonly Neuron[] {
  return openTable(bytes, "neurons").rows((row) => ({
    component: row.text("component"),
    position: row.number("position"),
    rank: row.number("rank"),
    neuron: row.number("neuron"),
    value: row.number("value"),
  }));
}

export function readPredictions(bytes: ArrayBuffer): readonly Prediction[] {
  return openTable(bytes, "predictions").rows((row) => ({
    position: row.number("position"),
    rank: row.number("rank"),
    id: row.number("token_id"),
    text: row.text("text"),
    logit: row.number("logit"),
    probability: row.number("probability"),
  }));
}

export function readAttention(bytes: ArrayBuffer): AttentionTable {
  const table = openTable(bytes, "attention");
  const { values, width } = table.matrix("value");
  const size = Math.sqrt(width);
  if (!Number.isInteger(size)) {
    throw new UnreadableTable(`An attention pattern of ${width} values is not a square`);
  }
  return {
    provenance: table.provenance,
    components: table.texts("component"),
    size,
    patterns: values,
  };
}

/** One row of a table, asked by column. */
export interface Row {
  readonly index: number;
  readonly text: (column: string) => string;
  readonly number: (column: string) => number;
  readonly flag: (column: string) => boolean;
}

/** A table as columns of plain values. */
export class ArrowTable {
  readonly #table: Table;

  constructor(
    table: Table,
    readonly provenance: Provenance,
  ) {
    this.#table = table;
  }

  texts(name: string): readonly string[] {
    return this.#column(name, "texts").values;
  }

  numbers(name: string): Float64Array {
    return Float64Array.from(this.#column(name, "numbers").values);
  }

  lists(name: string): readonly Iterable<number>[] {
    return this.#column(name, "lists").values;
  }

  rows<T>(make: (row: Row) => T): readonly T[] {
    return Array.from({ length: this.#table.rows }, (_, index) =>
      make({
        index,
        text: (name) => this.#column(name, "texts").values[index] ?? "",
        number: (name) => this.#column(name, "numbers").values[index] ?? NaN,
        flag: (name) => this.#column(name, "flags").values[index] === true,
      }),
    );
  }

  /** A fixed-size-list column as one flat array. */
  matrix(name: string): { readonly values: Float32Array; readonly width: number } {
    const { values, width } = this.#column(name, "matrix");
    return { values: values instanceof Float32Array ? values : Float32Array.from(values), width };
  }

  #column<K extends Column["kind"]>(name: string, kind: K): Extract<Column, { kind: K }> {
    const column = this.#table.columns.get(name);
    if (column === undefined) throw new UnreadableTable(`The table has no column ${name}`);
    if (column.kind !== kind) {
      throw new UnreadableTable(`Column ${name} has ${column.kind}, not ${kind}`);
    }
    return column as Extract<Column, { kind: K }>;
  }
}

export function openTable(bytes: ArrayBuffer, expected: string): ArrowTable {
  const table = readTable(bytes);
  const stamp = table.metadata.get("neural_mri");
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
  return new ArrowTable(table, provenance);
}
